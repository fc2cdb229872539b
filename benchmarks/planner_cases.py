"""Factorised linears that the planner is judged on: every structure, five shapes, two sizes each."""

from __future__ import annotations

from collections.abc import Iterator

from mixt_export.network import FactorizedLinear, build

#: Feature size -> its modes by number of cores.
MODES = {
    576: {2: (24, 24), 3: (8, 8, 9), 4: (4, 6, 4, 6)},
    1536: {2: (32, 48), 3: (8, 12, 16), 4: (4, 6, 8, 8)},
    2048: {2: (32, 64), 3: (8, 16, 16), 4: (4, 8, 8, 8)},
    4096: {2: (64, 64), 3: (16, 16, 16), 4: (8, 8, 8, 8), 12: (2,) * 12},
    11008: {2: (86, 128), 3: (16, 16, 43), 4: (4, 8, 8, 43)},
}
SHAPES = ((576, 576), (576, 1536), (2048, 2048), (4096, 4096), (4096, 11008))
ROWS = (1, 16, 128)


def linears() -> Iterator[tuple[str, FactorizedLinear]]:
    """Name ("tt3 r32 4096x4096") and linear; the shape is the name's last word, the method its first."""
    for n, m in SHAPES:
        for name, linear in _of_shape(n, m):
            yield f"{name} {n}x{m}", linear


def _of_shape(n: int, m: int) -> Iterator[tuple[str, FactorizedLinear]]:
    half = n * m // (2 * (n + m)) // 16 * 16
    for rank in (half, half // 2):
        yield f"low_rank r{rank}", build.low_rank("linear", n, m, rank)
    for cores, ranks in ((2, (16, 64)), (3, (8, 32)), (4, (8, 32)), (12, (8, 16, 64))):
        if cores in MODES[n] and cores in MODES[m]:
            for rank in ranks:
                bonds = _bonds(MODES[n][cores], MODES[m][cores], rank)
                yield f"tt{cores} r{rank}", build.tensor_train("linear", MODES[n][cores], MODES[m][cores], bonds)
    for share in (4, 8):
        yield f"tucker {n // share},{m // share}", build.tucker2("linear", n, m, n // share, m // share)
    for terms in (2, 8):
        yield f"kronecker t{terms}", build.kronecker("linear", MODES[n][2], MODES[m][2], terms)
    for blocks in (4, 8):
        rank = half // 2
        yield f"blast b{blocks} r{rank}", build.blast("linear", n, m, rank, (blocks, blocks))
    yield "monarch", build.monarch("linear", MODES[n][2], MODES[m][2])
    for terms in (3, 4):
        yield f"mixt n{terms}", build.mixt("linear", n, m, terms)


def _bonds(inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """``rank``, but nowhere above what the modes on either side can hold."""
    sites = [i * o for i, o in zip(inputs, outputs, strict=True)]
    found = []
    for cut in range(1, len(sites)):
        left = right = 1
        for size in sites[:cut]:
            left = min(rank, left * size)
        for size in sites[cut:]:
            right = min(rank, right * size)
        found.append(min(rank, left, right))
    return tuple(found)
