"""What only TensorRT exports are asked: board, JetPack, engine limits, float32 islands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixt_export.errors import UsageError
from mixt_export.families.wiring import Decoder
from mixt_export.lower.dialects import DIALECTS, Dialect
from mixt_export.lower.precision import HEAD, Islands
from mixt_export.targets.devices import DEFAULT_BOARD, DEVICES, Device, JetPack, device_named, jetpack_for
from mixt_export.targets.profiles import DEFAULT_MAX_INPUT_LEN, Profile, profiles

DESKTOP_DIALECT = "trt11"
#: 2^-4 on a linear's input, where the user names a linear and no exponent.
_DEFAULT_SHIFT = 4
_LARGEST_SHIFT = 12


@dataclass(frozen=True)
class TrtOptions:
    """``jetpack`` 6 or 7 and ``device`` (see devices.DEVICES) choose the dialect; both may be left out.

    ``max_batch``, ``max_input_len`` (default 512 or max_seq_len): largest shapes of an engine. ``islands``: what to
    compute in float32 besides norms and softmax: ``residual``, ``attention.<block>``, or a linear's name, optionally
    ``=<k>`` for a scale of 2^-k on its input. ``scan``: look for overflow with the PyTorch reference; None: at float16,
    when the export is verified too.
    """

    jetpack: int | None = None
    device: str | None = None
    max_batch: int | None = None
    max_input_len: int | None = None
    islands: Sequence[str] = field(default=())
    scan: bool | None = None

    def given(self) -> list[str]:
        """Options, as spelt on the command line, that were set."""
        named = {
            "--jetpack": self.jetpack, "--device": self.device, "--max-batch": self.max_batch,
            "--max-input-len": self.max_input_len, "--island": self.islands or None, "--scan": self.scan,
        }  # fmt: skip
        return [name for name, value in named.items() if value is not None]


@dataclass(frozen=True)
class TrtSettings:
    """Options after defaults, checked against each other."""

    dialect: Dialect
    jetpack: JetPack | None
    device: Device | None
    max_batch: int
    max_input_len: int
    profiles: list[Profile]

    @property
    def board(self) -> Device:
        """Whose costs choose the forms of linears."""
        return DEVICES[DEFAULT_BOARD] if self.device is None else self.device

    def manifest(self, islands: Islands, overflow: dict[str, Any] | None) -> dict[str, Any]:
        """The manifest's key ``trt``."""
        return {
            "jetpack": None if self.jetpack is None else self.jetpack.number,
            "device": None if self.device is None else self.device.name,
            "tensorrt": "10.15" if self.jetpack is None else self.jetpack.tensorrt,
            "strongly_typed": True,
            "max_batch": self.max_batch,
            "max_input_len": self.max_input_len,
            "profiles": self.profiles,
            "islands": {
                "residual": islands.residual,
                "attention": sorted(islands.attention),
                "linears": dict(sorted(islands.shifts.items())),
            },
            "overflow": overflow,
        }


def dialect_for(options: TrtOptions) -> Dialect:
    """The dialect that board and JetPack read. Raises UsageError where they contradict each other."""
    jetpack = jetpack_for(options.jetpack, _device(options))
    return DIALECTS[DESKTOP_DIALECT if jetpack is None else jetpack.dialect]


def settle(options: TrtOptions, decoder: Decoder, max_seq_len: int) -> TrtSettings:
    """Fill in defaults. Raises UsageError for options that contradict each other or the model."""
    device = _device(options)
    batch = 1 if options.max_batch is None else options.max_batch
    length = options.max_input_len
    if length is None:
        length = min(DEFAULT_MAX_INPUT_LEN, max_seq_len)
    return TrtSettings(
        dialect_for(options), jetpack_for(options.jetpack, device), device, batch, length,
        profiles(decoder, batch, length, max_seq_len),
    )  # fmt: skip


def named_islands(names: Sequence[str], decoder: Decoder) -> Islands:
    """Islands as the user lists them. Raises UsageError for a name the model does not have."""
    linears = {linear.name for block in decoder.blocks for linear in block.linears} | {HEAD}
    residual, attention, shifts = False, set(), {}
    for entry in names:
        name, _, power = entry.partition("=")
        kind, _, index = name.partition(".")
        if name == "residual" and not power:
            residual = True
        elif kind == "attention" and index.isdecimal() and int(index) < len(decoder.blocks) and not power:
            attention.add(int(index))
        elif name in linears:
            shifts[name] = _shift(entry, power)
        else:
            raise UsageError(
                f"--island {entry}: give residual, attention.<block below {len(decoder.blocks)}>, or the name of a "
                f"linear such as {decoder.blocks[0].linears[-1].name}, with =<k> for a scale of 2^-k."
            )
    return joined(Islands(residual, frozenset(attention), shifts), Islands(), decoder)


def joined(first: Islands, second: Islands, decoder: Decoder) -> Islands:
    """Both together, the larger scale where both name a linear.

    A linear that writes into the residual stream and leaves float16 takes the stream with it.
    """
    names = first.shifts.keys() | second.shifts.keys()
    shifts = {name: max(first.shifts.get(name, 0), second.shifts.get(name, 0)) for name in names}
    writers = {linear.name for block in decoder.blocks for linear in block.writers}
    return Islands(
        first.residual or second.residual or bool(writers & names), first.attention | second.attention, shifts
    )


def _shift(entry: str, power: str) -> int:
    if not power:
        return _DEFAULT_SHIFT
    if not power.isdecimal() or not 0 < int(power) <= _LARGEST_SHIFT:
        raise UsageError(f"--island {entry}: the exponent after = must be a whole number from 1 to {_LARGEST_SHIFT}.")
    return int(power)


def _device(options: TrtOptions) -> Device | None:
    return None if options.device is None else device_named(options.device)
