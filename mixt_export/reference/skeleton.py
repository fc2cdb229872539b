"""transformers' own model classes built from config.json without weights: on the meta device, nothing allocated."""

from __future__ import annotations

from typing import Any

import torch

from mixt_export.checkpoints import Checkpoint
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.families.encoders import is_encoder
from mixt_export.optional import require
from mixt_export.reference.experts import separate_experts


def build_skeleton(checkpoint: Checkpoint, *, dtype: torch.dtype, attn: str) -> torch.nn.Module:
    """The causal language model or encoder of ``checkpoint``: parameters on the meta device, computed buffers in place.

    ``attn``: "eager" or "sdpa" (eager where the class has no other). Nothing is read but config.json, no remote code is
    run, no network is used. Encoders (families.encoders) come without a pooler or task head. Raises UnsupportedError
    for a model type transformers has no causal language model for, CheckpointError for a config.json it rejects.
    """
    transformers = require("transformers", "Running a model in PyTorch")
    config = _config(transformers, checkpoint)
    attn = attn if _supports(transformers, config, checkpoint, attn) else "eager"
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn, "trust_remote_code": False}
    try:
        with torch.device("meta"):
            if is_encoder(checkpoint.config):
                model = transformers.AutoModel.from_config(config, **settings)
                if getattr(model, "pooler", None) is not None:
                    model.pooler = None
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, **settings)
    except (
        Exception
    ) as error:  # whatever a config.json of the right type but with wrong values makes a model class raise
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: transformers rejects it ({error}).") from error
    separate_experts(model)
    _restore_buffers(model)
    skeleton: torch.nn.Module = model.eval().requires_grad_(False)
    return skeleton


def _config(transformers: Any, checkpoint: Checkpoint) -> Any:
    values = dict(checkpoint.config)
    model_type = values.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    auto = transformers.models.auto.modeling_auto
    runnable = auto.MODEL_MAPPING_NAMES if is_encoder(values) else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type not in known or model_type not in runnable:
        raise UnsupportedError(
            f"{checkpoint.path / 'config.json'}: model_type {model_type!r} is not a causal language model that the "
            f"installed transformers {transformers.__version__} knows."
        )
    try:
        return transformers.AutoConfig.for_model(model_type).from_dict(values)
    except Exception as error:  # see build_skeleton
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: transformers rejects it ({error}).") from error


def _supports(transformers: Any, config: Any, checkpoint: Checkpoint, attn: str) -> bool:
    """Whether the class has the attention: not all do scaled_dot_product_attention (Gemma 2, GPT-J)."""
    auto = transformers.models.auto.modeling_auto
    classes = auto.MODEL_MAPPING if is_encoder(checkpoint.config) else auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return attn != "sdpa" or bool(getattr(classes[type(config)], "_supports_sdpa", False))


def _restore_buffers(model: torch.nn.Module) -> None:
    """Buffers that are computed, not stored (rotary frequencies): make them again, on the CPU.

    A module of nothing else is made anew; one with parameters has its class initialise the buffers alone.
    """
    for path, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if _indices(module):
            continue
        if any(True for _ in module.parameters()):
            _initialise_buffers(model, module, path)
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


def _initialise_buffers(model: Any, module: torch.nn.Module, path: str) -> None:
    """What transformers runs after loading: parameters stay on the meta device, where nothing is written."""
    names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    for name in names:
        buffer = module.get_buffer(name)
        module.register_buffer(name, torch.full_like(buffer, float("nan"), device="cpu"), persistent=False)
    with torch.no_grad():
        model._init_weights(module)
    if not all(bool(torch.isfinite(module.get_buffer(name)).all()) for name in names):
        raise UnsupportedError(
            f"{type(module).__name__} ({path}) holds computed buffers that its class does not initialise."
        )


def _indices(module: torch.nn.Module) -> bool:
    """Fill the buffers of an embedding that hold positions 0, 1, 2, … or token types 0; whether those were all."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name not in ("position_ids", "token_type_ids"):
            return False
        values = torch.arange(buffer.shape[-1]) if name == "position_ids" else torch.zeros(buffer.shape[-1]).long()
        module.register_buffer(name, values.expand(tuple(buffer.shape)), persistent=False)
    return True
