"""Faults of constants: a wrong matrix, vector or table in an intact graph."""

from __future__ import annotations

import zlib

import numpy as np

from tests.verification.faults.exported import Exported, NotApplicable, first, rewired

UP, DOWN = ("up_proj", "c_fc", "fc_in"), ("down_proj", "c_proj", "fc_out")


def _first(x: Exported, layer: int, names: tuple[str, ...]) -> list[str]:
    """Matrices of the first of these linears that the MLP has."""
    for name in names:
        try:
            return x.weights(layer, name, ("mlp",))
        except NotApplicable:
            continue
    raise NotApplicable("no such linear")


def _out_axis(x: Exported, layer: int, last: str) -> int:
    """Which axis of the last matrix is the linear's output."""
    node = next(node for node in reversed(x.linear(layer, last)) if node.op_type != "Add")
    return 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else -1


def _factors(x: Exported, layer: int, last: str = "up_proj") -> list[str]:
    names = x.weights(layer, last)
    if len(names) < 2:
        raise NotApplicable("no factors")
    return names


def _low_rank(x: Exported, layer: int) -> list[str]:
    names = _factors(x, layer)
    if len(names) != 2 or not names[0].endswith(".core0"):
        raise NotApplicable("no low rank")
    return names


def swapped_cores(x: Exported, layer: int) -> None:
    ours, theirs = _factors(x, layer)[-1], _factors(x, layer, "gate_proj")[-1]
    mine, other = x.value(ours), x.value(theirs)
    if mine.shape != other.shape:
        raise NotApplicable("cores of other shapes")
    x.put(ours, other)
    x.put(theirs, mine)


def transposed_core(x: Exported, layer: int) -> None:
    name = _factors(x, layer)[0]
    value = x.value(name)
    x.put(name, value.T.reshape(value.shape))


def lost_average(x: Exported, layer: int) -> None:
    linear = f"model.layers.{layer}.mlp.up_proj"
    if x.manifest["linears"].get(linear, {}).get("method") != "mixt":
        raise NotApplicable("no MixT")
    form = x.manifest["plan"]["forms"][linear]
    for name in x.weights(layer, "up_proj"):
        x.put(name, x.value(name) * sum(form["windows"]))


def rank_slice_off_by_one(x: Exported, layer: int) -> None:
    name = _low_rank(x, layer)[0]
    value = np.roll(x.value(name), 1, axis=1)
    value[:, 0] = 0
    x.put(name, value)


def rank_channel_zeroed(x: Exported, layer: int) -> None:
    name = _low_rank(x, layer)[0]
    value = x.value(name)
    value[:, -1] = 0
    x.put(name, value)


def flipped_sign(x: Exported, layer: int) -> None:
    name = _first(x, layer, UP)[-1]
    value = x.value(name)
    value[..., 0] *= -1
    x.put(name, value)


def dropped_bias(x: Exported, layer: int) -> None:
    name = first((one for one in x.constants(".bias", layer) if "proj" in one or "attn" in one), "bias of a linear")
    x.put(name, np.zeros_like(x.value(name)))


def norm_plus_one_forgotten(x: Exported, layer: int) -> None:
    name = x.constants("input_layernorm.weight/plus_1", layer)[0]
    x.put(name, x.value(name) - 1)


def norm_weights_off(x: Exported, layer: int) -> None:
    name = first((one for one in x.constants(".weight", layer) if "norm" in one or "ln_" in one), "weights of a norm")
    x.put(name, np.ones_like(x.value(name)))


def head_not_tied(x: Exported, _layer: int) -> None:
    constants = {tensor.name for tensor in x.graph.initializer if len(tensor.dims) == 2}
    node = next(node for node in x.graph.node if node.name.startswith("/lm_head/") and constants & set(node.input))
    name = next(name for name in node.input if name in constants)
    rewired(node, name, x.add(np.roll(x.value(name), 1, axis=0), name))


def _permuted(x: Exported, layer: int, last: str, heads: np.ndarray, axis: int, which: int) -> None:
    name = x.weights(layer, last)[which]
    value = x.value(name)
    parts = np.stack(np.split(value, len(heads), axis))[heads]
    x.put(name, np.concatenate(list(parts), axis))


def _heads(x: Exported) -> tuple[int, int]:
    return int(x.manifest["model"]["heads"]), int(x.manifest["kv"]["heads"])


def permuted_query_heads(x: Exported, layer: int) -> None:
    heads = np.roll(np.arange(_heads(x)[0]), 1)
    _permuted(x, layer, "q_proj", heads, _out_axis(x, layer, "q_proj"), -1)


def permuted_key_heads(x: Exported, layer: int) -> None:
    if _heads(x)[1] < 2:
        raise NotApplicable("one head of keys")
    _permuted(x, layer, "k_proj", np.arange(_heads(x)[1])[::-1].copy(), _out_axis(x, layer, "k_proj"), -1)


def wrong_grouping(x: Exported, layer: int) -> None:
    """Query head h reads the keys of head h mod kv_heads instead of h div group."""
    heads, kv = _heads(x)
    order = np.arange(heads).reshape(kv, -1).T.reshape(-1)
    if heads == kv or kv == 1:
        raise NotApplicable("no grouped heads")
    _permuted(x, layer, "q_proj", order, _out_axis(x, layer, "q_proj"), -1)
    axis = -1 if _out_axis(x, layer, "o_proj") == 0 else 0
    _permuted(x, layer, "o_proj", order, axis, 0)


def duplicated_layer(x: Exported, layer: int) -> None:
    known = {tensor.name: tensor for tensor in x.graph.initializer}
    for node in x.under(f"/model/layers.{layer}"):
        for name in list(node.input):
            other = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.").replace(f".h.{layer}.", f".h.{layer + 1}.")
            if other != name and other in known and list(known[other].dims) == list(known[name].dims):
                rewired(node, name, other)


def float16_overflow(x: Exported, layer: int) -> None:
    """The same function in exact arithmetic, through values beyond 65504."""
    if x.manifest["dtype"] != "float16":
        raise NotApplicable("not float16")
    up, down = _first(x, layer, ("up_proj",))[-1], _first(x, layer, ("down_proj",))[0]
    x.put(up, x.value(up).astype(np.float64) * 2.0**13)
    x.put(down, x.value(down).astype(np.float64) * 2.0**-13)


def corrupted_page(x: Exported, layer: int) -> None:
    """4096 bytes of noise, or all there are, in one matrix."""
    name = _first(x, layer, DOWN)[0]
    _noise(x, name)


def corrupted_embedding_page(x: Exported, _layer: int) -> None:
    name = next(node for node in x.graph.node if node.name.startswith("/model/embed_tokens/")).input[0]
    _noise(x, name)


def _noise(x: Exported, name: str) -> None:
    value = x.value(name)
    raw = bytearray(value.tobytes())
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    size = min(4096, len(raw))
    start = int(rng.integers(0, (len(raw) - size) // 4096 + 1)) * 4096
    raw[start : start + size] = rng.bytes(size)
    x.put(name, np.frombuffer(bytes(raw), value.dtype).reshape(value.shape))


def corrupted_exponent(x: Exported, layer: int) -> None:
    """The highest bit of one number's exponent."""
    name = _first(x, layer, UP)[-1]
    value = x.value(name)
    bits = value.reshape(-1).view(f"u{value.itemsize}")
    bits[len(bits) // 2] ^= 1 << (8 * value.itemsize - 2)
    x.put(name, value)


def embedding_of_a_rare_token(x: Exported, _layer: int) -> None:
    """One row of zeros, of a token that no text holds, where the head has a matrix of its own."""
    name = next(node for node in x.graph.node if node.name.startswith("/model/embed_tokens/")).input[0]
    value = x.value(name)
    value[-1] = 0
    rewired(x.under("/model/embed_tokens")[0], name, x.add(value, name))


def rotary_table_end(x: Exported, _layer: int) -> None:
    for part in ("cos", "sin"):
        name = f"/rotary/{part}"
        value = x.value(name)
        value[-1] = value[-2]
        x.put(name, value)


def query_norm_lost(x: Exported, layer: int) -> None:
    name = first((one for one in x.constants("", layer) if "q_norm.weight" in one), "norm of queries")
    x.put(name, np.ones_like(x.value(name)))


def swapped_experts(x: Exported, layer: int) -> None:
    ours, theirs = (x.constants(f"experts.{index}.down_proj.weight", layer)[0] for index in (0, 1))
    mine, other = x.value(ours), x.value(theirs)
    x.put(ours, other)
    x.put(theirs, mine)


def wrong_embedding_scale(x: Exported, _layer: int) -> None:
    node = x.named("/model/embed_tokens/scaled")
    name = next(name for name in node.input if name.startswith("/constants/"))
    rewired(node, name, x.constant(1.01 * x.value(name), x.value(name).dtype))
