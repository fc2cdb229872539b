"""Tiny random encoders written by transformers itself: BERT, RoBERTa, DistilBERT, alone or in a task model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import write_tokenizer

COMMON = {"vocab_size": 300, "max_position_embeddings": 64}
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 104}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**COMMON, **SIZES}),
    "roberta": ("RobertaConfig", {**COMMON, **SIZES, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("DistilBertConfig", {**COMMON, "dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 104}),
}


def write_tiny_encoder(
    folder: Path, model_type: str = "bert", *, task: bool = False, seed: int = 0, **keys: Any
) -> Path:
    """Write an encoder of hidden 48 with 3 blocks; ``task``: inside a masked language model; ``keys``: its config."""
    name, values = CONFIGS[model_type]
    config = getattr(transformers, name)(**{**values, **keys})
    kind = transformers.AutoModelForMaskedLM if task else transformers.AutoModel
    model = kind.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in path.lower()
            if norm and path.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif path.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
