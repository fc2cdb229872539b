"""A decoder run block by block: one block's weights in memory at a time, float32, transformers' own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import Checkpoint
from mixt_export.compression.memory import release_freed
from mixt_export.compression.stubs import Listen, release, stubbed, stubbed_embeddings
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families import FAMILIES, Decoder, decoder_of
from mixt_export.families.encoders import is_encoder
from mixt_export.reference.conv1d import make_linear
from mixt_export.reference.skeleton import build_skeleton
from mixt_export.reference.tensors import read_tensor

#: Logits exist for so many (token, vocabulary) pairs at once: 32 MB of float32, three times that with gradients.
LOGITS_AT_ONCE = 1 << 23

#: Keys of config.json by which a model multiplies or bounds what this class computes from embedding and head alone.
_SCALINGS = ("embedding_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping")

#: Elements checked for finiteness at once; checking a whole embedding would need twice its memory more.
_PIECE = 1 << 20


class BlockwiseModel:
    """The decoder of ``checkpoint`` on the meta device, of which single parts are materialised.

    ``layers``, ``norm``: its blocks and final norm. Conv1D modules (GPT-2) are nn.Linear here. Raises UnsupportedError
    when the model is of no family this program knows and has no ``layers`` and ``norm`` where decoders have them, or
    scales its logits.
    """

    predicts = True
    """Whether it predicts tokens, so that there is a loss."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model: Any = build_skeleton(checkpoint, dtype=torch.float32, attn="sdpa")
        self._transposed = make_linear(self.model)
        self.base: Any = self.model.base_model
        known = checkpoint.config.get("model_type") in FAMILIES
        self._decoder: Decoder | None = decoder_of(checkpoint.config) if known else None
        self.layers, self.norm = self._parts()
        inside = {part for layer in self.layers for part in layer.modules()}
        self._embeddings = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m not in inside]
        self._paths: dict[nn.Module, str] = {module: name for name, module in self.model.named_modules()}
        self._calls: dict[tuple[int, int], list[dict[str, Any]]] = {}

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @property
    def hidden(self) -> int:
        """Features of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.model.config.vocab_size)

    def block_path(self, index: int) -> str:
        """Module path of block ``index``, e.g. ``model.layers.0``."""
        return self._paths[self.layers[index]]

    def linears(self) -> Iterator[str]:
        """Module paths of every nn.Linear of the decoder blocks, in the order of definition."""
        for index in range(self.blocks):
            for name, module in self.layers[index].named_modules():
                if isinstance(module, nn.Linear):
                    yield f"{self.block_path(index)}.{name}"

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights; they are freed on exit. Parameters are shared by ``clone``."""
        layer = self.layers[index]
        self._materialise(layer)
        try:
            yield layer
        finally:
            release(layer)
            release_freed()

    def clone(self, layer: nn.Module) -> nn.Module:
        """A second module tree on the same tensors as ``layer``; assigning a parameter in one leaves the other."""
        shared = {id(parameter): parameter for parameter in layer.parameters()}
        return copy.deepcopy(layer, memo=dict(shared))

    def calls(self, batch: int, length: int) -> list[dict[str, Any]]:
        """For each block the keyword arguments (mask, positions, rotary) the model itself passes for such a batch."""
        if (batch, length) not in self._calls:
            self._calls[batch, length] = self._record(batch, length)
        return self._calls[batch, length]

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Apply ``layer``, block ``index`` or its clone, to ``hidden`` (batch, length, features)."""
        out = layer(hidden, **self.calls(hidden.shape[0], hidden.shape[1])[index])
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def embed(self, tokens: np.ndarray[Any, Any], into: np.ndarray[Any, Any]) -> torch.Tensor:
        """Embeddings of ``tokens`` (windows, length) int64, written to ``into`` (windows, length, features) float32.

        Returns a tensor that shares the memory of ``into``.
        """
        for module in self._embeddings:
            self._materialise(module)
        hidden = torch.from_numpy(into)
        first: list[torch.Tensor] = []

        def keep(index: int, value: torch.Tensor, _kwargs: dict[str, Any]) -> None:
            if index == 0:
                first.append(value[0])

        try:
            with self._stubbed(keep):
                for window, row in enumerate(tokens):
                    self.base(input_ids=torch.from_numpy(row)[None], use_cache=False)
                    hidden[window] = first.pop()
        finally:
            release(*self._embeddings)
        return hidden

    def loss_gradients(
        self, hidden: Callable[[int], torch.Tensor], tokens: np.ndarray[Any, Any]
    ) -> tuple[torch.Tensor, float]:
        """Gradient of the summed next-token cross-entropy with respect to the last block's output, and mean loss.

        ``hidden(window)`` gives (length, features); returns (windows, length, features) and nats per token. Logits
        exist for a few hundred tokens at a time. The last position of a window has no next token and gradient zero.
        """
        length = tokens.shape[1]
        gradients = torch.zeros(len(tokens), length, self.hidden)
        total = 0.0
        with self.head() as logits:
            for window in range(len(tokens)):
                rows, targets = hidden(window), torch.from_numpy(tokens[window, 1:])
                for span in self.spans(length - 1):
                    part = rows[span].detach().requires_grad_(True)
                    loss = nn.functional.cross_entropy(logits(part), targets[span], reduction="sum")
                    (gradients[window, span],) = torch.autograd.grad(loss, part)
                    total += loss.item()
        return gradients, total / (len(tokens) * max(1, length - 1))

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """While open: the last block's output (tokens, features) -> logits (tokens, vocabulary) float32.

        Gradients flow to the argument. Call it for one of ``spans`` at a time.
        """
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        self._materialise(self.norm)
        if bool(self.model.config.tie_word_embeddings):
            self._materialise(embedding)
            head.register_parameter("weight", embedding.weight)
        else:
            self._materialise(head)
        try:
            yield lambda hidden: self.bounded(head(self.norm(hidden)).float())
        finally:
            release(self.norm, embedding, head)

    def bounded(self, logits: torch.Tensor) -> torch.Tensor:
        """What the family does to the product of head and hidden state: scale and softcap."""
        if self._decoder is None:
            return logits
        scaled, cap = logits * self._decoder.logit_scale, self._decoder.logit_softcap
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    def stored(self, name: str) -> torch.Tensor:
        """Parameter ``name`` of the model in float32 as its module holds it: (out, in) for every linear."""
        tensor = read_tensor(self.checkpoint.store, name, "float32")
        return tensor.T.contiguous() if name in self._transposed else tensor

    def linear_shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of the stored dense weight of the linear ``name``.

        Raises CheckpointError when it is missing or no matrix.
        """
        weight = f"{name}.weight"
        shape = self.checkpoint.store.find(weight).ref.shape
        if len(shape) != 2:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {weight!r} has shape {shape}, expected a matrix; download or write "
                "the model again."
            )
        return shape[::-1] if self.flipped(name) else shape

    def flipped(self, name: str) -> bool:
        """Whether the checkpoint holds the weight of the linear ``name`` as (in, out), as GPT-2's does."""
        return f"{name}.weight" in self._transposed

    def _parts(self) -> tuple[list[nn.Module], nn.Module]:
        """Blocks and final norm: by the names of the family, else where most decoders have them."""
        base, kind = self.base, f"a {self.checkpoint.config.get('model_type')!r} model"
        if is_encoder(self.checkpoint.config):
            raise UnsupportedError(
                f"{self.checkpoint.path}: {kind} is an encoder, which predicts no tokens; give a decoder."
            )
        if self._decoder is not None:
            norm = self.model.get_submodule(self._decoder.final_norm.weight.removesuffix(".weight"))
            return [self.model.get_submodule(block.prefix) for block in self._decoder.blocks], norm
        if not all(isinstance(getattr(base, part, None), nn.Module) for part in ("layers", "norm", "rotary_emb")):
            raise UnsupportedError(
                f"{self.checkpoint.path}: {kind} cannot be run block by block: its decoder has no layers, norm and "
                "rotary_emb."
            )
        scaling = next((name for name in _SCALINGS if getattr(self.model.config, name, None) not in (None, 1)), None)
        if scaling is not None:
            raise UnsupportedError(
                f"{self.checkpoint.path}: {kind} cannot be run block by block: its {scaling} scales embeddings or "
                "logits, which is not supported."
            )
        return list(base.layers), base.norm

    def spans(self, tokens: int) -> Iterator[slice]:
        """Slices that cover range(tokens), each of as many tokens as logits may exist for at once."""
        return spans(tokens, self.vocabulary)

    def _materialise(self, module: nn.Module) -> None:
        path = self._paths[module]
        tensors: Mapping[str, torch.Tensor] = {
            name: self._read(f"{path}.{name}", meta) for name, meta in module.named_parameters() if meta.is_meta
        }
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)

    def _read(self, name: str, meta: torch.Tensor) -> torch.Tensor:
        stored, wanted = self.checkpoint.store.find(name).ref, tuple(meta.shape)
        wanted = wanted[::-1] if name in self._transposed else wanted
        if stored.shape != wanted:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name!r} has shape {stored.shape}, config.json asks for {wanted}."
            )
        tensor = self.stored(name)
        if not all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), _PIECE)):
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name!r} holds NaN or infinity.")
        return tensor

    def _record(self, batch: int, length: int) -> list[dict[str, Any]]:
        """Run the model's own forward with blocks, norm and embeddings replaced by stubs, and listen."""
        heard: list[dict[str, Any]] = []
        tokens = torch.zeros(batch, length, dtype=torch.int64)

        def listen(_index: int, _hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
            heard.append(kwargs)

        with stubbed_embeddings(self._embeddings), self._stubbed(listen):
            self.base(input_ids=tokens, use_cache=False)
        return heard

    def _stubbed(self, listen: Listen) -> AbstractContextManager[None]:
        """While open, blocks and norm return what they are given; ``listen`` hears each block's arguments."""
        return stubbed(self.layers, self.norm, listen)


def spans(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover range(tokens), each of as many tokens as logits may exist for at once."""
    step = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
