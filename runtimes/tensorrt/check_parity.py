"""Prove the engine on this device against what PyTorch computed at export: python3 device/check_parity.py OUT.

Needs numpy and TensorRT, not PyTorch. Exit codes: 0 passed, 3 failed, 2 bad folder, 5 memory, 6 TensorRT is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixt_trt.backends import BACKENDS, backend_named, load_backend
from mixt_trt.cuda import open_cuda
from mixt_trt.decoder import Decoder
from mixt_trt.engine import Engine
from mixt_trt.errors import TrtError
from mixt_trt.golden import FOLDER, read_golden
from mixt_trt.manifest import read_manifest
from mixt_trt.parity import ParityResult, check_parity


def main(arguments: list[str] | None = None, *, module: Any = None, cuda: Any = None) -> int:
    """Parse ``arguments``, run the golden cases; ``module`` and ``cuda`` replace the installed libraries."""
    parser = argparse.ArgumentParser(description="Compare the engine with the golden tensors of the export.")
    parser.add_argument("folder", nargs="?", help="the exported folder (default: the one this script lies in)")
    parser.add_argument("--backend", default="trt", help=f"one of {', '.join(BACKENDS)} (default: trt)")
    parser.add_argument("--layers", action="store_true", help="use the engine built with --layer-outputs")
    parser.add_argument("--cuda-graph", action="store_true", help="decode through a CUDA graph, as run.py --cuda-graph")
    parser.add_argument("--tolerance", type=float, help="relative L2 of logits that passes (default: as recorded)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    options = parser.parse_args(arguments)
    try:
        return _run(options, module, cuda)
    except TrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except MemoryError:
        print("error: out of memory; stop other programs or add swap.", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, module: Any, cuda: Any) -> int:
    here = Path(__file__).resolve().parent
    folder = Path(options.folder) if options.folder else here.parent
    backend = backend_named(options.backend)
    if options.layers and options.cuda_graph:
        raise TrtError("--layers and --cuda-graph exclude each other: a recorded step shows no blocks; leave one out.")
    if options.tolerance is not None and not 0.0 < options.tolerance < 1.0:
        raise TrtError(f"--tolerance {options.tolerance}: give a relative L2 between 0 and 1, such as 1e-3.")
    manifest = read_manifest(folder)
    golden = read_golden(folder / "device" / FOLDER, manifest)
    engine = Engine(manifest, backend, module or load_backend(backend), cuda or open_cuda(), layers=options.layers)
    decoder = Decoder(manifest, engine, cuda_graph=options.cuda_graph, note=_note)
    result = check_parity(decoder, golden, tolerance=options.tolerance, layers=options.layers)
    if options.json:
        verdict = {
            "passed": result.passed,
            "diverging": result.diverging,
            "minimum_tolerance": result.minimum_tolerance,
        }
        print(json.dumps({**verdict, **asdict(result)}))
    else:
        _print(result, golden.reference)
    return 0 if result.passed else 3


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _print(result: ParityResult, reference: str) -> None:
    print(
        f"reference: {reference}; relative L2 of logits <= {result.logits_tolerance:.1e}, "
        f"of norms <= {result.norms_tolerance:.1e}"
    )
    for case in result.cases:
        verdict = "ok" if result.passed_case(case) else "FAILED"
        print(
            f"{case.name:12} {verdict:6} logits {case.logits:.2e} · norms {case.norms:.2e} · top tokens "
            f"{case.tokens - case.wrong_tokens} of {case.tokens}" + ("" if case.finite else " · NaN or infinite")
        )
    print(f"minimum tolerance that passes: {result.minimum_tolerance:.1e} (asked: {result.logits_tolerance:.1e})")
    print("PASSED" if result.passed else f"FAILED (first diverging: {result.diverging or 'top tokens'})")


if __name__ == "__main__":
    sys.exit(main())
