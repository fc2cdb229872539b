"""Memory of MixT against dense: predicted from the architecture, from the graph, and measured with ONNX Runtime.

A model of --preset's shapes with random float32 weights, dense and with MixT (N_T = 4, no padding) in the last blocks:
in 17/32 of them, as in the paper's LLaMA2-7B. Each is exported, MixT in the stored form (for memory) and as chosen for
speed (balanced), and run in a fresh process on one thread: a prefill of --prompt tokens, then four steps. The folders
(7 GB) are made in --scratch and removed again; the largest process holds 4.5 GB.

    python -m benchmarks.mixt_memory [--preset tinyllama-1.1b] [--prompt 512] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import mixt_export
from benchmarks.common import publish
from mixt_export.accounting import Request, Source, account, open_source
from mixt_export.accounting.methods import variants
from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.checkpoints.write import encode_header
from mixt_export.network import TensorRef
from mixt_export.verification.graph import open_graph
from mixt_export.verification.memory import predict_memory
from mixt_export.verification.memory.measure import run_probe

DECODE = 4


def random_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values of standard deviation 0.02, other ones for each name.

    ONNX Runtime keeps one packed copy of weights that are equal, so tensors that repeat each other measure nothing.
    """
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    return np.multiply(values, np.float32(0.02), out=values)


def write_dense(source: Source, folder: Path) -> None:
    """A Hugging Face folder of the model's shapes, one tensor in memory at a time; norms are 1."""
    decoder = source.decoder
    names = {decoder.embedding: (decoder.vocab_size, decoder.hidden_size)}
    for block in decoder.blocks:
        names |= {norm.weight: (decoder.hidden_size,) for norm in block.norms}
        heads = (block.attention.q_norm, block.attention.k_norm)
        names |= {norm.weight: (decoder.head_dim,) for norm in heads if norm is not None}
        for linear in block.linears:
            names[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                names[f"{linear.name}.bias"] = (linear.out_features,)
    names[decoder.final_norm.weight] = (decoder.hidden_size,)
    if decoder.head is not None:
        names[f"{decoder.head.name}.weight"] = (decoder.vocab_size, decoder.hidden_size)
    refs = [TensorRef(name, shape, "float32") for name, shape in names.items()]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(source.config)), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(refs, {"format": "pt"}))
        for ref in refs:
            norm = ref.name.endswith("norm.weight")
            file.write((np.ones(ref.shape, np.float32) if norm else random_values(ref.name, ref.shape)).tobytes())


def write_mixt(dense: Path, source: Source, request: Request, folder: Path) -> None:
    """``dense`` with random cores in the linears that ``request`` replaces."""
    factors = variants(source.decoder, "mixt", request)[1].factors
    new = [
        NewTensor(ref.name, ref.dtype, ref.shape, lambda ref=ref: random_values(ref.name, ref.shape))
        for linear in factors.values()
        for ref in linear.core_tensors()
    ]
    folder.mkdir()
    write_checkpoint(folder, open_checkpoint(dense), new, factors, {"method": "random mixt"})


def measured(folder: Path, prompt: int, layers: int, optimize_for: str) -> dict[str, Any]:
    """Export ``folder`` and run it in a fresh process. ``forms``: how many MixT linears took which form."""
    out = folder.with_name("out")
    manifest = mixt_export.export(
        folder, out, verify=False, max_seq_len=prompt + DECODE, optimize_for=optimize_for
    ).manifest
    graph = predict_memory(open_graph(out).proto, batch=1, seq=prompt, total=prompt)
    found = run_probe(
        {
            "kind": "exported", "folder": str(out), "dtype": "float32", "prompt": prompt, "decode": DECODE,
            "threads": 1, "layers": layers,
        }
    )  # fmt: skip
    if isinstance(found, str):
        raise SystemExit(f"not measured: {found}")
    shutil.rmtree(out)
    forms = Counter(linear["form"] for linear in manifest.get("plan", {}).get("forms", {}).values())
    return {
        "forms": dict(forms),
        "predicted from the graph": {**asdict(graph), "sum": graph.sum},
        "measured": asdict(found),
    }


#: What is measured: name, variant of the accounting and folder, form that is counted, objective of the export.
RUNS = (
    ("dense", "dense", "dense", "balanced"),
    ("mixt, for memory", "mixt", "branches", "memory"),
    ("mixt, balanced", "mixt", "pairs", "balanced"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tinyllama-1.1b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--scratch", type=Path)
    given = parser.parse_args()
    source = open_source(given.preset)
    layers = len(source.decoder.blocks)
    request = Request(blocks=f"last:{round(layers * 17 / 32)}", n_tensors=(4, []))
    variants_of = {entry["name"]: entry for entry in account(source, "mixt", request, seq=given.prompt)["variants"]}
    result: dict[str, Any] = {"preset": given.preset, "blocks": request.blocks, "of": layers, "prompt": given.prompt}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch)
        write_dense(source, folder / "dense")
        write_mixt(folder / "dense", source, request, folder / "mixt")
        for name, variant, form, objective in RUNS:
            counted = variants_of[variant]
            result[name] = {
                "parameters": counted["parameters"]["total"],
                "predicted from the architecture": {"form": form, **counted["memory"]["float32"][form]["prefill"]},
                **measured(folder / variant, given.prompt, layers, objective),
            }
            if name != "dense":
                result[name]["change %"] = changes(result["dense"], result[name])
    publish("mixt_memory", result)


def changes(dense: dict[str, Any], mixt: dict[str, Any]) -> dict[str, float]:
    figures = {
        "parameters": lambda run: run["parameters"],
        "predicted from the architecture": lambda run: run["predicted from the architecture"]["total"],
        "predicted from the graph": lambda run: run["predicted from the graph"]["sum"],
        "measured, ran": lambda run: run["measured"]["ran"],
        "measured, anon": lambda run: run["measured"]["anon"],
        "measured, peak": lambda run: run["measured"]["peak"],
    }
    return {name: round(100 * (figure(mixt) / figure(dense) - 1), 2) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
