"""The PyTorch side: the model folder as transformers runs it, one sequence at a time, never batched or cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import UsageError
from mixt_export.optional import require
from mixt_export.verification.lookups import first_input
from mixt_export.verification.session import Ids, available_threads

Observe = Callable[[int, NDArray[np.float32]], None]
#: Block, keys and values (1, kv_heads, seq, head_dim) as computed -> as they are cached and attended to.
Keep = Callable[[int, Any, Any], tuple[Any, Any]]


class TorchModel:
    """A model folder, or an opened checkpoint, in PyTorch on the CPU at ``dtype`` ("float32", "float16" or "float64").

    ``layers``: keep only the first so many blocks (an export made with --num-layers has that many).
    Raises MissingDependencyError without torch or transformers, and what load_reference raises.
    """

    def __init__(
        self, folder: Path | Checkpoint, *, dtype: str = "float32", threads: int = 0, layers: int | None = None
    ) -> None:
        self._past: Sequence[NDArray[np.float32]] = ()
        self._kept: Keep | None = None
        self._torch = require("torch", "running the PyTorch reference")
        self._torch.set_num_threads(available_threads(threads))
        from mixt_export.reference import load_reference

        self.model: Any = load_reference(folder, dtype=dtype)
        folder = folder.path if isinstance(folder, Checkpoint) else folder
        self.model.eval()
        self.blocks: Any = _decoder_blocks(self.model, folder)
        if layers is not None and layers != len(self.blocks):
            if layers > len(self.blocks):
                raise UsageError(
                    f"{folder}: has {len(self.blocks)} layers, the exported model {layers}; "
                    "give the folder it was made from with --reference."
                )
            del self.blocks[layers:]
            config: Any = self.model.config
            config.num_hidden_layers = layers

    @property
    def vocab_size(self) -> int:
        """Rows of the output projection."""
        return int(self.model.config.vocab_size)

    @property
    def final_norm(self) -> tuple[str, Any] | None:
        """Name and module of the norm after the last block; None where there is none."""
        parent = next((module for module in self.model.modules() if self.blocks in module.children()), None)
        if parent is None:
            return None
        names = {module: name for name, module in self.model.named_modules()}
        norms = [module for module in parent.children() if "norm" in type(module).__name__.lower()]
        return (names[norms[-1]], norms[-1]) if norms else None

    def logits(self, tokens: Ids, observe: Observe | None = None) -> NDArray[np.float32]:
        """Teacher-forced logits (seq, vocab) float32 of one sequence (seq,).

        ``observe(layer, values)`` is called after each block with its output (seq, hidden) float32.
        """
        hooks = []
        if observe is not None:
            hooks = [block.register_forward_hook(self._hook(index, observe)) for index, block in enumerate(self.blocks)]
        try:
            with self._torch.inference_mode():
                ids = self._torch.from_numpy(np.ascontiguousarray(tokens[None, :]))
                logits = self.model(input_ids=ids, **self._cached(tokens)).logits
        finally:
            for hook in hooks:
                hook.remove()
        values: NDArray[np.float32] = logits[0].float().numpy()
        return values

    def hidden(self, tokens: Ids) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Logits (seq, vocab) and the output (seq, hidden) of every block, float32."""
        outputs: dict[int, NDArray[np.float32]] = {}
        logits = self.logits(tokens, outputs.__setitem__)
        return logits, [outputs[index] for index in range(len(self.blocks))]

    def embedded(self, tokens: Ids) -> NDArray[np.float32]:
        """What the first block is given for ``tokens`` (seq,) from position 0, (seq, hidden) float32."""
        return first_input(self, tokens)

    @contextmanager
    def behind(self, cache: Sequence[NDArray[np.float32]]) -> Iterator[None]:
        """All that runs inside follows ``cache``: keys and values of every block in turn, (1, kv_heads, past, dim)."""
        self._past, before = cache, self._past
        try:
            yield
        finally:
            self._past = before

    @contextmanager
    def keeping(self, keep: Keep) -> Iterator[None]:
        """All that runs inside, one sequence from an empty cache at a time, attends to what ``keep`` gives."""
        self._kept, before = keep, self._kept
        try:
            yield
        finally:
            self._kept = before

    def cache_of(self, tokens: Ids) -> list[NDArray[np.float32]]:
        """Keys and values of every block in turn, float32 (1, kv_heads, seq, head_dim), after ``tokens`` (seq,)."""
        from transformers import DynamicCache

        kept = DynamicCache()  # without the model's windows: every position stays
        with self._torch.inference_mode():
            ids = self._torch.from_numpy(np.ascontiguousarray(tokens[None, :]))
            self.model(input_ids=ids, past_key_values=kept, use_cache=True)
        return [part.float().numpy() for layer in kept.layers for part in (layer.keys, layer.values)]

    def _cached(self, tokens: Ids) -> dict[str, Any]:
        """Arguments of the model that put ``tokens`` behind the cache, if there is one."""
        if self._kept is not None:
            return {"use_cache": True, "past_key_values": changing_cache(self._kept)}
        if not self._past:
            return {"use_cache": False}
        from transformers import DynamicCache

        kept = DynamicCache(config=self.model.config)
        for layer in range(len(self.blocks)):
            key, value = (
                self._torch.from_numpy(array).to(self.model.dtype) for array in self._past[2 * layer : 2 * layer + 2]
            )
            kept.update(key, value, layer)
        width = self._past[0].shape[2] + len(tokens)
        mask = self._torch.ones((1, width), dtype=self._torch.int64)
        return {"use_cache": True, "past_key_values": kept, "attention_mask": mask}

    @staticmethod
    def _hook(index: int, observe: Observe) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            observe(index, value.detach()[0].float().numpy().copy())

        return hook


def changing_cache(keep: Keep) -> Any:
    """An empty cache that every position stays in, as ``keep`` gives it."""
    from transformers import DynamicCache

    class Changing(DynamicCache):  # type: ignore[misc]  # transformers is untyped
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *given: Any, **named: Any) -> Any:
            return super().update(*keep(layer_idx, key_states, value_states), layer_idx, *given, **named)

    return Changing()


def _decoder_blocks(model: Any, folder: Path) -> Any:
    count = int(model.config.num_hidden_layers)
    for _name, module in model.named_modules():
        if type(module).__name__ == "ModuleList" and len(module) == count:
            return module
    raise UsageError(
        f"{folder}: the PyTorch model has no list of {count} decoder blocks; verify cannot compare layers."
    )
