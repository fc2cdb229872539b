"""Fused kernels for TensorRT: compiled on this machine, checked by an assembler, carried beside the graph.

Sources are runtimes/tensorrt/kernels (Triton); which kernel serves which linear: runtimes/tensorrt/mixt_trt/tactics.py.
"""

from __future__ import annotations

from mixt_export.building.kernels.compile import Compiled, Failed, compile_kernels, triton_version
from mixt_export.building.kernels.gates import Fault, Inspection, inspect

__all__ = ["Compiled", "Failed", "Fault", "Inspection", "compile_kernels", "inspect", "triton_version"]
