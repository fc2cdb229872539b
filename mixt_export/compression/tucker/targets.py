"""Which linears of a block are stacked: by the names transformers gives them, checked against their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mixt_export.compression.tucker.stacks import GatedStack, HeadStack, SingleStack, Stack
from mixt_export.errors import CheckpointError

#: Last part of a linear's path -> its role; every other linear is decomposed alone.
ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
}
_HEADS, _GATED = "qkvo", ("gate", "up")


def stacks_of(
    linears: Iterable[str], shapes: Mapping[str, tuple[int, int]], config: Any, *, share: bool
) -> list[Stack]:
    """The stacks of ``linears`` (paths of one block), in the order of their first members.

    ``shapes``: (out, in) by path; ``config``: the transformers configuration. With ``share`` q, k, v, o of one
    attention form one stack and gate and up of one MLP another, as far as they are among ``linears``; without, each of
    q, k, v, o is a stack of its heads and every other linear stands alone.
    Raises CheckpointError where the shapes of q, k, v, o are not those of the configuration's heads.
    """
    together: dict[tuple[str, str], dict[str, str]] = {}
    for name in linears:
        parent, _, last = name.rpartition(".")
        role = ROLES.get(last, "")
        kind = "heads" if role and role in _HEADS else "gated" if role in _GATED and share else name
        key = (parent, kind) if share or kind != "heads" else (name, kind)
        together.setdefault(key, {})[role] = name
    found: list[Stack] = []
    for (parent, kind), members in together.items():
        if kind == "heads":
            shared = f"{parent}.tucker" if share else parent
            found.append(_heads({role: members[role] for role in _HEADS if role in members}, shared, shapes, config))
            continue
        name = next(iter(members.values()))
        out_features, in_features = shapes[name]
        if len(members) == len(_GATED) and len({shapes[member] for member in members.values()}) == 1:
            ordered = {role: members[role] for role in _GATED}
            found.append(GatedStack(ordered, f"{parent}.tucker", in_features, out_features))
        else:
            found += [
                SingleStack({"": member}, member, shapes[member][1], shapes[member][0]) for member in members.values()
            ]
    return found


def _heads(members: Mapping[str, str], shared: str, shapes: Mapping[str, tuple[int, int]], config: Any) -> HeadStack:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = {role: shapes[name][1 if role == "o" else 0] for role, name in members.items()}
    outer = {shapes[name][0 if role == "o" else 1] for role, name in members.items()}
    dims = {size / (heads if role in "qo" else kv_heads) for role, size in inner.items()}
    head_dim, features = dims.pop(), outer.pop()
    if dims or outer or head_dim != int(head_dim) or heads % kv_heads:
        given = ", ".join(f"{name} {shapes[name][0]}x{shapes[name][1]}" for name in members.values())
        raise CheckpointError(
            f"{given}: these shapes (out x in) are not {heads} heads (k and v: {kv_heads}) of one size; --exclude them."
        )
    return HeadStack(members, shared, features, int(head_dim), heads, kv_heads)
