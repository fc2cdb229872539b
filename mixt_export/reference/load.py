"""A model folder as a transformers model: dense, or with its factorised linears executed from the IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixt_export.checkpoints import Checkpoint, open_checkpoint
from mixt_export.errors import CheckpointError, UsageError
from mixt_export.families.encoders import encoder_of, is_encoder
from mixt_export.reference.conv1d import features_of
from mixt_export.reference.linear import linear_module
from mixt_export.reference.skeleton import build_skeleton
from mixt_export.reference.tensors import read_tensor, torch_dtype

ATTENTIONS = ("eager", "sdpa")

#: Tensors that old checkpoints store though they are computed.
_COMPUTED = ("rotary_emb.inv_freq",)


def load_reference(model_dir: str | Path | Checkpoint, *, dtype: str = "float32", attn: str = "eager") -> nn.Module:
    """Load ``model_dir`` as transformers' causal language model, or encoder, in eval mode on the CPU without gradients.

    ``model_dir`` may be a checkpoint that is open already, with tensors laid over it or without. Weights come from its
    headers-checked store, one tensor at a time; each factorised linear is a module that executes its network
    activation-first (reference.linear; MixT builds its matrix where that is cheaper). ``dtype``: float32, float16,
    bfloat16 or float64, of weights and activations; ``attn``: "eager" or "sdpa". Local files only; no code of the
    folder is run.

    Raises CheckpointError when a tensor is missing, unexpected or of the wrong shape, UnsupportedError for an unknown
    model type, UsageError for an unknown dtype or attention, MissingDependencyError without transformers.
    """
    if attn not in ATTENTIONS:
        raise UsageError(f"attention {attn!r} is unknown; choose one of {', '.join(ATTENTIONS)}.")
    kind = torch_dtype(dtype)
    checkpoint = model_dir if isinstance(model_dir, Checkpoint) else open_checkpoint(model_dir)
    model = build_skeleton(checkpoint, dtype=kind, attn=attn)
    filler = _Filler(checkpoint, model, dtype)
    if is_encoder(checkpoint.config):
        filler = _EncoderFiller(checkpoint, model, dtype)
    filler.fill()
    return model


class _Filler:
    """Moves the tensors of a folder into a model on the meta device, each exactly once."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, dtype: str) -> None:
        self.checkpoint, self.model, self.dtype = checkpoint, model, dtype
        self.loaded: dict[str, nn.Parameter] = {}

    def fill(self) -> None:
        """Factorised linears first, then everything else; the tied head last."""
        for name, linear in self.checkpoint.factors.items():
            self._replace(name, linear)
        tied = self._tied_head()
        for name, meta in list(self.model.named_parameters(remove_duplicate=False)):
            if name != tied and meta.is_meta:
                self._assign(name, self._parameter(name, tuple(meta.shape)))
        if tied is not None:
            self._tie(tied)
        self._check_complete(tied)

    def _replace(self, name: str, linear: Any) -> None:
        try:
            old = self.model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"{self.checkpoint.path}: the factorised linear {name!r} is not part of this {self._type()} model."
            ) from error
        expected = features_of(old)
        if expected != (linear.in_features, linear.out_features):
            raise CheckpointError(
                f"{self.checkpoint.path}: the factorised linear {name!r} maps {linear.in_features} to "
                f"{linear.out_features} features, but config.json says {expected[0]} to {expected[1]}."
            )
        if (getattr(old, "bias", None) is None) != (linear.bias is None):
            raise CheckpointError(
                f"{self.checkpoint.path}: the factorised linear {name!r} {'has' if linear.bias else 'lacks'} a bias, "
                "against config.json."
            )
        module = linear_module(linear, self._parameter, self._index)
        self.model.set_submodule(name, module.eval().requires_grad_(False))

    def _parameter(self, name: str, shape: tuple[int, ...] | None = None) -> nn.Parameter:
        if name in self.loaded:
            return self.loaded[name]
        if shape is not None:
            stored = self.checkpoint.store.find(name).ref
            if stored.shape != shape:
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {name!r} has shape {stored.shape}, config.json asks for {shape}."
                )
        tensor = read_tensor(self.checkpoint.store, name, self.dtype)
        self.loaded[name] = nn.Parameter(tensor, requires_grad=False)
        return self.loaded[name]

    def _index(self, name: str) -> torch.Tensor:
        self.loaded[name] = nn.Parameter(read_tensor(self.checkpoint.store, name, "int64"), requires_grad=False)
        return self.loaded[name].data

    def _assign(self, name: str, parameter: nn.Parameter) -> None:
        path, _, last = name.rpartition(".")
        self.model.get_submodule(path).register_parameter(last, parameter)

    def _tied_head(self) -> str | None:
        """Name of the output embedding's weight when config.json ties it to the input embedding."""
        model: Any = self.model
        head = model.get_output_embeddings()
        if head is None or not isinstance(head, nn.Linear) or not model.config.tie_word_embeddings:
            return None
        return next(f"{name}.weight" for name, module in model.named_modules() if module is head)

    def _tie(self, tied: str) -> None:
        model: Any = self.model
        shared = model.get_input_embeddings().weight
        if tied in self.checkpoint.store:
            stored = self._parameter(tied, tuple(shared.shape))
            if not torch.equal(stored, shared):
                raise CheckpointError(
                    f"{self.checkpoint.path}: config.json ties the embeddings, but {tied!r} differs from them; "
                    "correct tie_word_embeddings."
                )
        self._assign(tied, shared)

    def _check_complete(self, tied: str | None) -> None:
        empty = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if empty:
            raise CheckpointError(f"{self.checkpoint.path}: nothing is stored for {empty[0]!r}.")
        unexpected = [
            name
            for name in self.checkpoint.store
            if name not in self.loaded and name != tied and not self._foreign(name)
        ]
        if unexpected:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {unexpected[0]!r} is not part of this {self._type()} model"
                + (f" (and {len(unexpected) - 1} others)." if len(unexpected) > 1 else ".")
            )

    def _foreign(self, name: str) -> bool:
        """Whether the stored tensor ``name`` is none of the model's."""
        return name.endswith(_COMPUTED)

    def _type(self) -> str:
        return str(self.checkpoint.config.get("model_type"))


class _EncoderFiller(_Filler):
    """The same for an encoder: in a task model's folder its names carry a prefix, and pooler and head are left out."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, dtype: str) -> None:
        self.prefix = encoder_of(checkpoint.config, checkpoint.store).prefix
        if self.prefix:
            model = nn.ModuleDict({self.prefix.removesuffix("."): model})
        super().__init__(checkpoint, model, dtype)

    def _tied_head(self) -> str | None:
        return None

    def _foreign(self, name: str) -> bool:
        inner = name.removeprefix(self.prefix)
        return not name.startswith(self.prefix) or inner.startswith("pooler.") or inner.endswith("_ids")
