"""Run models on the material of a sweep, the dense one once, every other from its first changed block on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mixt_export.compression.scratch import Scratch
from mixt_export.errors import UnsupportedError
from mixt_export.evaluation.multiple_choice import ChoiceSequence, choice_scores, probabilities
from mixt_export.progress import Progress
from mixt_export.sweep.material import Material
from mixt_export.verification.session import Ids

#: Logits exist for so many positions at once.
_ROWS = 128

Observe = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class TextFigures:
    """Sums over the ``tokens`` predicted tokens of a text: ``nll`` and ``kl`` (dense ‖ this) in nats, ``agreed``
    positions where both have the same top token.
    """

    tokens: int
    nll: float
    kl: float
    agreed: int


@dataclass(frozen=True)
class Measured:
    """One model's figures. ``texts`` in the order of the material; ``probabilities`` (questions, 4) of the choices.

    ``mass``: mean total probability of the tokens that are read at the answer position (one position a choice);
    ``states`` (questions, blocks + 1, hidden) float32: the residual stream at the answer position, after the embedding
    and after each block, before the final norm.
    """

    texts: tuple[TextFigures, ...]
    probabilities: NDArray[np.float64]
    mass: float | None
    states: NDArray[np.float32]


class Decoder:
    """A transformers decoder in parts: blocks that can be entered in the middle, and the head apart.

    Raises UnsupportedError when ``model`` keeps its blocks elsewhere than decoders do.
    """

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        self.model, self.base, self.head = whole, whole.base_model, whole.get_output_embeddings()
        if not isinstance(getattr(self.base, "layers", None), nn.ModuleList) or self.head is None:
            raise UnsupportedError(
                f"a {self.model.config.model_type!r} model cannot be swept: its decoder has no list of layers."
            )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.base.layers)

    @property
    def path(self) -> str:
        """Module path of the list of blocks."""
        names: dict[int, str] = {id(module): name for name, module in self.model.named_modules()}
        return names[id(self.base.layers)]

    def run(
        self, tokens: Ids, observe: Observe | None = None, *, start: int = 0, entry: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the head reads, (length, hidden), for one sequence (length,).

        ``observe(block, output (length, hidden))`` hears every block from ``start`` on, and as block -1 what block 0
        reads when ``start`` is 0. ``entry`` (length, hidden) is what block ``start`` > 0 reads; the blocks before it
        are not run.
        """
        with torch.inference_mode(), self._entered(start, entry), self._observed(observe, start):
            ids = torch.from_numpy(np.ascontiguousarray(tokens[None, :]))
            hidden: torch.Tensor = self.base(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) of ``hidden`` (rows, hidden)."""
        with torch.inference_mode():
            return torch.log_softmax(self.head(hidden).float(), dim=-1)

    def check_head(self, tokens: Ids) -> None:
        """Raise UnsupportedError when the model's logits are not its head applied to what its decoder gives."""
        hidden = self.run(tokens)
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(tokens[None, :]))
            whole = self.model(input_ids=ids, use_cache=False).logits[0]
            if not torch.allclose(whole, self.head(hidden), rtol=1e-3, atol=1e-3):
                raise UnsupportedError(
                    f"a {self.model.config.model_type!r} model cannot be swept: its logits are more than its output "
                    "layer computes."
                )

    @contextmanager
    def _entered(self, start: int, entry: torch.Tensor | None) -> Iterator[None]:
        skipped = self.base.layers[:start]
        for layer in skipped:
            layer.forward = lambda *_args, **_kwargs: None if entry is None else entry[None]
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    @contextmanager
    def _observed(self, observe: Observe | None, start: int) -> Iterator[None]:
        hooks = []
        if observe is not None:
            hooks = [
                layer.register_forward_hook(_after(observe, index))
                for index, layer in enumerate(self.base.layers)
                if index >= start
            ]
            if start == 0:
                hooks.append(self.base.layers[0].register_forward_pre_hook(_before(observe)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _after(observe: Observe, index: int) -> Callable[[Any, Any, Any], None]:
    return lambda _module, _inputs, output: observe(index, (output[0] if isinstance(output, tuple) else output)[0])


def _before(observe: Observe) -> Callable[[Any, Any], None]:
    return lambda _module, inputs: observe(-1, inputs[0][0])


class Probe:
    """Measures models on ``material``; the first must be the dense one. Large arrays go to ``scratch``."""

    def __init__(self, material: Material, scratch: Scratch, progress: Progress) -> None:
        self._material, self._scratch, self._progress = material, scratch, progress
        self._entries: dict[int, NDArray[np.float32]] = {}
        self._final: NDArray[np.float32]
        self._dense: Decoder
        self._states: NDArray[np.float32]

    def dense(self, model: nn.Module, entries: Iterable[int]) -> Measured:
        """Measure the dense ``model``; keep its head, what the head reads, and the inputs of blocks ``entries``."""
        decoder = Decoder(model)
        sequences = self._material.sequences
        decoder.check_head(sequences[0][:8])
        hidden, length = decoder.model.config.hidden_size, sum(map(len, sequences))
        for block in set(entries) - {0}:
            self._entries[block] = self._scratch.working_array(f"entry {block}", (length, hidden))
        self._final = self._scratch.working_array("final", (self._material.text_tokens, hidden))
        self._dense = decoder
        measured = self._measure(decoder, 0, itself=True)
        self._states = measured.states
        decoder.model = decoder.base = None  # the blocks are not needed again, the head is
        return measured

    def student(self, model: nn.Module, unchanged: int) -> Measured:
        """Measure ``model``, whose first ``unchanged`` blocks are those of the dense model."""
        start = max((block for block in self._entries if block <= unchanged), default=0)
        return self._measure(Decoder(model), start, itself=False)

    def _measure(self, decoder: Decoder, start: int, *, itself: bool) -> Measured:
        runner = _Runner(decoder, start, self._entries, record=itself)
        sequences = len(self._material.sequences)
        with self._progress.task("measuring", sequences) as advance:
            texts, place = [], 0
            for text in self._material.texts:
                sums = _Sums()
                for window in text.windows:
                    rows = slice(place, place + len(window))
                    final = runner.run(window)
                    if itself:
                        self._final[rows] = final.numpy()
                    sums.add(decoder, self._dense, final, torch.from_numpy(self._final[rows]), window[1:], same=itself)
                    place = rows.stop
                    advance(1)
                texts.append(sums.figures())
            scores, masses, states = self._questions(decoder, runner, advance)
        mass = float(np.mean(masses)) if masses else None
        return Measured(tuple(texts), probabilities(np.array(scores)), mass, states)

    def _questions(
        self, decoder: Decoder, runner: _Runner, advance: Callable[[int], None]
    ) -> tuple[list[NDArray[np.float64]], list[float], NDArray[np.float32]]:
        questions = self._material.questions
        hidden = self._final.shape[1]
        states = np.zeros((len(questions), decoder.blocks + 1, hidden), np.float32)
        if runner.start:
            states[:, : runner.start + 1] = self._states[:, : runner.start + 1]
        scores, masses = [], []
        for number, question in enumerate(questions):
            at = question.position

            def keep(block: int, output: torch.Tensor, number: int = number, at: int = at) -> None:
                states[number, block + 1] = output[at].numpy()

            def read(sequence: ChoiceSequence, keep: Observe = keep) -> list[float]:
                final = runner.run(sequence.tokens, keep)
                positions = sorted({one.position for one in sequence.reads})
                rows = decoder.log_probabilities(final[positions])
                row_of = {position: row for row, position in enumerate(positions)}
                values = [float(rows[row_of[one.position], one.token]) for one in sequence.reads]
                if len(positions) == 1 and len(values) > 1:
                    masses.append(float(np.exp(values).sum()))
                advance(1)
                return values

            scores.append(choice_scores(question, read))
        return scores, masses, states


class _Runner:
    """Runs the sequences of the material in their order, entering at block ``start`` with the dense model's values."""

    def __init__(self, decoder: Decoder, start: int, entries: dict[int, NDArray[np.float32]], *, record: bool) -> None:
        self._decoder, self.start, self._entries, self._record = decoder, start, entries, record
        self._place = 0

    def run(self, tokens: Ids, keep: Observe | None = None) -> torch.Tensor:
        """Next sequence: what the head reads; ``keep`` hears the blocks that run (see Decoder.run)."""
        rows = slice(self._place, self._place + len(tokens))
        self._place = rows.stop

        def observe(block: int, output: torch.Tensor) -> None:
            if self._record and block + 1 in self._entries:
                self._entries[block + 1][rows] = output.numpy()
            if keep is not None:
                keep(block, output)

        entry = torch.from_numpy(self._entries[self.start][rows]) if self.start else None
        return self._decoder.run(tokens, observe, start=self.start, entry=entry)


class _Sums:
    """Running totals of one text."""

    def __init__(self) -> None:
        self.tokens = self.agreed = 0
        self.nll = self.kl = 0.0

    def add(
        self,
        decoder: Decoder,
        dense: Decoder,
        final: torch.Tensor,
        dense_final: torch.Tensor,
        targets: Ids,
        *,
        same: bool,
    ) -> None:
        """Take in one window: ``final`` and ``dense_final`` (length, hidden) predict ``targets`` (length - 1,)."""
        self.tokens += len(targets)
        for begin in range(0, len(targets), _ROWS):
            part = slice(begin, min(begin + _ROWS, len(targets)))
            ours = decoder.log_probabilities(final[part])
            wanted = torch.from_numpy(targets[part])[:, None]
            self.nll -= float(ours.gather(1, wanted).sum(dtype=torch.float64))
            if same:
                self.agreed += len(ours)
                continue
            theirs = dense.log_probabilities(dense_final[part])
            self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.kl += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))

    def figures(self) -> TextFigures:
        """The totals so far."""
        return TextFigures(self.tokens, self.nll, max(self.kl, 0.0), self.agreed)
