"""What the checks share: the two models, the tokens, the gate; at most one ONNX session is open at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixt_export.checkpoints import Checkpoint, open_checkpoint
from mixt_export.checkpoints.strictjson import load_optional
from mixt_export.errors import UsageError
from mixt_export.progress import Progress
from mixt_export.verification.far_probe import SIZES, far_length, long_cache
from mixt_export.verification.gate import DtypeCost, Gate, allowed, dtype_gate, float32_gate, rounding_gate
from mixt_export.verification.graph import open_graph
from mixt_export.verification.int8_cache import float_cache
from mixt_export.verification.layers import LayerErrors
from mixt_export.verification.metrics import LogitsComparison, relative_l2
from mixt_export.verification.options import SHORTEST, VerifyOptions
from mixt_export.verification.quantised import float_activations, matrices_of, with_integers
from mixt_export.verification.routes import Route
from mixt_export.verification.session import ExportedRunner, Ids
from mixt_export.verification.tokens import make_sequences, open_tokenizer
from mixt_export.verification.torch_model import TorchModel

_PROBE = 48
_COST_POSITIONS = 96
_DEFAULT_MAX_LENGTH = 2048


class Context:
    """Everything a check may use. ``layers`` gathers each block's error for the report."""

    def __init__(self, exported: Path, reference: Path, options: VerifyOptions, progress: Progress) -> None:
        self.exported, self.reference, self.options, self.progress = exported, reference, options, progress
        if not reference.is_dir():
            raise UsageError(f"{reference}: is not a folder; give the model folder that was exported with --reference.")
        self.graph = open_graph(exported)
        self.manifest = load_optional(exported / "mixt_manifest.json")
        self.config = dict(open_checkpoint(reference).config)
        #: Quantised matrices by name; with any, PyTorch runs with the weights that their integers stand for.
        self.matrices = matrices_of(self.graph, self.manifest)
        self.source: Path | Checkpoint = reference
        #: The graph whose values are compared: that of float activations and of a float cache.
        self.compared = self.graph
        if self.matrices:
            self.compared = float_activations(self.graph)
            self.source = with_integers(open_checkpoint(reference), self.matrices)
        self.compared = float_cache(self.compared)
        with progress.task("loading the PyTorch reference"):
            self.torch = TorchModel(self.source, threads=options.threads, layers=self.graph.layers)
        if self.graph.vocab_size not in (0, self.torch.vocab_size):
            raise UsageError(
                f"{exported} has {self.graph.vocab_size} tokens, {reference} has {self.torch.vocab_size}; "
                "give the model folder that was exported with --reference."
            )
        if self.max_length < SHORTEST:
            raise UsageError(
                f"{exported}: has {self.max_length} positions, verifying takes at least {SHORTEST}; export again with "
                "a larger --max-seq-len."
            )
        self.layers = LayerErrors(self.graph.layers)
        #: Check that failed -> how to run the same again.
        self.routes: dict[str, Route] = {}
        self._runner: ExportedRunner | None = None
        self._kind = ""
        self._graph = self.compared

    @cached_property
    def max_length(self) -> int:
        """Longest sequence that both models take."""
        limits = self.manifest.get("limits")
        given = limits.get("max_seq_len") if isinstance(limits, dict) else None
        lengths = (given, self.config.get("max_position_embeddings"))
        return min((value for value in lengths if isinstance(value, int) and value > 0), default=_DEFAULT_MAX_LENGTH)

    @cached_property
    def sequences(self) -> Any:
        """Windows and prompts as tokens."""
        tokenizer = open_tokenizer(self.reference, self.exported)
        return make_sequences(tokenizer, self.torch.vocab_size, self.max_length, self.options)

    @cached_property
    def probe(self) -> Ids:
        """A few dozen real tokens for the checks that run the same sequence in many ways."""
        tokens: Ids = np.concatenate([*self.sequences.windows, *self.sequences.prompts])[: min(_PROBE, self.max_length)]
        return tokens

    @cached_property
    def far(self) -> tuple[Ids, list[NDArray[np.float32]]]:
        """Tokens (6,) and the long cache before them, see far_probe."""
        length = far_length(self.graph, self.config, self.max_length)
        return np.resize(self.probe, sum(SIZES)), long_cache(self.graph, self.torch.cache_of(self.probe), length)

    @cached_property
    def probe_reference(self) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Reference logits and block outputs of the probe."""
        return self.torch.hidden(self.probe)

    @cached_property
    def gate(self) -> Gate:
        """The bar; at float16 it is found by running PyTorch at float16."""
        if self.graph.dtype == "float32":
            return float32_gate(self.graph.layers, self.options.tolerance)
        return dtype_gate(self._dtype_cost(self.graph.dtype), self.options.tolerance)

    def judge_by_rounding(self) -> bool:
        """Move a float32 gate to what rounding costs this very model; returns whether that changes the bar.

        Runs PyTorch at float64, so it is asked for only when the usual bar failed. Does nothing where the user set it.
        """
        if self.graph.dtype != "float32" or self.options.tolerance is not None:
            return False
        usual, moved = self.gate.tolerance, rounding_gate(self._dtype_cost("float64"))
        if moved.tolerance <= usual and moved.far <= usual:
            return False
        self.gate = moved
        self.layers = LayerErrors(self.graph.layers)
        self.routes.clear()
        return True

    def comparison(self) -> LogitsComparison:
        """An empty comparison at the gate's tolerance."""
        return LogitsComparison(self.gate.tolerance)

    def instrumented(self) -> ExportedRunner:
        """The exported graph with logits at all positions and every block's output visible."""
        return self._open("instrumented")

    def plain(self) -> ExportedRunner:
        """The exported graph as it is."""
        return self._open("plain")

    def observed(self, values: Sequence[str]) -> ExportedRunner:
        """The exported graph with logits at all positions and its inner ``values`` visible; a session of its own."""
        self.close()
        self._runner = ExportedRunner(self._graph, self.options.threads, all_positions=True, values=values)
        self._kind = "observed"
        return self._runner

    @contextmanager
    def emulating(self, wanted: bool) -> Iterator[None]:
        """Sessions opened inside round every value as typed, where ``wanted``."""
        if not wanted:
            yield
            return
        self.close()
        self._graph = dataclasses.replace(self.compared, emulated=True)
        try:
            yield
        finally:
            self.close()
            self._graph = self.compared

    def close(self) -> None:
        """Release the ONNX session."""
        self._runner = None

    def release(self) -> None:
        """Release both models, so that measuring in fresh processes has the memory to itself."""
        self.close()
        del self.torch

    def _open(self, kind: str) -> ExportedRunner:
        if self._runner is None or self._kind != kind:
            self.close()
            visible = kind == "instrumented"
            self._runner = ExportedRunner(self._graph, self.options.threads, all_positions=visible, layers=visible)
            self._kind = kind
        return self._runner

    def _dtype_cost(self, dtype: str) -> DtypeCost:
        """PyTorch at ``dtype`` beside PyTorch float32 on a few windows."""
        with self.progress.task(f"running PyTorch at {dtype}"):
            model = TorchModel(self.source, dtype=dtype, threads=self.options.threads, layers=self.graph.layers)
            comparison = LogitsComparison(0.0)
            errors = LayerErrors(self.graph.layers)
            tokens, past = self.far
            with self.torch.behind(past), model.behind(past):
                far = relative_l2(model.logits(tokens), self.torch.logits(tokens))
            for window in self.sequences.windows:
                tokens = window[: _COST_POSITIONS - comparison.positions]
                if not len(tokens):
                    break
                expected, expected_layers = self.torch.hidden(tokens)
                actual, actual_layers = model.hidden(tokens)
                comparison.add(actual, expected)
                errors.add(actual_layers, expected_layers)
        return DtypeCost(
            dtype,
            comparison.positions,
            comparison.rel_l2,
            comparison.cosine,
            comparison.kl,
            comparison.flips_at(allowed(comparison.rel_l2)),
            comparison.nonfinite,
            errors.values(),
            far,
        )
