"""all-MiniLM-L6-v2 by every kind of factor: compressed by `mixt compress`, exported, proven, judged by its embeddings.

python -m benchmarks.encoder_methods [--blocks last:3] [--windows 48] [--sentences 60]

Half of the linears' parameters of the last blocks are kept, closed forms only. Judged: relative L2 against PyTorch that
verification found, cosine of the exported model's sentence embeddings with the original's on held-out sentences (mean,
in domain and out), and thread CPU time of a batch of 8 x 64 tokens, interleaved with the dense export, one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleaved, paired_ratio, publish
from benchmarks.encoder import fetch, sentences

METHODS: dict[str, dict[str, Any]] = {
    "svd-llm": {"keep": 0.5},
    "tt": {"keep": 0.5, "cores": 2},
    "tucker": {"keep": 0.5},
    "mixt": {"n_tensors": 2, "refine_steps": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="last:3")
    parser.add_argument("--windows", type=int, default=48, help="calibration windows of 128 tokens")
    parser.add_argument("--sentences", type=int, default=60, help="held-out sentences per text")
    given = parser.parse_args()
    import torch

    from mixt_export import compress, export
    from mixt_export.compression.settings import Settings
    from mixt_export.runtime import load_runtime
    from mixt_export.sample.texts import EVALUATION

    torch.set_num_threads(1)
    model = fetch()
    texts = {name: sentences(path, given.sentences) for name, path in EVALUATION.items()}
    runtime = load_runtime("ort_encoder")
    with tempfile.TemporaryDirectory(prefix="mixt-encoders-") as name:
        work = Path(name)
        encoders, rows = {}, []
        export(model, work / "dense", verify=False)
        encoders["dense"] = runtime.Encoder(work / "dense", threads=1)
        wanted = {name: encoders["dense"].embed(found) for name, found in texts.items()}
        for method, options in METHODS.items():
            began = time.process_time()
            settings = Settings(windows=given.windows, window=128)
            compress(model, work / f"{method}-model", method=method, blocks=given.blocks, settings=settings, **options)
            spent = time.process_time() - began
            result = export(work / f"{method}-model", work / method)
            encoders[method] = runtime.Encoder(work / method, threads=1)
            cosines = {
                f"cosine, {name}": round(float((encoders[method].embed(found) * wanted[name]).sum(1).mean()), 4)
                for name, found in texts.items()
            }
            linears = [entry for entry in result.manifest["linears"].values() if entry["method"] != "dense"]
            rows.append({
                "method": method,
                "linears": len(linears),
                "share kept": round(sum(e["params"] for e in linears) / sum(e["dense_params"] for e in linears), 4),
                "verified": bool(result.ok),
                "relative L2": result.report.minimum_tolerance,
                "compress, CPU seconds": round(spent, 1),
                **cosines,
            })  # fmt: skip
        batch = [list(range(1000, 1064))] * 8

        def timed(encoder: Any) -> float:
            began = time.thread_time()
            encoder.embed_ids(batch)
            return time.thread_time() - began

        seconds = interleaved({name: lambda e=e: timed(e) for name, e in encoders.items()}, rounds=9)
        for row in rows:
            row["times dense speed, 8 x 64"] = paired_ratio(seconds["dense"], seconds[row["method"]])
    median = float(np.median(seconds["dense"]))
    publish("encoder_methods", {
        "model": "all-MiniLM-L6-v2", "blocks": given.blocks, "calibration windows of 128": given.windows,
        "held-out sentences per text": given.sentences, "dense, 8 x 64, ms": round(1e3 * median, 1), "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
