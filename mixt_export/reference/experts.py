"""Experts as single linears: transformers' stacked expert parameters replaced by a module tree a checkpoint can name.

transformers holds the experts of a layer in two parameters of three axes. Here every expert has its own ``gate_proj``,
``up_proj`` and ``down_proj``, under the names that published folders use, so that each can be factorised, hooked or
compressed as any other linear. The arithmetic is transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mixt_export.errors import CheckpointError

#: Class names of transformers' modules that hold stacked experts laid out as checkpoints.experts says.
STACKED = frozenset({"Qwen3MoeExperts"})


class Expert(nn.Module):
    """One expert: down(activation(gate(x)) · up(x))."""

    def __init__(self, hidden: int, inner: int, activation: Callable[[torch.Tensor], torch.Tensor], **kind: Any):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, **kind)
        self.up_proj = nn.Linear(hidden, inner, bias=False, **kind)
        self.down_proj = nn.Linear(inner, hidden, bias=False, **kind)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        y: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return y


class ExpertList(nn.Module):
    """Experts 0, 1, … as submodules of those names; called as transformers' stacked experts are.

    An expert that no token chose runs on no rows, so that whoever listens to its linears hears of every one of them.
    """

    def __init__(
        self, count: int, hidden: int, inner: int, activation: Callable[[torch.Tensor], torch.Tensor], **kind: Any
    ) -> None:
        super().__init__()
        self.count = count
        for index in range(count):
            self.add_module(str(index), Expert(hidden, inner, activation, **kind))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """x (tokens, hidden), chosen experts and their weights (tokens, k) -> (tokens, hidden)."""
        total = torch.zeros_like(hidden_states)
        for index in range(self.count):
            tokens, slots = torch.where(top_k_index == index)
            y = self.get_submodule(str(index))(hidden_states[tokens])
            weighted = y * top_k_weights[tokens, slots, None]
            total = total.index_add(0, tokens, weighted.to(total.dtype))
        return total


def separate_experts(model: nn.Module) -> None:
    """Replace the stacked experts of every layer of ``model`` by an ExpertList of the same sizes, dtype and device.

    Raises CheckpointError when config.json asks a router for more experts than there are.
    """
    for path, module in list(model.named_modules()):
        if type(module).__name__ not in STACKED:
            continue
        stacked: Any = module
        config: Any = model.config
        if not 1 <= config.num_experts_per_tok <= stacked.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok is {config.num_experts_per_tok}, but a layer has "
                f"{stacked.num_experts} experts; give 1 to {stacked.num_experts}."
            )
        like = stacked.down_proj
        separate = ExpertList(
            stacked.num_experts,
            stacked.hidden_dim,
            stacked.intermediate_dim,
            stacked.act_fn,
            dtype=like.dtype,
            device=like.device,
        )
        model.set_submodule(path, separate)
