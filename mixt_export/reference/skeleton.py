"""transformers' own model classes built from config.json without weights: on the meta device, nothing allocated."""

from __future__ import annotations

from typing import Any

import torch

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.optional import require


def build_skeleton(checkpoint: Checkpoint, *, dtype: torch.dtype, attn: str) -> torch.nn.Module:
    """The AutoModelForCausalLM of ``checkpoint`` with parameters on the meta device and computed buffers in place.

    ``attn``: "eager" or "sdpa". Nothing is read but config.json, no remote code is run, no network is used. Raises
    UnsupportedError for a model type transformers has no causal language model for, CheckpointError for a
    config.json it rejects.
    """
    transformers = require("transformers", "Running a model in PyTorch")
    config = _config(transformers, checkpoint)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn, trust_remote_code=False
            )
    except (
        Exception
    ) as error:  # whatever a config.json of the right type but with wrong values makes a model class raise
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: transformers rejects it ({error}).") from error
    _restore_buffers(model)
    skeleton: torch.nn.Module = model.eval().requires_grad_(False)
    return skeleton


def _config(transformers: Any, checkpoint: Checkpoint) -> Any:
    values = dict(checkpoint.config)
    model_type = values.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type not in known or model_type not in causal:
        raise UnsupportedError(
            f"{checkpoint.path / 'config.json'}: model_type {model_type!r} is not a causal language model that the "
            f"installed transformers {transformers.__version__} knows."
        )
    try:
        return transformers.AutoConfig.for_model(model_type).from_dict(values)
    except Exception as error:  # see build_skeleton
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: transformers rejects it ({error}).") from error


def _restore_buffers(model: torch.nn.Module) -> None:
    """Buffers that are computed, not stored (rotary frequencies): make the module that owns them again, on the CPU."""
    for path, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        config: Any = getattr(module, "config", None)
        parent = model.get_submodule(path.rpartition(".")[0])
        try:
            remade = type(module)(config=config)
        except TypeError as error:
            raise UnsupportedError(
                f"{type(module).__name__} ({path}) holds computed buffers and cannot be built from the config alone."
            ) from error
        setattr(parent, path.rpartition(".")[2], remade)
