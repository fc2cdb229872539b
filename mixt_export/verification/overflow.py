"""Which tensors of a model outgrow float16: run calibration prompts through the PyTorch reference, keep the maxima.

The reference runs in float32 and knows nothing of the lowering. What flows between the factors of a linear is
recomputed from the linear's captured input, in the order in which the exported graph contracts.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import Checkpoint
from mixt_export.families.wiring import Decoder
from mixt_export.lower.overflow import Extremes
from mixt_export.lower.precision import HEAD
from mixt_export.network import Branch, FactorizedLinear, Order, best_orders
from mixt_export.network.order import steps
from mixt_export.progress import SILENT, Progress
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.session import Ids
from mixt_export.verification.tokens import make_sequences, open_tokenizer
from mixt_export.verification.torch_model import TorchModel

#: Positions of shipped text beside the prompts. Outliers sit at the first tokens of a sequence and at punctuation.
_POSITIONS = 256
_ATTENTION = "mixt_scan"


def scan(
    checkpoint: Checkpoint,
    decoder: Decoder,
    *,
    max_length: int,
    threads: int = 1,
    progress: Progress = SILENT,
) -> Extremes:
    """Run the shipped texts and prompts (random tokens without a tokenizer) and return the largest |x| per tensor.

    ``decoder`` may be the first blocks of the model. Raises MissingDependencyError without torch and transformers.
    """
    with progress.task("loading the PyTorch reference"):
        model = TorchModel(checkpoint, threads=threads, layers=len(decoder.blocks))
    options = VerifyOptions(positions=max(min(_POSITIONS, max_length), 2))
    made = make_sequences(open_tokenizer(checkpoint.path), model.vocab_size, max_length, options)
    watch = _Watch(model, decoder, checkpoint)
    with watch.attached(), progress.task("looking for overflow", len(made.windows) + len(made.prompts)) as advance:
        for tokens in (*made.windows, *made.prompts):
            watch.run(tokens)
            advance(1)
    return watch.extremes()


class _Watch:
    """Hooks on every linear and block, and an attention that looks at its scores."""

    def __init__(self, model: TorchModel, decoder: Decoder, checkpoint: Checkpoint) -> None:
        self._model, self._decoder = model, decoder
        self._factors, self._store = checkpoint.factors, checkpoint.store
        blocks = len(decoder.blocks)
        self._tokens = 0
        self._inputs: dict[str, float] = {}
        self._outputs: dict[str, float] = {}
        self._inner: dict[str, float] = {}
        self._residual = [0.0] * (blocks + 1)
        self._series = {name: [0.0] * blocks for name in ("scores", "keys", "values")}
        self._loaded: dict[str, NDArray[np.float32]] = {}

    def run(self, tokens: Ids) -> None:
        self._model.logits(tokens)
        self._tokens += len(tokens)

    def extremes(self) -> Extremes:
        return Extremes(
            tokens=self._tokens,
            inputs=self._inputs,
            outputs=self._outputs,
            inner=self._inner,
            residual=tuple(self._residual),
            **{name: tuple(peaks) for name, peaks in self._series.items()},
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        model: Any = self._model.model
        AttentionInterface.register(_ATTENTION, self._attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        before = model.config._attn_implementation
        model.config._attn_implementation = _ATTENTION
        names = [linear.name for block in self._decoder.blocks for linear in block.linears]
        hooks = [model.get_submodule(name).register_forward_hook(self._linear(name)) for name in names]
        hooks.append(model.get_output_embeddings().register_forward_hook(self._linear(HEAD)))
        hooks.append(model.get_input_embeddings().register_forward_hook(self._stream(0)))
        hooks += [block.register_forward_hook(self._stream(i + 1)) for i, block in enumerate(self._model.blocks)]
        own = [part for block in self._model.blocks for part in block.modules() if hasattr(part, "_attn")]
        for part in own:
            part._attn = self._listening(part)
        try:
            yield
        finally:
            model.config._attn_implementation = before
            for part in own:
                del part._attn
            for hook in hooks:
                hook.remove()

    def _linear(self, name: str) -> Any:
        def hook(_module: Any, given: Any, output: Any) -> None:
            self._inputs[name] = max(self._inputs.get(name, 0.0), _peak(given[0]))
            self._outputs[name] = max(self._outputs.get(name, 0.0), _peak(output))
            if name in self._factors:
                linear = self._factors[name]
                flat = given[0].detach().float().reshape(-1, linear.in_features).numpy()
                self._inner[name] = max(self._inner.get(name, 0.0), inner_peak(linear, self._load, flat))

        return hook

    def _stream(self, index: int) -> Any:
        def hook(_module: Any, _given: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            self._residual[index] = max(self._residual[index], _peak(value))

        return hook

    def _listening(self, module: Any) -> Any:
        """The attention of a class that knows no other (GPT-J), its scores noted."""
        attend = module._attn

        def listen(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
            self._scores(module, query, key, value, 1.0 / module.scale_attn)
            return attend(query, key, value, *rest, **more)

        return listen

    def _scores(self, module: Any, query: Any, key: Any, value: Any, scaling: float) -> Any:
        """Scores before softcap and mask, noted where a query sees the key."""
        torch = self._model._torch
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        for name, peak in (("scores", _peak(scores[..., seen])), ("keys", _peak(key)), ("values", _peak(value))):
            series = self._series[name]
            series[module.layer_idx] = max(series[module.layer_idx], peak)
        return scores

    def _attention(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Any, None]:
        """Eager attention, (batch, heads, seq, head_dim)."""
        torch = self._model._torch
        groups = query.shape[1] // key.shape[1]
        scores = self._scores(module, query, key, value, scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        mixed = torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value.repeat_interleave(groups, dim=1)
        return mixed.transpose(1, 2).contiguous(), None

    def _load(self, name: str) -> NDArray[np.float32]:
        if name not in self._loaded:
            self._loaded[name] = self._store.read(name, "float32")
        return self._loaded[name]


def inner_peak(linear: FactorizedLinear, load: Any, x: NDArray[np.float32]) -> float:
    """Largest |value| between the factors of ``linear`` for x (tokens, in), the unscaled sum of its branches included.

    ``load(name)`` gives a core as float32. Branches of one scale are added before they are scaled, as the graph does.
    """
    peak, alike = 0.0, len({branch.scale for branch in linear.branches}) == 1
    total: NDArray[np.float32] | None = None
    for branch, order in zip(linear.branches, best_orders(linear), strict=True):
        y, largest = _walk(linear, branch, order, load, x)
        peak = max(peak, largest)
        if alike:
            y = y[:, : linear.out_features]
            total = y if total is None else total + y
            peak = max(peak, float(np.abs(total).max(initial=0.0)))
    return peak


def _walk(
    linear: FactorizedLinear, branch: Branch, order: Order, load: Any, x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], float]:
    """The unscaled branch, (tokens, ∏ out_modes), and the largest |value| on the way, the result included."""
    state = np.pad(x, ((0, 0), (0, branch.in_size - linear.in_features)))
    state = state.reshape(len(x), *(size for _, size in branch.in_modes))
    labels: Sequence[str] = [label for label, _ in branch.in_modes]
    letter = dict(zip(branch.sizes(), string.ascii_letters, strict=False))
    peak = 0.0
    for index, (_, after) in zip(order, steps(branch, order), strict=True):
        core = branch.cores[index]
        left, right, result = ("".join(letter[label] for label in group) for group in (labels, core.labels, after))
        equation = f"...{left},{right}->...{result}"
        state = np.asarray(np.einsum(equation, state, load(core.tensor.name), optimize=True))
        labels = after
        peak = max(peak, float(np.abs(state).max(initial=0.0)))
    axes = [labels.index(label) + 1 for label, _ in branch.out_modes]
    return state.transpose(0, *axes).reshape(len(x), branch.out_size), peak


def _peak(value: Any) -> float:
    """Largest |x| of a tensor; infinity when an element is not finite."""
    if value.numel() == 0:
        return 0.0
    peak = float(value.detach().abs().max())
    return peak if np.isfinite(peak) else float("inf")
