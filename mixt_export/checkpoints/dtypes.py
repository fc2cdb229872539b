"""Dtypes: the codes of safetensors, the numpy names used everywhere else."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

#: safetensors code -> numpy name, of every dtype this package handles.
NAME_OF_CODE = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

CODE_OF_NAME = {name: code for code, name in NAME_OF_CODE.items()}

#: Codes that safetensors defines and this package does not handle (quantised, unsigned and complex weights).
UNHANDLED_CODES = frozenset(
    {
        *("U64", "U32", "U16", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"),
        *("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    }
)

#: Exponent bits of each floating dtype in its little-endian integer: all ones means Inf or NaN (IEEE 754, bfloat16).
EXPONENT_MASK: dict[str, tuple[np.dtype[Any], int]] = {
    "float64": (np.dtype(np.uint64), 0x7FF0_0000_0000_0000),
    "float32": (np.dtype(np.uint32), 0x7F80_0000),
    "float16": (np.dtype(np.uint16), 0x7C00),
    "bfloat16": (np.dtype(np.uint16), 0x7F80),
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype called ``name``; ``bfloat16`` comes from ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def is_floating(name: str) -> bool:
    """Whether ``name`` is one of the floating dtypes."""
    return name in EXPONENT_MASK


def largest(name: str) -> float:
    """Largest finite value of the floating dtype ``name``."""
    return float(ml_dtypes.finfo(numpy_dtype(name)).max)
