"""The report of `mixt inspect --as`: everything that is known of a model before it has weights, as data for JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixt_export.accounting import paper
from mixt_export.accounting.compute import TRAINING_FACTOR, FormCosts, attention_macs, form_costs
from mixt_export.accounting.memory import ITEM_BYTES, peak_memory
from mixt_export.accounting.methods import Request, Variant, chosen_blocks, variants
from mixt_export.accounting.parameters import Parameters, count, matrices, storage, weights
from mixt_export.accounting.source import Source
from mixt_export.errors import UsageError
from mixt_export.families.wiring import Decoder

Report = dict[str, Any]

#: Beyond any cache that a device holds; keeps absurd shapes out.
_MOST_TOKENS = 1 << 24


def account(source: Source, method: str | None, request: Request, *, seq: int = 2048, batch: int = 1) -> Report:
    """Count ``source`` dense, with ``method`` and with what compares to it; ``kind`` is ``accounting``.

    ``seq``, ``batch``: shape for which memory is told, a prefill of ``seq`` tokens and a step at ``seq`` positions.
    Raises UsageError for what ``variants`` refuses and for an impossible shape.
    """
    for option, value in (("--seq", seq), ("--batch", batch)):
        if not 1 <= value <= _MOST_TOKENS:
            raise UsageError(f"{option} {value}: give a number from 1 to {_MOST_TOKENS}.")
    decoder = source.decoder
    found = variants(decoder, method, request)
    dense = form_costs(decoder, found[0])["dense"]
    report: Report = {
        "kind": "accounting",
        "model": {
            "name": source.name,
            "source": source.kind,
            "model_type": decoder.model_type,
            "blocks": len(decoder.blocks),
            "hidden_size": decoder.hidden_size,
            "vocab_size": decoder.vocab_size,
            "heads": decoder.heads,
            "kv_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "tied_embeddings": decoder.head is None,
        },
        "request": {
            "method": method,
            "blocks": [] if method is None else list(chosen_blocks(decoder, method, request)),
            "bond": request.bond,
            "paper_padding": request.paper_padding,
            "keep": request.keep,
            "seq": seq,
            "batch": batch,
        },
        "attention_macs_per_token": attention_macs(decoder, seq),
        "kv_bytes_per_token": {dtype: decoder.kv_bytes_per_token(item) for dtype, item in ITEM_BYTES.items()},
        "variants": [_variant(decoder, variant, dense, seq, batch) for variant in found],
    }
    if _is_the_papers(source, method, request):
        report["paper"] = paper.comparison(decoder)
    return report


def _variant(decoder: Decoder, variant: Variant, dense: FormCosts, seq: int, batch: int) -> Report:
    parameters = count(decoder, variant)
    costs = form_costs(decoder, variant)
    return {
        "name": variant.name,
        "method": variant.method,
        "parameters": {
            "linears": parameters.linears,
            "embedding": parameters.embedding,
            "head": parameters.head,
            "vectors": parameters.vectors,
            "total": parameters.total,
        },
        "storage_bytes": storage(decoder, variant),
        "types": _types(decoder, variant),
        "blocks": [sum(weights(linear, variant) for linear in block.linears) for block in decoder.blocks],
        "forms": {
            form: {
                "runs": cost.runs,
                "macs_per_token": cost.macs,
                "training_macs_per_token": TRAINING_FACTOR * cost.macs,
                "share_of_dense": cost.macs / dense.macs,
                "linear_weights": cost.weights,
                "block_macs": [cost.of(block.linears) for block in decoder.blocks],
            }
            for form, cost in costs.items()
        },
        "memory": {
            dtype: {
                form: {
                    "prefill": _memory(decoder, parameters, cost, dtype, batch, seq, seq),
                    "decode": _memory(decoder, parameters, cost, dtype, batch, 1, seq),
                }
                for form, cost in costs.items()
                if cost.runs
            }
            for dtype in ITEM_BYTES
        },
    }


def _types(decoder: Decoder, variant: Variant) -> Report:
    """Per type of linear: how many, how many replaced, parameters before and after, tensors of a replaced one."""
    found: Report = {}
    for block in decoder.blocks:
        for linear in block.linears:
            kind = found.setdefault(
                linear.name.rpartition(".")[2],
                {
                    "shape": [linear.out_features, linear.in_features],
                    "count": 0,
                    "replaced": 0,
                    "dense_params": 0,
                    "params": 0,
                    "tensors": [],
                },
            )
            kind["count"] += 1
            kind["dense_params"] += linear.out_features * linear.in_features
            kind["params"] += weights(linear, variant)
            if linear.name in variant.factors:
                kind["replaced"] += 1
                kind["tensors"] = [list(shape) for shape in matrices(linear, variant)]
    return found


def _memory(
    decoder: Decoder, parameters: Parameters, costs: FormCosts, dtype: str, batch: int, new: int, positions: int
) -> Report:
    memory = peak_memory(decoder, parameters, costs, dtype=dtype, batch=batch, new=new, positions=positions)
    return {
        "weights": memory.weights,
        "kv_cache": memory.kv_cache,
        "activations": memory.activations,
        "scores": memory.scores,
        "total": memory.total,
        "where": memory.where,
    }


def _is_the_papers(source: Source, method: str | None, request: Request) -> bool:
    """Whether the request is the configuration of the paper's table, with or without its padding."""
    terms, rules = request.n_tensors
    if (source.kind, source.name, method) != ("preset", paper.PRESET, "mixt") or rules:
        return False
    the_papers = replace(request, blocks=paper.BLOCKS)
    same_blocks = len({chosen_blocks(source.decoder, "mixt", asked) for asked in (request, the_papers)}) == 1
    return same_blocks and terms in (None, paper.TERMS) and request.bond == paper.BOND
