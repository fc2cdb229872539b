"""config.json of a foreign folder: what marks it, and what is left of it for the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import huggingface, paths, strictjson
from mixt_export.checkpoints.checkpoint import CONFIG_FILE
from mixt_export.errors import CheckpointError

#: Keys of config.json that mark a format, by its name. A folder may carry those of one format only.
MARKS: dict[str, tuple[str, ...]] = {
    "ablinear": ("low_rank_modules", "low_rank_schema", "low_rank_format_version", "low_rank_method"),
    "asvd": ("truncation_ranks",),
    "dobi-svd": ("dobi_target_modules",),
    "svd-llm": ("svd_ranks",),
    "blast": ("blast_rank", "blast_num_blocks", "indices", "target_modules", "precompute_matrix"),
    "basis-sharing": (),
}

#: What the formats put before a family's model_type.
_PREFIXES = ("lowrank_", "asvd_", "svdllm-", "svdllm_", "dobisvd_", "blast_", "basis_sharing_")
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def peek(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``, or {} where there is none. Raises CheckpointError for one that cannot be read."""
    path = paths.own_file(folder, CONFIG_FILE)
    return {} if path is None else strictjson.load_object(path, limit=huggingface.CONFIG_BYTES)


def model_type(config: Mapping[str, Any]) -> str:
    """config.json's model_type, "" where it has none."""
    found = config.get("model_type")
    return found if isinstance(found, str) else ""


def names_class(config: Mapping[str, Any], beginning: str) -> bool:
    """Whether a class in architectures or auto_map begins with ``beginning`` (after its module's name)."""
    listed = config.get("architectures")
    mapped = config.get("auto_map")
    names = [*(listed if isinstance(listed, list) else ()), *(mapped.values() if isinstance(mapped, dict) else ())]
    return any(isinstance(name, str) and name.rpartition(".")[2].startswith(beginning) for name in names)


def own_config(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a folder in the format ``name``. CheckpointError where it carries the marks of another, too."""
    config = huggingface.read_config(folder)
    for other, keys in MARKS.items():
        if other != name and keys and config.get(keys[0]):
            own = MARKS[name][0] if MARKS[name] else name
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: has {keys[0]} ({other}) beside {own} ({name}); a folder holds one format: "
                "remove the key that does not belong to these weights."
            )
    return config


def normalised(config: Mapping[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    """``config`` with the family's own model_type and architecture, without the keys of the format ``name``.

    ``auto_map`` goes as well: it names code in the folder, which is neither run nor copied.
    """
    dropped = {*MARKS[name], "auto_map"}
    result = {key: value for key, value in config.items() if key not in dropped}
    family = family_of(model_type(config))
    result["model_type"] = family
    if family in _ARCHITECTURES:
        result["architectures"] = [_ARCHITECTURES[family]]
    return {**result, **changes}


def family_of(name: str) -> str:
    """The family's model_type behind a format's own: ``lowrank_llama`` → ``llama``."""
    for prefix in _PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return name.removeprefix(prefix)
    return name


def ranks_of(path: Path, key: str, value: Any) -> dict[str, int]:
    """Ranks by linear: ``{name: rank}`` or ``{name: {"rank": rank}}``. Raises CheckpointError naming the key."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: {key} must map names of linears to ranks; copy config.json again.")
    found = {}
    for name, given in value.items():
        rank = given.get("rank") if isinstance(given, Mapping) else given
        if type(rank) is not int or rank < 1:
            raise CheckpointError(
                f"{path}: {key} gives {name!r} the rank {rank!r}, which is no whole number from 1; copy config.json "
                "again."
            )
        found[str(name)] = rank
    return found
