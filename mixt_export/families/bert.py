"""BERT and what is built like it (MiniLM, sentence encoders, XLM-R's ancestors): post-norm, absolute positions."""

from __future__ import annotations

from mixt_export.errors import UnsupportedError
from mixt_export.families.config import Config, expect
from mixt_export.families.encoder_wiring import Encoder, post_norm_encoder


def encoder(config: Config, prefix: str) -> Encoder:
    """Wiring of a BertModel, or of the one inside a task model."""
    expect_absolute(config)
    return post_norm_encoder(config, prefix)


def expect_absolute(config: Config) -> None:
    """Refuse decoders and relative positions: this wiring has neither."""
    expect(config, "position_embedding_type", ("absolute",))
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UnsupportedError("config.json: is_decoder is set; only encoders of this model_type are supported.")
