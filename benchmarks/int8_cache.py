"""A cache of 8 bits: how its scales hold at positions that calibration has not seen, and what it costs and saves.

python -m benchmarks.int8_cache [--lengths 128 1024 2048] [--rounds 15]

``far``: the same 512 tokens of the novel put at later positions; keys rounded by the scales of the export, one for each
pair of channels that a rotary embedding turns together, and by what the largest magnitude of each channel alone would
give. Shares beyond the range and relative L2, mean and largest over blocks. ``speed``: float and int8 folders of the
sample model, runner of the device, one thread, CPU seconds, steps in turn; one run of each prompt in pieces of 256.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import publish, sample

Array = NDArray[np.float32]
OFFSETS = (0, 1000, 4000, 7000)
TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = exported(Path(scratch))
        result = {"far": far(folders["int8"]), "speed": speed(folders, given.lengths, given.rounds)}
    publish("int8_cache", result)


def exported(scratch: Path) -> dict[str, Path]:
    """Folders of the sample model with a float cache and one of 8 bits."""
    from mixt_export.quantisation.cache import Int8Cache
    from mixt_export.targets import export

    folders = {"float": scratch / "float", "int8": scratch / "int8"}
    for name, cache in (("float", None), ("int8", Int8Cache(measure=False))):
        export(sample(), folders[name], int8_cache=cache, verify=False)
    return folders


def far(folder: Path) -> dict[str, Any]:
    """How keys at each of OFFSETS lie in the range of both kinds of scales."""
    from mixt_export.compression.texts import calibration_windows, default_texts
    from mixt_export.evaluation.perplexity import tokenise
    from mixt_export.sample.texts import EVALUATION
    from mixt_export.targets.calibrate import WINDOW, WINDOWS
    from mixt_export.verification.graph import open_graph
    from mixt_export.verification.int8_cache import cache_scales
    from mixt_export.verification.torch_model import TorchModel

    model, graph = TorchModel(sample(), threads=1), open_graph(folder)
    windows, _ = calibration_windows(sample(), default_texts(), WINDOWS, WINDOW, model.vocab_size)
    seen = [keys(model, np.asarray(window), 0) for window in windows]
    alone = [np.max([np.abs(each[layer]).max(axis=1) for each in seen], axis=0) / 127 for layer in range(graph.layers)]
    scales = {"pairs, as exported": [key[0, :, 0] for key, _ in cache_scales(graph)], "each channel": alone}
    text = tokenise(sample(), EVALUATION["novel"].read_text(encoding="utf-8"))[:TOKENS]
    found: dict[str, Any] = {}
    for offset in OFFSETS:
        values = keys(model, np.asarray(text), offset)
        found[str(offset)] = {name: fit(values, of) for name, of in scales.items()}
    return found


def keys(model: Any, tokens: NDArray[np.int64], offset: int) -> list[Array]:
    """Keys (kv_heads, tokens, channels) of every block with ``tokens`` at positions from ``offset`` on."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    positions = torch.arange(offset, offset + len(tokens))[None]
    with torch.inference_mode():
        model.model(
            input_ids=torch.from_numpy(tokens[None]), position_ids=positions, past_key_values=cache, use_cache=True
        )
    return [layer.keys[0].numpy() for layer in cache.layers]


def fit(values: list[Array], scales: list[Array]) -> dict[str, float]:
    """Share beyond the range, and relative L2 of what is kept, mean and largest over blocks."""
    clipped, errors = [], []
    for found, scale in zip(values, scales, strict=True):
        codes = np.rint(found / scale[:, None])
        kept = np.clip(codes, -128, 127) * scale[:, None]
        clipped.append(float(((codes < -128) | (codes > 127)).mean()))
        errors.append(float(np.linalg.norm(kept - found) / np.linalg.norm(found)))
    return {
        "clipped": round(float(np.mean(clipped)), 6),
        "clipped at most": round(max(clipped), 6),
        "rel_l2": round(float(np.mean(errors)), 5),
        "rel_l2 at most": round(max(errors), 5),
    }


def speed(folders: dict[str, Path], lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Prompt and steps behind it by CPU time, and bytes of the cache, at each of ``lengths``."""
    from mixt_export.runtime import load_runtime

    runtime: Any = load_runtime("ort")
    models = {name: runtime.Model(folder, threads=1) for name, folder in folders.items()}
    tokens = np.random.default_rng(0).integers(5, 40000, max(lengths)).tolist()
    rows = []
    for length in lengths:
        caches, prompt = {}, {}
        for name, model in models.items():
            caches[name] = model.new_cache()
            began = time.process_time()
            model.prefill([tokens[:length]], caches[name], chunk=model.prefill_chunk)
            prompt[name] = time.process_time() - began
        steps: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                began = time.process_time()
                model.step([tokens[0]], caches[name])
                steps[name].append(time.process_time() - began)
        rows.append(
            {
                "tokens": length,
                "prompt s": {name: round(value, 3) for name, value in prompt.items()},
                "step ms": {name: round(1e3 * statistics.median(each), 2) for name, each in steps.items()},
                "step ratio": round(statistics.median(np.divide(steps["float"], steps["int8"]).tolist()), 3),
                "cache MB": {name: round(cache.nbytes / 1e6, 1) for name, cache in caches.items()},
            }
        )
    return rows


if __name__ == "__main__":
    main()
