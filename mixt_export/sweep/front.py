"""The front of a compressed model that is still, byte for byte, that of the dense one."""

from __future__ import annotations

import re
from itertools import zip_longest

from mixt_export.checkpoints import Checkpoint


def unchanged_blocks(dense: Checkpoint, other: Checkpoint, blocks: str, count: int) -> int:
    """How many blocks from the first on compute in ``other`` what they compute in ``dense``.

    ``blocks`` is the module path of the list of ``count`` blocks (``model.layers``). A block counts when every tensor
    below its path has equal name, dtype, shape and bytes in both and no linear of it is factorised; all of them only
    if the tensors outside the blocks that are read before them (everything outside but the output head and the norm
    after the blocks, in doubt) are equal too. Weights are streamed, never held.
    """
    number = re.compile(re.escape(blocks) + r"\.([0-9]+)\.")

    def block_of(name: str) -> int:
        match = number.match(name)
        return int(match[1]) if match else -1

    changed = [block_of(name) for name in other.factors]
    if -1 in changed:
        return 0
    limit = min(changed, default=count)
    after = _after_the_blocks(blocks)
    names = {name for name in (*dense.store, *other.store) if not after.fullmatch(name)}
    for name in sorted(names, key=lambda name: (block_of(name), name)):
        place = block_of(name)
        if place >= limit:
            break
        if not _equal(dense, other, name):
            return max(place, 0)
    return limit


def _after_the_blocks(blocks: str) -> re.Pattern[str]:
    """Names of tensors that are read after the last block: the norm beside the blocks, an output head."""
    parent = blocks.rpartition(".")[0]
    return re.compile(rf"({re.escape(parent)}\.)?norm\.(weight|bias)|lm_head\.(weight|bias)")


def _equal(dense: Checkpoint, other: Checkpoint, name: str) -> bool:
    if name not in dense.store or name not in other.store:
        return False
    ours, theirs = dense.store[name].ref, other.store[name].ref
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return all(one == two for one, two in zip_longest(dense.store.chunks(name), other.store.chunks(name)))
