"""One run of compress: what every family of methods shares, and what each has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixt_export.checkpoints import NewTensor, open_checkpoint
from mixt_export.checkpoints.packed import Packed
from mixt_export.compression.clock import Clock
from mixt_export.compression.controls import Controls
from mixt_export.compression.encoder_blocks import blockwise
from mixt_export.compression.report import BlockReport, LayerReport, SearchReport, TextReport
from mixt_export.compression.request import Request
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.self_text import SELF, sampled_windows
from mixt_export.compression.statistics_cache import StatisticsCache, cache_of
from mixt_export.compression.targets import is_expert, select
from mixt_export.compression.texts import calibration_windows, default_texts, open_tokenizer
from mixt_export.errors import UnsupportedError, UsageError
from mixt_export.network import FactorizedLinear
from mixt_export.progress import Progress
from mixt_export.reference.tensors import torch_dtype
from mixt_export.selection import fewer, parse_blocks

Windows = np.ndarray[Any, Any]
"""Token ids (windows, length) int64."""


@dataclass(frozen=True)
class Plan:
    """What a run would do, known from headers alone. ``dense`` and ``budget`` in parameters, ``scratch_bytes`` bytes.

    ``recipe``: the family's choices by name; ``budget``: parameters of the targeted linears afterwards, at most.
    """

    method: str
    recipe: dict[str, Any]
    targets: tuple[str, ...]
    dense: int
    budget: int
    calibration: tuple[str, ...]
    scratch_bytes: int


@dataclass(frozen=True)
class Result:
    """What a run made: the IR of the factorised linears, the tensors to write, and what the report says of them.

    ``notes``: sentences the user should read; ``packed``: tensors of the IR that are written in parts, which are among
    ``tensors``.
    """

    layers: tuple[LayerReport, ...]
    texts: tuple[TextReport, ...]
    factors: dict[str, FactorizedLinear]
    tensors: list[NewTensor]
    blocks: tuple[BlockReport, ...] = ()
    controls: Controls | None = None
    search: SearchReport | None = None
    notes: tuple[str, ...] = ()
    packed: dict[str, Packed] = field(default_factory=dict)


class Job(ABC):
    """A checked request. ``targets``: module paths of the linears to compress, ``texts``: what calibrates them.

    Raises UsageError, CheckpointError or UnsupportedError for everything that shows before a weight is read.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.settings = request, request.settings
        self.cache = StatisticsCache(cache_of(request.cache))
        if request.dtype is not None:
            torch_dtype(request.dtype)
        self.checkpoint = open_checkpoint(request.model_dir)
        if self.checkpoint.factors:
            raise UnsupportedError(
                f"{self.checkpoint.path}: is factorised already; compress the dense model it was made from."
            )
        self.model = blockwise(self.checkpoint)
        if not request.blocks_given and fewer(request.blocks, self.model.blocks):
            self.request = replace(request, blocks="all")
        self.targets = tuple(self._select())
        for name in self.targets:
            self.checkpoint.store.find(f"{name}.weight")
        self._refuse_experts()
        self.check()
        self.texts: tuple[Path | str, ...] = self._texts() if self.needs_tokens else ()

    @property
    def pairs_tokens(self) -> bool:
        """Whether a linear's inputs in the dense and in the compressed model are compared token by token."""
        return False

    @property
    @abstractmethod
    def needs_tokens(self) -> bool:
        """Whether calibration text is read at all."""

    @property
    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """The family's choices by name, plain JSON types."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """Parameters that the targeted linears have afterwards, at most."""

    @property
    @abstractmethod
    def scratch_bytes(self) -> int:
        """Temporary disk, an upper estimate."""

    @abstractmethod
    def check(self) -> None:
        """Check the family's own options. Raises UsageError."""

    @abstractmethod
    def run(self, scratch: Scratch, clock: Clock, progress: Progress) -> Result:
        """Do it; nothing is written but the scratch."""

    def plan(self) -> Plan:
        """What ``run`` would do."""
        return Plan(
            self.request.method.name,
            self.recipe,
            self.targets,
            self.dense,
            self.budget,
            tuple(str(text) for text in self.texts),
            self.scratch_bytes,
        )

    @property
    def dense(self) -> int:
        """Parameters of the targeted linears as they are."""
        return sum(rows * columns for rows, columns in map(self.shape, self.targets))

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a targeted linear."""
        out_features, in_features = self.model.linear_shape(name)
        return out_features, in_features

    def dtype(self, name: str) -> str:
        """Dtype that the factors of a targeted linear are stored in."""
        return self.request.dtype or self.checkpoint.store[f"{name}.weight"].ref.dtype

    def by_block(self) -> dict[int, list[str]]:
        """Block index -> targeted linears by their name inside the block."""
        found: dict[int, list[str]] = {}
        for index in range(self.model.blocks):
            prefix = self.model.block_path(index) + "."
            inside = [name.removeprefix(prefix) for name in self.targets if name.startswith(prefix)]
            if inside:
                found[index] = inside
        return found

    def length(self, asked: int) -> int:
        """``asked`` tokens per window, or as many as the model has positions."""
        return min(asked, int(getattr(self.model.model.config, "max_position_embeddings", asked)))

    def windows(self, progress: Progress) -> tuple[Windows, tuple[TextReport, ...]]:
        """Calibration windows: the texts' and, in place of "self", sampled ones, interleaved.

        Raises UsageError when the texts are too short for a single window.
        """
        if not self.needs_tokens:
            return np.zeros((0, 0), dtype=np.int64), ()
        settings, length = self.settings, self.length(self.settings.window)
        files = [text for text in self.texts if isinstance(text, Path)]
        own = len(self.texts) - len(files)
        sampled = settings.windows * own // len(self.texts)
        parts: list[Windows] = []
        reports: list[TextReport] = []
        if files:
            windows, texts = calibration_windows(
                self.checkpoint.path, files, settings.windows - sampled, length, self.model.vocabulary
            )
            parts.append(windows)
            reports.extend(texts)
        if sampled:
            windows, text = sampled_windows(self.checkpoint, sampled, length, self.request.seed, progress)
            parts.append(windows)
            reports.append(text)
        return _interleaved(parts), tuple(reports)

    def _refuse_experts(self) -> None:
        """Raise UnsupportedError for experts of a method that pairs tokens."""
        expert = next((name for name in self.targets if is_expert(name)), None)
        if self.pairs_tokens and expert is not None:
            raise UnsupportedError(
                f"{expert}: method {self.request.method.name} pairs the tokens a linear reads in the dense and in the "
                "compressed model, but their routers send tokens to different experts; use --exclude experts, --method "
                "td-moe, svd-llm or gfw-svd, or for low rank --objective input-aware."
            )

    def _select(self) -> list[str]:
        names = list(self.model.linears())
        chosen = parse_blocks(self.request.blocks, self.model.blocks)
        prefixes = tuple(f"{self.model.block_path(index)}." for index in chosen)
        return select([name for name in names if name.startswith(prefixes)], self.request.include, self.request.exclude)

    def _texts(self) -> tuple[Path | str, ...]:
        texts = tuple(SELF if str(text) == SELF else Path(text) for text in self.request.calib)
        open_tokenizer(self.checkpoint.path)
        for text in texts:
            if isinstance(text, Path) and not text.is_file():
                raise UsageError(f"{text}: no such calibration text.")
        return texts or tuple(default_texts())


def _interleaved(parts: Sequence[Windows]) -> Windows:
    order = sorted(
        ((position + 0.5) / len(part), number, position)
        for number, part in enumerate(parts)
        for position in range(len(part))
    )
    return np.stack([parts[number][position] for _, number, position in order])
