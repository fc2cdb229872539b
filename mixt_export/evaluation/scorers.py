"""Models that give logits at every position of a window: an exported folder, or a model folder in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import UsageError
from mixt_export.verification.graph import MODEL_FILE, open_graph
from mixt_export.verification.session import ExportedRunner, Ids, RunFailed

#: Who runs a kind of folder, as tables show it.
ONNX, TORCH = "onnxruntime", "torch"


class Scorer(Protocol):
    """``folder`` is run by ``engine``."""

    folder: Path
    engine: str

    def logits(self, tokens: Ids) -> NDArray[np.float32]:
        """Logits (seq, vocab) at every position of one sequence (seq,)."""
        ...


class ExportedScorer:
    """An exported folder through ONNX Runtime, its last-position node bypassed."""

    engine = ONNX

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.folder = folder
        self._runner = ExportedRunner(open_graph(folder), threads, all_positions=True)

    def logits(self, tokens: Ids) -> NDArray[np.float32]:
        """See Scorer.logits.

        Raises UsageError when the runtime fails, as it does beyond the model's longest sequence.
        """
        try:
            step = self._runner.full(tokens)
        except RunFailed as error:
            raise UsageError(
                f"{self.folder}: cannot run windows of {len(tokens)} tokens, try a smaller --window: {error}"
            ) from error
        values: NDArray[np.float32] = step.logits[0]
        return values


class TorchScorer:
    """A model folder through PyTorch float32."""

    engine = TORCH

    def __init__(self, folder: Path, threads: int = 0) -> None:
        from mixt_export.verification.torch_model import TorchModel

        self.folder = folder
        self._model = TorchModel(folder, threads=threads)

    def logits(self, tokens: Ids) -> NDArray[np.float32]:
        """See Scorer.logits."""
        return self._model.logits(tokens)


def open_scorer(folder: Path, threads: int = 0) -> Scorer:
    """An exported folder (it holds model.onnx) or else a model folder.

    Raises UsageError when it is neither.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: is not a folder; give an exported folder or a model folder.")
    return (ExportedScorer if (folder / MODEL_FILE).is_file() else TorchScorer)(folder, threads)
