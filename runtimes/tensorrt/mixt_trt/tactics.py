"""Which compiled kernel serves a linear, and how it is launched. Plain numbers: neither TensorRT nor Triton.

A kernel is a function of runtimes/tensorrt/kernels with constants; sizes are arguments, so one serves many linears. It
has tiles for few tokens (decoding) and for many, and picks by the number of tokens it is given: an engine with one
profile times a plugin at one size only. Tiles were chosen by timing them on a GPU (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass

#: Most executed multiply-adds per needed one with many tokens: beyond, a kernel is slower than the function's body.
LARGEST_WASTE = 1.5

#: Most multiply-adds of a MixT for each token: beyond, its time is that of its products; libraries have better ones.
LARGEST_WORK = 12_000_000

#: The dtype that kernels compute in, and the operators' number of cores or windows.
DTYPE = "float16"
CORES = 2
MAX_WINDOWS = 6

#: Widest vector of a load, in elements (16 bytes), and its half, which kernels still take.
ALIGNMENTS = (8, 4)
#: Ranks, and the last input mode, are padded to one of these inside a kernel.
RANKS = (16, 32)
DEPTHS = (32, 64)
#: Up to so many tokens kernels use their tiles for few.
FEW = 16
#: Largest number of trailing spectators of a MixT window.
MAX_SPECTATORS = 16

#: Numbers that are passed for each window.
_SIZES = ("LEFT", "ROWS", "COLUMNS")


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: ``function`` of the Triton module ``module`` with ``constants``.

    ``align``: elements that rows of the activation and of matrices are a multiple of, of ``odd`` kernels all but those
    that ranks make; ``divisible``: the numbers that are therefore multiples. ``matrices``: core or weight inputs.
    ``numbers``: int32 parameters after the inputs.
    """

    module: str
    function: str
    kind: str
    bias: bool
    align: int
    matrices: int
    numbers: int
    constants: tuple[tuple[str, int], ...]
    divisible: tuple[tuple[str, int], ...]
    stages: int
    odd: bool = False
    warps: int = 4
    dtype: str = DTYPE

    @property
    def absent(self) -> tuple[str, ...]:
        """Parameters of the function that this kernel does not have."""
        unused = range(self.matrices + 1, MAX_WINDOWS + 1) if self.function == "mixt" else ()
        names = [name for number in unused for name in (f"w{number}_ptr", *(f"{size}{number}" for size in _SIZES))]
        return (*names, *(() if self.bias else ("bias_ptr",)))

    @property
    def name(self) -> str:
        """File stem, unique among kernels."""
        return f"{self.kind}-a{self.align}{'-odd' if self.odd else ''}{'-bias' if self.bias else ''}"

    @property
    def parameters(self) -> int:
        """What a launch passes: inputs, int32 numbers, one output."""
        return 1 + self.matrices + self.bias + self.numbers + 1

    def constant(self, name: str) -> int:
        """The constant called ``name``."""
        return dict(self.constants)[name]


@dataclass(frozen=True)
class Launch:
    """How a kernel runs over T tokens: grid (T / ``tokens`` rounded up, ``blocks``, z), extras (T, *``numbers``).

    z is 1, but up to `FEW` tokens ``turns``, or ``turns`` · T where ``apart``: tiles for few tokens are smaller.
    """

    tokens: int
    blocks: int
    turns: int
    apart: bool
    numbers: tuple[int, ...]

    def grid(self, tokens: int) -> tuple[int, int, int]:
        """The grid for a number of tokens."""
        z = self.turns * (tokens if self.apart else 1) if tokens <= FEW else 1
        return -(-tokens // self.tokens), self.blocks, z


@dataclass(frozen=True)
class Train:
    """A tensor train of cores (r_(k-1), out_k, in_k, r_k), of which kernels take two; ``ranks`` are the inner ones."""

    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: str
    bias: bool = False

    def kernel(self) -> Kernel | None:
        """The kernel for this linear; None where `refusal` says why."""
        return None if self.refusal() is not None else self.candidate()

    def refusal(self, largest_waste: float | None = None) -> str | None:
        """Why no kernel serves this linear, None when one does; ``largest_waste``: LARGEST_WASTE where it is None."""
        if self.dtype != DTYPE:
            return f"there are no kernels for {self.dtype}"
        kernel = self.candidate()
        if kernel is None:
            most = f"{CORES} cores with a rank up to {RANKS[-1]} and a last input mode up to {DEPTHS[-1]}"
            return f"kernels have {most}, not {len(self.in_modes)} cores of {self.in_modes} with ranks {self.ranks}"
        if self._align() is None:
            return f"the last input mode {self.in_modes[-1]} is no multiple of {ALIGNMENTS[-1]}"
        waste = self.waste(kernel)
        if waste > (LARGEST_WASTE if largest_waste is None else largest_waste):
            return f"the tiles execute {waste:.1f} times the multiply-adds of modes {self.in_modes} x {self.out_modes}"
        return None

    def launch(self, kernel: Kernel) -> Launch:
        """Grid and numbers for ``kernel``, which is that of this linear."""
        few, many = (
            -(-self.out_modes[0] // kernel.constant(first)) * -(-self.out_modes[1] // kernel.constant(last))
            for first, last in (("FJ1", "FJ2"), ("BJ1", "BJ2"))
        )
        numbers = (*self.in_modes, *self.out_modes, *self.ranks)
        return Launch(kernel.constant("BM"), many, -(-few // many), True, numbers)

    def _align(self) -> int | None:
        return next((align for align in ALIGNMENTS if self.in_modes[-1] % align == 0), None)

    def candidate(self) -> Kernel | None:
        """The kernel that computes this linear, however badly its tiles fit; it needs `refusal`'s alignment."""
        if len(self.in_modes) != CORES:
            return None
        rank = next((rank for rank in RANKS if rank >= self.ranks[0]), None)
        depth = next((depth for depth in DEPTHS if depth >= self.in_modes[-1]), None)
        if rank is None or depth is None:
            return None
        align = self._align() or 1
        wide = self.out_modes[0] > _NARROW
        return train_kernel(rank, depth, wide, self.bias, align, odd=self.ranks[0] % align > 0)

    def waste(self, kernel: Kernel) -> float:
        """Multiply-adds that ``kernel`` executes with many tokens, padding included, for each that the chain needs."""
        (i1, i2), (j1, j2), (rank,) = self.in_modes, self.out_modes, self.ranks
        first, last = kernel.constant("BJ1"), kernel.constant("BJ2")
        columns = -(-j2 // last) * last
        executed = i1 * kernel.constant("RP1") * columns * -(-j1 // first) * (kernel.constant("BK") + first)
        return executed / (i1 * rank * j2 * (i2 + j1))


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

    def kernel(self) -> Kernel | None:
        """The kernel for this linear; None where `refusal` says why."""
        return None if self.refusal() is not None else self.candidate()

    def candidate(self) -> Kernel:
        """The kernel that computes this linear, however large it is; `refusal` says what else it needs."""
        return mixture_kernel(self._spectators(), self.transposed, self.bias, self._align() or 1)

    def refusal(self) -> str | None:
        """Why no kernel serves this linear, None when one does."""
        spectators = self._spectators()
        if self.dtype != DTYPE:
            return f"there are no kernels for {self.dtype}"
        if not 2 <= len(self.windows) <= MAX_WINDOWS:
            return f"no kernel has {len(self.windows)} windows"
        if spectators[-1] != 1 or any(size > MAX_SPECTATORS or size & (size - 1) for size in spectators):
            return f"the trailing spectators {spectators} are no powers of two up to {MAX_SPECTATORS} ending in 1"
        segment = self.windows[-1].rows
        if any(window.left > 1 and window.rows * window.right % segment for window in self.windows):
            return f"its windows do not share the segments of {segment} features"
        if segment % spectators[0]:
            return f"segments of {segment} features are no multiple of {spectators[0]} spectators"
        if self._align() is None:
            return f"the rows of its weights do not begin at multiples of {ALIGNMENTS[-1]} elements"
        work = sum(window.left * window.rows * window.columns * window.right for window in self.windows)
        if work > LARGEST_WORK:
            millions = f"{work / 1e6:.1f} million multiply-adds"
            return f"its windows take {millions} a token, which products of their own do faster"
        return None

    def launch(self, kernel: Kernel) -> Launch:
        """Grid and numbers for ``kernel``, which is that of this linear."""
        segment = self.windows[-1].rows
        sizes = [number for window in self.windows for number in (window.left, window.rows, window.columns)]
        numbers = (self.in_features, self.out_features, *sizes, segment)
        blocks = -(-segment // kernel.constant("BF")) * -(-self.out_features // segment)
        turns = kernel.constant("BF") // kernel.constant("FF")
        return Launch(kernel.constant("BM"), blocks, turns, False, numbers)

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
        return next((align for align in ALIGNMENTS if all(size % align == 0 for size in sizes)), None)


#: Output modes j_1 up to this take a narrow tile.
_NARROW = 32


def train_kernel(rank: int, depth: int, wide: bool, bias: bool, align: int, odd: bool) -> Kernel:
    """The kernel of two cores whose rank and last input mode are padded to ``rank`` and ``depth``.

    ``wide``: tiles of 64 values of j_1 instead of 32; ``odd``: the rank is no multiple of ``align``.
    """
    few = {"BI": 32, "FJ1": 16, "FJ2": 4}
    many = {"BM": 64, "BJ1": 64 if wide else _NARROW, "BJ2": 64 // rank}
    constants = {"RP1": rank, "BK": depth, "FEW": FEW, **few, **many}
    divisible = (("I2", align), ("R1", 1 if odd else align))
    kind = f"tt2-r{rank}-k{depth}-j{constants['BJ1']}"
    return Kernel(
        "tt", "tt2", kind, bias, align, CORES, 3 * CORES, tuple(constants.items()), divisible,
        stages=3, odd=odd,
    )  # fmt: skip


def mixture_kernel(spectators: tuple[int, ...], transposed: bool, bias: bool, align: int) -> Kernel:
    """The kernel of windows with these trailing spectators."""
    most = max(spectators)
    depth = max(16, 256 // most)
    constants = {f"C{number}": size for number, size in enumerate((*spectators, *[1] * 5)[:MAX_WINDOWS], 1)}
    constants |= {"FEW": FEW, "FF": max(32, 8 * most), "FK": min(64, depth)}
    constants |= {"BM": 32, "BF": 128, "BK": min(32, depth), "TRANSPOSED": int(transposed), "ALIGN": align}
    divisible = [("IN", align), ("SEGMENT", most if transposed else most * align)]
    for number, right in enumerate(spectators, 1):
        divisible += [(f"COLUMNS{number}", align if transposed else max(1, align // right))]
        divisible += [] if transposed else [(f"ROWS{number}", align)]
    kind = f"mixt-c{'_'.join(map(str, spectators))}{'-left' if transposed else ''}"
    return Kernel(
        "mixt", "mixt", kind, bias, align, len(spectators), 4 + 3 * len(spectators),
        tuple(constants.items()), tuple(divisible), stages=3,
    )  # fmt: skip


def train_kernels(bias: bool, align: int, odd: bool = False) -> list[Kernel]:
    """Every kernel of tensor trains."""
    return [
        train_kernel(rank, depth, wide, bias, align, odd)
        for rank in RANKS
        for depth in DEPTHS
        for wide in (False, True)
    ]
