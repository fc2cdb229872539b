"""Complete one prompt on a device: python run.py MODEL_DIR -p "Once upon a time"."""

from __future__ import annotations

import argparse
import io
import sys

# Python puts this file's folder on the path; a type checker that starts elsewhere cannot know.
from mixt_ort import Model, OrtRuntimeError, Sampler, Tokenizer  # type: ignore[import-not-found]


def main(arguments: list[str] | None = None) -> int:
    """Parse ``arguments`` (default: the command line), stream the answer to stdout; returns the exit code."""
    parser = argparse.ArgumentParser(description="Complete one prompt with an exported folder.")
    parser.add_argument("model", help="folder that `mixt export` wrote")
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--low-memory", action="store_true", help="no prepacked copy of the weights")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        tokenizer = Tokenizer(options.model)
        if options.chat:
            ids = tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
        else:
            ids = tokenizer.encode(options.prompt)
        sampler = Sampler(options.temperature, options.top_p, options.top_k, options.seed, options.repetition_penalty)
        model = Model(options.model, threads=options.threads, low_memory=options.low_memory)
        generation = model.generate(ids, options.max_tokens, sampler)
        stream = tokenizer.stream()
        for token in generation:
            print(stream.push(token), end="", flush=True)
        print(stream.finish())
    except OrtRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(generation.stats.line(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
