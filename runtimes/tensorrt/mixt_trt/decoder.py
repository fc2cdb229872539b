"""A decoder with a key/value cache on the device, for one sequence: prefill in pieces, then token by token.

The graph takes the cache as an input and returns it one longer (concatenation), so past and present are two buffers
that change places after every run. A CUDA graph needs addresses and shapes that stay: there the cache is a window of
fixed width whose unused columns stand on the left and are masked out, and after each run present moves back into past
one column to the left, which drops an unused column. Both routes compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import Engine
from .errors import TrtError
from .manifest import ITEMSIZE, Manifest, Shape

#: Tokens that a cache has room for at first; it doubles from there to the folder's limit.
FIRST_CAPACITY = 256
#: Widths of the window of a CUDA graph: the smallest, doubling from there.
_FIRST_WINDOW = 64

Logits = npt.NDArray[np.float32]
#: Called after each run with its first position and the output of every block (seq, hidden); needs such an engine.
Observe = Callable[[int, "list[npt.NDArray[np.float32]]"], None]


@dataclass
class _Window:
    """A recorded decoding step: ``width`` columns of past, and the graph once it is recorded."""

    width: int
    graph: int | None = None


class Decoder:
    """Runs the engine of ``manifest``. Lengths in tokens. ``cuda_graph`` records decoding steps where that is possible.

    One cache at a time: ``new_cache`` (or ``truncate``) starts over. ``note`` hears why something was not possible.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        *,
        cuda_graph: bool = False,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.manifest = manifest
        self.engine = engine
        self.tokens: list[list[int]] = [[]]
        self.observe: Observe | None = None
        self._cuda, self._stream = engine.cuda, engine.stream
        self._note = note
        self._wants_graph = cuda_graph
        self._window: _Window | None = None
        self._parts = [f"{layer}.{part}" for layer in range(manifest.layers) for part in ("key", "value")]
        self._column = manifest.head_dim * ITEMSIZE[manifest.kv_dtype]
        self._capacity = 0
        self._past: list[int] = []
        self._present: list[int] = []
        self._ids = self._cuda.allocate(8 * self.max_input_len)
        self._mask = self._cuda.allocate(8 * manifest.max_seq_len)
        self._logits = self._cuda.allocate(4 * manifest.vocab_size)
        self._extra: dict[str, tuple[int, int]] = {}

    @property
    def max_input_len(self) -> int:
        """Most new tokens that one run may take."""
        return max(profile.inputs["input_ids"][2][1] for profile in self.engine.stamp.profiles)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.tokens[0])

    @property
    def cache_bytes(self) -> int:
        """Device memory held for keys and values, past and present."""
        return 2 * len(self._parts) * self._capacity * self._column * self.manifest.heads

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise TrtError(f"cannot cut a cache of {self.length} tokens to {length}.")
        if length == self.length:
            return
        self._leave_window()
        self._move(self.length, 0, length, 0, length)
        del self.tokens[0][length:]

    def prefill(self, ids: Sequence[Sequence[int]], _cache: object = None, *, chunk: int | None = None) -> Logits:
        """Append the tokens ``ids[0]``, at most ``chunk`` (and what the engine takes) a run.

        Returns logits (1, vocab) float32 after the last token. Raises TrtError for unknown tokens and for too many.
        """
        (tokens,) = ids
        self._check(tokens)
        rest = [int(token) for token in tokens]
        while rest:
            piece = rest[: self._piece(min(chunk or len(rest), len(rest)))]
            del rest[: len(piece)]
            if len(piece) == 1 and self._wants_graph and self.length and self._advance_in_window(piece[0]):
                continue
            self._advance(piece)
        logits = np.empty((1, self.manifest.vocab_size), np.float32)
        self._cuda.download(logits, self._logits, self._stream)
        return logits

    def step(self, tokens: Sequence[int], _cache: object = None) -> Logits:
        """Append one token; returns logits (1, vocab) float32."""
        return self.prefill([tokens])

    def cache_norms(self) -> npt.NDArray[np.float64]:
        """Euclidean norm of keys and of values per layer and position: (layers, 2, length), over heads and features."""
        self._leave_window()
        shape = (self.manifest.heads, self.length, self.manifest.head_dim)
        norms = [np.sqrt((self._read(address, shape) ** 2).sum(axis=(0, 2))) for address in self._past]
        return np.stack(norms).reshape(self.manifest.layers, 2, self.length)

    def _piece(self, wanted: int) -> int:
        """How many new tokens the next run takes: as many as wanted and admitted, or one where the cache is long."""
        wanted = min(wanted, self.max_input_len)
        admitted = self.engine.admits(self._shapes(wanted, self.length, self.length + wanted))
        return wanted if admitted else 1

    # ------------------------------------------------------------------------------------------------- plain route

    def _advance(self, piece: list[int]) -> None:
        """Run ``piece`` after what the cache holds; the cache changes only when the run succeeded."""
        self._leave_window()
        past, total = self.length, self.length + len(piece)
        self._reserve(total)
        shapes = self._shapes(len(piece), past, total)
        self._prepare(shapes, np.ones(total, np.int64), piece)
        self.engine.enqueue()
        self._cuda.synchronize(self._stream)
        self._past, self._present = self._present, self._past
        self.tokens[0].extend(piece)
        self._observe_extra(past)

    def _prepare(self, shapes: dict[str, Shape], mask: npt.NDArray[np.int64], piece: list[int]) -> None:
        self._cuda.upload(self._ids, np.asarray(piece, np.int64), self._stream)
        self._cuda.upload(self._mask, mask, self._stream)
        addresses = {"input_ids": self._ids, "attention_mask": self._mask, "logits": self._logits}
        for part, past, present in zip(self._parts, self._past, self._present, strict=True):
            addresses[f"past_key_values.{part}"] = past
            addresses[f"present.{part}"] = present
        self.engine.prepare(shapes, addresses)
        extra = [name for name in self.engine.outputs if name not in addresses]
        if extra:
            self.engine.prepare(shapes, {name: self._extra_buffer(name) for name in extra})

    def _shapes(self, new: int, past: int, total: int) -> dict[str, Shape]:
        cache = (1, self.manifest.heads, past, self.manifest.head_dim)
        names = {f"past_key_values.{part}": cache for part in self._parts}
        return {"input_ids": (1, new), "attention_mask": (1, total), **names}

    def _reserve(self, total: int) -> None:
        """Room for ``total`` columns in both buffers of every tensor; keeps what past holds."""
        if total <= self._capacity:
            return
        capacity = min(max(FIRST_CAPACITY, 2 * self._capacity, total), max(total, self.manifest.max_seq_len))
        nbytes = self.manifest.heads * capacity * self._column
        used = self.length * self._column * self.manifest.heads
        for index in range(len(self._parts)):
            fresh = self._cuda.allocate(nbytes)
            # Zeroed: a masked column must not hold NaN.
            self._cuda.zero(fresh, nbytes, self._stream)
            if self._capacity:
                self._cuda.copy_rows(fresh, used, self._past[index], used, used, 1, self._stream)
                self._cuda.synchronize(self._stream)
                self._cuda.free(self._past[index])
                self._cuda.free(self._present[index])
                self._past[index], self._present[index] = fresh, self._cuda.allocate(nbytes)
            else:
                self._past.append(fresh)
                self._present.append(self._cuda.allocate(nbytes))
            self._cuda.zero(self._present[index], nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        self._capacity = capacity

    def _move(self, old: int, old_start: int, new: int, new_start: int, count: int) -> None:
        """``count`` columns of past, a buffer ``old`` wide, into one ``new`` wide; columns nobody filled are zero."""
        size, column = self.manifest.heads, self._column
        for index, source in enumerate(self._past):
            target = self._present[index]
            self._cuda.zero(target, size * new * column, self._stream)
            self._cuda.copy_rows(
                target + new_start * column, new * column, source + old_start * column, old * column,
                count * column, size, self._stream,
            )  # fmt: skip
        self._cuda.synchronize(self._stream)
        self._past, self._present = self._present, self._past

    # -------------------------------------------------------------------------------------------- CUDA graph route

    def _advance_in_window(self, token: int) -> bool:
        """One decoding step of fixed shape; False when there is no room for a window (the plain route does it)."""
        window = self._enter_window()
        if window is None:
            return False
        mask = np.zeros(window.width + 1, np.int64)
        mask[window.width - self.length :] = 1
        if window.graph is not None:
            self._cuda.upload(self._ids, np.asarray([token], np.int64), self._stream)
            self._cuda.upload(self._mask, mask, self._stream)
            self._cuda.launch(window.graph, self._stream)
        else:
            # The first run after new shapes is never recorded: TensorRT sets itself up during it.
            self._prepare(self._shapes(1, window.width, window.width + 1), mask, [token])
            self._queue_step(window.width)
            self._cuda.synchronize(self._stream)
            self._record(window)
        self._cuda.synchronize(self._stream)
        self.tokens[0].append(token)
        return True

    def _queue_step(self, width: int) -> None:
        self.engine.enqueue()
        column = self._column
        for past, present in zip(self._past, self._present, strict=True):
            self._cuda.copy_rows(
                past, width * column, present + column, (width + 1) * column, width * column, self.manifest.heads,
                self._stream,
            )  # fmt: skip

    def _record(self, window: _Window) -> None:
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._queue_step(window.width)
            finally:
                window.graph = self._cuda.end_capture(self._stream)
        except TrtError as error:
            self._note(f"decoding without a CUDA graph: {error}")
            self._wants_graph = False

    def _enter_window(self) -> _Window | None:
        """The window that has a free column, made or doubled when needed; None when the limit leaves no room."""
        width = self._window.width if self._window is not None else _FIRST_WINDOW
        while width <= self.length:
            width *= 2
        width = min(width, self.manifest.max_seq_len - 1)
        if width <= self.length:
            return None
        if self._window is None or self._window.width != width:
            self._leave_window()
            self._reserve(width + 1)
            self._move(self.length, 0, width, width - self.length, self.length)
            self._window = _Window(width)
        return self._window

    def _leave_window(self) -> None:
        """Back to a cache without unused columns."""
        if self._window is None:
            return
        window, self._window = self._window, None
        if window.graph is not None:
            self._cuda.free_graph(window.graph)
        self._move(window.width, window.width - self.length, self.length, 0, self.length)

    # --------------------------------------------------------------------------------------------------- outputs

    def _extra_buffer(self, name: str) -> int:
        nbytes = 4 * self.engine.elements(name)
        address, held = self._extra.get(name, (0, 0))
        if nbytes > held:
            if held:
                self._cuda.free(address)
            address = self._cuda.allocate(nbytes)
            self._extra[name] = address, nbytes
        return address

    def _observe_extra(self, first: int) -> None:
        if self.observe is None:
            return
        names = self.engine.stamp.layer_outputs
        self.observe(
            first, [self._read(self._extra[n][0], self.engine.shape(n)[1:], self.engine.dtype(n)) for n in names]
        )

    def _read(self, address: int, shape: Shape, kind: str | None = None) -> npt.NDArray[Any]:
        """An array on the device as float64; bfloat16 is the upper half of a float32."""
        kind = kind or {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[self.manifest.kv_dtype]
        raw = np.empty(shape, {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16}[kind])
        self._cuda.download(raw, address, self._stream)
        if kind == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float64)

    def _check(self, tokens: Sequence[int]) -> None:
        vocab, limit = self.manifest.vocab_size, self.manifest.max_seq_len
        if not tokens:
            raise TrtError("there are no tokens; give at least one.")
        bad = next((token for token in tokens if not 0 <= token < vocab), None)
        if bad is not None:
            raise TrtError(f"{bad} is not a token id from 0 to {vocab - 1}.")
        if self.length + len(tokens) > limit:
            raise TrtError(
                f"{self.length + len(tokens)} tokens do not fit: the folder was exported for at most {limit}; shorten "
                "the prompt or export again with a larger --max-seq-len."
            )
