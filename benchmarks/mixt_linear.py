"""How fast the executable forms of a MixT linear are against the dense product, and whether the chosen form is right.

One shape per session, several distinct copies so that small weights do not all sit in the cache and starting a run is
shared, one thread, thread CPU time, all forms and the dense product in random order in every round. A slice of a few
numbers reads each output, in the dense graph as well, as the next operator of a model would. ``chosen`` is what
`mixt export --optimize-for balanced` takes for a model whose linears all have that shape. Medians of paired ratios.

    python -m benchmarks.mixt_linear                                      the table
    python -m benchmarks.mixt_linear --shapes 2048x2048 --terms 4         one shape
    python -m benchmarks.mixt_linear --fp16                               float16 weights and activations
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import interleaved, paired_ratio, publish, timer
from mixt_export.lower.functions import load_function
from mixt_export.lower.mixture import mixt_node, weight_names, weight_shape
from mixt_export.network import build
from mixt_export.plan import MixtForm, choose_forms, mixt_forms

SHAPES = ("576x192", "576x576", "576x1536", "1536x576", "2048x2048", "4096x4096", "4096x11008")
ROWS = (1, 16, 128)
TERMS = (4, 3)

#: (rows, smallest side at least) -> how many times faster than dense the chosen form of four terms should be.
TARGETS = {(128, 2048): 1.9, (128, 576): 1.5, (1, 2048): 5.0}
#: The chosen form may nowhere take more than this many times as long as the dense product.
SLOWEST = 1.05

_ELEMENTS = {False: (np.float32, TensorProto.FLOAT), True: (np.float16, TensorProto.FLOAT16)}


def session(form: MixtForm, copies: int, half: bool) -> ort.InferenceSession:
    """``copies`` linears of random weights over one input x (1, rows, in)."""
    rng = np.random.default_rng(0)
    dtype, element = _ELEMENTS[half]
    nodes, functions, outputs = [], {}, []
    weights = [numpy_helper.from_array(np.array([i]), f"i{i}") for i in range(3)]
    for copy in range(copies):
        names = []
        for suffix, window in weight_names(form):
            names.append(f"linear{copy}.{suffix}")
            values = rng.standard_normal(weight_shape(form, window), np.float32).astype(dtype)
            weights.append(numpy_helper.from_array(values, names[-1]))
        if form.dense:
            nodes.append(helper.make_node("MatMul", ["x", *names], [f"z{copy}"], name=f"linear{copy}"))
        else:
            op, shapes = mixt_node(form)
            attributes: dict[str, Any] = dict(shapes)
            functions[op] = ir.serde.serialize_function(load_function(op))
            node = helper.make_node(op, ["x", *names], [f"z{copy}"], name=f"linear{copy}", domain="mixt", **attributes)
            nodes.append(node)
        nodes.append(helper.make_node("Slice", [f"z{copy}", "i0", "i1", "i2"], [f"y{copy}"], name=f"slice{copy}"))
        outputs.append(helper.make_tensor_value_info(f"y{copy}", element, None))
    x = helper.make_tensor_value_info("x", element, ["batch", "rows", form.in_features])
    graph = helper.make_graph(nodes, "g", [x], outputs, weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mixt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions.values()), ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def measure(shape: str, terms: int, rounds: int, half: bool, every: bool) -> dict[str, Any]:
    """Times faster than dense of each form, by rows."""
    n_in, n_out = map(int, shape.split("x"))
    linear = build.mixt("linear", n_in, n_out, terms)
    chosen = choose_forms([linear]).choices["linear"].form.name
    forms = {form.name: form for form in mixt_forms(linear)}
    kept = set(forms) if every else {"branches", "branches-left", "pairs", "dense", chosen}
    copies = max(1, min(32, (96 << 20) // (4 * n_in * n_out)))
    models = {name: session(form, copies, half) for name, form in forms.items() if name in kept}
    result: dict[str, Any] = {"chosen": chosen}
    for rows in ROWS:
        x = np.random.default_rng(1).standard_normal((1, rows, n_in), np.float32).astype(_ELEMENTS[half][0])
        repeats = max(1, round(4e-3 / timer(models["dense"], x, 2)))
        seconds = interleaved({name: partial(timer, model, x, repeats) for name, model in models.items()}, rounds)
        result[f"rows {rows}"] = {
            "dense microseconds": round(1e6 * statistics.median(seconds["dense"]) / copies, 1),
            **{name: paired_ratio(seconds["dense"], seconds[name]) for name in models if name != "dense"},
        }
    return result


def missed(shape: str, result: dict[str, Any]) -> list[str]:
    """Targets that the chosen form of four terms misses."""
    side = min(map(int, shape.split("x")))
    found = []
    for rows in ROWS:
        ratios = result[f"rows {rows}"]
        gain = 1.0 if result["chosen"] == "dense" else ratios[result["chosen"]]["median"]
        wanted = [times for (at, least), times in TARGETS.items() if at == rows and side >= least]
        if gain < max([1 / SLOWEST, *wanted]):
            found.append(f"{shape} rows {rows}: {gain} < {max([1 / SLOWEST, *wanted]):.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--terms", nargs="*", type=int, default=TERMS)
    parser.add_argument("--every", action="store_true", help="every form, not only the short-named ones")
    parser.add_argument("--fp16", action="store_true")
    options = parser.parse_args()
    layers: dict[str, Any] = {}
    misses: list[str] = []
    for terms in options.terms:
        for shape in options.shapes:
            result = measure(shape, terms, options.rounds, options.fp16, options.every)
            layers[f"{terms} terms {shape}"] = result
            if terms == 4:
                misses += missed(shape, result)
    name = "mixt_linear_fp16" if options.fp16 else "mixt_linear"
    publish(name, {"threads": 1, "times faster than dense": layers, "targets missed": misses})


if __name__ == "__main__":
    main()
