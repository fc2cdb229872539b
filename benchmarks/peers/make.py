"""Make a peer's files: python -m benchmarks.peers.make gguf|gguf-f32|q8_0|q4_0|bf16 SOURCE TARGET."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


def _gguf(source: Path, target: Path) -> None:
    from benchmarks.peers.gguf import write_gguf

    write_gguf(source, target, np.float16)


def _gguf_f32(source: Path, target: Path) -> None:
    from benchmarks.peers.gguf import write_gguf

    write_gguf(source, target, np.float32)


def _quantised(kind: str) -> Callable[[Path, Path], None]:
    def run(source: Path, target: Path) -> None:
        from benchmarks.peers.llama_cpp import quantise

        quantise(source, target, kind)
        source.unlink()

    return run


def _bf16(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "gguf": _gguf,
    "gguf-f32": _gguf_f32,
    "q8_0": _quantised("q8_0"),
    "q4_0": _quantised("q4_0"),
    "bf16": _bf16,
}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
