"""A linear as a tensor train that serves its inputs, with outliers beside it where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from mixt_export.compression.closed_form import damped, regressed
from mixt_export.compression.roots import cholesky
from mixt_export.compression.settings import Settings
from mixt_export.compression.tensor_mixture.moments import Moments
from mixt_export.compression.tensor_mixture.replacements import Replacement, replacement
from mixt_export.compression.tensor_train.decomposition import ranks_within, spectra
from mixt_export.compression.tensor_train.fitting import Outliers, fit, marginals, whiten, whitened_svd
from mixt_export.compression.tensor_train.modes import Modes
from mixt_export.network import build
from mixt_export.network.build.matrix import with_sparse


@dataclass(frozen=True)
class Size:
    """What one linear becomes; ``ranks`` None: chosen within a budget; ``outliers``: entries stored beside it."""

    modes: Modes
    ranks: tuple[int, ...] | None
    outliers: int
    dtype: str


@dataclass
class TrainSolver:
    """Callable as replacements.Solve. ``params`` fills with what the linears became, numbers by module path.

    ``keep``: share of the parameters of the linears replaced so far, outliers included, that is not exceeded; what
    whole ranks leave of it goes to the next linear. ``weighted`` False: the train is that of the weight, S = I.
    """

    sizes: Mapping[str, Size]
    keep: float
    settings: Settings
    weighted: bool
    params: dict[str, int] = field(default_factory=dict)
    _left: float = 0.0

    def __call__(self, name: str, original: nn.Linear, moments: Moments) -> Replacement:
        """See replacements.Solve."""
        size, settings = self.sizes[name], self.settings
        weight = original.weight.detach().double()
        target, gram = weight, None
        if self.weighted:
            target = regressed(weight, moments.cross, moments.gram, settings.anchor_damping)
            gram = damped(moments.gram, settings.anchor_damping)
        outliers = Outliers.largest(target, size.outliers) if size.outliers else None
        inside = target if outliers is None else target - outliers.matrix(target)
        metrics = None if gram is None else marginals(gram, size.modes[0])
        ranks = size.ranks
        if ranks is None:
            self._left += self.keep * weight.numel()
            whitened = inside if metrics is None else whiten(inside, [cholesky(metric) for metric in metrics])
            ranks = ranks_within(spectra(whitened, size.modes), size.modes, int(self._left) - size.outliers)
        start = whitened_svd(inside, metrics, size.modes, ranks)
        sweeps, steps = settings.als_sweeps, settings.als_steps
        train = fit(target, gram, size.modes, start, sweeps=sweeps, steps=steps, outliers=outliers)
        linear = build.tensor_train(name, *size.modes, ranks, dtype=size.dtype, method="tt")
        residual = None
        if train.outliers is not None:
            linear = with_sparse(linear, size.outliers, dtype=size.dtype, index_dtype="int32")
            residual = (train.outliers.rows, train.outliers.columns, train.outliers.values)
        self.params[name] = linear.params
        if size.ranks is None:
            self._left -= linear.params
        return replacement(linear, original, train.cores, moments.error(train.matrix(size.modes)), residual)
