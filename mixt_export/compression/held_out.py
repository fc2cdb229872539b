"""Perplexity of the written model and of the one it was made from, on texts that calibration has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixt_export.checkpoints import open_checkpoint
from mixt_export.compression.blocks import BlockwiseModel
from mixt_export.compression.controls import COMPRESSED, DENSE, Controls, TextScores
from mixt_export.compression.job import Job, Windows
from mixt_export.compression.scratch import Scratch
from mixt_export.compression.statistics_cache import array_digest
from mixt_export.compression.stubs import release
from mixt_export.compression.tensor_mixture.scoring import scores
from mixt_export.compression.texts import calibration_windows
from mixt_export.errors import UsageError
from mixt_export.progress import Progress
from mixt_export.reference.linear import linear_module
from mixt_export.reference.tensors import read_tensor
from mixt_export.sample.texts import EVALUATION, IN_DOMAIN

#: Shipped texts that are scored on by default, and tokens per window.
DOMAINS = ("addresses", "novel")
WINDOW = 512


class FactorisedModel(BlockwiseModel):
    """A factorised folder run block by block: its linears execute their factors."""

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """See BlockwiseModel."""
        layer, prefix = self.layers[index], f"{self.block_path(index)}."
        dense: dict[str, nn.Module] = {}
        loaded: dict[str, nn.Parameter] = {}

        def load(name: str) -> nn.Parameter:
            if name not in loaded:
                loaded[name] = nn.Parameter(self.stored(name), requires_grad=False)
            return loaded[name]

        def load_index(name: str) -> torch.Tensor:
            return read_tensor(self.checkpoint.store, name, "int64")

        for name, linear in self.checkpoint.factors.items():
            if name.startswith(prefix):
                inside = name.removeprefix(prefix)
                dense[inside] = layer.get_submodule(inside)
                layer.set_submodule(inside, linear_module(linear, load, load_index))
        try:
            with super().block(index) as materialised:
                yield materialised
        finally:
            for inside, module in dense.items():
                layer.set_submodule(inside, module)
            release(layer)


class HeldOut:
    """What a job's result will be scored on. ``texts``: name -> windows; empty where nothing is scored.

    Raises UsageError or CheckpointError as calibration texts do, for texts that were asked for; without the shipped
    ones or a tokenizer nothing is scored.
    """

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.texts: dict[str, Windows] = {}
        request = job.request
        if request.eval_text and not job.model.predicts:
            raise UsageError("--eval-text: this model predicts no next tokens, so it has no perplexity; leave it out.")
        if not request.evaluate or not job.model.predicts:
            return
        files = {str(text): Path(text) for text in request.eval_text}
        if not files:
            files = {domain: EVALUATION[domain] for domain in DOMAINS if EVALUATION[domain].is_file()}
            if not (job.checkpoint.path / "tokenizer.json").is_file():
                progress.note("perplexity before and after is not measured: the model has no tokenizer.json.")
                return
        length = job.length(WINDOW)
        for name, path in files.items():
            count = request.eval_windows
            windows, _ = calibration_windows(job.checkpoint.path, [path], count, length, job.model.vocabulary)
            self.texts[name] = windows

    def score(self, written: Path, controls: Controls | None, scratch: Scratch) -> tuple[TextScores, ...]:
        """Scores of the model in the folder ``written`` under COMPRESSED and of the original under DENSE.

        Those of ``controls`` where there are any. Blocks are in memory one at a time.
        """
        if controls is not None and not self.job.request.eval_text:
            return tuple(
                TextScores(
                    text.text,
                    text.domain,
                    text.windows,
                    text.window,
                    {name: text.scores[name] for name in (DENSE, COMPRESSED)},
                )
                for text in controls.texts
            )
        if not self.texts:
            return ()
        tokens = list(self.texts.values())
        outputs = {
            DENSE: self._dense(tokens, scratch),
            COMPRESSED: self._outputs(FactorisedModel(open_checkpoint(written)), tokens),
        }
        found = scores(self.job.model, tokens, outputs, self.progress, "scoring")
        return tuple(
            TextScores(name, self._relation(name), len(windows), windows.shape[1], by_variant)
            for (name, windows), by_variant in zip(self.texts.items(), found, strict=True)
        )

    def _dense(self, tokens: list[Windows], scratch: Scratch) -> list[torch.Tensor]:
        """What the original's last block gives, from the cache where it has been there."""
        cache, model = self.job.cache, self.job.model
        facts: dict[str, Any] = {}
        if cache.folder is not None:
            facts = {
                "model": cache.model(self.job.checkpoint),
                "tokens": [array_digest(windows) for windows in tokens],
                "versions": cache.versions(),
            }
        needed = sum(4 * windows.size * model.hidden for windows in tokens)
        with cache.entry("outputs", facts, needed, scratch.folder) as entry:
            if not entry.complete:
                for number, output in enumerate(self._outputs(model, tokens)):
                    entry.put(str(number), output.numpy())
                entry.commit()
            return [torch.from_numpy(entry.get(str(number))) for number in range(len(tokens))]

    @torch.no_grad()
    def _outputs(self, model: BlockwiseModel, tokens: list[Windows]) -> list[torch.Tensor]:
        """The last block's output (windows, length, features) for each text."""
        streams = [model.embed(windows, np.zeros((*windows.shape, model.hidden), np.float32)) for windows in tokens]
        with self.progress.task("scoring", model.blocks) as advance:
            for index in range(model.blocks):
                with model.block(index) as layer:
                    for stream in streams:
                        for window in range(len(stream)):
                            stream[window : window + 1] = model.run(layer, index, stream[window : window + 1])
                advance(1)
        return streams

    def _relation(self, name: str) -> str:
        """What a text has to do with the calibration."""
        if self.job.request.calib or self.job.request.eval_text:
            return "held out"
        return "in domain" if name in IN_DOMAIN else "out of domain"
