"""The checks, one file each, in the order in which they run: instrumented session first, then the plain one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixt_export.verification.checks import (
    batch_decode,
    batch_prefill,
    chunked_prefill,
    decode,
    greedy,
    redensified,
    shared_cache,
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
        teacher_forced,
        batch_prefill,
        batch_decode,
        chunked_prefill,
        decode,
        shared_cache,
        greedy,
        redensified,
    )
)
