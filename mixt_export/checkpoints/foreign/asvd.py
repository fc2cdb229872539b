"""ASVD: `truncation_ranks` in config.json, y = ALinear(BLinear(x)).

Written by https://github.com/hahnyuan/ASVD4LLM (huggingface_repos/build_asvd_repo.py, modules/svd_linear.py):
architectures ASVDLlamaForCausalLM (also Opt, Qwen2), `<linear>.BLinear.weight` (rank, in), `<linear>.ALinear.weight`
(out, rank), the bias at ALinear. The head may be among the linears: it stays factorised here, and then is not tied to
the embedding whatever config.json says, as SVDLinear in place of the head is not.
"""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.pairs import find_pairs, refuse_mixture, two_factor_linears
from mixt_export.checkpoints.weights import open_weights

NAME = "asvd"
HEAD = "lm_head"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None."""
    config = configs.peek(folder)
    if config.get("truncation_ranks"):
        return f"truncation_ranks in {CONFIG_FILE}"
    found = configs.model_type(config)
    return f"model_type {found!r} in {CONFIG_FILE}" if found.startswith("asvd_") else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint."""
    given = configs.own_config(folder, NAME)
    store = open_weights(folder)
    refuse_mixture(folder, store, "ALinear/BLinear")
    pairs = find_pairs(store, "ALinear", "BLinear")
    ranks = configs.ranks_of(folder / CONFIG_FILE, "truncation_ranks", given.get("truncation_ranks") or {})
    head = {"tie_word_embeddings": False} if HEAD in pairs else {}
    config = configs.normalised(given, NAME, **head)
    factors = two_factor_linears(folder, config, store, pairs, ranks, NAME)
    info = {"head": "factorised, stored as lm_head.ALinear and lm_head.BLinear"} if head else {}
    return Checkpoint(folder, NAME, reason, config, store, factors, info)
