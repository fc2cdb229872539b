"""Faults of the graph: nodes wired or parametrised wrongly, on intact weights."""

from __future__ import annotations

import numpy as np
from onnx import helper

from tests.verification.faults.exported import Exported, NotApplicable, rewired


def _portable(x: Exported) -> None:
    if x.manifest["dialect"] != "portable":
        raise NotApplicable("positions are inside the attention node")


def wrong_rotary_base(x: Exported, layer: int) -> None:
    """Frequencies raised to the power 1.05, as a larger base makes them."""
    cos, sin = (x.value(f"/rotary/{part}").astype(np.float64) for part in ("cos", "sin"))
    frequencies = np.arctan2(sin[1], cos[1]) ** 1.05
    angles = np.arange(len(cos))[:, None] * frequencies
    for part, value in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
        name = f"/rotary/{part}"
        new = x.add(value, name)
        for node in x.under(f"/model/layers.{layer}"):
            rewired(node, name, new)


def wrong_rotary_interleaving(x: Exported, layer: int) -> None:
    found = False
    for node in x.under(f"/model/layers.{layer}"):
        for attribute in node.attribute:
            if attribute.name in ("rotary_interleaved", "interleaved"):
                attribute.i, found = 1 - attribute.i, True
    if not found or not any(tensor.name == "/rotary/cos" for tensor in x.graph.initializer):
        raise NotApplicable("no rotary embedding")


def rotary_off_by_one(x: Exported, layer: int) -> None:
    """Queries turn by one position too many; of queries and keys together only the difference counts."""
    node = x.named(f"/model/layers.{layer}/self_attn/q_rotary")
    rewired(node, node.input[3], x.before(node, "Add", [node.input[3], x.constant([1])]))


def positions_ignore_the_past(x: Exported, _layer: int) -> None:
    """Every piece of a prompt begins at position 0."""
    if x.manifest["dialect"] == "ort":
        node = x.named("/position/column")
        rewired(node, node.input[0], x.before(node, "Sub", [node.input[0], node.input[0]]))
        return
    node = x.named("/position/ids")
    node.input[1], node.input[2] = x.constant([0]), "/attention/seq/output_0"


def wrong_epsilon(x: Exported, layer: int) -> None:
    for node in x.under(f"/model/layers.{layer}"):
        if "Normalization" in node.op_type:
            x.attribute(node, "epsilon").f *= 10
            return
    raise NotApplicable("no norm node")


def cache_off_by_one(x: Exported, layer: int) -> None:
    node = x.attention(layer)
    if node.op_type == "GroupQueryAttention":
        fewer = x.before(node, "Sub", [node.input[5], x.constant(1, np.int32)])
        node.input[5] = x.before(node, "Max", [fewer, x.constant(0, np.int32)])
        return
    value = node.input[5]
    ends = [x.constant([number]) for number in (0, 1, 2**31 - 1, 2)]
    later = x.before(node, "Slice", [value, ends[1], ends[2], ends[3]])
    first = x.before(node, "Slice", [value, ends[0], ends[1], ends[3]])
    node.input[5] = x.before(node, "Concat", [later, first], axis=2)


def cache_swapped(x: Exported, layer: int) -> None:
    node = x.attention(layer)
    key, value = (list(node.input).index(f"past_key_values.{layer}.{part}") for part in ("key", "value"))
    node.input[key], node.input[value] = node.input[value], node.input[key]


def cache_of_another_layer(x: Exported, layer: int) -> None:
    ours, theirs = x.attention(layer), x.attention(layer + 1)
    for part in ("key", "value"):
        first, second = f"past_key_values.{layer}.{part}", f"past_key_values.{layer + 1}.{part}"
        rewired(ours, first, second)
        rewired(theirs, second, first)


def wrong_attention_scale(x: Exported, layer: int) -> None:
    x.attribute(x.attention(layer), "scale").f *= 1.02


def window_off_by_one(x: Exported, _layer: int) -> None:
    """Every windowed layer sees one token more."""
    nodes = [node for node in x.graph.node if any(entry.name == "local_window_size" for entry in node.attribute)]
    for node in nodes:
        x.attribute(node, "local_window_size").i += 1
    if nodes:
        return
    for name in x.constants(""):
        if name.startswith("/constants/window_"):
            x.put(name, x.value(name) + 1)
            return
    raise NotApplicable("no window")


def softcap_dropped(x: Exported, layer: int) -> None:
    x.attribute(x.attention(layer), "softcap").f = 0.0


def causal_mask_off_by_one(x: Exported, _layer: int) -> None:
    node = x.named("/attention/causal")
    rewired(node, node.input[1], x.before(node, "Add", [node.input[1], x.constant(1)]))


def padding_ignored(x: Exported, _layer: int) -> None:
    _portable(x)
    node = x.named("/attention/usable")
    rewired(node, node.input[0], x.before(node, "Or", [node.input[0], x.before(node, "Not", [node.input[0]])]))


def padding_counted(x: Exported, _layer: int) -> None:
    """Right-padded rows are taken to be as long as the longest."""
    node = x.named("/attention/last_index")
    width = x.before(node, "Cast", ["/attention/total/output_0"], to=7) if _defined(x, node.name) else ""
    if not width:
        width = x.before(node, "Shape", ["attention_mask"], start=1)
    zeros = x.before(node, "Sub", [node.input[0], node.input[0]])
    rewired(node, node.input[0], x.before(node, "Add", [zeros, width]))


def _defined(x: Exported, name: str) -> bool:
    """Whether the mask's length is known before node ``name``."""
    order = [node.name for node in x.graph.node]
    return "/attention/total" in order and order.index("/attention/total") < order.index(name)


def last_position_off_by_one(x: Exported, _layer: int) -> None:
    node = x.named("/lm_head/last_position")
    if node.op_type == "GatherND":
        index = x.named("/lm_head/indices")
        fewer = x.before(index, "Sub", [index.input[0], x.constant([1])])
        rewired(index, index.input[0], x.before(index, "Max", [fewer, x.constant([0])]))
        return
    two = x.before(node, "Slice", [node.input[0], x.constant([-2]), *node.input[2:4]])
    node.input[:] = [two, x.constant([0]), x.constant([1]), node.input[3]]


def missing_residual(x: Exported, layer: int) -> None:
    node = x.named(f"/model/layers.{layer}/self_attn/residual")
    _identity(node, node.input[1])


def dropped_layer(x: Exported, layer: int) -> None:
    node = next(node for node in x.graph.node if f"/model/layers.{layer}/output" in node.output)
    _identity(node, f"/model/layers.{layer - 1}/output")


def _identity(node, value: str) -> None:
    node.CopyFrom(helper.make_node("Identity", [value], list(node.output), name=node.name))


def swapped_gate_and_up(x: Exported, layer: int) -> None:
    gate, up = (x.linear(layer, last)[-1] for last in ("gate_proj", "up_proj"))
    gate.output[0], up.output[0] = up.output[0], gate.output[0]


def wrong_activation(x: Exported, layer: int) -> None:
    """x · sigmoid(1.702 x), which approximates GELU, for SiLU."""
    node = x.named(f"/model/layers.{layer}/mlp/Sigmoid")
    dtype = {"float32": np.float32, "float16": np.float16}[x.manifest["dtype"]]
    rewired(node, node.input[0], x.before(node, "Mul", [node.input[0], x.constant(1.702, dtype)]))


def wrong_gelu(x: Exported, layer: int) -> None:
    """GELU by the error function where the model has the one by tanh, or the other way round."""
    entry = x.attribute(x.named(f"/model/layers.{layer}/mlp/Gelu"), "approximate")
    entry.s = b"none" if entry.s == b"tanh" else b"tanh"


def norm_and_linear_out_of_order(x: Exported, layer: int) -> None:
    """The MLP reads the residual stream before its norm."""
    for path in ("post_attention_layernorm", "ln_2", "pre_feedforward_layernorm"):
        for node in x.under(f"/model/layers.{layer}/{path}"):
            if "Normalization" in node.op_type and any(
                "mlp" in r.name for r in x.graph.node if node.output[0] in r.input
            ):
                _identity(node, node.input[0])
                return
    raise NotApplicable("no norm before the MLP")
