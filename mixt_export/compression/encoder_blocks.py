"""An encoder run block by block: what BlockwiseModel is for decoders, without a head that predicts tokens."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import Checkpoint
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.stubs import release
from mixt_export.errors import UnsupportedError
from mixt_export.families.encoders import encoder_of, is_encoder


def blockwise(checkpoint: Checkpoint) -> BlockwiseModel:
    """The model of ``checkpoint``, of whichever kind it is. Raises UnsupportedError as the classes do."""
    return BlockwiseEncoder(checkpoint) if is_encoder(checkpoint.config) else BlockwiseModel(checkpoint)


class BlockwiseEncoder(BlockwiseModel):
    """The encoder of ``checkpoint``; names carry the prefix that its tensors have in a task model's folder."""

    predicts = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        prefix = encoder_of(checkpoint.config, checkpoint.store).prefix
        self._paths = {module: prefix + name for name, module in self.model.named_modules()}

    def embed(self, tokens: np.ndarray[Any, Any], into: np.ndarray[Any, Any]) -> torch.Tensor:
        """What the first block reads: see BlockwiseModel.embed."""
        module = self.model.embeddings
        self._materialise(module)
        hidden = torch.from_numpy(into)
        try:
            with torch.no_grad():
                for window, row in enumerate(tokens):
                    hidden[window] = module(input_ids=torch.from_numpy(row)[None])[0]
        finally:
            release(module)
        return hidden

    def head(self) -> NoReturn:
        """Raise UnsupportedError: there is none."""
        raise UnsupportedError(
            f"{self.checkpoint.path}: an encoder predicts no tokens, so there is no loss to measure; choose a method "
            "that needs none, such as svd-llm, with --ranks uniform or relative."
        )

    def _parts(self) -> tuple[list[nn.Module], nn.Module]:
        blocks = next(module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        return list(blocks), nn.Identity()

    def _record(self, batch: int, length: int) -> list[dict[str, Any]]:
        """Run the model's own forward with blocks and embeddings replaced by stubs, and listen."""
        heard: list[dict[str, Any]] = []
        embeddings: Any = self.model.embeddings
        embeddings.forward = lambda *_args, **_kwargs: torch.zeros(batch, length, self.hidden)
        try:
            with self._stubbed(lambda _index, _hidden, kwargs: heard.append(kwargs)):
                self.base(input_ids=torch.ones(batch, length, dtype=torch.int64))
        finally:
            del embeddings.forward
        return heard
