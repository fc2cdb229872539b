"""The part of the student that recovery runs: its blocks from the first factorised one on, and the final norm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.recover.modules import trained_module
from mixt_export.compression.recover.pair import Pair
from mixt_export.compression.refine import trainable
from mixt_export.errors import UnsupportedError
from mixt_export.reference.tensors import read_tensor


class Tail:
    """Blocks ``first`` … last of the student in float32, factors executed, and its final norm.

    ``parameters``: stored tensor name -> what is trained: factors and vectors of the blocks with factorised linears,
    and the final norm. Nothing in front of ``first`` is in memory.
    """

    def __init__(self, pair: Pair, teacher: BlockwiseModel) -> None:
        self.first = pair.blocks[0]
        self._store = pair.student.store
        self._calls = teacher.calls  # masks, positions and rotary embeddings depend on config.json alone
        self._loaded: dict[str, nn.Parameter] = {}
        self._model = model = BlockwiseModel(pair.student)
        for name in pair.linears:
            model.model.set_submodule(name, trained_module(pair.student.factors[name], self._load, self._index))
        self.blocks: list[nn.Module] = list(model.layers[self.first :])
        self.norm: nn.Module = model.norm
        for offset, block in enumerate(self.blocks):
            self._fill(block, model.block_path(self.first + offset))
        self._fill(self.norm, path_of(model, self.norm))
        self.parameters = self._trained(pair)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Input of block ``first`` (batch, length, features) -> normalised final hidden state, same shape."""
        calls = self._calls(hidden.shape[0], hidden.shape[1])
        for offset, block in enumerate(self.blocks):
            out: Any = block(hidden, **calls[self.first + offset])
            hidden = out[0] if isinstance(out, tuple) else out
        result: torch.Tensor = self.norm(hidden)
        return result

    def dtype(self, name: str) -> str:
        """The dtype in which tensor ``name`` is stored."""
        dtype: str = self._store[name].ref.dtype
        return dtype

    def _trained(self, pair: Pair) -> dict[str, nn.Parameter]:
        moving = {id(parameter) for index in pair.blocks for parameter in trainable(self.blocks[index - self.first])}
        moving |= {id(parameter) for parameter in self.norm.parameters()}
        return {name: parameter for name, parameter in self._loaded.items() if id(parameter) in moving}

    def _load(self, name: str) -> nn.Parameter:
        if name not in self._loaded:
            self._loaded[name] = nn.Parameter(self._model.stored(name), requires_grad=False)
        return self._loaded[name]

    def _index(self, name: str) -> torch.Tensor:
        return read_tensor(self._store, name, "int64")

    def _fill(self, module: nn.Module, path: str) -> None:
        for name, meta in list(module.named_parameters()):
            if meta.is_meta:
                owner, _, last = name.rpartition(".")
                module.get_submodule(owner).register_parameter(last, self._load(f"{path}.{name}"))


class Head:
    """The output embedding (vocabulary, features) float32, of which steps use some rows, and its bias if it has one.

    Raises UnsupportedError when it is not a matrix.
    """

    def __init__(self, model: BlockwiseModel) -> None:
        head: nn.Module = model.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(f"{model.checkpoint.path}: the output embedding is not one matrix.")
        tied = bool(model.model.config.tie_word_embeddings)
        owner: nn.Module = model.model.get_input_embeddings() if tied else head
        self.weight: torch.Tensor = read_tensor(model.checkpoint.store, f"{path_of(model, owner)}.weight", "float32")
        self.bias = None if head.bias is None else model.stored(f"{path_of(model, head)}.bias")
        self._bounded = model.bounded

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, features) -> (tokens, vocabulary), or only the columns ``rows``."""
        if rows is None:
            return self._bounded(nn.functional.linear(hidden, self.weight, self.bias))
        bias = None if self.bias is None else self.bias[rows]
        return self._bounded(nn.functional.linear(hidden, self.weight[rows], bias))


def final_norm(model: BlockwiseModel) -> nn.Module:
    """A copy of the final norm of ``model`` with its weights, float32."""
    norm = copy.deepcopy(model.norm)
    path = path_of(model, model.norm)
    for name, _ in list(norm.named_parameters()):
        values = read_tensor(model.checkpoint.store, f"{path}.{name}", "float32")
        norm.register_parameter(name, nn.Parameter(values, requires_grad=False))
    result: nn.Module = norm
    return result


def path_of(model: BlockwiseModel, module: nn.Module) -> str:
    """Module path of ``module`` in ``model``."""
    found: str = next(name for name, other in model.model.named_modules() if other is module)
    return found
