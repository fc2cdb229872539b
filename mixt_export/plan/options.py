"""The forms of one linear side by side: predicted times, scores, what each would hold, why one is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mixt_export.network import FactorizedLinear
from mixt_export.plan.forms import Form
from mixt_export.plan.networks import NAIVE, NetworkForm
from mixt_export.plan.objectives import SLOWER, Objective

Times = Mapping[str, Mapping[int, float]]
"""Name of a form -> rows -> predicted seconds."""


class Options:
    """The forms of ``linear``. ``shared``: tensors that other linears hold as well; they cost no form anything.

    ``stored``: numbers in the tensors that are its own.
    """

    def __init__(
        self, linear: FactorizedLinear, forms: tuple[Form, ...], times: Times, objective: Objective, shared: set[str]
    ) -> None:
        self.linear, self.every, self.times, self.objective = linear, forms, times, objective
        self.dense = forms[-1]
        self.scores: dict[str, float] = {}
        self.stored = sum(size for name, size in parts(linear).items() if name not in shared)
        self.stored_form = forms[0]
        self._shared = shared
        self.forms = self._sensible()

    def _sensible(self) -> tuple[Form, ...]:
        """Without forms whose work is out of proportion; a low rank below break-even is never rebuilt."""
        if _is_low_rank(self.linear) and self.stored_form.macs <= self.dense.macs:
            return (self.stored_form,)
        return tuple(form for form in self.every if form.macs <= NAIVE * self.dense.macs)

    def score(self, totals: Mapping[int, float]) -> None:
        """Weighted share of the model's dense time in each regime."""
        weights = self.objective.weights
        self.scores = {
            name: sum(weights[rows] * time / totals[rows] for rows, time in times.items())
            for name, times in self.times.items()
        }

    def size(self, form: Form) -> int:
        """Numbers that the graph holds for this linear alone."""
        if not self._shared or not isinstance(form, NetworkForm):
            return form.elements
        common = sum(
            read.elements for read in form.reads if read.stored and tensor_of(self.linear, read) in self._shared
        )
        return form.elements - common

    def smallest(self, *, alone: bool) -> Form:
        """The fastest of the forms that hold no more than is stored, else of those that hold least.

        ``alone``: what others hold as well counts in full, among the forms as among what is stored.
        """

        def size(form: Form) -> int:
            return form.elements if alone else self.size(form)

        stored = sum(parts(self.linear).values()) if alone else self.stored
        limit = max(stored, min(map(size, self.forms)))
        return self.fastest(form for form in self.forms if size(form) <= limit)

    def least(self, *, naive: bool) -> Form:
        """The one that holds least; ``naive``: whatever work it is."""
        return min(self.every if naive else self.forms, key=lambda form: (self.size(form), self.scores[form.name]))

    def fastest(self, forms: Iterable[Form]) -> Form:
        """The one with the best score; the smaller one where two are alike."""
        return min(forms, key=lambda form: (self.scores[form.name], form.elements))

    def exchange(self, now: Form, spare: int) -> tuple[float, Form] | None:
        """The exchange of ``now`` that gains most time per number among those ``spare`` allows, with that rate."""
        best: tuple[float, Form] | None = None
        for form in self.forms:
            gain, cost = self.scores[now.name] - self.scores[form.name], self.size(form) - self.size(now)
            if gain <= 0 or cost > spare or (self.objective.guarded and self.slow(form) and not self.slow(now)):
                continue
            rate = gain / max(cost, 1)
            if best is None or rate > best[0]:
                best = (rate, form)
        return best

    def gains(self, form: Form) -> dict[int, float]:
        """Predicted times faster than the dense product, by rows."""
        return {rows: time / self.times[form.name][rows] for rows, time in self.times[self.dense.name].items()}

    def slow(self, form: Form) -> bool:
        """Whether ``form`` is slower than the dense product by more than `SLOWER` in some regime."""
        return min(self.gains(form).values()) * SLOWER < 1

    def facts(self, form: Form) -> str:
        """Bytes and predicted gains of ``form``."""
        gains = sorted(self.gains(form).items())
        factors, rows = ", ".join(f"{gain:.2f}" for _, gain in gains), ", ".join(str(rows) for rows, _ in gains)
        share = 100 * form.elements / self.dense.elements
        return f"{share:.1f} % of dense bytes, {factors} x dense speed at {rows} rows"

    def change(self, form: Form, itemsize: int) -> str:
        """What ``form`` merges and what that is worth: ``rebuilt dense for prefill: 4.2x fewer MACs, +12 MB``."""
        if form.macs == self.stored_form.macs and form.elements == self.stored_form.elements:
            return ""
        grown = itemsize * (form.elements - self.stored_form.elements)
        what = "rebuilt dense" if form.dense else "merged" if grown else "reordered"
        ratio = self.stored_form.macs / form.macs
        work = f"{ratio:.1f}x fewer MACs" if ratio > 1 else f"{1 / ratio:.1f}x the MACs"
        return f"{what} for {self.objective.name}: {work}" + (f", {grown / 1e6:+.2f} MB" if grown else "") + "; "

    def reason(self, form: Form, itemsize: int, limit: str) -> str:
        """Why ``form`` was chosen, in one sentence; ``limit`` names what kept faster forms out."""
        fastest = self.fastest(self.forms)
        sound = [other for other in self.forms if not self.slow(other)]
        if form == fastest:
            why = f"fastest for {self.objective.name}"
        elif self.objective.guarded and sound and form == self.fastest(sound):
            why = "fastest that is nowhere slower than dense"
        else:
            why = f"fastest {limit} ({fastest.name} would be faster)"
        return f"{self.change(form, itemsize)}{why}: {self.facts(form)}"


def parts(linear: FactorizedLinear) -> dict[str, int]:
    """Name -> numbers of every tensor that stands for the matrix of ``linear``."""
    found = {tensor.name: tensor.size for tensor in linear.core_tensors()}
    if linear.sparse is not None:
        found[linear.sparse.values.name] = linear.sparse.nnz
    return found


def tensor_of(linear: FactorizedLinear, read: object) -> str:
    """Name of the stored tensor that ``read`` (a `networks.Read` of one core) reads."""
    return linear.branches[read.branch].cores[read.group[0]].tensor.name  # type: ignore[attr-defined]


def _is_low_rank(linear: FactorizedLinear) -> bool:
    """Whether it is the product of two matrices."""
    if len(linear.branches) != 1:
        return False
    (branch,) = linear.branches
    return len(branch.cores) == 2 and len(branch.in_modes) == len(branch.out_modes) == 1
