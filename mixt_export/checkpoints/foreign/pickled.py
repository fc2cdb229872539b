"""A model saved whole by torch.save, read as data: SVD-LLM's {'model', 'tokenizer'}, and those like it.

Written by https://github.com/AIoT-MLSys-Lab/SVD-LLM (SVDLLM.py; component/svd_llama.py), Dobi-SVD (DobiSVD_Model.pt),
ASVD and ZS-SVD in LowRankArena: one .pt file that holds the module itself. Its classes are not needed and not imported:
the tree of modules gives the names, the tensors lie in the file, and config.json is the pickled configuration unless
one lies beside the file. The pickled tokenizer is not used; tokenizer.json is looked for beside the file and in --base.

Factors are recognised by their names: `q_u_proj` (out, rank) and `q_v_proj` (rank, in) beside each other (SVD-LLM),
submodules `u_proj` and `v_proj` (ZS-SVD), `ALinear` and `BLinear` (ASVD's SVDLinear, Dobi-SVD's SVDTransformLayer).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mixt_export.checkpoints import paths
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign import config as configs
from mixt_export.checkpoints.foreign.order import reversed_order
from mixt_export.checkpoints.foreign.over_base import given_base
from mixt_export.checkpoints.foreign.pairs import Pair, find_pairs, refuse_mixture, two_factor_linears
from mixt_export.checkpoints.huggingface import read_config
from mixt_export.checkpoints.pickle_values import Record, TensorView
from mixt_export.checkpoints.store import TensorStore
from mixt_export.checkpoints.torch_file import (
    TorchFile,
    is_module,
    is_tensors,
    modules_of,
    open_torch_file,
    settings_of,
    state_of,
    tensors_of,
)
from mixt_export.checkpoints.weights import weights_file
from mixt_export.errors import CheckpointError, UnsupportedError, UsageError

NAME = "pickled"
_SVD_LLM = re.compile(r"(.+\.)([a-z]+)_[uv]_proj\.weight")
#: Buffers that old versions of model classes stored though they are computed.
_COMPUTED = re.compile(r".+\.(rotary_emb\.\w+|attn\.(masked_)?bias)")
#: Classes of linears with ALinear and BLinear -> whether ALinear reads the input.
_CLASSES = {"SVDLinear": False, "SVDTransformLayer": True, "SVDTransformLayer_remapping": True}
_METHODS = {True: "dobi-svd", False: "asvd"}


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None. Looks at file names only."""
    if weights_file(folder) is not None:
        return None
    found = _files(folder)
    return f"{', '.join(found[:3])} and no other weights" if found else None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder; see open_checkpoint. Raises what torch_file.open_torch_file does, and for what is no model."""
    names = _files(folder)
    if len(names) != 1:
        raise CheckpointError(
            f"{folder}: holds {len(names)} files of torch.save ({', '.join(names[:3])}), and which is the model cannot "
            "be told; leave the model's alone in the folder."
        )
    path = paths.required_file(folder, names[0], "download the model again")
    file = open_torch_file(path)
    model = file.value.get("model") if isinstance(file.value, dict) and "model" in file.value else file.value
    views = _views(path, model)
    config, bases = _config(folder, path, model)
    store = TensorStore(tensors_of(file, {name: view for name, view in views.items() if not _COMPUTED.fullmatch(name)}))
    store = _without_copies(file, store, config)
    pairs, method = _pairs(folder, config, store, path, model)
    factors = two_factor_linears(folder, config, store, pairs, None, method) if pairs else {}
    return Checkpoint(folder, NAME, f"{reason} ({method})", config, store, factors, {}, bases)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt") if not path.name.startswith("."))


def _views(path: Path, model: Any) -> dict[str, TensorView]:
    if is_module(model):
        return state_of(model, str(path))
    if is_tensors(model):
        return dict(model)
    raise UnsupportedError(
        f"{path}: holds neither a torch module nor a state_dict, so that no weights are found in it; save the model's "
        "state_dict, or the model as safetensors."
    )


def _config(folder: Path, path: Path, model: Any) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """config.json's content, and the folders besides ``folder`` that have companions."""
    base = given_base()
    if base is not None and not base.is_dir():
        raise UsageError(f"--base {base}: there is no such folder; give the folder of the dense model.")
    bases = () if base is None else (base,)
    if paths.own_file(folder, "config.json") is not None:
        return configs.normalised(read_config(folder), "svd-llm"), bases
    settings = model.state.get("config") if isinstance(model, Record) else None
    found = settings_of(settings)
    if isinstance(settings, Record) and not found.get("model_type"):
        # A class attribute before transformers 5: told by the module that the configuration's class is from.
        found["model_type"] = settings.cls.module.rpartition(".")[2].removeprefix("configuration_")
    if found.get("model_type"):
        return configs.normalised(found, "svd-llm"), bases
    if base is None:
        raise CheckpointError(
            f"{path}: holds no configuration; put the model's config.json beside it, or give the dense model's folder "
            "with --base."
        )
    return configs.normalised(read_config(base), "svd-llm"), bases


def _without_copies(file: TorchFile, store: TensorStore, config: dict[str, Any]) -> TensorStore:
    """``store`` without a head that is the embedding: the same bytes under a second name."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not config.get("tie_word_embeddings") or head not in store or embedding not in store:
        return store
    if store[head].made is not None or store[head].offset != store[embedding].offset:
        return store
    return TensorStore({name: stored for name, stored in store.items() if name != head})


def _pairs(
    folder: Path, config: dict[str, Any], store: TensorStore, path: Path, model: Any
) -> tuple[dict[str, Pair], str]:
    """The factorised linears and what made them; ({}, "dense") where there are none."""
    beside = {match[1] + match[2]: match for match in map(_SVD_LLM.fullmatch, store) if match is not None}
    if beside:
        refuse_mixture(folder, store, "u_proj and v_proj of SVD-LLM's own classes")
        return {f"{stem}_proj": Pair(f"{stem}_u_proj", f"{stem}_v_proj") for stem in beside}, "svd-llm"
    below = find_pairs(store, "u_proj", "v_proj")
    if below:
        refuse_mixture(folder, store, "u_proj/v_proj")
        return below, "svd-llm"
    linear = find_pairs(store, "ALinear", "BLinear")
    if not linear:
        return {}, "dense"
    refuse_mixture(folder, store, "ALinear/BLinear")
    classes = {record.cls.name for _, record in modules_of(model, str(path))} if is_module(model) else set()
    orders = {_CLASSES[name] for name in classes & set(_CLASSES)}
    default = orders.pop() if len(orders) == 1 else None
    turned = reversed_order(folder, config, store, linear, None, default=default)
    return {name: pair.turned() if turned else pair for name, pair in linear.items()}, _METHODS[turned]
