"""The arguments of compress as one object, checked against what the method understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from mixt_export.compression.families import FAMILIES, Family
from mixt_export.compression.method import DEFAULT_METHOD, Method, get_method
from mixt_export.compression.settings import Settings
from mixt_export.errors import UsageError


class Options(TypedDict, total=False):
    """Keywords of ``compress`` and ``plan``: those of every method, then those of one family (see families)."""

    method: str
    blocks: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    calib: Sequence[str | Path]
    settings: Settings | None
    dtype: str | None
    seed: int
    overwrite: bool
    cache: bool | str | Path
    evaluate: bool
    eval_text: Sequence[str | Path]
    eval_windows: int

    keep: float
    ranks: str | Path
    objective: str | None
    asvd_alpha: float
    update: str | None
    store: str | None
    attended: bool | None

    n_tensors: int | Mapping[str, int] | Sequence[str]
    bond: int
    paper_padding: bool
    permute: bool
    refine_steps: int | None
    controls: bool

    modes: Sequence[str] | str
    cores: int
    tt_rank: int | str | Sequence[str]
    outliers: float

    tucker_ranks: Sequence[str] | Sequence[int] | str
    tucker_share: bool
    hooi_sweeps: int
    hooi_tolerance: float

    whitening: str
    expert_down: bool

    rho: Sequence[float]
    search: bool
    search_windows: int
    minutes: float


@dataclass(frozen=True)
class Request:
    """What was asked for. ``own``: the options of the method's family, an object of its ``options`` class.

    ``blocks_given``: False where ``blocks`` is the family's default, which a model may have too few blocks for.
    """

    model_dir: Path
    output: Path
    method: Method
    own: Any
    blocks: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calib: tuple[str | Path, ...] = ()
    settings: Settings = field(default_factory=Settings)
    dtype: str | None = None
    seed: int = 0
    overwrite: bool = False
    cache: bool | str | Path = True
    evaluate: bool = True
    eval_text: tuple[str | Path, ...] = ()
    eval_windows: int = 2
    blocks_given: bool = True

    @property
    def family(self) -> Family:
        """The family of the method."""
        return FAMILIES[self.method.family]

    @classmethod
    def of(cls, model_dir: str | Path, output: str | Path, options: Options) -> Request:
        """Sort ``options`` into those of every method and those of the family.

        Raises UnsupportedError for an unknown method, UsageError for an option or setting of another family, TypeError
        for one that no family has.
        """
        given: dict[str, Any] = dict(options)
        method = get_method(given.pop("method", DEFAULT_METHOD))
        family = FAMILIES[method.family]
        unknown = [name for name in given if name not in Options.__annotations__]
        if unknown:
            raise TypeError(f"compress() got an unexpected keyword argument {unknown[0]!r}")
        foreign = {name for other in FAMILIES.values() for name in other.option_names} - set(family.option_names)
        for name in given:
            if name in foreign:
                raise UsageError(
                    f"--{_dashed(name)} does not apply to method {method.name}, which has "
                    f"{', '.join(f'--{_dashed(own)}' for own in family.option_names)}."
                )
        seed = given.get("seed", 0)
        if not 0 <= seed < 1 << 31:
            raise UsageError(f"--seed {seed}: give a whole number from 0 to {(1 << 31) - 1}.")
        if given.get("eval_windows", 1) < 1:
            raise UsageError(f"--eval-windows {given['eval_windows']}: give at least 1, or --no-eval.")
        own = family.options(**{name: given.pop(name) for name in family.option_names if name in given})
        settings = given.pop("settings", None) or Settings()
        _check_settings(settings, method, family)
        asked = given.pop("blocks", None)
        for name in ("include", "exclude", "calib", "eval_text"):
            given[name] = tuple(given.get(name) or ())
        return cls(
            Path(model_dir),
            Path(output),
            method,
            own,
            asked or family.blocks,
            settings=settings,
            blocks_given=bool(asked),
            **given,
        )


def _check_settings(settings: Settings, method: Method, family: Family) -> None:
    """Raise UsageError for a setting that was changed and that only other families read."""
    plain = Settings()
    for other in FAMILIES.values():
        for name in sorted(set(other.settings) - set(family.settings)):
            if getattr(settings, name) != getattr(plain, name):
                raise UsageError(f"the setting {name.replace('_', ' ')} does not apply to method {method.name}.")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
