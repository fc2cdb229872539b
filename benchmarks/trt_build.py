"""Plans by TensorRT-RTX on the CPU: every structure × dialect × profiles × target, cores as stored and as planned.

python -m benchmarks.trt_build [--layers 2] [--sm 86 120] [--structures mixt dense] [--forms stored planned]

The first blocks of SmolLM2-135M with random cores in its shapes, fp16: what a compiler accepts and how large plans get
do not depend on values. Nothing runs on a GPU; memory figures are TensorRT-RTX's own, never those of a Jetson. What a
second profile costs a whole model: benchmarks/trt_whole.py.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import tempfile
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, sample
from mixt_export.building import build_engine
from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
from mixt_export.errors import MixtError
from mixt_export.network import FactorizedLinear, build
from mixt_export.plan import forms_of
from mixt_export.targets import export
from mixt_export.targets.trt import TrtOptions

MAX_SEQ_LEN, MAX_INPUT_LEN = 1024, 256

#: SmolLM2's features as three sites of a tensor train.
_SITES = {192: (4, 6, 8), 576: (8, 8, 9), 1536: (8, 12, 16)}
Make = Callable[[str, int, int], FactorizedLinear | None]


def _tucker(name: str, inside: int, outside: int) -> FactorizedLinear | None:
    """The projections q and o, which have nine heads each, with shared factors."""
    stem, _, last = name.rpartition(".")
    if last not in ("q_proj", "o_proj"):
        return None
    return build.tucker_heads(name, last[0], 576, 9, 64, (288, 48, 4), shared=f"{stem}.tucker")


#: SmolLM2's features as two factors.
_PAIRS = {192: (12, 16), 576: (24, 24), 1536: (32, 48)}

STRUCTURES: dict[str, Make] = {
    "dense": lambda *_: None,
    "low_rank": lambda name, inside, outside: build.low_rank(name, inside, outside, min(inside, outside) // 3),
    "tensor_train": lambda name, i, o: build.tensor_train(name, _SITES[i], _SITES[o], (24, 24)),
    "tensor_train_2": lambda name, i, o: build.tensor_train(name, _PAIRS[i], _PAIRS[o], (16,)),
    "tensor_ring": lambda name, i, o: build.tensor_ring(name, _SITES[i], _SITES[o], (4, 8, 8)),
    "tucker_heads": _tucker,
    "tucker2": lambda name, i, o: build.tucker2(name, i, o, i // 2, o // 2),
    "kronecker": lambda name, i, o: build.kronecker(name, _PAIRS[i], _PAIRS[o], 3),
    "monarch": lambda name, i, o: build.monarch(name, _PAIRS[i], _PAIRS[o]),
    "blast": lambda name, i, o: build.blast(name, i, o, 32, (8, 8)),
    "mixt": lambda name, inside, outside: build.mixt(name, inside, outside, 4),
    "sparse": lambda name, i, o: build.with_sparse(build.low_rank(name, i, o, min(i, o) // 4), i * o // 200),
}
FORMS = ("stored", "planned")


def model_of(structure: str, folder: Path, layers: int) -> Path:
    """SmolLM2 with the linears of its first ``layers`` blocks replaced by random cores."""
    import numpy as np

    source = open_checkpoint(sample())
    rng = np.random.default_rng(0)
    factors: dict[str, FactorizedLinear] = {}
    tensors: dict[str, NewTensor] = {}
    for name, stored in source.store.items():
        linear = name.removesuffix(".weight")
        parts = linear.split(".")
        if not linear.endswith("_proj") or int(parts[2]) >= layers:
            continue
        outside, inside = stored.ref.shape
        network = STRUCTURES[structure](linear, inside, outside)
        if network is None:
            continue
        factors[linear] = network
        places = _places(network, rng)
        for ref in network.tensors():
            values = places.get(ref.name)
            if values is None:
                values = (rng.standard_normal(ref.shape) / prod(ref.shape) ** 0.25).astype(np.float32)
            tensors[ref.name] = NewTensor(ref.name, ref.dtype, ref.shape, partial(np.asarray, values))
    if not factors:
        return source.path
    folder.mkdir()
    write_checkpoint(folder, source, list(tensors.values()), factors, {"method": structure})
    return folder


def _places(network: FactorizedLinear, rng: Any) -> dict[str, Any]:
    """Rows and columns of a sparse residual, each entry once."""
    if network.sparse is None:
        return {}
    entries = rng.choice(network.in_features * network.out_features, network.sparse.nnz, replace=False)
    entries.sort()
    return {
        network.sparse.rows.name: entries // network.in_features,
        network.sparse.cols.name: entries % network.in_features,
    }


def as_stored(model: Path) -> list[tuple[str, str]]:
    """Overrides that execute every linear's cores as they are stored."""
    factors = open_checkpoint(model).factors
    return [(f"^{re.escape(name)}$", forms_of(linear)[0].name) for name, linear in factors.items()]


def one(out: Path, sm: int, profiles: str) -> dict[str, Any]:
    """Build once, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        report = build_engine(out, backend="rtx", sm=sm, profiles=profiles)
    except MixtError as error:
        return {"built": False, "error": str(error)}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "built": True,
        "claim": report.claim,
        "library": report.library,
        "plan_bytes": report.nbytes,
        "network_layers": report.layers,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "largest_process_so_far_bytes": after.ru_maxrss * 1024,
        "log_memory": report.log_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sm", type=int, nargs="+", default=[86, 120])
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    rows = []
    for structure in options.structures:
        with tempfile.TemporaryDirectory() as scratch:
            model = model_of(structure, Path(scratch) / "model", options.layers)
            for forms in options.forms if structure != "dense" else options.forms[:1]:
                overrides = as_stored(model) if forms == "stored" else []
                for jetpack, dialect in ((6, "trt10"), (7, "trt11")):
                    out = Path(scratch) / f"{dialect}-{forms}"
                    settings = TrtOptions(jetpack=jetpack, max_input_len=MAX_INPUT_LEN)
                    result = export(
                        model, out, target="trt", dtype="fp16", num_layers=options.layers, max_seq_len=MAX_SEQ_LEN,
                        trt=settings, forms=overrides, verify=False,
                    )  # fmt: skip
                    for sm in options.sm:
                        for profiles in ("one", "two"):
                            case = {"structure": structure, "forms": forms, "dialect": dialect, "sm": sm}
                            case |= {"profiles": profiles, "weight_bytes": result.plan.weight_bytes}
                            rows.append({**case, **one(out, sm, profiles)})
                            print(_line(rows[-1]), flush=True)
    built = sum(row["built"] for row in rows)
    print(f"{built} of {len(rows)} cases built")
    facts = {"layers": options.layers, "max_seq_len": MAX_SEQ_LEN, "max_input_len": MAX_INPUT_LEN, "dtype": "fp16"}
    text = json.dumps({**facts, "built": built, "cases": rows}, indent=1)
    (RESULTS / "trt_build.json").write_text(text + "\n", encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    head = f"{row['structure']:14} {row['forms']:7} {row['dialect']} SM{row['sm']:<3} {row['profiles']} profile(s): "
    if not row["built"]:
        return f"{head}FAILED {row['error']}"
    weights = row["log_memory"]["weights_bytes"]
    activation = max(profile["activation_bytes"] for profile in row["log_memory"]["profiles"])
    return (
        f"{head}graph {row['weight_bytes'] / 1e6:.1f} MB · plan {row['plan_bytes'] / 1e6:.1f} MB · RTX weights "
        f"{weights / 1e6:.1f} MB · RTX activation {activation / 1e6:.1f} MB · {row['cpu_seconds']:.1f} CPU s"
    )


if __name__ == "__main__":
    main()
