"""Dense export against onnxruntime-genai's own fp32 build of the same model: one thread, one process, interleaved.

python -m benchmarks.speed
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import interleaved, mixt, paired_ratio, publish, sample
from benchmarks.decoder import Timed

CONTEXTS, PREFILLS = (128, 1024), (128, 512)
#: Tokens per call of a long prefill in runtimes/ort.
CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run(mixt("export", sample(), "-o", folder / "ours", "--no-verify"), check=True, capture_output=True)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(sample())]
        subprocess.run(
            [*builder, "-o", str(folder / "genai"), "-p", "fp32", "-e", "cpu"], check=True, capture_output=True
        )
        kv = json.loads((folder / "ours" / "mixt_manifest.json").read_text())["kv"]
        models = {name: Timed(folder / name, kv["heads"], kv["head_dim"]) for name in ("genai", "ours")}
        result: dict[str, Any] = {"threads": 1, "rounds": rounds, "clock": "thread CPU time"}
        for context in CONTEXTS:
            runs = {name: (lambda m=model, c=context: m.decode(c)) for name, model in models.items()}
            result[f"decode at {context}"] = report(interleaved(runs, rounds), 1)
        for tokens in PREFILLS:
            runs = {name: (lambda m=model, t=tokens: m.prefill(t)) for name, model in models.items()}
            if tokens > CHUNK:  # what `mixt run` does; genai prefills a prompt in one call
                runs["ours in chunks"] = lambda t=tokens: models["ours"].prefill(t, CHUNK)
            result[f"prefill {tokens}"] = report(interleaved(runs, max(5, rounds // 2)), tokens)
    publish("speed", result)


def report(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    rates = {f"{name} tokens/s": round(tokens / statistics.median(s), 1) for name, s in seconds.items()}
    ratios = {
        f"{name} times genai": paired_ratio(seconds["genai"], s) for name, s in seconds.items() if name != "genai"
    }
    return {**rates, **ratios}


if __name__ == "__main__":
    main()
