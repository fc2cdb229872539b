"""Will an exported model fit a board, and how fast could it be at best: arithmetic on headers, nothing measured.

Memory at the largest shapes the engine must accept. What is exact: weights, cache, inputs and outputs. What is a model:
activations (liveness over our graph; TensorRT fuses more and may pad), the libraries' share, the builder's peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mixt_export.errors import ResourceError, UsageError
from mixt_export.families.wiring import Linear
from mixt_export.lower.weights import itemsize
from mixt_export.targets.devices import Device
from mixt_export.targets.export import ExportPlan
from mixt_export.targets.trt import TrtSettings

#: Present is written beside past: the cache exists twice (Concat, no shared buffer).
CACHE_COPIES = 2
#: CUDA context, cuBLAS handles and TensorRT's own code once loaded. An assumption.
LIBRARIES = 600 << 20
#: Host memory of a build = BUILDER_BASE + BUILDER_FACTOR * weights: TensorRT-RTX 1.7.1 on x86-64, one profile, 73 MB of
#: weights -> 458 MB and 831 MB -> 3.1 GB peak resident. Not measured on a Jetson; tactic timing there adds to it.
BUILDER_BASE, BUILDER_FACTOR = 200 << 20, 3.5


@dataclass(frozen=True)
class Fit:
    """Bytes of every part at the engine's largest shapes, and times in seconds that a roofline allows at best.

    ``cache``: keys and values of ``max_batch`` sequences of ``max_seq_len``, past and present. ``activations``,
    ``attention``: the larger of a prefill and a decode step, see verification.memory.predict. ``decode``: seconds per
    token and sequence step at a full cache; ``prefill``: seconds for ``max_input_len`` tokens, batch 1, empty cache.
    """

    device: Device
    max_batch: int
    max_input_len: int
    max_seq_len: int
    weights: int
    cache: int
    activations: int
    attention: int
    libraries: int
    builder: int
    decode: float
    prefill: float

    @property
    def running(self) -> int:
        """Everything that is in memory at once while the engine runs."""
        return self.weights + self.cache + self.activations + self.attention + self.libraries

    @property
    def fits(self) -> bool:
        """Whether the engine can run; building it may need swap nevertheless."""
        return self.running <= self.device.usable

    @property
    def swap(self) -> int:
        """Bytes that building needs beyond the board's memory; 0 on a desktop, which builds in system memory."""
        return max(self.builder - self.device.usable, 0) if self.device.unified else 0

    @property
    def longest(self) -> int:
        """Longest sequence whose cache fits beside everything else, in tokens; 0 when nothing fits."""
        room = self.device.usable - (self.running - self.cache)
        return max(room * self.max_seq_len // self.cache, 0) if self.cache else 0

    def require(self) -> None:
        """Raise ResourceError with what would help, unless it fits."""
        if self.fits:
            return
        shorter = min(self.longest, self.max_seq_len)
        help_ = f"--max-seq-len {shorter} fits" if shorter >= self.max_input_len else "compress the model further"
        raise ResourceError(
            f"{self.device.title}: needs {self.running / 1e9:.2f} GB while running, {self.device.usable / 1e9:.2f} GB "
            f"are usable after the system; {help_}, or lower --max-batch or --max-input-len."
        )


def fit(plan: ExportPlan) -> Fit:
    """Judge ``plan``, a plan for a TensorRT device. No weight is read.

    Raises UsageError when the plan names no device.
    """
    settings = plan.trt
    if settings is None or settings.device is None:
        raise UsageError("whether it fits depends on the board; name it with --target trt --device.")
    device, length = settings.device, plan.max_seq_len
    activations, attention = _working_memory(plan, settings)
    per_token = plan.kv_bytes_per_token
    weights = plan.weight_bytes
    body, head = (2.0 * count for count in _macs_per_token(plan))
    mixing = 4.0 * plan.decoder.heads * plan.decoder.head_dim * len(plan.decoder.blocks)
    prompt = settings.max_input_len
    return Fit(
        device=device,
        max_batch=settings.max_batch,
        max_input_len=prompt,
        max_seq_len=length,
        weights=weights,
        cache=CACHE_COPIES * settings.max_batch * length * per_token,
        activations=activations,
        attention=attention,
        libraries=LIBRARIES,
        builder=BUILDER_BASE + int(BUILDER_FACTOR * weights),
        decode=_roofline(device, _read_per_step(plan) + length * per_token, body + head + mixing * length),
        prefill=_roofline(
            device, _read_per_step(plan) + prompt * per_token, prompt * (body + mixing * prompt / 2) + head
        ),
    )


def _roofline(device: Device, nbytes: float, flops: float) -> float:
    """Seconds: the larger of moving ``nbytes`` once and computing ``flops`` (Williams et al., CACM 52(4), 2009)."""
    return max(nbytes / device.bandwidth, flops / device.flops)


def _read_per_step(plan: ExportPlan) -> int:
    """Bytes of weights that every step reads: all, less a separate embedding, of which one row per token is read."""
    decoder = plan.decoder
    if decoder.head is None:
        return plan.weight_bytes
    return plan.weight_bytes - decoder.vocab_size * decoder.hidden_size * itemsize(plan.lowered.weights.dtype)


def _macs_per_token(plan: ExportPlan) -> tuple[int, int]:
    """Multiply-adds for one token in the planned forms: of the linears of all blocks, and of the output projection.

    The output projection computes the last position only.
    """
    choices, decoder = plan.forms.choices, plan.decoder

    def count(linear: Linear) -> int:
        choice = choices.get(linear.name)
        return linear.in_features * linear.out_features if choice is None else choice.form.macs

    head = decoder.vocab_size * decoder.hidden_size if decoder.head is None else count(decoder.head)
    return sum(count(linear) for block in decoder.blocks for linear in block.linears), head


def _working_memory(plan: ExportPlan, settings: TrtSettings) -> tuple[int, int]:
    """Activations and attention scores of the hungrier of the longest prefill and the last decode step."""
    from mixt_export.verification import predict_memory

    proto = ir.serde.serialize_model(plan.lowered.model)
    runs = [(settings.max_input_len, plan.max_seq_len), (1, plan.max_seq_len)]
    needs = [predict_memory(proto, batch=settings.max_batch, seq=seq, total=total) for seq, total in runs]
    worst = max(needs, key=lambda need: need.activations + need.workspace)
    return worst.activations, worst.workspace
