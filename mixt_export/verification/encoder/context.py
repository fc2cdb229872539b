"""What the encoder checks share: the two models, the sequences, the gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mixt_export.checkpoints import open_checkpoint
from mixt_export.checkpoints.strictjson import load_optional
from mixt_export.errors import UsageError
from mixt_export.progress import Progress
from mixt_export.verification.encoder.torch_encoder import TorchEncoder
from mixt_export.verification.encoder.totals import Totals, unit_mean
from mixt_export.verification.gate import DtypeCost, Gate, dtype_gate, float32_gate, rounding_gate
from mixt_export.verification.graph import ENCODER_LAYER, ExportedGraph, open_encoder_graph
from mixt_export.verification.layers import LayerErrors
from mixt_export.verification.options import VerifyOptions
from mixt_export.verification.session import Ids, not_run, start_session
from mixt_export.verification.tokens import make_sequences, open_tokenizer

HIDDEN, EMBEDDING = "last_hidden_state", "sentence_embedding"
_DEFAULT_MAX_LENGTH = 512
_COST_SEQUENCES = 3


@dataclass(frozen=True)
class Batch:
    """One run: ``ids`` and ``mask`` (batch, seq) int64, ``segments`` (batch, seq) int64 or None."""

    ids: Ids
    mask: Ids
    segments: Ids | None = None


class EncoderContext:
    """Both models, the sequences and the gate. ``layers`` gathers each block's error for the report."""

    def __init__(self, exported: Path, reference: Path, options: VerifyOptions, progress: Progress) -> None:
        self.exported, self.reference, self.options, self.progress = exported, reference, options, progress
        if not reference.is_dir():
            raise UsageError(f"{reference}: is not a folder; give the model folder that was exported with --reference.")
        self.graph = open_encoder_graph(exported)
        self.manifest = load_optional(exported / "mixt_manifest.json")
        self.config = dict(open_checkpoint(reference).config)
        self.layers = LayerErrors(self.graph.layers)
        self._session: Any = None
        with progress.task("loading the PyTorch reference"):
            self.torch: TorchEncoder | None = TorchEncoder(reference, "float32", options.threads, self.graph.layers)

    @property
    def segmented(self) -> bool:
        """Whether the graph takes token types."""
        return any(value.name == "token_type_ids" for value in self.graph.proto.graph.input)

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        limits = self.manifest.get("limits")
        given = limits.get("max_seq_len") if isinstance(limits, dict) else None
        return given if isinstance(given, int) and given > 0 else _DEFAULT_MAX_LENGTH

    @property
    def pad(self) -> int:
        """The token that fills a batch."""
        given = self.config.get("pad_token_id")
        return given if isinstance(given, int) and given >= 0 else 0

    @cached_property
    def sequences(self) -> list[Ids]:
        """Windows of the shipped texts and prompts as tokens."""
        tokenizer = open_tokenizer(self.reference, self.exported)
        vocabulary = self.config.get("vocab_size")
        made = make_sequences(
            tokenizer, vocabulary if isinstance(vocabulary, int) else 1, self.max_length, self.options
        )
        return [*made.windows, *made.prompts]

    @cached_property
    def gate(self) -> Gate:
        """The bar: fixed at float32, at 16 bits what PyTorch loses at the same dtype."""
        if self.graph.dtype == "float32":
            return float32_gate(self.graph.layers, self.options.tolerance)
        return dtype_gate(self._cost(self.graph.dtype), self.options.tolerance)

    def judge_by_rounding(self) -> bool:
        """Move a float32 gate to what rounding costs this very model; whether that changes the bar."""
        if self.graph.dtype != "float32" or self.options.tolerance is not None:
            return False
        moved = rounding_gate(self._cost("float64"))
        if moved.tolerance <= self.gate.tolerance:
            return False
        self.gate, self.layers = moved, LayerErrors(self.graph.layers)
        return True

    def run(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32], list[NDArray[Any]]]:
        """States (batch, seq, hidden), embeddings (batch, hidden) and block outputs of the exported graph."""
        if self._session is None:
            self._session = start_session(self.graph, _visible(self.graph), self.options.threads)
        feeds = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self.segmented:
            feeds["token_type_ids"] = np.zeros_like(batch.ids) if batch.segments is None else batch.segments
        wanted = [HIDDEN, EMBEDDING, *(ENCODER_LAYER.format(index) for index in range(self.graph.layers))]
        try:
            states, embedding, *layers = self._session.run(wanted, feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise not_run(error) from error
        return states.astype(np.float32, copy=False), embedding.astype(np.float32, copy=False), layers

    def expected(self, tokens: Ids, segments: Ids | None = None) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        """States (seq, hidden) and block outputs of PyTorch for one sequence."""
        assert self.torch is not None  # released after the checks
        return self.torch.states(tokens, segments)

    def close(self) -> None:
        """Release the ONNX session."""
        self._session = None

    def release(self) -> None:
        """Release both models."""
        self.close()
        self.torch = None

    def _cost(self, dtype: str) -> DtypeCost:
        """PyTorch at ``dtype`` beside PyTorch float32 on a few sequences."""
        with self.progress.task(f"running PyTorch at {dtype}"):
            model = TorchEncoder(self.reference, dtype, self.options.threads, self.graph.layers)
            totals, errors = Totals(), LayerErrors(self.graph.layers)
            for tokens in self.sequences[:_COST_SEQUENCES]:
                (wanted, layers), (found, found_layers) = self.expected(tokens), model.states(tokens, None)
                totals.add(found, wanted, unit_mean(found), unit_mean(wanted))
                errors.add(found_layers, layers)
        return DtypeCost(dtype, totals.tokens, totals.needed, totals.cosine, 0.0, 0, totals.nonfinite, errors.values())


def _visible(graph: ExportedGraph) -> onnx.ModelProto:
    """The same nodes with every block's output as an output of the graph."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    proto.graph.output.extend(onnx.ValueInfoProto(name=ENCODER_LAYER.format(i)) for i in range(graph.layers))
    return proto
