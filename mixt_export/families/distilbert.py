"""DistilBERT: BERT's blocks under other names, without token types."""

from __future__ import annotations

from mixt_export.families.config import Config
from mixt_export.families.encoder_wiring import BlockNames, ConfigKeys, Encoder, post_norm_encoder

_NAMES = BlockNames(
    layer="transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)
_KEYS = ConfigKeys(hidden="dim", layers="n_layers", heads="n_heads", ffn="hidden_dim", activation="activation")
_EPS = 1e-12
"""Fixed in transformers' modules."""


def encoder(config: Config, prefix: str) -> Encoder:
    """Wiring of a DistilBertModel, or of the one inside a task model."""
    return post_norm_encoder(config, prefix, norm_eps=_EPS, token_types=0, names=_NAMES, keys=_KEYS)
