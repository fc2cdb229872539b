"""`genai_config.json`: lets onnxruntime-genai load an exported folder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixt_export.errors import CheckpointError

#: model_type values that onnxruntime-genai knows by name; any other decoder goes under its generic name. Its own "gpt2"
#: is a graph whose cache is one tensor per layer, so GPT-2 goes under the generic name too.
_KNOWN_TYPES = frozenset({
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3",
})  # fmt: skip
_GENERIC_TYPE = "decoder"

#: What GPT-2 and GPT-J call them.
_OLD_NAMES = {"hidden_size": "n_embd", "num_attention_heads": "n_head"}

#: Search settings taken over from generation_config.json when it holds a value of the right type, else these.
_SEARCH_DEFAULTS: dict[str, bool | int | float] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def genai_config(
    manifest: Mapping[str, Any], hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of ``genai_config.json`` for onnxruntime-genai 0.14 and later.

    ``manifest`` is mixt_manifest.json, ``hf_config`` config.json, ``generation_config`` generation_config.json (None:
    there is none). Token ids nobody states are left out; genai generates without them. The graph's logits are
    (batch, 1, vocab), which genai takes as those of the last token, for prompts too. A batch of unequal prompts needs
    dialect ``ort``, a ``pad_token_id`` and padding on the right: the mask genai builds is the one that dialect expects.

    Raises CheckpointError when config.json lacks hidden_size or num_attention_heads.
    """
    generation = generation_config or {}
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if any("activations" in matrix for matrix in manifest.get("quantisation", {}).get("matrices", {}).values()):
        # Exact on every x86; slower than need be on those with VNNI or AMX, where this line may go (quantisation.md).
        session["session.x64quantprecision"] = "1"
    kv = manifest["kv"]
    context = manifest["limits"]["max_seq_len"]
    model_type = hf_config.get("model_type")
    model: dict[str, Any] = {
        "context_length": context,
        "decoder": {
            "session_options": session,
            "filename": "model.onnx",
            "head_size": kv["head_dim"],
            "hidden_size": _size(hf_config, "hidden_size"),
            "num_attention_heads": _size(hf_config, "num_attention_heads"),
            "num_hidden_layers": kv["layers"],
            "num_key_value_heads": kv["heads"],
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
        "type": model_type if model_type in _KNOWN_TYPES else _GENERIC_TYPE,
        "vocab_size": manifest["vocab_size"],
    }
    eos = list(manifest["eos_token_ids"])
    if eos:
        model["eos_token_id"] = eos
    if manifest["bos_token_id"] is not None:
        model["bos_token_id"] = manifest["bos_token_id"]
    stated = (source.get("pad_token_id") for source in (manifest, generation, hf_config))
    pad = next((token for token in stated if _is_number(token, int)), None)
    if pad is None and eos:
        pad = eos[0]
    if pad is not None:
        model["pad_token_id"] = pad
    return {"model": model, "search": _search(generation, context, bool(kv["shared_buffer"]))}


def _search(generation: Mapping[str, Any], context: int, shared_buffer: bool) -> dict[str, Any]:
    search: dict[str, Any] = {
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shared_buffer,
    }
    for name, default in _SEARCH_DEFAULTS.items():
        value = generation.get(name)
        good = isinstance(value, bool) if isinstance(default, bool) else _is_number(value, type(default))
        search[name] = value if good else default
    return search


def _is_number(value: Any, kind: type) -> bool:
    """Whether ``value`` is a number usable as ``kind`` (an int passes as a float, a bool as neither)."""
    return not isinstance(value, bool) and isinstance(value, (int, float) if kind is float else int)


def _size(hf_config: Mapping[str, Any], name: str) -> int:
    value = hf_config.get(name, hf_config.get(_OLD_NAMES[name]))
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"config.json: {name} is {value!r}, but genai_config.json needs it as an integer; correct the model folder."
        )
    return value
