"""Tucker on SmolLM2: which stacking is best, what it costs in perplexity, what sharing saves, parity.

python -m benchmarks.tucker [stacking] [quality] [laser] [sharing] [concatenation] [--windows 8] [--rows REGEX]

All parts without arguments; each keeps its results in results/tucker.json beside those of the others. --windows: of 512
tokens of each text that give a perplexity; --rows: which rows of quality.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, interleaved, measured, mixt, paired_ratio, publish, sample

ATTENTION = ("--include", "self_attn")
#: What `mixt compress` is asked for, by row of the table.
QUALITY = {
    "tucker, attention of block 20 at 0.25": ("--method", "tucker", "--blocks", "20", "--keep", "0.25", *ATTENTION),
    "svd-llm, the same": ("--method", "svd-llm", "--blocks", "20", "--keep", "0.25", *ATTENTION),
    "tucker, attention of the last 4 at 0.5": ("--method", "tucker", "--blocks", "last:4", "--keep", "0.5", *ATTENTION),
    "tucker, each projection alone": (
        "--method", "tucker", "--blocks", "last:4", "--keep", "0.5", *ATTENTION, "--no-tucker-share",
    ),
    "svd, the same": ("--method", "svd", "--blocks", "last:4", "--keep", "0.5", *ATTENTION),
    "svd-llm, the same size": ("--method", "svd-llm", "--blocks", "last:4", "--keep", "0.5", *ATTENTION),
}  # fmt: skip

LASER = ("--method", "laser", "--blocks", "last:4", "--include", "mlp", "--search-windows", "4")


def stacking() -> dict[str, Any]:
    """||W - W'||² / ||W||² of an attention at equal size: one stack, a stack of each projection, low rank."""
    import torch

    from mixt_export.checkpoints import open_checkpoint
    from mixt_export.compression.tucker.decomposition import hosvd
    from mixt_export.compression.tucker.sizing import choose
    from mixt_export.compression.tucker.stacks import HeadStack

    torch.set_num_threads(1)
    store, rows = open_checkpoint(sample()).store, {}
    for layer in (5, 17, 27):
        names = {role: f"model.layers.{layer}.self_attn.{role}_proj" for role in "qkvo"}
        weights = {name: torch.from_numpy(store.read(f"{name}.weight", "float32")).double() for name in names.values()}
        energy = sum(float(weight.square().sum()) for weight in weights.values())

        def error(members: dict[str, str], keep: float, weights: Any = weights) -> tuple[float, tuple[int, ...]]:
            stack = HeadStack(members, "s", 576, 64, 9, 3)
            tensor = stack.tensor(weights)
            bases = hosvd(tensor, 3)
            ranks = choose(stack, bases.captured(), keep)
            return stack.solve(tensor, ranks, bases, 1e-7, 50).errors[-1] * float(tensor.square().sum()), ranks

        for keep in (0.3, 0.5, 0.7):
            began = time.process_time()
            together, ranks = error(names, keep)
            seconds = time.process_time() - began
            apart = sum(error({role: name}, keep)[0] for role, name in names.items())
            low = 0.0
            for weight in weights.values():
                rank = int(keep * weight.numel() / sum(weight.shape))
                low += float(torch.linalg.svdvals(weight)[rank:].square().sum())
            rows[f"block {layer} at {keep}"] = {
                "ranks": list(ranks),
                "one stack": round(together / energy, 4),
                "each projection": round(apart / energy, 4),
                "low rank": round(low / energy, 4),
                "CPU seconds": round(seconds, 2),
            }
    return rows


def quality(windows: int, rows: str) -> dict[str, Any]:
    """Perplexity in and out of domain, PyTorch float32, and what `mixt compress` took."""
    return _scored({name: options for name, options in QUALITY.items() if re.search(rows, name)}, windows)


def laser(windows: int) -> dict[str, Any]:
    """What LASER's search finds on the shipped calibration texts, and what that is worth on others."""
    return _scored({"laser, MLPs of the last 4": LASER}, windows)


def _scored(wanted: dict[str, tuple[str, ...]], windows: int) -> dict[str, Any]:
    from mixt_export.evaluation import perplexity
    from mixt_export.sample.texts import EVALUATION

    texts = {name: EVALUATION[name] for name in ("addresses", "novel")}

    def score(folder: Path) -> dict[str, Any]:
        found = {name: round(perplexity(folder, text, windows=windows).perplexity, 3) for name, text in texts.items()}
        return {**found, "windows of 512": windows}

    rows: dict[str, Any] = {f"dense, {windows} windows": score(sample())}
    print(rows, flush=True)
    for name, options in wanted.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = Path(scratch) / "model"
            usage = measured(mixt("compress", sample(), "-o", model, *options))
            report = json.loads((model / "compress_report.json").read_text())
            rows[name] = {
                **score(model),
                "kept": round(report["keep_achieved"], 4),
                "ranks": sorted({str(layer["ranks"]) for layer in report["layers"] if layer["ranks"]}),
                "compress CPU seconds": round(usage.cpu, 1),
            }
            if report.get("search"):
                rows[name]["search"] = report["search"]
                rows[name]["truncated"] = {
                    layer["name"]: layer["rank"] for layer in report["layers"] if layer["method"] != "dense"
                }
        print(name, rows[name], flush=True)
    return rows


def sharing() -> dict[str, Any]:
    """Multiply-adds per token of q, k, v and o as planned, steps shared and not; counts need no weights."""
    from mixt_export.network import build
    from mixt_export.plan import choose_forms

    rows = {}
    for title, sizes, ranks in (
        ("LLaMA-2-7B (64,4,2)", (4096, 32, 128, 32), (64, 4, 2)),
        ("LLaMA-2-7B (1408,64,2)", (4096, 32, 128, 32), (1408, 64, 2)),
        ("LLaMA-2-7B (1920,60,1)", (4096, 32, 128, 32), (1920, 60, 1)),
        ("GPT-J (64,4,2)", (4096, 16, 256, 16), (64, 4, 2)),
        ("SmolLM2 (228,64,7)", (576, 9, 64, 3), (228, None, 7)),
        ("SmolLM2 (207,64,8)", (576, 9, 64, 3), (207, None, None)),
    ):
        features, heads, dim, kv = sizes
        linears = [
            build.tucker_heads(f"a.{role}_proj", role, features, heads, dim, ranks, shared="a.t", kv_heads=kv)
            for role in "qkvo"
        ]
        plan = choose_forms(linears)
        rows[title] = {
            "parameters": plan.stored_elements,
            "dense": plan.dense_elements,
            "macs": sum(choice.form.macs for choice in plan.choices.values()),
            "macs without sharing": sum(choose_forms([linear]).choices[linear.name].form.macs for linear in linears),
            "numbers in the graph": plan.planned_elements,
            "macs by node": {name: choice.form.macs for name, choice in plan.choices.items()},
        }
    return rows


def concatenation() -> dict[str, Any]:
    """x·A_i·B_i for the linears of one input against [A_1 …] side by side and a Split; times as fast, CPU, 1 thread."""
    rows: dict[str, Any] = {}
    for title, (inputs, ranks, outputs) in {
        "SmolLM2 q k v, 0.8": (576, (230, 115, 115), (576, 192, 192)),
        "SmolLM2 q k v, 0.5": (576, (144, 72, 72), (576, 192, 192)),
        "SmolLM2 gate up, 0.8": (576, (335, 335), (1536, 1536)),
        "SmolLM2 gate up, 0.5": (576, (209, 209), (1536, 1536)),
        "2048 q k v, 0.5": (2048, (512, 205, 205), (2048, 512, 512)),
        "2048 gate up, 0.5": (2048, (819, 819), (8192, 8192)),
        "4096 q k v, rank 614": (4096, (614, 614, 614), (4096, 4096, 4096)),
        "4096 q k v, rank 64": (4096, (64, 64, 64), (4096, 4096, 4096)),
        "8 experts, rank 64": (2048, (64,) * 8, (768,) * 8),
    }.items():
        sessions = [_products(inputs, ranks, outputs, joined) for joined in (False, True)]
        rows[title] = {}
        for count in (1, 16, 128):
            x = {"x": np.random.default_rng(0).standard_normal((1, count, inputs)).astype(np.float32)}
            runs = {name: _timed(session, x) for name, session in zip(("apart", "joined"), sessions, strict=True)}
            seconds = interleaved(runs, 15)
            rows[title][f"{count} rows"] = paired_ratio(seconds["apart"], seconds["joined"])
    return rows


def _timed(session: Any, x: dict[str, Any]) -> Any:
    def run() -> float:
        began = time.thread_time()
        for _ in range(repeats):
            session.run(None, x)
        return (time.thread_time() - began) / repeats

    repeats = 1
    run()
    repeats = max(1, min(500, int(0.02 / max(run(), 1e-6))))
    return run


def _products(inputs: int, ranks: tuple[int, ...], outputs: tuple[int, ...], joined: bool) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    first = [rng.standard_normal((inputs, rank)).astype(np.float32) for rank in ranks]
    hidden = [f"h{index}" for index in range(len(ranks))]
    tensors = [
        numpy_helper.from_array(rng.standard_normal((rank, out)).astype(np.float32), f"B{index}")
        for index, (rank, out) in enumerate(zip(ranks, outputs, strict=True))
    ]
    if joined:
        tensors.append(numpy_helper.from_array(np.concatenate(first, axis=1), "A"))
        tensors.append(numpy_helper.from_array(np.array(ranks), "sizes"))
        nodes = [
            helper.make_node("MatMul", ["x", "A"], ["h"]),
            helper.make_node("Split", ["h", "sizes"], hidden, axis=-1),
        ]
    else:
        tensors += [numpy_helper.from_array(factor, f"A{index}") for index, factor in enumerate(first)]
        nodes = [helper.make_node("MatMul", ["x", f"A{index}"], [name]) for index, name in enumerate(hidden)]
    nodes += [helper.make_node("MatMul", [name, f"B{index}"], [f"y{index}"]) for index, name in enumerate(hidden)]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", inputs])],
        [
            helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, ["batch", "seq", out])
            for index, out in enumerate(outputs)
        ],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


PARTS = ("stacking", "quality", "laser", "sharing", "concatenation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", default="", metavar="REGEX")
    given = parser.parse_args()
    run = {
        "stacking": stacking,
        "quality": lambda: quality(given.windows, given.rows),
        "laser": lambda: laser(given.windows),
        "sharing": sharing,
        "concatenation": concatenation,
    }
    path = RESULTS / "tucker.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    result = {name: known[name] for name in PARTS if name in known}
    for name in given.parts or PARTS:
        found = run[name]()
        result[name] = {**result.get(name, {}), **found} if name == "quality" else found
        publish("tucker", {part: result[part] for part in PARTS if part in result})


if __name__ == "__main__":
    main()
