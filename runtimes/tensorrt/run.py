"""Complete one prompt with the engine on this device: python3 device/run.py OUT -p "Once upon a time".

Text needs the Python package tokenizers; token ids (--ids 1,2,3) need numpy and TensorRT alone.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

# Python puts this file's folder on the path; a type checker that starts elsewhere cannot know. The file is that of
# runtimes/ort: sampling, text and the loop over tokens are the same for every engine, and need no onnxruntime.
from mixt_ort import Generation, OrtRuntimeError, Sampler, Tokenizer  # type: ignore[import-not-found]
from mixt_trt.backends import BACKENDS, backend_named, load_backend
from mixt_trt.cuda import open_cuda
from mixt_trt.decoder import Decoder
from mixt_trt.engine import Engine
from mixt_trt.errors import TrtError
from mixt_trt.manifest import read_manifest


def main(arguments: list[str] | None = None, *, module: Any = None, cuda: Any = None) -> int:
    """Parse ``arguments``, stream the answer to stdout; ``module`` and ``cuda`` replace the installed libraries."""
    parser = argparse.ArgumentParser(description="Complete one prompt with a built engine.")
    parser.add_argument("folder", nargs="?", help="the exported folder (default: the one this script lies in)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt")
    prompt.add_argument("--ids", help="the prompt as token ids, 1,2,3; prints token ids")
    parser.add_argument(
        "--chat", action="store_true", help="wrap the prompt in the model's chat template (needs jinja2)"
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--cuda-graph", action="store_true", help="record the decoding step once and replay it")
    parser.add_argument("--backend", default="trt", help=f"one of {', '.join(BACKENDS)} (default: trt)")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        _run(options, module, cuda)
    except TrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except OrtRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: out of memory; stop other programs or add swap.", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace, module: Any, cuda: Any) -> None:
    folder = Path(options.folder) if options.folder else Path(__file__).resolve().parent.parent
    manifest = read_manifest(folder)
    tokenizer, ids = _prompt(options, folder, manifest.bos_token_id)
    sampler = Sampler(options.temperature, options.top_p, options.top_k, options.seed, options.repetition_penalty)
    backend = backend_named(options.backend)
    module, cuda = module or load_backend(backend), cuda or open_cuda()
    before, _ = cuda.memory()
    engine = Engine(manifest, backend, module, cuda)
    decoder: Any = Decoder(manifest, engine, cuda_graph=options.cuda_graph, note=_note)
    ends = frozenset(manifest.eos_token_ids)
    if options.max_tokens < 1:
        raise TrtError(f"--max-tokens {options.max_tokens}: give at least 1.")
    # The decoder is the model and its cache at once.
    generation = Generation(decoder, ids, options.max_tokens, sampler, ends, decoder, decoder.max_input_len)
    if tokenizer is None:
        for number, token in enumerate(generation):
            print(f"{',' if number else ''}{token}", end="", flush=True)
        print()
    else:
        stream = tokenizer.stream()
        for token in generation:
            print(stream.push(token), end="", flush=True)
        print(stream.finish())
    free, total = cuda.memory()
    print(
        f"{generation.stats.line()} · device memory {max(before - free, 0) / 1e6:.0f} MB taken, cache "
        f"{decoder.cache_bytes / 1e6:.1f} MB, {free / 1e6:.0f} of {total / 1e6:.0f} MB free",
        file=sys.stderr,
    )


def _prompt(options: argparse.Namespace, folder: Path, bos: int | None) -> tuple[Any, list[int]]:
    """(tokenizer or None, token ids)."""
    if options.ids is not None:
        if options.chat:
            raise TrtError("--chat wraps text, --ids gives token ids; leave one out.")
        try:
            return None, [int(word) for word in options.ids.split(",")]
        except ValueError:
            raise TrtError(f"--ids {options.ids}: give numbers separated by commas.") from None
    tokenizer = Tokenizer(folder)
    if options.chat:
        return tokenizer, tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    ids = tokenizer.encode(options.prompt)
    return tokenizer, ids if ids or bos is None else [bos]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
