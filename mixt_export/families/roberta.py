"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's blocks, positions counted over the tokens that are no padding."""

from __future__ import annotations

from mixt_export.errors import CheckpointError
from mixt_export.families.bert import expect_absolute
from mixt_export.families.config import Config
from mixt_export.families.encoder_wiring import Encoder, post_norm_encoder

_PAD = 1


def encoder(config: Config, prefix: str) -> Encoder:
    """Wiring of a RobertaModel, or of the one inside a task model."""
    expect_absolute(config)
    pad = config.get("pad_token_id", _PAD)
    if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
        raise CheckpointError(f"config.json: pad_token_id must be a whole number from 0 on, found {pad!r}.")
    return post_norm_encoder(config, prefix, pad_positions=pad)
