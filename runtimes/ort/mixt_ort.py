"""Run an exported folder with ONNX Runtime: one file, numpy and onnxruntime; tokenizers and jinja2 only for text.

    model = Model("OUT")
    text = Tokenizer("OUT")
    stream = text.stream()
    for token in model.generate(text.encode("Once upon a time"), max_new_tokens=64):
        print(stream.push(token), end="", flush=True)

The folder's ``mixt_manifest.json`` says which dialect the graph speaks; see README.md beside this file.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SCHEMA = 1
MODEL_FILE = "model.onnx"
MANIFEST_FILE = "mixt_manifest.json"

_MAX_JSON_BYTES = 64 * 1024 * 1024
_DTYPES = ("float32", "float16")
_KV_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
_ORT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
#: Dialects, those for TensorRT included: their graphs are standard ONNX with the cache of ``portable``.
_PADDING = {"ort": "right", "portable": "left", "trt10": "left", "trt11": "left"}
#: A cache starts with room for this many tokens and then doubles, up to the model's limit.
_FIRST_CAPACITY = 256
#: `generate` processes prompts in pieces of this many tokens: activations stay in the processor's caches, which is
#: faster than one long piece and takes less memory. Products of integers are as fast in shorter pieces.
_PREFILL_CHUNK = {"float": 256, "integer": 128}
#: What ONNX Runtime reads while a session is made: whether its attention on a CPU works in tiles.
_TILES_OFF = "ORT_GQA_DISABLE_FLASH_ATTENTION"
#: How long a thread without work waits busily; the first version of ONNX Runtime on which that was tried.
_SPIN_US, _SPIN_LIMITED = "20", (1, 31)
#: Flags of x86 processors that add products of 8 bits in 32 bits at once (VNNI, AMX).
_WIDE_SUMS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_CPUINFO = Path("/proc/cpuinfo")
#: Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

Logits = npt.NDArray[np.float32]
_Described = tuple[str, tuple[int | None, ...]]


class OrtRuntimeError(Exception):
    """Base of the errors of this runtime; the text is one sentence a user can act on."""


class FolderError(OrtRuntimeError):
    """The folder is not what an exporter wrote: a file is missing, corrupt, or contradicts the graph."""


class PromptError(OrtRuntimeError):
    """The request cannot be served: unknown token ids, a prompt that does not fit, a batch the dialect refuses."""


class TemplateError(OrtRuntimeError):
    """The chat template is absent or does not render."""


class OutputError(OrtRuntimeError):
    """The model produced numbers that cannot be used, or ONNX Runtime failed while running it."""


# ------------------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Manifest:
    """What ``mixt_manifest.json`` says about running the graph. Lengths in tokens, ``heads`` are key/value heads.

    ``weights``: "integer" where matrices were quantised, else "float". ``integer_products``: whether there are products
    of int8 by int8, which read activations as integers too.
    """

    dialect: str
    dtype: str
    padding: str
    layers: int
    heads: int
    head_dim: int
    kv_dtype: str
    shared_buffer: bool
    max_seq_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    weights: str = "float"
    integer_products: bool = False

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of one sequence adds to the cache."""
        return 2 * self.layers * self.heads * self.head_dim * np.dtype(_KV_DTYPES[self.kv_dtype]).itemsize


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check ``mixt_manifest.json``. Raises FolderError naming the field that is wrong."""
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise FolderError(f"{path}: no such file; give the folder that `mixt export` wrote.")
    data = _read_json(path)
    if not isinstance(data, dict):
        raise FolderError(f"{path}: holds {type(data).__name__}, not a JSON object; export the model again.")
    if data.get("schema") != SCHEMA:
        raise FolderError(
            f"{path}: schema {data.get('schema')!r} is not {SCHEMA}, the one this runtime reads; "
            "use the runtime of the version that exported the folder, or export again."
        )
    if data.get("kind") == "encoder":
        raise FolderError(f"{path}: is of an encoder, which makes no text; embed with `mixt embed` or device/embed.py.")
    field = _Fields(path, data)
    dialect = field.choice("dialect", tuple(_PADDING))
    shared = field.get("kv.shared_buffer")
    if not isinstance(shared, bool):
        raise field.wrong("kv.shared_buffer", shared, "true or false")
    if field.choice("padding", ("left", "right")) != _PADDING[dialect]:
        raise field.wrong("padding", field.get("padding"), f"{_PADDING[dialect]!r} (dialect {dialect})")
    if shared and dialect != "ort":
        raise field.wrong("kv.shared_buffer", shared, f"false (dialect {dialect})")
    eos = field.get("eos_token_ids")
    if not isinstance(eos, list) or not all(_is_int(token) and token >= 0 for token in eos):
        raise field.wrong("eos_token_ids", eos, "a list of token ids")
    bos = field.get("bos_token_id")
    if bos is not None and not (_is_int(bos) and bos >= 0):
        raise field.wrong("bos_token_id", bos, "null or a token id")
    return Manifest(
        dialect=dialect,
        dtype=field.choice("dtype", _DTYPES),
        padding=_PADDING[dialect],
        layers=field.count("kv.layers", 10_000),
        heads=field.count("kv.heads", 10_000),
        head_dim=field.count("kv.head_dim", 65_536),
        kv_dtype=field.choice("kv.dtype", tuple(_KV_DTYPES)),
        shared_buffer=shared,
        max_seq_len=field.count("limits.max_seq_len", 2**24),
        vocab_size=field.count("vocab_size", 2**24),
        eos_token_ids=tuple(eos),
        bos_token_id=bos,
        weights="integer" if "quantisation" in data else "float",
        integer_products=_integer_products(data.get("quantisation")),
    )


def _integer_products(quantisation: Any) -> bool:
    """Whether a matrix of the manifest's ``quantisation`` is multiplied by integers."""
    matrices = quantisation.get("matrices") if isinstance(quantisation, dict) else None
    entries = matrices.values() if isinstance(matrices, dict) else ()
    return any(isinstance(entry, dict) and "activations" in entry for entry in entries)


class _Fields:
    """Typed access to a parsed manifest by dotted name."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self._path = path
        self._data = data

    def get(self, name: str) -> Any:
        value: Any = self._data
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise FolderError(f"{self._path}: the field {name!r} is missing; export the model again.")
            value = value[part]
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.get(name)
        if value not in allowed:
            raise self.wrong(name, value, "one of " + ", ".join(allowed))
        return str(value)

    def count(self, name: str, limit: int) -> int:
        value = self.get(name)
        if not _is_int(value) or not 1 <= value <= limit:
            raise self.wrong(name, value, f"an integer from 1 to {limit}")
        return int(value)

    def wrong(self, name: str, value: Any, expected: str) -> FolderError:
        return FolderError(f"{self._path}: {name} is {value!r}, expected {expected}; export the model again.")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_own(path: Path) -> None:
    """Raise FolderError when ``path`` is a link out of its folder, unless into the blobs of a Hugging Face cache."""
    if not path.is_symlink():
        return
    home, target = path.parent.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in target.parents and blobs not in target.parents:
        raise FolderError(f"{path}: is a link that leads out of the folder; put the file itself there.")


def _read_text(path: Path) -> str:
    _check_own(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise FolderError(f"{path}: larger than {_MAX_JSON_BYTES} bytes, which no exported folder needs.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FolderError(f"{path}: is not UTF-8 text ({error.reason}); export the model again.") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: is not valid JSON ({error}); export the model again.") from error


# ---------------------------------------------------------------------------------------------------------- cache


class Cache:
    """Keys and values of a batch of sequences, and which tokens they stand for. Made by ``Model.new_cache``.

    Storage is allocated on demand and doubles up to the model's limit. In the ``ort`` dialect with a shared buffer,
    past and present are one array (batch, heads, capacity, head_dim) that the graph updates in place; otherwise two
    flat arrays per tensor take turns as past and present.
    """

    def __init__(self, manifest: Manifest, binding: Any, batch: int) -> None:
        self.batch = batch
        self.capacity = 0
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self._manifest = manifest
        self._binding = binding
        self._dtype = _KV_DTYPES[manifest.kv_dtype]
        self._names = [f"{i}.{part}" for i in range(manifest.layers) for part in ("key", "value")]
        #: Mask columns in use. With left padding they include the padding.
        self._columns = 0
        self._current: list[npt.NDArray[Any]] = []
        self._other: list[npt.NDArray[Any]] = []
        self._valid = np.zeros((batch, 0), np.bool_)
        self._mask = np.zeros(0, np.int64)
        #: The tokens of a step with a shared buffer, and whether they and the whole of the mask are what is bound.
        self._token = np.zeros((batch, 1), np.int64)
        self._step_bound = False
        self._logits = np.zeros((batch, 1, manifest.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens that each sequence holds."""
        return [len(row) for row in self.tokens]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(array.nbytes for array in (*self._current, *self._other))

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of the only sequence. Raises PromptError for a batch."""
        if self.batch != 1 or not 0 <= length <= len(self.tokens[0]):
            raise PromptError(
                f"cannot cut a cache of {self.batch} sequence(s) of {self.lengths} tokens to {length}; "
                "only a single sequence can be cut, and only to a shorter one."
            )
        if not self._manifest.shared_buffer and length < self._columns:
            for index in range(len(self._names)):
                kept = self._view(self._current, index, self._columns)[:, :, :length]
                self._view(self._other, index, length)[...] = kept
            self._current, self._other = self._other, self._current
        del self.tokens[0][length:]
        self._columns = length

    def _advance(
        self, run: Callable[[Any], None], ids: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Run ``ids`` (batch, seq), of which ``valid`` are tokens and not padding; returns the logits buffer.

        The cache changes only after the run succeeded, so an error or an interrupt leaves it usable.
        """
        right = self._manifest.padding == "right"
        counts = valid.sum(axis=1)
        ends = np.asarray(self.lengths, np.int64) + counts
        total = int(ends.max()) if right else self._columns + ids.shape[1]
        self._reserve(total)
        mask = self._mask[: self.batch * total].reshape(self.batch, total)
        if right:
            np.less(np.arange(total), ends[:, None], out=mask, casting="unsafe")
        else:
            self._valid[:, self._columns : total] = valid
            mask[...] = self._valid[:, :total]
        self._step_bound = False
        self._bind_inputs(ids, mask)
        if not self._manifest.shared_buffer:
            self._bind(self._columns, total)
        run(self._binding)
        if not self._manifest.shared_buffer:
            self._current, self._other = self._other, self._current
        self._columns = total
        for row, new, keep in zip(self.tokens, ids, valid, strict=True):
            row.extend(new[keep].tolist())
        return self._logits

    def _step(self, run: Callable[[Any], None], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Run one token of every sequence with a shared buffer; returns the logits buffer.

        As `_advance`, but for what it would make and bind anew: binding two inputs takes 0.1 ms after a step has filled
        the processor's caches with weights. The mask is as long as the buffer, with zeros behind what each sequence
        holds: GroupQueryAttention reads the number of ones; its length only tells it that this is no first prompt.
        """
        self._reserve(self._columns + 1)
        mask = self._mask.reshape(self.batch, self.capacity)
        if not self._step_bound:
            self._bind_inputs(self._token, mask)
            self._step_bound = True
        for index, (row, token) in enumerate(zip(self.tokens, tokens, strict=True)):
            held = len(row) + 1
            mask[index, :held] = 1
            mask[index, held:] = 0
            self._token[index, 0] = token
        run(self._binding)
        for row, token in zip(self.tokens, tokens, strict=True):
            row.append(int(token))
        self._columns += 1
        return self._logits

    def _bind_inputs(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> None:
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            self._binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)

    def _reserve(self, total: int) -> None:
        """Make room for ``total`` columns; keeps what is stored. One array at a time, so the peak stays low."""
        if total <= self.capacity:
            return
        limit = max(total, self._manifest.max_seq_len)
        capacity = min(limit, max(_FIRST_CAPACITY, 2 * self.capacity, total))
        used, heads, size = self._columns, self._manifest.heads, self._manifest.head_dim
        shared = self._manifest.shared_buffer
        if not self._current:
            self._current = [np.zeros(0, self._dtype) for _ in self._names]
            self._other = [] if shared else [np.zeros(0, self._dtype) for _ in self._names]
        for index in range(len(self._names)):
            # Zeroed, not empty: uninitialised NaN in a slot nobody reads must not reach a vectorised kernel.
            fresh = np.zeros(self.batch * heads * capacity * size, self._dtype)
            if used:
                old = self._view(self._current, index, self.capacity if shared else used)[:, :, :used]
                length = capacity if shared else used
                view = fresh[: self.batch * heads * length * size].reshape(self.batch, heads, length, size)
                view[:, :, :used] = old
            self._current[index] = fresh
            if not shared:
                self._other[index] = np.zeros_like(fresh)
        grown = np.zeros((self.batch, capacity), np.bool_)
        grown[:, :used] = self._valid[:, :used]
        self._valid = grown
        self._mask = np.zeros(self.batch * capacity, np.int64)
        self._step_bound = False
        self.capacity = capacity
        if shared:
            self._bind(capacity, capacity)

    def _bind(self, past: int, present: int) -> None:
        """Point past (``past`` tokens long) and present (``present`` tokens long) at the storage."""
        shape = (self.batch, self._manifest.heads, past, self._manifest.head_dim)
        out_shape = (self.batch, self._manifest.heads, present, self._manifest.head_dim)
        targets = self._current if self._manifest.shared_buffer else self._other
        for name, source, target in zip(self._names, self._current, targets, strict=True):
            self._binding.bind_input(f"past_key_values.{name}", "cpu", 0, self._dtype, shape, source.ctypes.data)
            self._binding.bind_output(f"present.{name}", "cpu", 0, self._dtype, out_shape, target.ctypes.data)

    def _view(self, arrays: list[npt.NDArray[Any]], index: int, length: int) -> npt.NDArray[Any]:
        """The flat array ``index`` seen as (batch, heads, length, head_dim)."""
        shape = (self.batch, self._manifest.heads, length, self._manifest.head_dim)
        return arrays[index][: int(np.prod(shape))].reshape(shape)


# -------------------------------------------------------------------------------------------------------- sampler


class Sampler:
    """Choose the next token from logits. The default is greedy (temperature 0).

    Order as in transformers: repetition penalty (Keskar et al. 2019, CTRL: a seen token's logit is divided by the
    penalty when positive, multiplied when negative), temperature, the ``top_k`` likeliest (0: all), then the smallest
    set of likeliest tokens whose mass reaches ``top_p`` (Holtzman et al. 2020). The same ``seed`` gives the same draws.
    Raises PromptError for values out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
    ) -> None:
        checks = (
            (0.0 <= temperature < np.inf, "temperature", temperature, "0 (greedy) or more"),
            (0.0 < top_p <= 1.0, "top_p", top_p, "above 0 and at most 1"),
            (top_k >= 0, "top_k", top_k, "0 (off) or more"),
            (0.0 < repetition_penalty < np.inf, "repetition_penalty", repetition_penalty, "above 0"),
            (seed is None or seed >= 0, "seed", seed, "0 or more"),
        )
        for good, name, value, expected in checks:
            if not good:
                raise PromptError(f"{name} is {value}, it must be {expected}.")
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.repetition_penalty = repetition_penalty
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.floating[Any]], history: Sequence[int] = ()) -> int:
        """One token id from ``logits`` (vocab,), given the tokens so far. Raises OutputError for NaN or +inf."""
        likeliest = int(logits.argmax())  # of NaN and numbers the first NaN
        if not np.isfinite(logits[likeliest]):
            raise OutputError("the model produced NaN or infinite logits; verify the exported folder.")
        if self.repetition_penalty != 1.0 and len(history):
            logits = logits.astype(np.float64)
            seen = np.unique(np.asarray(history, np.int64))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
            likeliest = int(logits.argmax())
        if self.temperature == 0.0:
            return likeliest
        largest = float(logits[likeliest])
        tokens: npt.NDArray[np.int64] | None = None
        if 0 < self.top_k < logits.size:
            tokens = np.argpartition(logits, -self.top_k)[-self.top_k :].astype(np.int64)
            logits = logits[tokens]
        with np.errstate(over="ignore", under="ignore"):
            mass = np.exp((logits.astype(np.float64) - largest) / self.temperature)
        mass /= mass.sum()
        if self.top_p < 1.0:
            nucleus = _nucleus(mass, self.top_p)
            mass = mass[nucleus]
            tokens = nucleus if tokens is None else tokens[nucleus]
        cumulative = np.cumsum(mass)
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        drawn = min(drawn, mass.size - 1)
        return drawn if tokens is None else int(tokens[drawn])


def _nucleus(mass: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Indices of the smallest set of likeliest entries whose sum reaches ``top_p``, likeliest first.

    Sorting a whole vocabulary costs milliseconds and the set is usually small, so a growing head of it is sorted.
    """
    head = 64
    while True:
        head = min(head, mass.size)
        order = np.argpartition(mass, mass.size - head)[mass.size - head :]
        order = order[np.argsort(-mass[order], kind="stable")].astype(np.int64)
        cumulative = np.cumsum(mass[order])
        if cumulative[-1] >= top_p or head == mass.size:
            return order[: int(np.searchsorted(cumulative, top_p, side="left")) + 1]
        head *= 8


# ---------------------------------------------------------------------------------------------------------- model


def sum_exactly(options: Any) -> bool:
    """Have a session of ``options`` (ort.SessionOptions) add products of int8 by int8 without saturation.

    On x86 without VNNI, ONNX Runtime's kernel for signed weights adds pairs of products in 16 bits, which overflow: a
    product of SmolLM2 was off by 18 %. There its own rewriting to unsigned weights (the same integers plus 128) is
    asked for, which adds in 32 bits and takes 1.2 to 1.5 times as long; True is returned. Elsewhere nothing is set:
    with VNNI or AMX the signed kernel is exact and the unsigned one slower. An unknown x86 is taken for one without.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or _WIDE_SUMS & _cpu_flags():
        return False
    options.add_session_config_entry("session.x64quantprecision", "1")
    return True


@contextmanager
def _freed_at_once(wanted: bool) -> Iterator[None]:
    """While weights are rewritten, have glibc give what is freed back to the system (335 MB at the peak become 265).

    It would keep the holes of the signed weights, tens of MB, for later. Afterwards its limits are what they grow to by
    themselves in a process that has freed large blocks.
    """
    try:
        limit = ctypes.CDLL(None).mallopt if wanted else None
    except (AttributeError, OSError, TypeError):  # another C library
        limit = None
    if limit is None:
        yield
        return
    limit(_MMAP_THRESHOLD, 64 * 1024)
    try:
        yield
    finally:
        limit(_MMAP_THRESHOLD, 32 * 1024 * 1024)
        limit(_TRIM_THRESHOLD, 64 * 1024 * 1024)


def _cpu_flags() -> set[str]:
    """Features of this processor as Linux names them; empty elsewhere."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


class Model:
    """An exported folder, loaded. Raises FolderError when the folder is not whole.

    ``threads``: default one per physical core this process may use. ``low_memory`` keeps weights only in the mapped
    file (no prepacked copy: about half the speed, far less memory). ``spinning`` lets idle threads busy-wait as long as
    ONNX Runtime does by itself, not only for microseconds: a little faster with nothing else to do, slower on a shared
    machine.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        low_memory: bool = False,
        spinning: bool = False,
    ) -> None:
        if threads is not None and threads < 1:
            raise PromptError(f"threads is {threads}, it must be 1 or more.")
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.threads = threads or physical_cores()
        path = self.folder / MODEL_FILE
        if not path.is_file():
            raise FolderError(f"{path}: no such file; the folder is incomplete, export the model again.")
        _check_own(path)
        # Here and not above: sampler, tokenizer and Generation also serve engines that are not ONNX Runtime's.
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        _wait(options, ort.__version__, long=spinning)
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
        rewritten = self.manifest.integer_products and sum_exactly(options)
        try:
            with _attention(self.manifest), _freed_at_once(rewritten):
                self.session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime's exceptions have no common base class
            raise FolderError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}.") from error
        _check_graph(path, self.session, self.manifest)

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a piece in which prompts are best processed."""
        return _PREFILL_CHUNK[self.manifest.weights]

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache for ``batch`` sequences."""
        if batch < 1:
            raise PromptError(f"a batch of {batch} sequences cannot be run; give at least one.")
        return Cache(self.manifest, self.session.io_binding(), batch)

    def prefill(self, ids: Sequence[Sequence[int]], cache: Cache, *, chunk: int | None = None) -> Logits:
        """Append ``ids`` (one token list per sequence, ragged allowed) to ``cache``; at most ``chunk`` columns a run.

        Returns logits (batch, vocab) float32 after the last token of each sequence.
        Raises PromptError: empty or unknown tokens, more than max_seq_len, or (dialect ort) more than one sequence
        together with a cache that is not empty or a chunk smaller than the prompt.
        """
        self._check_ids(ids, cache.batch, cache._columns)
        width = max(len(row) for row in ids)
        step = width if chunk is None else chunk
        if step < 1:
            raise PromptError(f"chunk is {chunk}, it must be 1 or more.")
        continued = any(cache.lengths) or step < width
        if self.manifest.dialect == "ort" and cache.batch > 1 and continued and width > 1:
            raise PromptError(
                f"the ort dialect continues a prompt only for one sequence, not for {cache.batch}: prefill the batch "
                "in one piece into an empty cache, or export with --target onnx."
            )
        padded = np.zeros((cache.batch, width), np.int64)
        valid = np.zeros((cache.batch, width), np.bool_)
        for row, tokens in enumerate(ids):
            where = slice(0, len(tokens)) if self.manifest.padding == "right" else slice(width - len(tokens), width)
            padded[row, where] = tokens
            valid[row, where] = True
        logits = cache._logits
        for start in range(0, width, step):
            piece = np.ascontiguousarray(padded[:, start : start + step])
            logits = cache._advance(self._run, piece, valid[:, start : start + step])
        return logits[:, 0, :].copy()

    def step(self, tokens: Sequence[int], cache: Cache) -> Logits:
        """Append one token to every sequence; returns logits (batch, vocab) float32. Raises PromptError."""
        ids = [[token] for token in tokens]
        if not self.manifest.shared_buffer:
            return self.prefill(ids, cache)
        self._check_ids(ids, cache.batch, cache._columns)
        return cache._step(self._run, tokens)[:, 0, :].copy()

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 128,
        sampler: Callable[[Logits, Sequence[int]], int] | None = None,
        stop: Collection[int] | None = None,
        *,
        cache: Cache | None = None,
        chunk: int | None = 0,
    ) -> Generation:
        """Iterate over new token ids (the stop token itself is not yielded).

        ``stop``: token ids that end the text; None means the folder's end-of-sequence ids. ``cache``: a cache of one
        sequence; whatever it shares with the prompt's beginning is not computed again. ``chunk``: tokens that are
        processed at once; 0: ``prefill_chunk``, None: all. Ends early at max_seq_len.
        Raises PromptError at once when the prompt does not fit.
        """
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}, it must be 1 or more.")
        cache = cache or self.new_cache()
        if cache.batch != 1:
            raise PromptError(f"generate needs a cache of one sequence, not of {cache.batch}.")
        prompt = [int(token) for token in prompt_ids]
        self._check_ids([prompt], batch=1, columns=0)
        ends = self.manifest.eos_token_ids if stop is None else stop
        chunk = self.prefill_chunk if chunk == 0 else chunk
        return Generation(self, prompt, max_new_tokens, sampler or Sampler(), frozenset(ends), cache, chunk)

    def _check_ids(self, ids: Sequence[Sequence[int]], batch: int, columns: int) -> None:
        """Raise PromptError unless ``ids`` can be appended to ``batch`` sequences that fill ``columns`` columns."""
        if len(ids) != batch:
            raise PromptError(f"{len(ids)} token list(s) for a cache of {batch} sequence(s).")
        vocab, limit = self.manifest.vocab_size, self.manifest.max_seq_len
        for row, tokens in enumerate(ids):
            if not len(tokens):
                raise PromptError(f"sequence {row} has no tokens; give at least one.")
            bad = next((token for token in tokens if not _is_int(token) or not 0 <= token < vocab), None)
            if bad is not None:
                raise PromptError(f"sequence {row} holds {bad!r}, which is not a token id from 0 to {vocab - 1}.")
        needed = columns + max(len(tokens) for tokens in ids)
        if needed > limit:
            raise PromptError(
                f"{needed} tokens do not fit: the folder was exported for at most {limit}; shorten the prompt or "
                "export again with a larger --max-seq-len."
            )

    def _run(self, binding: Any) -> None:
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            # onnxruntime's exceptions have no common base class
            raise OutputError(f"ONNX Runtime failed: {_first_line(error)}.") from error


class Generation(Iterator[int]):
    """The tokens of one answer, made as they are asked for; ``stats`` and ``finish_reason`` fill as it goes.

    ``finish_reason``: None while running, then "stop" (a stop token), "length" (max_new_tokens) or "max_seq_len".
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        max_new_tokens: int,
        sampler: Callable[[Logits, Sequence[int]], int],
        stop: frozenset[int],
        cache: Cache,
        chunk: int | None,
    ) -> None:
        self.stats = Stats()
        self.finish_reason: str | None = None
        self.cache = cache
        self._steps = self._generate(model, prompt, max_new_tokens, sampler, stop, chunk)

    def __next__(self) -> int:
        return next(self._steps)

    def _generate(
        self,
        model: Model,
        prompt: list[int],
        max_new_tokens: int,
        sampler: Callable[[Logits, Sequence[int]], int],
        stop: frozenset[int],
        chunk: int | None,
    ) -> Iterator[int]:
        stats, cache = self.stats, self.cache
        began = time.perf_counter()
        # At least one token must run, or there are no logits to continue from.
        reused = min(_common_prefix(cache.tokens[0], prompt), len(prompt) - 1)
        cache.truncate(reused)
        logits = model.prefill([prompt[reused:]], cache, chunk=chunk)
        stats.reused_tokens, stats.prompt_tokens = reused, len(prompt) - reused
        stats.prefill_s = time.perf_counter() - began
        history = list(prompt)
        while True:
            token = sampler(logits[0], history)
            elapsed = time.perf_counter() - began
            if stats.new_tokens == 0:
                stats.first_token_s = elapsed
            else:
                stats.decode_s += elapsed
                stats.decode_steps += 1
            if token in stop:
                self.finish_reason = "stop"
                return
            stats.new_tokens += 1
            history.append(token)
            if stats.new_tokens == max_new_tokens:
                self.finish_reason = "length"
            elif len(history) > model.manifest.max_seq_len:
                self.finish_reason = "max_seq_len"
            yield token
            if self.finish_reason:
                return
            # The reader's time between two tokens is not the model's.
            began = time.perf_counter()
            logits = model.step([token], cache)


@dataclass
class Stats:
    """Timings of one generation, in seconds; the reader's own time between tokens is not counted."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens computed per second (tokens taken from the cache not counted)."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first one."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0

    def line(self) -> str:
        """One line for people."""
        reused = f" (+{self.reused_tokens} cached)" if self.reused_tokens else ""
        return (
            f"prefill {self.prompt_tokens} tokens{reused} {self.prefill_tok_s:.0f} tok/s · "
            f"decode {self.new_tokens} tokens {self.decode_tok_s:.1f} tok/s · "
            f"first token {1000 * self.first_token_s:.0f} ms · peak RSS {peak_rss_bytes() / 1e6:.0f} MB"
        )

    def as_dict(self) -> dict[str, float | int]:
        """The same as data; times in seconds, rates in tokens per second, memory in bytes."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "prefill_s": self.prefill_s,
            "first_token_s": self.first_token_s,
            "decode_s": self.decode_s,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def _check_graph(path: Path, session: Any, manifest: Manifest) -> None:
    """Raise FolderError unless inputs, outputs, dtypes and fixed sizes are what the manifest promises."""
    kv: _Described = (_ORT_TYPES[manifest.kv_dtype], (None, manifest.heads, None, manifest.head_dim))
    parts = [f"{i}.{part}" for i in range(manifest.layers) for part in ("key", "value")]
    tokens: _Described = ("tensor(int64)", (None, None))
    expected_inputs = {"input_ids": tokens, "attention_mask": tokens}
    expected_inputs |= {f"past_key_values.{part}": kv for part in parts}
    expected_outputs: dict[str, _Described] = {"logits": ("tensor(float)", (None, 1, manifest.vocab_size))}
    expected_outputs |= {f"present.{part}": kv for part in parts}
    for kind, expected, found in (
        ("input", expected_inputs, session.get_inputs()),
        ("output", expected_outputs, session.get_outputs()),
    ):
        described = {value.name: (value.type, tuple(value.shape)) for value in found}
        odd = sorted(set(described) ^ set(expected))
        if odd:
            raise FolderError(f"{path}: {kind} {odd[0]!r} does not fit {MANIFEST_FILE}; export the model again.")
        for name, (dtype, sizes) in expected.items():
            found_type, found_sizes = described[name]
            fits = found_type == dtype and len(found_sizes) == len(sizes)
            pairs = zip(found_sizes, sizes, strict=False)
            if not fits or any(isinstance(a, int) and b is not None and a != b for a, b in pairs):
                raise FolderError(
                    f"{path}: {kind} {name!r} is {found_type} {list(found_sizes)}, but {MANIFEST_FILE} says {dtype} "
                    f"{['?' if size is None else size for size in sizes]}; export the model again."
                )


def _wait(options: Any, version: str, *, long: bool) -> None:
    """How threads of ``options`` wait for the next node: busily for microseconds, then asleep, unless ``long``.

    Between the nodes of a step there are microseconds: waking a thread costs more than that, waiting busily for
    milliseconds takes processors from other processes. Versions of ONNX Runtime without such a limit sleep at once.
    """
    limited = tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= _SPIN_LIMITED
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if long or limited else "0")
    if limited and not long:
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)


@contextmanager
def _attention(manifest: Manifest) -> Iterator[None]:
    """While a session is made: attend with whole rows of scores, which prompts in short pieces are faster with.

    Not with int8 keys, which long prompts read faster in tiles. What the environment says already stays.
    """
    if manifest.kv_dtype == "int8" or _TILES_OFF in os.environ:
        yield
        return
    os.environ[_TILES_OFF] = "1"
    try:
        yield
    finally:
        del os.environ[_TILES_OFF]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:400]


# ----------------------------------------------------------------------------------------------------------- text


class Tokenizer:
    """``tokenizer.json`` of a folder, and its chat template. Raises FolderError when the file is absent or corrupt."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise FolderError(
                "text needs the Python package 'tokenizers': pip install tokenizers; token ids work without it."
            ) from error
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FolderError(f"{path}: no such file; copy the original model's tokenizer.json there.")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(_read_text(path))
        except FolderError:
            raise
        except Exception as error:
            # tokenizers raises bare Exception for every parse error
            raise FolderError(f"{path}: is not a tokenizer ({_first_line(error)}).") from error
        self._tokenizer.no_truncation()  # what a file asks for is meant for training; transformers ignores it too
        self._tokenizer.no_padding()
        self._config = self._read_config()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer adds around a text (such as a BOS token)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(self.decode)

    @property
    def chat_template(self) -> str | None:
        """The folder's chat template: ``chat_template.jinja``, else from ``tokenizer_config.json``, else None."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return _read_text(path)
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """``messages`` ({"role", "content"} each) as the text the model was trained on.

        The template is data from the folder: it runs in jinja2's immutable sandbox. Raises TemplateError.
        """
        source = self.chat_template
        if source is None:
            raise TemplateError(
                f"{self.folder}: has no chat template (neither chat_template.jinja nor one in tokenizer_config.json); "
                "give a raw prompt instead (--raw)."
            )
        try:
            import jinja2
            import jinja2.sandbox
        except ModuleNotFoundError as error:
            raise TemplateError("chat templates need the Python package 'jinja2': pip install jinja2.") from error

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda layout: time.strftime(layout)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            return environment.from_string(source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens(),
            )
        except Exception as error:
            # a template is foreign code: any Python exception can come out of it
            raise TemplateError(f"{self.folder}: the chat template failed: {_first_line(error)}.") from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of ``messages`` rendered for an answer by the assistant. Raises TemplateError."""
        return self.encode(self.render(messages), special=False)

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "tokenizer_config.json"
        data = _read_json(path) if path.is_file() else {}
        if not isinstance(data, dict):
            raise FolderError(f"{path}: holds {type(data).__name__}, not a JSON object.")
        return data

    def _special_tokens(self) -> dict[str, str]:
        """bos_token and so on, which templates may mention; written as a string or as {"content": string}."""
        tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
            value = self._config.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
        return tokens


class TextStream:
    """Turns tokens into text as they come, and holds back what is not yet a whole character.

    A token may end inside a UTF-8 sequence; the decoder shows that as U+FFFD at the end of the text. Decoding goes from
    a point before the unseen text, because some decoders treat the first token of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._seen = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest, without a trailing character that never got complete."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[: self._seen])
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            if not final:
                return ""
            text = text.rstrip("\ufffd")
        fresh = text[len(before) :]
        if fresh:
            # Only the tokens of the newest text are kept as context for the next.
            self._ids = self._ids[self._seen :]
            self._seen = len(self._ids)
        return fresh


# -------------------------------------------------------------------------------------------------------- machine


def physical_cores() -> int:
    """Physical cores this process may use (affinity and Linux cgroup quota respected), at least 1."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:
        return max(1, (os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package, core = ((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        except OSError:
            package, core = "", str(cpu)
        cores.add((package.strip(), core.strip()))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return max(1, count)
    return max(1, count if quota == "max" else min(count, int(quota) // int(period)))


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
