"""Encoder families: one file per family, one line here."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

from mixt_export.errors import CheckpointError
from mixt_export.families.encoder_wiring import Encoder

#: config.json's model_type -> module with `encoder(config, prefix) -> Encoder`, and the encoder's name in task models.
ENCODERS = {
    "bert": ("mixt_export.families.bert", "bert."),
    "roberta": ("mixt_export.families.roberta", "roberta."),
    "xlm-roberta": ("mixt_export.families.roberta", "roberta."),
    "camembert": ("mixt_export.families.roberta", "roberta."),
    "distilbert": ("mixt_export.families.distilbert", "distilbert."),
}


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` (a parsed config.json) is of an encoder family."""
    return config.get("model_type") in ENCODERS


def encoder_of(config: Mapping[str, Any], names: Collection[str], num_layers: int | None = None) -> Encoder:
    """Wiring of the encoder that ``config`` describes, cut to ``num_layers`` blocks if given.

    names: tensors of the checkpoint; those of a task model (BertForMaskedLM) carry the encoder's name in front. Raises
    UnsupportedError for an unknown variant, CheckpointError for a config that contradicts itself or other weights.
    """
    module, inside = ENCODERS[str(config.get("model_type"))]
    word = "embeddings.word_embeddings.weight"
    prefix = next((prefix for prefix in ("", inside) if prefix + word in names), None)
    if prefix is None:
        raise CheckpointError(
            f"the checkpoint holds neither {word!r} nor {inside + word!r}; the weights do not belong to this "
            f"config.json (model_type {config.get('model_type')!r})."
        )
    encoder: Encoder = importlib.import_module(module).encoder(config, prefix)
    return encoder.first(num_layers) if num_layers is not None else encoder
