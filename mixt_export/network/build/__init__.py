"""Constructors of the known structures from sizes. Row-major everywhere: the first mode is the most significant."""

from mixt_export.network.build.blocks import blast, block_tensor_train, monarch
from mixt_export.network.build.chains import kronecker, tensor_ring, tensor_train
from mixt_export.network.build.heads import tucker_heads
from mixt_export.network.build.matrix import dense, low_rank, tucker2, with_sparse
from mixt_export.network.build.tensor_mixture import mixt

__all__ = [
    "blast",
    "block_tensor_train",
    "dense",
    "kronecker",
    "low_rank",
    "mixt",
    "monarch",
    "tensor_ring",
    "tensor_train",
    "tucker2",
    "tucker_heads",
    "with_sparse",
]
