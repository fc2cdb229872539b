"""What the writers of other tools' formats share: two matrices per linear under other names, config.json changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import layout
from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.store import StoredTensor
from mixt_export.checkpoints.write import NewTensor, write_weights
from mixt_export.checkpoints.writers.matrices import every_two_factors, stored_as
from mixt_export.progress import Progress


def write_pairs(
    folder: Path,
    source: Checkpoint,
    name: str,
    parts: tuple[str, str],
    change: Callable[[Mapping[str, int]], Mapping[str, Any]],
    progress: Progress,
) -> None:
    """Write ``source`` with every factorised linear as ``<linear>.<up>.weight`` (out, rank) and ``.<down>.weight``.

    ``parts``: the names (up, down); down is (rank, in) as nn.Linear stores it, a bias goes to up. ``change`` gives the
    keys of config.json from the ranks. Raises UnsupportedError where a linear is no product of two matrices.
    """
    pairs = every_two_factors(source, name)
    up, down = parts
    replaced = {ref.name for linear in source.factors.values() for ref in linear.tensors()}
    tensors: dict[str, NewTensor | StoredTensor] = {
        key: stored for key, stored in source.store.items() if key not in replaced
    }
    for linear, pair in pairs.items():
        first = stored_as(source.store, pair.down, (pair.bond, pair.inner), f"{linear}.{down}.weight")
        last = stored_as(source.store, pair.up, (pair.outer, pair.bond), f"{linear}.{up}.weight", pair.scale)
        tensors |= {first.name: first, last.name: last}
        if pair.linear.bias is not None:
            bias = source.store[pair.linear.bias.name]
            called = f"{linear}.{up}.bias"
            tensors[called] = NewTensor(called, bias.ref.dtype, bias.ref.shape, _reader(source, bias.ref.name))
    plan = sorted(tensors.values(), key=lambda item: layout.place(item.ref.name))
    write_weights(folder, source.store, plan, {"format": "pt"}, progress)
    config = {**source.config, **change({linear: pair.rank for linear, pair in pairs.items()})}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for companion in source.companions():
        shutil.copyfile(companion, folder / companion.name)


def _reader(source: Checkpoint, name: str) -> Callable[[], Any]:
    return lambda: source.store.read(name)


def class_name(source: Checkpoint, prefix: str) -> list[str]:
    """architectures: the family's class with ``prefix`` before it."""
    listed = source.config.get("architectures")
    return [f"{prefix}{name}" for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
