"""Load the device-side runtimes, which travel as plain files and are not part of the package, and talk with them."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from mixt_export.errors import MixtError, UnsupportedError, UsageError
from mixt_export.resources import resource

#: kind -> file below runtimes/
_FILES = {"ort": "ort/mixt_ort.py", "ort_encoder": "ort_encoder/mixt_embed.py"}

_TOOLKIT = "mixt_trt"


def load_runtime(kind: str = "ort") -> ModuleType:
    """The runtime of ``kind`` as a module, the same object on every call. Raises UnsupportedError for other kinds."""
    if kind not in _FILES:
        raise UnsupportedError(f"there is no runtime {kind!r}; known: {', '.join(sorted(_FILES))}.")
    path = resource("runtimes") / _FILES[kind]
    name = f"mixt_export._runtimes.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnsupportedError(f"{path}: cannot be loaded as a Python module; reinstall mixt-export.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is being executed.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def bundle_folder() -> Path:
    """The scripts that are copied to OUT/device of a TensorRT folder."""
    return resource("runtimes") / "tensorrt"


def toolkit(module: str) -> Any:
    """Module ``mixt_trt.<module>``, the same object on every call and the one that the device scripts use."""
    if _TOOLKIT not in sys.modules:
        path = bundle_folder() / _TOOLKIT / "__init__.py"
        spec = importlib.util.spec_from_file_location(_TOOLKIT, path, submodule_search_locations=[str(path.parent)])
        if spec is None or spec.loader is None or not path.is_file():
            raise MixtError(f"{path}: cannot be loaded as a Python package; reinstall mixt-export.")
        package = importlib.util.module_from_spec(spec)
        sys.modules[_TOOLKIT] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_TOOLKIT}.{module}")


@contextmanager
def runtime_errors(runtime: ModuleType) -> Iterator[None]:
    """Turn the runtime's errors into ours: UsageError for bad folders and requests, MixtError for bad output."""
    try:
        yield
    except runtime.OutputError as error:
        raise MixtError(str(error)) from error
    except runtime.OrtRuntimeError as error:
        raise UsageError(str(error)) from error


def prompt_ids(model: Any, tokenizer: Any, prompt: str, *, chat: bool | None, system: str | None = None) -> list[int]:
    """Token ids of ``prompt``: through the chat template, as it is, or (None) through the template if there is one.

    ``model`` and ``tokenizer`` are the runtime's. An empty prompt becomes the BOS token where the model has one.
    Raises UsageError for a ``system`` text without a template, and the runtime's TemplateError.
    """
    if chat is None:
        chat = tokenizer.chat_template is not None
    if system is not None and not chat:
        raise UsageError("--system needs the model's chat template; leave it out, or put the text into the prompt.")
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        ids: list[int] = tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}])
        return ids
    ids = tokenizer.encode(prompt)
    if not ids and model.manifest.bos_token_id is not None:
        return [model.manifest.bos_token_id]
    return ids


class Conversation:
    """A chat with a loaded model; keeps the key/value cache across turns, so that only new text is computed."""

    def __init__(self, model: Any, tokenizer: Any, sampler: Any, *, max_tokens: int, system: str | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        #: Timings of the latest answer (the runtime's Stats), None before the first.
        self.stats: Any = None
        self._model = model
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._system = system
        self._cache = model.new_cache()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer to ``text`` piece by piece.

        Closing the iterator ends the answer; what was said so far stays in the history. Raises the runtime's
        errors, and the history is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode_chat(messages)
        generation = self._model.generate(ids, self._max_tokens, self._sampler, cache=self._cache)
        self.stats = generation.stats
        stream = self._tokenizer.stream()
        said: list[str] = []
        try:
            for token in generation:
                said.append(stream.push(token))
                yield said[-1]
            said.append(stream.finish())
            yield said[-1]
        except GeneratorExit:
            self._remember(messages, said)
            raise
        self._remember(messages, said)

    def _remember(self, messages: list[dict[str, str]], said: list[str]) -> None:
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]


def say(text: str) -> None:
    """Write ``text`` to stdout at once; characters that its encoding lacks become question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    sys.stdout.write(text)
    sys.stdout.flush()


def open_model(folder: Path, *, threads: int | None = None, low_memory: bool = False) -> tuple[ModuleType, Any, Any]:
    """(runtime, Model, Tokenizer) of an exported ``folder``. Raises UsageError when it is not one."""
    runtime = load_runtime("ort")
    with runtime_errors(runtime):
        if not folder.is_dir():
            raise UsageError(f"{folder}: is not a folder; give the folder that `mixt export` wrote.")
        # The tokenizer first: it is quick to fail.
        tokenizer = runtime.Tokenizer(folder)
        return runtime, runtime.Model(folder, threads=threads, low_memory=low_memory), tokenizer
