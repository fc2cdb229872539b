"""Whole models built by TensorRT-RTX on the CPU, with one profile and with two: what a second profile costs.

python -m benchmarks.trt_whole [dense] [low_rank=FOLDER] [mixt=FOLDER] [--jetpack 6 7] [--sm 86]

``dense`` is the sample model, SmolLM2-135M-Instruct; other models are named with their folders. Each is exported at
fp16 for both dialects and built with one profile, with two, and with two of which one is for one new token exactly,
every build in a process of its own. Cases already in benchmarks/results/trt_whole.json stay unless they are built anew.
Nothing runs on a GPU; memory figures are TensorRT-RTX's own for its target, never those of a Jetson.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, sample
from mixt_export.building import build_engine
from mixt_export.errors import MixtError
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions

MAX_SEQ_LEN, MAX_INPUT_LEN = 2048, 512

#: One profile; two; and two of which that for decoding admits exactly one new token.
PROFILES = ("one", "two", "two, fixed")


def build(out: Path, sm: int, profiles: str) -> dict[str, Any]:
    """One build; called in a process that has no other children."""
    name, _, fixed = profiles.partition(", ")
    if fixed:
        _fix_decoding(out)
    try:
        report = build_engine(out, backend="rtx", sm=sm, profiles=name)
    except MixtError as error:
        return {"built": False, "error": str(error)}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "built": True,
        "claim": report.claim,
        "library": report.library,
        "plan_bytes": report.nbytes,
        "network_layers": report.layers,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_resident_bytes": used.ru_maxrss * 1024,
        "log_memory": report.log_memory,
    }


def _fix_decoding(out: Path) -> None:
    """Rewrite the manifest's profile "decode" so that one new token is the most it admits."""
    path = out / "mixt_manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    decode = next(profile for profile in manifest["trt"]["profiles"] if profile["name"] == "decode")
    inputs = decode["inputs"]
    more = inputs["input_ids"]["max"][1] - 1
    for name in ("input_ids", "attention_mask"):
        inputs[name]["max"][1] -= more
    path.write_text(json.dumps(manifest), encoding="utf-8")


def cases(label: str, model: Path, jetpack: int, sm: int, variants: list[str]) -> list[dict[str, Any]]:
    """Export ``model`` once and build it with the profiles of ``variants``, "two, fixed" last."""
    rows = []
    with tempfile.TemporaryDirectory(dir=RESULTS / "tmp") as scratch:
        out = Path(scratch) / "out"
        began = time.process_time()
        trt = TrtOptions(jetpack=jetpack, max_input_len=MAX_INPUT_LEN)
        result = export(model, out, target="trt", dtype="fp16", max_seq_len=MAX_SEQ_LEN, trt=trt, verify=False)
        seconds = time.process_time() - began
        for profiles in sorted(variants, key=PROFILES.index):
            row = {
                "model": label, "dialect": result.plan.target.dialect.name, "sm": sm, "profiles": profiles,
                "weight_bytes": result.plan.weight_bytes, "graph_nodes": len(result.plan.lowered.model.graph),
                "export_cpu_seconds": round(seconds, 2),
            }  # fmt: skip
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(row | pool.apply(build, (out, sm, profiles)))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One case for the terminal."""
    head = f"{row['model']:10} {row['dialect']} SM{row['sm']} {row['profiles']} profile(s): "
    if not row["built"]:
        return head + "FAILED " + str(row["error"])
    memory = row["log_memory"]
    activation = max(profile["activation_bytes"] for profile in memory["profiles"])
    return (
        f"{head}graph {row['weight_bytes'] / 1e6:.1f} MB · plan {row['plan_bytes'] / 1e6:.1f} MB · RTX weights "
        f"{memory['weights_bytes'] / 1e6:.1f} MB · RTX activation {activation / 1e6:.1f} MB · "
        f"{row['cpu_seconds']:.0f} CPU s · peak {row['peak_resident_bytes'] / 1e9:.2f} GB"
    )


def main() -> None:
    """Build every model asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["dense"], help="dense, or LABEL=FOLDER")
    parser.add_argument("--jetpack", type=int, nargs="+", default=[6, 7])
    parser.add_argument("--sm", type=int, default=86)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    options = parser.parse_args()
    (RESULTS / "tmp").mkdir(exist_ok=True)
    rows = []
    for name in options.models:
        label, _, folder = name.partition("=")
        model = Path(folder) if folder else sample()
        for jetpack in options.jetpack:
            rows += cases(label, model, jetpack, options.sm, options.profiles)
    print(f"{sum(row['built'] for row in rows)} of {len(rows)} cases built")
    path = RESULTS / "trt_whole.json"
    known = {_key(row): row for row in json.loads(path.read_text(encoding="utf-8"))["cases"]} if path.is_file() else {}
    merged = list((known | {_key(row): row for row in rows}).values())
    settings = {"max_seq_len": MAX_SEQ_LEN, "max_input_len": MAX_INPUT_LEN, "dtype": "fp16"}
    built = sum(row["built"] for row in merged)
    path.write_text(json.dumps({**settings, "built": built, "cases": merged}, indent=1) + "\n", encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("model", "dialect", "sm", "profiles"))


if __name__ == "__main__":
    main()
