"""The checks, one file each, in the order in which they run: what is read, the instrumented session, the plain one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixt_export.verification.checks import (
    batch_decode,
    batch_prefill,
    chunked_prefill,
    declared,
    decode,
    far,
    files,
    greedy,
    int8_activations,
    int8_cache,
    quantised_weights,
    redensified,
    rounded,
    shared_cache,
    tables,
    teacher_forced,
)
from mixt_export.verification.context import Context
from mixt_export.verification.result import CheckResult


@dataclass(frozen=True)
class Check:
    """``run`` does it; ``applies`` says whether it makes sense for this model."""

    name: str
    title: str
    run: Callable[[Context], CheckResult]
    applies: Callable[[Context], bool]


CHECKS = tuple(
    Check(module.NAME, module.TITLE, module.run, getattr(module, "applies", lambda _context: True))
    for module in (
        files,
        declared,
        tables,
        teacher_forced,
        batch_prefill,
        batch_decode,
        chunked_prefill,
        decode,
        shared_cache,
        far,
        greedy,
        rounded,
        quantised_weights,
        int8_activations,
        int8_cache,
        redensified,
    )
)
