"""MixT or low rank in the place of any nn.Linear of any torch module, made from what the module is fed.

Every replacement is fitted to the outputs of the original linear, each row weighted by 1/||W x||²
(tensor_mixture/moments.py), in closed form; then, if asked, all factors together are trained until the module's output
is the original's again. Nothing is assumed about the module but that it runs its linears by calling them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mixt_export.compression.optimiser import Optimiser
from mixt_export.compression.precision import fast_products
from mixt_export.compression.recover.settings import rate_for
from mixt_export.compression.refine import RefineSettings, draws, gradients_for, schedule
from mixt_export.compression.scratch import IN_MEMORY
from mixt_export.compression.settings import Settings
from mixt_export.compression.statistics import Reached
from mixt_export.compression.tensor_mixture.moments import Moments, token_weights
from mixt_export.compression.tensor_mixture.replacements import Solve, low_rank_solver, mixt_solver
from mixt_export.compression.tensor_mixture.sizes import mixt_of, terms_of
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.progress import SILENT, Progress

Inputs = Sequence[Mapping[str, Any]]
"""Keyword arguments of one forward pass each."""

#: One in so many inputs, one at least, is held out of a refinement; these are measured so often on the way.
_HELD_OUT, _CHECKS = 8, 6

#: What the errors of sizes.py, written for the command line, are called here.
_ARGUMENTS = {
    "--exclude linears that should stay dense": "leave linears that should stay dense out of names",
    "--exclude leaves the linear dense": "a linear that is not in names stays dense",
    "--paper-padding": "paper_padding",
    "--n-tensors": "n_tensors",
    "--bond": "bond",
}


@dataclass(frozen=True)
class LinearReport:
    """``terms``: N_T whose parameters were the budget; ``error``: mean over rows of ||W x - W' x'||² / ||W x||²,
    on the inputs that calibrated it, x' as the replacement saw it. Parameters without bias.
    """

    name: str
    method: str
    in_features: int
    out_features: int
    terms: int
    params_before: int
    params_after: int
    error: float


@dataclass(frozen=True)
class GenericReport:
    """``refined``: (before, after) error of the output, see ``refine_replaced``; None without."""

    linears: tuple[LinearReport, ...]
    refined: tuple[float, float] | None

    @property
    def params_before(self) -> int:
        """Parameters of the replaced linears as they were, without biases."""
        return sum(linear.params_before for linear in self.linears)

    @property
    def params_after(self) -> int:
        """Parameters of what replaced them, without biases."""
        return sum(linear.params_after for linear in self.linears)


def replace_linears(
    module: nn.Module,
    names: str | Sequence[str],
    inputs: Iterable[Mapping[str, Any]],
    *,
    n_tensors: int | Mapping[str, int] = 4,
    bond: int = 2,
    paper_padding: bool = False,
    method: str = "mixt",
    sequential: bool = True,
    counted: str | None = None,
    refine_steps: int = 0,
    matrix_rate: float | None = None,
    learning_rate: float = 2e-3,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> GenericReport:
    """Replace linears of ``module`` in place, in the order in which it runs them.

    ``names``: a regular expression searched in module paths, or the exact paths. ``inputs``: keyword arguments of one
    forward pass each; kept in memory. ``n_tensors``, ``bond``, ``paper_padding``: see families.MixTOptions.
    ``method``: "mixt" (reference.tensor_mixture.MixTLinear) or "low-rank" with no more parameters than that MixT.
    ``sequential``: each linear is fitted on inputs that went through those already replaced, its target the original's
    output on the original's inputs; otherwise on the original's inputs. ``counted``: name of the argument, such as
    "attention_mask", whose non-zero entries are the rows that count wherever a tensor has its leading axes. A linear is
    taken to run as often in every pass as in the first.

    ``refine_steps`` > 0 then calls ``refine_replaced`` with that many steps and the two rates. Equal arguments give
    equal factors.

    The module runs in eval mode and gets its modes back; replaced linears keep their bias, dtype float32.
    Raises UsageError for names that are no nn.Linear, sizes that do not fit, no inputs; UnsupportedError for an unknown
    method, a linear that is never run, or linears on another device than the CPU or with another dtype than float32;
    CheckpointError when activations are not finite. ``module`` is as it was when one is raised.
    """
    batches = list(inputs)
    if not batches:
        raise UsageError("no inputs: give the keyword arguments of at least one forward pass.")
    if refine_steps < 0:
        raise UsageError(f"refine_steps is {refine_steps}; give 0 for none, or how many.")
    if refine_steps:
        _rates(refine_steps, 1.0 if matrix_rate is None else matrix_rate, learning_rate)
    linears = _named(module, names)
    with _in_arguments():
        solve = _solver(linears, n_tensors, bond, paper_padding, method, settings or Settings())
    with _evaluating(module):
        order, runs = _order(module, linears, batches[0])
        if not sequential:
            order = [[name for group in order for name in group]]
        original = copy.deepcopy(module)
        reports: list[LinearReport] = []
        try:
            with torch.no_grad(), progress.task("replacing linears", len(linears)) as advance:
                for group in order:
                    moments = _moments(original, module, {name: runs[name] for name in group}, batches, counted)
                    for name in group:
                        reports.append(_replace(module, linears[name], name, solve, moments.pop(name), method))
                        advance(1)
            terms = terms_of(n_tensors, linears)
            report = GenericReport(tuple(replace(one, terms=terms[one.name]) for one in reports), None)
            if refine_steps:
                report = refine_replaced(
                    module,
                    original,
                    report,
                    batches,
                    steps=refine_steps,
                    matrix_rate=matrix_rate,
                    learning_rate=learning_rate,
                    counted=counted,
                    seed=seed,
                    progress=progress,
                )
        except BaseException:
            for name, linear in linears.items():
                module.set_submodule(name, linear)
            raise
    return report


def refine_replaced(
    module: nn.Module,
    original: nn.Module,
    report: GenericReport,
    inputs: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    matrix_rate: float | None = None,
    learning_rate: float = 2e-3,
    counted: str | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> GenericReport:
    """Train what ``replace_linears`` put into ``module`` until its output is that of ``original``; gives ``report``
    with ``refined``.

    Factors and biases of the replacements are trained together, on one element of ``inputs`` per step, in place. The
    loss is the mean over rows of ||o - y||² / ||y||², y the first tensor of the original's output (..., features): on
    unit rows 2 - 2 cosine. Give a ``module`` whose output is what is used, such as pooled embeddings and not tokens.
    ``matrix_rate``: relative step length of a factor (see optimiser.py), None for what suits the share of parameters
    that ``report`` kept (recover.settings.rate_for); ``learning_rate``: of Adam, for biases; both warm up and then
    follow a cosine (RefineSettings).

    An eighth of ``inputs``, the last ones and one at least, are not trained on (unless there is only one) and measured
    now and then: the parameters that were best on them stay, the untrained ones if none was better. ``refined`` is
    this error before and after. Inputs that the replacements were fitted to favour the untrained parameters: other
    ones serve better. ``counted``: see ``replace_linears``.
    Raises UsageError for no inputs, no steps, rates that are not positive; UnsupportedError for an output without a
    tensor.
    """
    batches = list(inputs)
    if not batches:
        raise UsageError("no inputs: give the keyword arguments of at least one forward pass.")
    rate = rate_for(report.params_after / report.params_before) if matrix_rate is None else matrix_rate
    rates = _rates(steps, rate, learning_rate)
    paths = [linear.name for linear in report.linears]
    trained = {
        f"{path}.{name}": value for path in paths for name, value in module.get_submodule(path).named_parameters()
    }
    asked = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    held = max(1, len(batches) // _HELD_OUT)
    training = batches[:-held] or batches
    optimiser = Optimiser(trained, rates.matrix_rate, rates.learning_rate)
    checked = {steps * (check + 1) // _CHECKS for check in range(_CHECKS)}
    with _evaluating(module), _evaluating(original):
        loss = _Loss(original, module, counted)
        before = best = _mean(loss, batches[-held:])
        kept = {name: value.detach().clone() for name, value in trained.items()}
        try:
            with gradients_for(module, trained.values()), progress.task("refining", steps) as advance:
                for step, part in enumerate(draws(len(training), 1, steps, seed)):
                    with fast_products(), torch.enable_grad():
                        torch.autograd.backward(loss(training[int(part[0])]))
                    optimiser.step(schedule(step, steps, rates.warm_up, rates.final))
                    if step + 1 in checked:
                        found = _mean(loss, batches[-held:])
                        if found < best:
                            best = found
                            kept = {name: value.detach().clone() for name, value in trained.items()}
                    advance(1)
        finally:
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(kept[name])
            for parameter, wanted in asked:
                parameter.requires_grad_(wanted)
    return replace(report, refined=(before, best))


def _rates(steps: int, matrix_rate: float, learning_rate: float) -> RefineSettings:
    return RefineSettings(steps=steps, batch=1, matrix_rate=matrix_rate, learning_rate=learning_rate)


class _Loss:
    """Mean over the rows that count of ||o - y||² / ||y||²; y is computed once per input as far as memory allows."""

    def __init__(self, original: nn.Module, module: nn.Module, counted: str | None) -> None:
        self.original, self.module, self.counted = original, module, counted
        self.kept: dict[int, torch.Tensor] = {}
        self.room = IN_MEMORY

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Scalar; ``batch`` has to live as long as this object."""
        wanted = self._wanted(batch)
        rows = _rows(batch, self.counted, wanted)
        y, o = wanted[rows], _first_tensor(self.module(**batch))[rows]
        return ((o - y).square().sum(-1) * token_weights(y)).mean()

    @torch.no_grad()
    def _wanted(self, batch: Mapping[str, Any]) -> torch.Tensor:
        found = self.kept.get(id(batch))
        if found is None:
            found = _first_tensor(self.original(**batch))
            if found.nbytes <= self.room:
                self.kept[id(batch)] = found
                self.room -= found.nbytes
        return found


@torch.no_grad()
def _mean(loss: _Loss, batches: Inputs) -> float:
    return sum(float(loss(batch)) for batch in batches) / len(batches)


def _named(module: nn.Module, names: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The chosen linears by path, in the order of definition."""
    every = {name: part for name, part in module.named_modules(remove_duplicate=False) if isinstance(part, nn.Linear)}
    example = f"such as {next(iter(every))!r}" if every else "the module has none"
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise UsageError(f"{names!r} is not a regular expression ({error}).") from error
        chosen = [name for name in every if pattern.search(name)]
        if not chosen:
            raise UsageError(f"{names!r} matches no nn.Linear ({example}).")
    else:
        chosen = list(dict.fromkeys(names))
        wrong = next((name for name in chosen if name not in every), None)
        if wrong is not None or not chosen:
            raise UsageError(f"{wrong!r} is not the path of an nn.Linear ({example})." if chosen else "no names given.")
    for name in chosen:
        linear = every[name]
        if linear.weight.dtype != torch.float32 or linear.weight.device.type != "cpu":
            raise UnsupportedError(
                f"{name}: its weight is {linear.weight.dtype} on {linear.weight.device}; module.float().cpu() first."
            )
        if sum(other is linear for other in every.values()) > 1:
            raise UnsupportedError(f"{name}: one nn.Linear is used under several paths; such a linear stays dense.")
    return {name: every[name] for name in every if name in set(chosen)}


def _solver(
    linears: Mapping[str, nn.Linear],
    n_tensors: int | Mapping[str, int],
    bond: int,
    paper_padding: bool,
    method: str,
    settings: Settings,
) -> Solve:
    """What makes the replacements; both methods are sized by the MixT of the same options."""
    terms = terms_of(n_tensors, linears)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    sized = mixt_of(shapes, terms, dict.fromkeys(linears, "float32"), bond=bond, paper_padding=paper_padding)
    solvers: dict[str, Callable[[], Solve]] = {
        "mixt": lambda: mixt_solver(sized, settings),
        "low-rank": lambda: low_rank_solver({name: _size(linear) for name, linear in sized.items()}, settings),
    }
    if method not in solvers:
        raise UnsupportedError(f"method {method!r} is unknown here; choose one of {', '.join(solvers)}.")
    return solvers[method]()


def _replace(
    module: nn.Module, linear: nn.Linear, name: str, solve: Solve, moments: Moments, method: str
) -> LinearReport:
    found = solve(name, linear, moments)
    module.set_submodule(name, found.module().train(linear.training).requires_grad_(linear.weight.requires_grad))
    dense = linear.in_features * linear.out_features
    return LinearReport(
        name, method, linear.in_features, linear.out_features, 0, dense, _size(found.linear), found.error
    )


def _size(linear: FactorizedLinear) -> int:
    """Parameters without the bias."""
    return sum(tensor.size for tensor in linear.core_tensors())


def _order(
    module: nn.Module, linears: Mapping[str, nn.Linear], batch: Mapping[str, Any]
) -> tuple[list[list[str]], dict[str, int]]:
    """Linears in the order of execution, those that read the very same tensor together; and how often each runs."""
    seen: list[tuple[torch.Tensor, list[str]]] = []
    runs = dict.fromkeys(linears, 0)

    def hear(name: str, x: torch.Tensor) -> None:
        runs[name] += 1
        if runs[name] > 1:
            return
        names = next((names for tensor, names in seen if tensor is x), None)
        if names is None:
            seen.append((x, [name]))
        else:
            names.append(name)

    with torch.no_grad(), _hearing(module, linears, hear):
        module(**batch)
    missing = next((name for name in linears if not runs[name]), None)
    if missing is not None:
        raise UnsupportedError(f"{missing}: the module never runs this linear on the first of the inputs.")
    return [names for _, names in seen], runs


def _moments(
    original: nn.Module, module: nn.Module, runs: Mapping[str, int], batches: Inputs, counted: str | None
) -> dict[str, Moments]:
    """Moments of every linear named in ``runs`` over all rows that count."""
    linears: dict[str, nn.Linear] = {name: original.get_submodule(name) for name in runs}  # type: ignore[misc]
    found = {name: Moments(linear.out_features, linear.in_features) for name, linear in linears.items()}
    for batch in batches:
        before, after = _calls(original, runs, batch), _calls(module, runs, batch)
        for name, linear in linears.items():
            for x, shifted in zip(before[name], after[name], strict=True):
                rows = _rows(batch, counted, x)
                wanted = nn.functional.linear(x[rows], linear.weight)
                found[name].add(wanted, shifted[rows], token_weights(wanted))
    return found


def _calls(module: nn.Module, runs: Mapping[str, int], batch: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    """What each linear reads in one forward pass, which ends when all have run as often as ``runs`` says."""
    calls: dict[str, list[torch.Tensor]] = {name: [] for name in runs}

    def hear(name: str, x: torch.Tensor) -> None:
        calls[name].append(x)
        if all(len(heard) >= runs[other] for other, heard in calls.items()):
            raise Reached

    with _hearing(module, runs, hear), suppress(Reached):
        module(**batch)
    return calls


@contextmanager
def _hearing(module: nn.Module, names: Iterable[str], hear: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While open, ``hear(name, x)`` gets what the linear of that path reads."""

    def listener(name: str) -> Callable[..., None]:
        return lambda _module, inputs: hear(name, inputs[0])

    with ExitStack() as stack:
        for name in names:
            handle = module.get_submodule(name).register_forward_pre_hook(listener(name))
            stack.callback(handle.remove)
        yield


def _rows(batch: Mapping[str, Any], counted: str | None, tensor: torch.Tensor) -> torch.Tensor:
    """Mask over the leading axes of ``tensor`` (..., features): the rows that count."""
    if counted is not None:
        if counted not in batch:
            raise UsageError(f"the inputs have no argument {counted!r}; they have {', '.join(batch)}.")
        mask = batch[counted]
        if isinstance(mask, torch.Tensor) and mask.shape == tensor.shape[:-1]:
            return mask.bool()
    return torch.ones(tensor.shape[:-1], dtype=torch.bool)


def _first_tensor(output: Any) -> torch.Tensor:
    """The first floating-point tensor (..., features) of a module's output: itself, or inside tuples and mappings."""
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, (torch.Tensor, Mapping, tuple, list)):
            return _first_tensor(part)
    raise UnsupportedError(f"the module's output, a {type(output).__name__}, holds no tensor to refine against.")


@contextmanager
def _in_arguments() -> Iterator[None]:
    """A UsageError from inside speaks of arguments instead of options of the command line."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        for option, argument in _ARGUMENTS.items():
            message = message.replace(option, argument)
        raise UsageError(message) from error


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; every part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
