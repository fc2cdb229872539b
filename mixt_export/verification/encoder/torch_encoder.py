"""The PyTorch side of an encoder: the model folder as transformers runs it, one sequence at a time, never padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.errors import UsageError
from mixt_export.optional import require
from mixt_export.verification.session import Ids, available_threads


class TorchEncoder:
    """The model folder as transformers runs it, one sequence at a time, cut to ``layers`` blocks."""

    def __init__(self, folder: Path, dtype: str, threads: int, layers: int) -> None:
        self._torch = require("torch", "running the PyTorch reference")
        self._torch.set_num_threads(available_threads(threads))
        from mixt_export.reference import load_reference

        model: Any = load_reference(folder, dtype=dtype)
        blocks = next((module for module in model.modules() if type(module).__name__ == "ModuleList"), None)
        if blocks is None or len(blocks) < layers:
            raise UsageError(
                f"{folder}: has {0 if blocks is None else len(blocks)} blocks, the exported model {layers}; "
                "give the folder it was made from with --reference."
            )
        del blocks[layers:]
        self._model, self._blocks = model, blocks

    def states(self, tokens: Ids, segments: Ids | None) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        """Last hidden states (seq, hidden) float32 of one sequence (seq,), and every block's output."""
        outputs: list[NDArray[Any]] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            outputs.append(value.detach()[0].float().numpy().copy())

        hooks = [block.register_forward_hook(keep) for block in self._blocks]
        extra = {} if segments is None else {"token_type_ids": self._torch.from_numpy(segments[None, :])}
        try:
            with self._torch.inference_mode():
                ids = self._torch.from_numpy(np.ascontiguousarray(tokens[None, :]))
                found = self._model(input_ids=ids, **extra).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        values: NDArray[np.float32] = found[0].float().numpy()
        return values, outputs
