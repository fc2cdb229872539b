"""How large config.json says a linear is, for the families whose factors circulate; used to tell layouts apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixt_export.checkpoints.foreign.config import family_of, model_type

Features = tuple[int, int]
"""(in, out) features of a linear."""

#: Families whose linears are transformers' Conv1D: weights and factors stored (in, out).
CONV1D = frozenset({"gpt2"})


def features_of(config: Mapping[str, Any], linear: str) -> Features | None:
    """(in, out) of the linear called ``linear``, or None where config.json does not tell."""
    sizes = {key: value for key, value in config.items() if type(value) is int and value > 0}
    make = _BY_NAME.get(linear.rpartition(".")[2])
    if family_of(model_type(config)) in CONV1D:
        make = _OF_GPT2.get(".".join(linear.split(".")[-2:]), make if linear == "lm_head" else None)
    try:
        return None if make is None else make(sizes)
    except KeyError:
        return None


def _heads(sizes: Mapping[str, int]) -> int:
    return sizes["num_attention_heads"] * _head_dim(sizes)


def _kv_heads(sizes: Mapping[str, int]) -> int:
    return sizes.get("num_key_value_heads", sizes["num_attention_heads"]) * _head_dim(sizes)


def _head_dim(sizes: Mapping[str, int]) -> int:
    return sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]


def _inner(sizes: Mapping[str, int]) -> int:
    return sizes.get("n_inner") or 4 * sizes["n_embd"]


_BY_NAME: dict[str, Callable[[Mapping[str, int]], Features]] = {
    "q_proj": lambda sizes: (sizes["hidden_size"], _heads(sizes)),
    "k_proj": lambda sizes: (sizes["hidden_size"], _kv_heads(sizes)),
    "v_proj": lambda sizes: (sizes["hidden_size"], _kv_heads(sizes)),
    "o_proj": lambda sizes: (_heads(sizes), sizes["hidden_size"]),
    "gate_proj": lambda sizes: (sizes["hidden_size"], sizes["intermediate_size"]),
    "up_proj": lambda sizes: (sizes["hidden_size"], sizes["intermediate_size"]),
    "down_proj": lambda sizes: (sizes["intermediate_size"], sizes["hidden_size"]),
    "lm_head": lambda sizes: (sizes.get("hidden_size") or sizes["n_embd"], sizes["vocab_size"]),
}
_OF_GPT2: dict[str, Callable[[Mapping[str, int]], Features]] = {
    "attn.c_attn": lambda sizes: (sizes["n_embd"], 3 * sizes["n_embd"]),
    "attn.c_proj": lambda sizes: (sizes["n_embd"], sizes["n_embd"]),
    "mlp.c_fc": lambda sizes: (sizes["n_embd"], _inner(sizes)),
    "mlp.c_proj": lambda sizes: (_inner(sizes), sizes["n_embd"]),
}
