"""One interface over the engines that are compared; each one is imported only by the process that runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: Tokens that every engine makes room for.
CAPACITY = 1024


class Engine(Protocol):
    """A loaded model of one sequence, greedy."""

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Forget everything, compute ``ids``; logits (vocab,) after the last of them."""
        ...

    def decode(self, count: int) -> list[int]:
        """The next ``count`` likeliest tokens, one pass over the model for each."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (seq, vocab) at every position of ``ids``."""
        ...


class Ours:
    """An exported folder through runtimes/ort, as `mixt run` uses it."""

    def __init__(self, path: Path, threads: int) -> None:
        from mixt_export.runtime import load_runtime

        runtime: Any = load_runtime("ort")
        self._path = path
        self._model = runtime.Model(path, threads=threads)
        self._cache = self._model.new_cache()
        self._chunk = self._model.prefill_chunk
        self._next = 0

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._cache.truncate(0)
        logits: NDArray[np.float32] = self._model.prefill([list(ids)], self._cache, chunk=self._chunk)[0]
        self._next = int(logits.argmax())
        return logits

    def decode(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            found.append(self._next)
            self._next = int(self._model.step([self._next], self._cache)[0].argmax())
        return found

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        from mixt_export.evaluation.scorers import ExportedScorer

        if not hasattr(self, "_scorer"):
            self._scorer = ExportedScorer(self._path, threads=1)
        return self._scorer.logits(np.asarray(ids, np.int64))


class GenAI:
    """A folder of ONNX Runtime GenAI's builder through its own generator; all-position logits through ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        self._genai, self._path = genai, path
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config = genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = genai.Model(config)
        self._params = genai.GeneratorParams(self._model)
        self._params.set_search_options(max_length=CAPACITY, do_sample=False)
        self._generator: Any = None

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._generator = self._genai.Generator(self._model, self._params)
        self._generator.append_tokens(np.asarray(ids, np.int32))
        logits: NDArray[np.float32] = np.asarray(self._generator.get_logits(), np.float32).reshape(-1)
        return logits

    def decode(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            self._generator.generate_next_token()
            found.append(int(self._generator.get_next_tokens()[0]))
        return found

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        import onnxruntime as ort

        if not hasattr(self, "_session"):
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = ort.InferenceSession(self._path / "model.onnx", options)
        sizes = json.loads((self._path / "genai_config.json").read_text())["model"]["decoder"]
        empty = np.zeros((1, sizes["num_key_value_heads"], 0, sizes["head_size"]), np.float32)
        names = [value.name for value in self._session.get_inputs()]
        feeds: dict[str, Any] = {name: empty for name in names if name.startswith("past_key_values")}
        tokens = np.asarray([ids], np.int64)
        given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        found: NDArray[np.float32] = self._session.run(["logits"], {**feeds, **given})[0][0]
        return found


class Torch:
    """transformers in eager PyTorch."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        self._past: Any = None
        self._next = 0

    def prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._past = None
        return self._run(list(ids))

    def decode(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            found.append(self._next)
            self._run([self._next])
        return found

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            found: NDArray[np.float32] = self._model(self._torch.tensor([list(ids)])).logits[0].float().numpy()
        return found

    def _run(self, ids: list[int]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([ids]), past_key_values=self._past, use_cache=True, logits_to_keep=1)
            self._past = out.past_key_values
            logits: NDArray[np.float32] = out.logits[0, -1].float().numpy()
        self._next = int(logits.argmax())
        return logits


def _llama_cpp(path: Path, threads: int) -> Engine:
    from benchmarks.peers.llama_cpp import LlamaCpp

    return LlamaCpp(path, threads, CAPACITY)


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "ours": Ours,
    "genai": GenAI,
    "llama.cpp": _llama_cpp,
    "torch": Torch,
}
