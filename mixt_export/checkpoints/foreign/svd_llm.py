"""SVD-LLM's Hugging Face export: `svd_ranks` in config.json, y = u_proj(v_proj(x)).

model_type `svdllm-llama`, `<linear>.v_proj.weight` (rank, in), `<linear>.u_proj.weight` (out, rank); read by
https://github.com/Zishan-Shao/lowrankarena (src/validation.py). The weights may be safetensors or pytorch_model.bin
files. SVD-LLM's own pickle is another format, see pickled.
"""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.pairs import find_pairs, refuse_mixture, two_factor_linears
from mixt_export.checkpoints.weights import open_weights

NAME = "svd-llm"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None."""
    config = configs.peek(folder)
    if config.get("svd_ranks"):
        return f"svd_ranks in {CONFIG_FILE}"
    found = configs.model_type(config)
    return f"model_type {found!r} in {CONFIG_FILE}" if found.startswith("svdllm") else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint."""
    given = configs.own_config(folder, NAME)
    store = open_weights(folder)
    refuse_mixture(folder, store, "u_proj/v_proj")
    pairs = find_pairs(store, "u_proj", "v_proj")
    ranks = configs.ranks_of(folder / CONFIG_FILE, "svd_ranks", given.get("svd_ranks") or {})
    config = configs.normalised(given, NAME)
    return Checkpoint(
        folder, NAME, reason, config, store, two_factor_linears(folder, config, store, pairs, ranks, NAME)
    )
