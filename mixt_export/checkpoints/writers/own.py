"""Write our own format from any folder: two-factor linears in the layout that exported models use in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.write import NewTensor, write_checkpoint
from mixt_export.checkpoints.writers.matrices import stored_as, two_factors
from mixt_export.network import Branch, Core, FactorizedLinear
from mixt_export.progress import Progress

NAME = "mixt"


def check(_source: Checkpoint) -> None:
    """Our format holds every network."""


def write(folder: Path, source: Checkpoint, progress: Progress) -> None:
    """Write ``source`` into the empty ``folder``: cores (in, rank) and (rank, out), other networks as they are stored.

    A core that several linears name is written once, under the name that the first of them gives it.
    """
    factors: dict[str, FactorizedLinear] = {}
    tensors: dict[str, NewTensor] = {}
    given: dict[tuple[str, bool], str] = {}
    for name, linear in source.factors.items():
        pair = two_factors(linear)
        if pair is None:
            factors[name] = linear
            continue
        cores = []
        for number, (core, ends) in enumerate(
            ((pair.down, (pair.inner, pair.bond)), (pair.up, (pair.bond, pair.outer)))
        ):
            # What matters of labels is which axis is which: a basis is shared whatever its linears call its axes.
            key = (core.tensor.name, core.labels == ends)
            called = given.setdefault(key, f"{name}.core{number}")
            made = stored_as(source.store, core, ends, called)
            tensors.setdefault(called, made)
            cores.append(Core(made.ref, ends))
        (branch,) = linear.branches
        new = Branch(branch.in_modes, branch.out_modes, tuple(cores), branch.scale)
        factors[name] = replace(linear, branches=(new,))
    write_checkpoint(folder, source, tensors.values(), factors, source.info, progress)
