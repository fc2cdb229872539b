"""What an export costs: seconds with Python's start, peak memory, nodes. SmolLM2's factors, and a 7B-shaped folder.

The 7B-shaped folder (Llama-2-7B's shapes, float16, random bytes repeated, 7 shards, 13.5 GB) is made in --scratch and
removed again; --no-7b leaves it out.

    python -m benchmarks.export_cost [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import measured, mixt, publish, sample

LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    h, f, v = (LLAMA_7B[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for layer in range(LLAMA_7B["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        tensors |= {f"{prefix}mlp.down_proj.weight": (h, f)}
        tensors |= {f"{prefix}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    return tensors | {"model.norm.weight": (h,), "lm_head.weight": (v, h)}


def write_7b(folder: Path, shards: int = 7) -> int:
    """Returns the bytes of the largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    noise = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(np.float16).tobytes()
    tensors, weight_map = shapes(), {}
    names = list(tensors)
    for shard in range(shards):
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in mine:
            size = 2 * prod(tensors[name])
            header[name] = {"dtype": "F16", "shape": tensors[name], "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            while end > 0:
                out.write(noise[: min(end, len(noise))])
                end -= len(noise)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(2 * prod(shape) for shape in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--no-7b", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch)
        command = mixt("compress", sample(), "-o", folder / "model", "--method", "svd", "--keep", "0.5")
        subprocess.run(command, check=True, capture_output=True)
        result: dict[str, Any] = {"SmolLM2 low rank, float32": small(folder, given.runs)}
        if not given.no_7b:
            result["7B-shaped, float16 rewritten"] = large(folder)
    publish("export_cost", result)


def small(folder: Path, runs: int) -> dict[str, Any]:
    out = folder / "out"
    usages = [measured(mixt("export", folder / "model", "-o", out, "--no-verify", "--overwrite")) for _ in range(runs)]
    manifest = json.loads((out / "mixt_manifest.json").read_text())
    weights = manifest["memory"]["weight_bytes"]
    peak = max(usage.peak_rss for usage in usages)
    return {
        "wall seconds, median": round(statistics.median(usage.wall for usage in usages), 2),
        "wall seconds, minimum": round(min(usage.wall for usage in usages), 2),
        "cpu seconds, median": round(statistics.median(usage.cpu for usage in usages), 2),
        "weights MB": round(weights / 1e6, 1),
        "peak RSS MB": round(peak / 1e6, 1),
        "allowed MB (0.15 x weights + 150)": round(0.15 * weights / 1e6 + 150, 1),
        "nodes": manifest["graph"]["nodes"],
    }


def large(folder: Path) -> dict[str, Any]:
    largest = write_7b(folder / "7b")
    usage = measured(mixt("export", folder / "7b", "-o", folder / "7b-out", "--no-verify", "--fp16"))
    return {
        "wall seconds": round(usage.wall, 1),
        "peak RSS MB": round(usage.peak_rss / 1e6, 1),
        "allowed MB (largest tensor + 300)": round(largest / 1e6 + 300, 1),
        "written GB": round((folder / "7b-out" / "model.onnx.data").stat().st_size / 1e9, 2),
    }


if __name__ == "__main__":
    main()
