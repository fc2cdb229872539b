"""The training loop of a recovery: deterministic, stateless but for what State holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mixt_export.compression.blocks import spans
from mixt_export.compression.optimiser import Optimiser
from mixt_export.compression.precision import fast_products, half_activations
from mixt_export.compression.recover.data import HELD_OUT, VALIDATION, Held, Windows
from mixt_export.compression.recover.report import Check
from mixt_export.compression.recover.settings import RecoverSettings
from mixt_export.compression.recover.state import State, StateFolder
from mixt_export.compression.recover.tail import Head, Tail
from mixt_export.compression.recover.teacher import Teacher
from mixt_export.compression.recover.vocabulary import divergence
from mixt_export.compression.refine import draws, schedule
from mixt_export.progress import Progress


@dataclass(frozen=True)
class Measured:
    """Sums over the predicted tokens of some windows: negative log likelihoods in nats, divergence; their number."""

    tokens: int
    teacher_nll: float
    student_nll: float
    kl: float


class Trainer:
    """Trains ``tail.parameters`` in place towards ``teacher``."""

    def __init__(
        self,
        tail: Tail,
        head: Head,
        teacher: Teacher,
        windows: Windows,
        settings: RecoverSettings,
        seed: int,
        folder: StateFolder,
        progress: Progress,
    ) -> None:
        self.tail, self.head, self.teacher, self.windows = tail, head, teacher, windows
        self.settings, self.seed, self.folder, self.progress = settings, seed, folder, progress
        for parameter in tail.parameters.values():
            parameter.requires_grad_(True)
        assert settings.matrix_rate is not None  # recover has settled it
        self.optimiser = Optimiser(tail.parameters, settings.matrix_rate, settings.learning_rate)

    def run(self, resume: bool) -> State:
        """Train to the end, from the saved state with ``resume`` if there is one; the best parameters stay in place."""
        state = self._restored() if resume else None
        if resume and state is None:
            self.progress.note(f"nothing to resume in {self.folder.path}: starting at the beginning.")
        state = state or self._begin()
        losses: list[float] = []
        with fast_products(), self.progress.task("training", self.settings.steps) as advance:
            advance(state.step)
            for step, part in enumerate(self._batches()):
                if step < state.step or self._patience_ended(state):
                    continue
                losses.append(self._step(step, part))
                advance(1)
                state.step = step + 1
                if self._is_check(state.step):
                    self._check(state, sum(losses) / len(losses))
                    self.folder.save(state)
                    losses.clear()
        with torch.no_grad():
            for name, parameter in self.tail.parameters.items():
                parameter.copy_(state.tensors[f"best:{name}"])
        return state

    @torch.no_grad()
    def measure(self, held: Held) -> Measured:
        """Next-token likelihoods and KL(teacher ‖ student) over the whole vocabulary."""
        tokens, teacher_nll, student_nll, kl = 0, 0.0, 0.0, 0.0
        for window in range(held.rows.start, held.rows.stop):
            found = self.tail(self.teacher.inputs[window : window + 1])[0, :-1].float()
            wanted, targets = self.teacher.outputs[window, :-1], self.teacher.tokens[window, 1:]
            for span in spans(len(targets), len(self.head.weight)):
                ours, theirs = self.head.logits(found[span]).float(), self.head.logits(wanted[span]).float()
                student_nll += float(nn.functional.cross_entropy(ours, targets[span], reduction="sum"))
                teacher_nll += float(nn.functional.cross_entropy(theirs, targets[span], reduction="sum"))
                kl += float(divergence(theirs, ours).sum())
            tokens += len(targets)
        return Measured(tokens, teacher_nll, student_nll, kl)

    def held_out_kl(self) -> float:
        """Divergence in nats per token that chooses: the mean over the ends of the training texts, and the mean over
        the windows of other domains, where there are some; both count the same.
        """
        means = []
        with half_activations():
            for role in (HELD_OUT, VALIDATION):
                found = [self.measure(held) for held in self.windows.held if held.role == role]
                if found:
                    means.append(sum(one.kl for one in found) / sum(one.tokens for one in found))
        return sum(means) / len(means)

    def _batches(self) -> Iterator[torch.Tensor]:
        return draws(self.windows.training, self.settings.batch, self.settings.steps, self.seed)

    def _step(self, step: int, part: torch.Tensor) -> float:
        """One update from the windows ``part``; returns the loss before it."""
        teacher, settings = self.teacher, self.settings
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        rows, weights = teacher.vocabulary.draw(
            torch.cat([teacher.likely[part].flatten(), teacher.tokens[part].flatten().int()]), generator
        )
        wanted = teacher.outputs[part].flatten(0, 1)
        with half_activations():
            found = self.tail(teacher.inputs[part]).flatten(0, 1).float()
        loss = divergence(self.head.logits(wanted, rows), self.head.logits(found, rows), weights).mean()
        if settings.hidden_weight:
            apart = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
            loss = loss + settings.hidden_weight * apart.mean()
        torch.autograd.backward(loss)
        self.optimiser.step(schedule(step, settings.steps, settings.warm_up, settings.final))
        return float(loss.detach())

    def _begin(self) -> State:
        state = State(0, 0)
        self._check(state, None)
        return state

    def _is_check(self, step: int) -> bool:
        steps, checks = self.settings.steps, self.settings.checks
        return step == steps or step * checks // steps > (step - 1) * checks // steps

    def _check(self, state: State, training_loss: float | None) -> None:
        """Measure the held-out windows and take a picture of everything."""
        kl = self.held_out_kl()
        best = min((check.held_out_kl for check in state.checks), default=float("inf"))
        state.checks.append(Check(state.step, kl, training_loss))
        if kl < best or not state.tensors:
            state.best_step = state.step
            state.tensors.update(
                {f"best:{name}": value.detach().clone() for name, value in self.tail.parameters.items()}
            )
        state.tensors.update(
            {f"now:{name}": value.detach().clone() for name, value in self.tail.parameters.items()},
        )
        state.tensors.update(self.optimiser.tensors())

    def _patience_ended(self, state: State) -> bool:
        checks = state.checks
        best = min(range(len(checks)), key=lambda index: checks[index].held_out_kl)
        return len(checks) - 1 - best >= self.settings.patience

    def _restored(self) -> State | None:
        """The saved state with parameters and moments put back, or None when nothing was saved."""
        wanted = {f"{kind}:{name}": value for name, value in self.tail.parameters.items() for kind in ("now", "best")}
        state = self.folder.load({**wanted, **self.optimiser.tensors()})
        if state is None:
            return None
        with torch.no_grad():
            for name, parameter in self.tail.parameters.items():
                parameter.copy_(state.tensors[f"now:{name}"])
        self.optimiser.restore(state.tensors, state.step)
        return state
