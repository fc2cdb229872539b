"""Which compiled kernels serve a linear, and how they are launched. Plain numbers: neither TensorRT nor Triton.

A kernel is a function of runtimes/tensorrt/kernels with constants; sizes are arguments, so one serves many linears. Two
tactics per kind: the first for few tokens (decoding), the second for many; TensorRT times both and takes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

#: Most executed multiply-adds per needed one: tiles that hardly fit a shape are slower than the function's body.
LARGEST_WASTE = 6.0

#: dtype -> widest vector of a load, in elements (16 bytes), and its half, which the Tensor Core kernels still take.
ALIGNMENTS = {"float16": (8, 4), "float32": (4,)}
_SHORT = {"float16": "fp16", "float32": "fp32"}

#: Ranks are padded to one of these inside a kernel.
RANKS = (16, 32, 64)
#: Largest number of trailing spectators of a MixT window.
MAX_SPECTATORS = 16

MAX_WINDOWS = 6
#: Numbers that are passed for each window.
_SIZES = ("LEFT", "ROWS", "COLUMNS")


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: ``function`` of the Triton module ``module`` with ``constants``, for one dtype.

    ``align``: elements that rows of the activation and of matrices are a multiple of, of ``odd`` kernels all but those
    that ranks make; ``divisible``: the numbers that are therefore multiples. ``matrices``: core or weight inputs.
    ``numbers``: int32 parameters after the inputs.
    """

    module: str
    function: str
    kind: str
    dtype: str
    bias: bool
    align: int
    tactic: int
    matrices: int
    numbers: int
    constants: tuple[tuple[str, int], ...]
    divisible: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    odd: bool = False

    @property
    def absent(self) -> tuple[str, ...]:
        """Parameters of the function that this kernel does not have."""
        unused = range(self.matrices + 1, MAX_WINDOWS + 1) if self.function == "mixt" else ()
        names = [name for number in unused for name in (f"w{number}_ptr", *(f"{size}{number}" for size in _SIZES))]
        return (*names, *(() if self.bias else ("bias_ptr",)))

    @property
    def name(self) -> str:
        """File stem, unique among kernels."""
        extras = f"{'-odd' if self.odd else ''}{'-bias' if self.bias else ''}"
        return f"{self.kind}-{_SHORT[self.dtype]}-a{self.align}{extras}-{self.tactic}"

    @property
    def parameters(self) -> int:
        """What a launch passes: inputs, int32 numbers, one output."""
        return 1 + self.matrices + self.bias + self.numbers + 1

    def constant(self, name: str) -> int:
        """The constant called ``name``."""
        return dict(self.constants)[name]


@dataclass(frozen=True)
class Launch:
    """How a kernel runs over T tokens: grid (T / ``tokens`` rounded up, ``y``, ``z``), extras (T, *``numbers``)."""

    tokens: int
    y: int
    z: int
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Train:
    """A tensor train of 2 to 4 cores (r_(k-1), out_k, in_k, r_k); ``ranks`` are the inner ones."""

    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: str
    bias: bool = False

    def kernels(self) -> tuple[Kernel, ...]:
        """Kernels for this linear, one per tactic; empty where `refusal` says why."""
        if self.refusal() is not None:
            return ()
        return tuple(kernel for kernel in self.candidates() if self.waste(kernel) <= LARGEST_WASTE)

    def refusal(self, largest_waste: float | None = None) -> str | None:
        """Why no kernel serves this linear, None when one does; ``largest_waste``: LARGEST_WASTE where it is None."""
        sites = len(self.in_modes)
        if self.dtype not in ALIGNMENTS:
            return f"there are no kernels for {self.dtype}"
        if not self.candidates():
            return f"no kernel has {sites} cores with ranks up to {max(self.ranks, default=1)}"
        if self._align() is None:
            return f"the last input mode {self.in_modes[-1]} is no multiple of {ALIGNMENTS[self.dtype][-1]}"
        waste = min(map(self.waste, self.candidates()))
        if waste > (LARGEST_WASTE if largest_waste is None else largest_waste):
            return f"the tiles execute {waste:.1f} times the multiply-adds of modes {self.in_modes} x {self.out_modes}"
        return None

    def launch(self, kernel: Kernel) -> Launch:
        """Grid and numbers for ``kernel``, which is one of `kernels`."""
        first, *rest = (-(-size // kernel.constant(f"BJ{site}")) for site, size in enumerate(self.out_modes, 1))
        return Launch(kernel.constant("BM"), first, prod(rest), (*self.in_modes, *self.out_modes, *self.ranks))

    def _align(self) -> int | None:
        return next((align for align in ALIGNMENTS[self.dtype] if self.in_modes[-1] % align == 0), None)

    def candidates(self) -> list[Kernel]:
        """Kernels that compute this linear, however badly their tiles fit it; they need `refusal`'s alignment."""
        padded = next((rank for rank in RANKS if rank >= max(self.ranks, default=1)), 0)
        tiles = _TRAIN_TILES.get((len(self.in_modes), padded, self.dtype), ())
        align = self._align() or 1
        odd = any(rank % align for rank in self.ranks)
        return [
            train_kernel(len(self.in_modes), padded, self.dtype, self.bias, align, odd, number)
            for number in range(1, len(tiles) + 1)
        ]

    def waste(self, kernel: Kernel) -> float:
        """Multiply-adds that ``kernel`` executes, padding and repetition included, for each that the chain needs."""
        sites, ranks = len(self.in_modes), (1, *self.ranks, 1)
        needed, outputs, inputs = 0, 1, prod(self.in_modes)
        for site in reversed(range(sites)):
            needed += inputs * ranks[site + 1] * ranks[site] * self.out_modes[site] * outputs
            inputs //= self.in_modes[site]
            outputs *= self.out_modes[site]
        launch = self.launch(kernel)
        return launch.y * launch.z * self._executed(kernel) / (launch.tokens * needed)

    def _executed(self, kernel: Kernel) -> int:
        """Multiply-adds of one program, padding included."""
        sites = len(self.in_modes)
        rows, chunk, depth, padded = (kernel.constant(name) for name in ("BM", "BI", "BK", "RP1"))
        blocks = [kernel.constant(f"BJ{site}") for site in range(1, sites + 1)]
        leading = prod(self.in_modes[:-2])
        walks = leading * -(-self.in_modes[-2] // chunk)
        total = walks * rows * chunk * padded * blocks[-1] * (-(-self.in_modes[-1] // depth) * depth)
        columns = rows * blocks[-1]
        for site in reversed(range(sites - 1)):
            above = padded if site else 1
            inner = chunk * padded if site == sites - 2 else padded
            times = walks if site == sites - 2 else prod(self.in_modes[: site + 1])
            total += times * above * blocks[site] * inner * columns
            columns *= blocks[site]
        return total


@dataclass(frozen=True)
class Window:
    """I_left ⊗ w ⊗ I_right with ``columns`` inputs and ``rows`` outputs of w."""

    left: int
    rows: int
    columns: int
    right: int


@dataclass(frozen=True)
class Mixture:
    """A MixT linear of 2 to 6 windows, the last one without trailing spectators.

    ``transposed``: weights are (out, in). Windows may read or write more than ``in_features`` and ``out_features``.
    """

    in_features: int
    out_features: int
    windows: tuple[Window, ...]
    transposed: bool
    dtype: str
    bias: bool = False

    def kernels(self) -> tuple[Kernel, ...]:
        """Kernels for this linear, one per tactic; empty where `refusal` says why."""
        if self.refusal() is not None:
            return ()
        return tuple(
            mixture_kernel(self._spectators(), self.transposed, self.dtype, self.bias, self._align() or 1, tactic)
            for tactic in range(1, len(MIXTURE_TILES[self.dtype]) + 1)
        )

    def refusal(self) -> str | None:
        """Why no kernel serves this linear, None when one does."""
        spectators = self._spectators()
        if self.dtype not in ALIGNMENTS:
            return f"there are no kernels for {self.dtype}"
        if not 2 <= len(self.windows) <= 6:
            return f"no kernel has {len(self.windows)} windows"
        if spectators[-1] != 1 or any(size > MAX_SPECTATORS or size & (size - 1) for size in spectators):
            return f"the trailing spectators {spectators} are no powers of two up to {MAX_SPECTATORS} ending in 1"
        segment = self.windows[-1].rows
        if any(window.left > 1 and window.rows * window.right % segment for window in self.windows):
            return f"its windows do not share the segments of {segment} features"
        if segment % spectators[0]:
            return f"segments of {segment} features are no multiple of {spectators[0]} spectators"
        if self._align() is None:
            least = ALIGNMENTS[self.dtype][-1]
            return f"the rows of its weights do not begin at multiples of {least} elements"
        return None

    def launch(self, kernel: Kernel) -> Launch:
        """Grid and numbers for ``kernel``, which is one of `kernels`."""
        segment = self.windows[-1].rows
        sizes = [number for window in self.windows for number in (window.left, window.rows, window.columns)]
        numbers = (self.in_features, self.out_features, *sizes, segment)
        blocks = -(-segment // kernel.constant("BF"))
        return Launch(kernel.constant("BM"), blocks, -(-self.out_features // segment), numbers)

    def _spectators(self) -> tuple[int, ...]:
        return tuple(window.right for window in self.windows)

    def _align(self) -> int | None:
        sizes = [self.in_features, *(window.columns * window.right for window in self.windows)]
        if self.transposed:
            sizes += [window.columns for window in self.windows]
        else:
            segment = self.windows[-1].rows
            sizes += [window.rows for window in self.windows]
            sizes += [segment // window.right for window in self.windows]
        return next((align for align in ALIGNMENTS[self.dtype] if all(size % align == 0 for size in sizes)), None)


@dataclass(frozen=True)
class _TrainTile:
    tokens: int
    chunk: int
    depth: int
    blocks: tuple[int, ...]
    warps: int
    stages: int


#: (cores, padded rank, dtype) -> one tile per tactic: few tokens, many tokens. Found by compiling: no spill, shared
#: memory that every device has, fewest registers. None was ever timed on a device.
_TRAIN_TILES: Mapping[tuple[int, int, str], tuple[_TrainTile, ...]] = {
    (2, 16, "float16"): (_TrainTile(1, 16, 32, (16, 16), 4, 2), _TrainTile(2, 16, 32, (64, 16), 8, 2)),
    (2, 32, "float16"): (_TrainTile(1, 16, 32, (16, 8), 4, 2), _TrainTile(2, 8, 32, (64, 8), 8, 3)),
    (2, 64, "float16"): (_TrainTile(1, 8, 32, (32, 8), 8, 2), _TrainTile(2, 8, 32, (32, 8), 8, 2)),
    (3, 16, "float16"): (_TrainTile(1, 16, 32, (16, 4, 8), 4, 2), _TrainTile(2, 8, 32, (16, 4, 8), 8, 2)),
    (3, 32, "float16"): (_TrainTile(1, 8, 32, (16, 1, 8), 8, 2), _TrainTile(2, 8, 32, (16, 1, 8), 8, 2)),
    (4, 16, "float16"): (_TrainTile(1, 16, 16, (8, 1, 2, 8), 4, 2),),
    (2, 16, "float32"): (_TrainTile(1, 4, 16, (16, 8), 4, 2), _TrainTile(2, 4, 16, (32, 8), 4, 2)),
    (2, 32, "float32"): (_TrainTile(1, 4, 16, (16, 8), 4, 2), _TrainTile(2, 4, 16, (16, 8), 8, 2)),
    (2, 64, "float32"): (_TrainTile(1, 4, 16, (16, 4), 8, 2),),
    (3, 16, "float32"): (_TrainTile(1, 4, 16, (16, 1, 8), 4, 2),),
}


@dataclass(frozen=True)
class MixtureTile:
    """``features`` and ``depth`` are for windows without spectators; both adapt to the number of spectators."""

    tokens: int
    features: int
    depth: int
    warps: int
    stages: int


MIXTURE_TILES: Mapping[str, tuple[MixtureTile, ...]] = {
    "float16": (MixtureTile(16, 32, 64, 4, 3), MixtureTile(32, 128, 32, 8, 3)),
    "float32": (MixtureTile(16, 32, 16, 8, 2), MixtureTile(32, 64, 16, 8, 2)),
}


#: From so many windows on the wide tiles run out of registers.
_MANY_WINDOWS = 4


def train_kernel(cores: int, rank: int, dtype: str, bias: bool, align: int, odd: bool, tactic: int) -> Kernel:
    """The kernel of ``cores`` cores whose ranks are padded to ``rank``; ``odd``: they are no multiples of ``align``."""
    tile = _TRAIN_TILES[cores, rank, dtype][tactic - 1]
    constants = {"BM": tile.tokens, "BI": tile.chunk, "BK": tile.depth}
    constants |= {f"BJ{site}": block for site, block in enumerate(tile.blocks, 1)}
    constants |= {f"RP{bond}": rank for bond in range(1, cores)}
    divisible = ((f"I{cores}", align), *((f"R{bond}", 1 if odd else align) for bond in range(1, cores)))
    return Kernel(
        "tt", f"tt{cores}", f"tt{cores}-r{rank}", dtype, bias, align, tactic, cores, 3 * cores,
        tuple(constants.items()), divisible, tile.warps, tile.stages, odd,
    )  # fmt: skip


def mixture_kernel(
    spectators: tuple[int, ...], transposed: bool, dtype: str, bias: bool, align: int, tactic: int
) -> Kernel:
    """The kernel of windows with these trailing spectators."""
    tile, most = MIXTURE_TILES[dtype][tactic - 1], max(spectators)
    features = tile.features if len(spectators) < _MANY_WINDOWS else tile.features // 2
    constants = {"BM": tile.tokens, "BF": max(features, 8 * most), "BK": min(tile.depth, max(16, 256 // most))}
    constants |= {f"C{number}": size for number, size in enumerate((*spectators, *[1] * (6 - len(spectators))), 1)}
    constants |= {"TRANSPOSED": int(transposed), "ALIGN": align}
    divisible = [("IN", align), ("SEGMENT", most if transposed else most * align)]
    for number, right in enumerate(spectators, 1):
        divisible += [(f"COLUMNS{number}", align if transposed else max(1, align // right))]
        divisible += [] if transposed else [(f"ROWS{number}", align)]
    kind = f"mixt-c{'_'.join(map(str, spectators))}{'-left' if transposed else ''}"
    return Kernel(
        "mixt", "mixt", kind, dtype, bias, align, tactic, len(spectators), 4 + 3 * len(spectators),
        tuple(constants.items()), tuple(divisible), tile.warps, tile.stages,
    )  # fmt: skip


def train_kernels(dtype: str, bias: bool, align: int, odd: bool = False) -> list[Kernel]:
    """Every kernel of tensor trains for ``dtype``."""
    return [
        train_kernel(cores, rank, kind, bias, align, odd, tactic)
        for (cores, rank, kind), tiles in _TRAIN_TILES.items()
        if kind == dtype
        for tactic in range(1, len(tiles) + 1)
    ]
