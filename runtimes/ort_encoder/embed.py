"""Embed sentences on a device: python embed.py MODEL_DIR "a sentence" "another one"; one JSON line per sentence."""

from __future__ import annotations

import argparse
import json
import sys

# Python puts this file's folder on the path; a type checker that starts elsewhere cannot know.
from mixt_embed import Encoder, EncoderError  # type: ignore[import-not-found]


def main(arguments: list[str] | None = None) -> int:
    """Parse ``arguments`` (default: the command line), print {"text", "embedding"} lines; returns the exit code."""
    parser = argparse.ArgumentParser(description="Sentence embeddings from an exported encoder.")
    parser.add_argument("model", help="folder that `mixt export` wrote")
    parser.add_argument("text", nargs="*", help="sentences; default: the lines of standard input")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    texts = options.text or [line.strip() for line in sys.stdin if line.strip()]
    try:
        vectors = Encoder(options.model, threads=options.threads).embed(texts)
    except EncoderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for text, vector in zip(texts, vectors, strict=True):
        print(json.dumps({"text": text, "embedding": [round(float(value), 7) for value in vector]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
