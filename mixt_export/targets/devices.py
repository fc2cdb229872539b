"""The devices TensorRT folders are made for, as data with sources. Nothing here was measured by this project.

Every source says how it was checked: "excerpt read" (a stored copy of part of the page), or "not opened" (as cited by
others). Check the row of your board before relying on it.

``visible`` is what the operating system reports as total memory (on Jetson less than the module's nominal size, because
firmware and carve-outs take their share); ``reserved`` is what we leave to a headless system. Tensor throughput is
dense float16, derived on Jetson Orin from NVIDIA's sparse INT8 figures (half for dense, half again for float16; whether
accumulating in float32 halves it once more, as on GeForce of the same generation, is not known).
"""

from __future__ import annotations

from dataclasses import dataclass

from mixt_export.errors import UsageError
from mixt_export.plan.gpu import Gpu

MIB, GIB, GB = 1 << 20, 1 << 30, 10**9


@dataclass(frozen=True)
class JetPack:
    """A generation of NVIDIA's Jetson software: which dialect its TensorRT reads."""

    number: int
    dialect: str
    tensorrt: str
    oldest: str
    source: str


@dataclass(frozen=True)
class Device:
    """A board or card. Memory in bytes, bandwidth in bytes/s, ``flops`` dense float16 tensor operations per second.

    ``cache``: bytes of the GPU's second-level cache; ``processors``: its streaming multiprocessors.
    ``unified``: the GPU uses system memory, so the operating system, the builder and the engine share it. ``jetpacks``
    lists the generations that run on it, the default first; empty for a desktop card, which takes dialect trt11.
    """

    name: str
    title: str
    compute_capability: str
    visible: int
    reserved: int
    bandwidth: float
    flops: float
    cache: int
    processors: int
    jetpacks: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def unified(self) -> bool:
        """Whether system and GPU share the memory."""
        return bool(self.jetpacks)

    @property
    def usable(self) -> int:
        """Bytes left for building and running an engine."""
        return self.visible - self.reserved

    def gpu(self, itemsize: int = 2) -> Gpu:
        """The model by which forms are chosen and times are told, for weights and activations of ``itemsize`` bytes."""
        return Gpu(self.name, self.bandwidth, self.flops, self.cache, self.processors, itemsize)


JETPACKS = {
    pack.number: pack
    for pack in (
        JetPack(
            6, "trt10", "10.3", "6.1",
            "https://docs.pytorch.org/TensorRT/v2.6.1/_sources/getting_started/jetpack.rst.txt (excerpt read)",
        ),
        JetPack(
            7, "trt11", "10.16", "7.2",
            "https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html "
            "(excerpt read)",
        ),
    )
}  # fmt: skip

#: Without a board or a JetPack: what every TensorRT from 10.3 on reads.
DEFAULT_JETPACK = 6

#: Whose figures choose the forms of an export that names no board: the Orins differ little in operations per byte.
DEFAULT_BOARD = "agx-orin-64gb"

_MODULES = "https://developer.nvidia.com/embedded/jetson-modules (not opened)"
_ORIN_BRIEF = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/nvidia-jetson-agx-orin-technical-brief.pdf "
    "(not opened; summary http://mzph.cn/web/30785.shtml: 16 SM, 4 MB L2, 170 sparse INT8 TOPS, excerpt read)"
)
_JETPACK_7_ON_ORIN = "https://wiki.seeedstudio.com/deploy_tensorrt_edge_llm_on_jetpack7.2/ (not opened)"
_HEADLESS = "reserved: our assumption for a headless system without a desktop"
_DESKTOP = "reserved: our assumption for driver and desktop"
_SAME_CACHE = "cache: that of the AGX Orin, an assumption"

DEVICES = {
    device.name: device
    for device in (
        Device(
            "orin-nano-8gb", "Jetson Orin Nano 8GB", "8.7", int(7.4 * GIB), GIB, 68 * GB, 10e12, 4 * MIB, 8, (6, 7),
            (
                _MODULES, _JETPACK_7_ON_ORIN,
                "https://github.com/ace-step/ACE-Step-1.5/issues/1192 (7.4 GB visible; not opened)",
                "15 W mode: 68 GB/s, 625 MHz, 8 SM, 40 sparse INT8 TOPS; the Super modes of JetPack 6.2 reach 102 GB/s "
                "and 67: https://www.brojogopalsapui.com/ai-foundations/sub_contents/AI_hardware/"
                "jetson_orin_nano_light.html (excerpt read)",
                _SAME_CACHE, _HEADLESS,
            ),
        ),
        Device(
            "orin-nx-16gb", "Jetson Orin NX 16GB", "8.7", int(15.3 * GIB), int(1.2 * GIB), 102.4 * GB, 15e12, 4 * MIB,
            8, (6, 7),
            (
                _MODULES, _JETPACK_7_ON_ORIN,
                "https://www.techpowerup.com/gpu-specs/jetson-orin-nx-16-gb.c4086 (not opened)",
                "visible: 16 GiB less the same share for carve-outs as on the AGX Orin, an estimate",
                "918 MHz, 60 of its 100 sparse INT8 TOPS are the GPU's", _SAME_CACHE, _HEADLESS,
            ),
        ),
        Device(
            "agx-orin-64gb", "Jetson AGX Orin 64GB", "8.7", 62841 << 20, int(1.5 * GIB), 204.8 * GB, 42.5e12, 4 * MIB,
            16, (6, 7),
            (
                _MODULES, _ORIN_BRIEF, _JETPACK_7_ON_ORIN,
                "https://github.com/rollthecloudinc/hedge/issues/303 (tegrastats: 62841 MB; not opened)",
                "1.3 GHz, 170 of its 275 sparse INT8 TOPS are the GPU's", _HEADLESS,
            ),
        ),
        Device(
            "agx-thor", "Jetson AGX Thor (T5000, 128GB)", "11.0", 122 * GIB, 2 * GIB, 273 * GB, 258e12, 32 * MIB, 20,
            (7,),
            (
                _MODULES,
                "https://developer.ridgerun.com/wiki/index.php/NVIDIA_Jetson_AGX_Thor/Blackwell_GPU (2560 cores; "
                "excerpt read)",
                "https://forums.developer.nvidia.com/t/356355 (20 SM and 32 MiB of L2 as the driver reports them; "
                "excerpt read)",
                "2070 sparse FP4 TFLOPS: an eighth for dense float16; visible: an estimate", _HEADLESS,
            ),
        ),
        Device(
            "rtx-3060-12gb", "GeForce RTX 3060 12GB", "8.6", 12 * GIB, GIB, 360 * GB, 25.5e12, 3 * MIB, 28, (),
            (
                "https://www.techpowerup.com/gpu-specs/geforce-rtx-3060-12-gb.c3682 (not opened)",
                "http://cholla.mmto.org/nvidia/my3060.html (28 SM, 3 MB of L2; excerpt read)",
                "float32 accumulation: 28 SM x 4 x 64 multiply-adds x 1.777 GHz", _DESKTOP,
            ),
        ),
        Device(
            "rtx-4090", "GeForce RTX 4090", "8.9", 24 * GIB, GIB, 1008 * GB, 165e12, 72 * MIB, 128, (),
            (
                "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (not opened)",
                "float32 accumulation", _DESKTOP,
            ),
        ),
        Device(
            "rtx-5090", "GeForce RTX 5090", "12.0", 32 * GIB, GIB, 1792 * GB, 209e12, 96 * MIB, 170, (),
            (
                "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
                "nvidia-rtx-blackwell-gpu-architecture.pdf (not opened)",
                "float32 accumulation", _DESKTOP,
            ),
        ),
    )
}  # fmt: skip


def device_named(name: str) -> Device:
    """The device called ``name``; UsageError lists what there is."""
    if name not in DEVICES:
        raise UsageError(f"--device {name}: not in the table of devices; choose from {', '.join(DEVICES)}.")
    return DEVICES[name]


def jetpack_for(number: int | None, device: Device | None) -> JetPack | None:
    """The JetPack to export for: as asked, else the device's own, else the one that reads least; None on a desktop.

    Raises UsageError for a generation that is not in the table or does not run on ``device``.
    """
    if number is not None and number not in JETPACKS:
        raise UsageError(f"--jetpack {number}: choose from {', '.join(map(str, JETPACKS))}.")
    if device is None:
        return JETPACKS[number or DEFAULT_JETPACK]
    if not device.jetpacks:
        if number is not None:
            raise UsageError(
                f"--jetpack {number}: {device.title} is no Jetson; leave --jetpack out, it takes dialect trt11."
            )
        return None
    if number is not None and number not in device.jetpacks:
        known = " and ".join(map(str, device.jetpacks))
        raise UsageError(
            f"--jetpack {number}: {device.title} runs JetPack {known}; leave --jetpack out or choose that."
        )
    return JETPACKS[number or device.jetpacks[0]]
