"""Run in a fresh process (`python -m`): load one model, run it, print what the process held as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

_STATUS = Path("/proc/self/status")
_FIELDS = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "VmHWM": "peak"}


def usage() -> dict[str, int]:
    """Bytes this process holds: resident, anonymous, file-mapped, and the peak so far; empty without Linux's /proc."""
    if not _STATUS.is_file():
        return {}
    rows = (line.split() for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    return {_FIELDS[row[0][:-1]]: int(row[1]) * 1024 for row in rows if row and row[0][:-1] in _FIELDS}


def measure(
    kind: str, folder: Path, dtype: str, prompt: int, decode: int, threads: int, layers: int
) -> dict[str, object]:
    """Memory before loading, after loading, and after a prefill of ``prompt`` tokens and ``decode`` steps."""
    tokens = np.arange(prompt, dtype=np.int64) % 7 + 3
    return _KINDS[kind](folder, dtype, tokens, decode, threads, layers)


def _exported(
    folder: Path, _dtype: str, tokens: np.ndarray, decode: int, threads: int, _layers: int
) -> dict[str, object]:
    import onnxruntime  # noqa: F401 (its import belongs to the baseline)

    from mixt_export.verification.graph import open_graph
    from mixt_export.verification.session import ExportedRunner

    before = usage()
    runner = ExportedRunner(open_graph(folder), threads)
    loaded = usage()
    runner.greedy(tokens, decode + 1)
    return {"before": before, "loaded": loaded, "ran": usage()}


def _torch(folder: Path, dtype: str, tokens: np.ndarray, decode: int, threads: int, layers: int) -> dict[str, object]:
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401 (its import belongs to the baseline)

    from mixt_export.verification.torch_model import TorchModel

    before = usage()
    model = TorchModel(folder, dtype=dtype, threads=threads, layers=layers)
    loaded = usage()
    with torch.inference_mode():
        ids = torch.from_numpy(tokens[None, :])
        cache = None
        for _turn in range(decode + 1):
            output = model.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
    return {"before": before, "loaded": loaded, "ran": usage()}


_KINDS = {"exported": _exported, "torch": _torch}


def main() -> None:
    """Arguments as one JSON object; the result as the last line of stdout."""
    arguments = json.loads(sys.argv[1])
    result = measure(folder=Path(arguments.pop("folder")), **arguments)
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
