"""Reading and writing model folders: one format per file, every header checked before a weight is touched."""

from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.finite import check_finite
from mixt_export.checkpoints.folder import FORMATS, companion, open_checkpoint, recognise
from mixt_export.checkpoints.overlay import Made, overlaid
from mixt_export.checkpoints.store import StoredTensor, TensorStore
from mixt_export.checkpoints.write import NewTensor, write_checkpoint

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Made",
    "NewTensor",
    "StoredTensor",
    "TensorStore",
    "check_finite",
    "companion",
    "open_checkpoint",
    "overlaid",
    "recognise",
    "write_checkpoint",
]
