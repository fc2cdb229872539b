"""AA-SVD: a directory of .pt files over its base model, y = U(V(x)).

Written by https://github.com/atulkumarin/AA-SVD (compression/compressed_linear.py, compress.py) and loaded over the
base model by model_adapter.py: per linear a folder, its module path with ``.`` → ``_``, with `U.pt` (out, rank) and
`V.pt` (in, rank), the latter a transposed view; per refined norm a folder with `state_dict.pt`. Biases are the base
model's. The final norm and the head count as modules of a layer behind the last (``model_layers_32_norm``).
"""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints import paths
from mixt_export.checkpoints.checkpoint import Checkpoint
from mixt_export.checkpoints.foreign.over_base import open_base, over_base
from mixt_export.checkpoints.pickle_values import TensorView
from mixt_export.checkpoints.store import StoredTensor
from mixt_export.checkpoints.torch_file import is_contiguous, is_tensors, open_torch_file
from mixt_export.errors import CheckpointError, UnsupportedError
from mixt_export.network import Branch, Core, FactorizedLinear

NAME = "aa-svd"
_FACTORS = ("U.pt", "V.pt")
_NORM = "state_dict.pt"
_QUANTISED = ("UK_q.pt", "VK_q.pt", "V1_T.pt", "qweight.pt")
_AGAIN = "write or copy the folder again"


def recognise(folder: Path) -> str | None:
    """Why ``folder`` is in this format, or None. Looks at file names only."""
    for part in sorted(folder.iterdir()):
        if part.is_dir() and any((part / name).exists() for name in (*_FACTORS, *_QUANTISED)):
            return f"{'U.pt and V.pt' if (part / 'U.pt').exists() else 'factors'} in {part.name}/"
    return None


def open(folder: Path, reason: str) -> Checkpoint:
    """Open the folder over its base model; see open_checkpoint and over_base.open_base."""
    base = open_base(folder, None, "factors of AA-SVD")
    modules = _modules(folder, base)
    tensors: dict[str, StoredTensor] = {}
    factors: dict[str, FactorizedLinear] = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = {path.name for path in part.iterdir() if path.suffix == ".pt"}
        if not names:
            continue
        if not part.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{part}: is a link that leads out of the model folder, which is not followed.")
        module = modules.get(part.name)
        if module is None:
            raise CheckpointError(
                f"{part}: is named after no module of the base model {base.path}; give the base model that was "
                "compressed with --base."
            )
        if names & set(_QUANTISED):
            raise UnsupportedError(
                f"{part}: holds quantised factors (dobi_remapping), which are not read; compress without it, or save "
                "the dequantised factors as U.pt and V.pt."
            )
        if names & set(_FACTORS):
            factors[module] = _linear(part, module, base, tensors)
        elif _NORM in names:
            _replace(part, module, base, tensors)
        else:
            raise CheckpointError(f"{part}: holds neither {_FACTORS[0]} and {_FACTORS[1]} nor {_NORM}; {_AGAIN}.")
    return over_base(folder, NAME, reason, base, tensors, factors, {})


def _modules(folder: Path, base: Checkpoint) -> dict[str, str]:
    """Name of a folder -> path of the module it stands for."""
    found: dict[str, str] = {}
    for name in base.store:
        module = name.rpartition(".")[0]
        if found.setdefault(module.replace(".", "_"), module) != module:
            raise CheckpointError(f"{folder}: a folder's name could mean two modules of {base.path}: {module!r}.")
    layers = base.config.get("num_hidden_layers")
    for last, module in (("norm", "model.norm"), ("lm_head", "lm_head")):
        if f"{module}.weight" in base.store:
            found[f"model_layers_{layers}_{last}"] = module
    return found


def _linear(part: Path, module: str, base: Checkpoint, tensors: dict[str, StoredTensor]) -> FactorizedLinear:
    dense = base.store.refs.get(f"{module}.weight")
    if dense is None or len(dense.shape) != 2:
        raise CheckpointError(f"{part}: {module!r} is no dense linear of the base model {base.path}.")
    views = {}
    for name in _FACTORS:
        path = paths.required_file(part, name, f"the linear {module!r} needs both factors: {_AGAIN}")
        file = open_torch_file(path)
        if not isinstance(file.value, TensorView) or len(file.value.shape) != 2:
            raise CheckpointError(f"{path}: holds no matrix; {_AGAIN}.")
        views[name] = file, file.value
    (up_file, up), (down_file, down) = views["U.pt"], views["V.pt"]
    if up.shape[1] != down.shape[1] or (up.shape[0], down.shape[0]) != dense.shape:
        raise CheckpointError(
            f"{part}: U {up.shape} and V {down.shape} are no factors of {module!r}, which is {dense.shape} in "
            f"{base.path}; give the base model that was compressed with --base."
        )
    # V is saved as the transpose of (rank, in): so it lies in the file, and so it is used.
    turned = not is_contiguous(down)
    stored = (down_file.stored_transposed if turned else down_file.stored)(down, f"{module}.V")
    tensors[f"{module}.V"] = stored
    tensors[f"{module}.U"] = up_file.stored(up, f"{module}.U")
    cores = [
        Core(stored.ref, ("r", "i") if turned else ("i", "r")),
        Core(tensors[f"{module}.U"].ref, ("o", "r")),
    ]
    branch = Branch((("i", down.shape[0]),), (("o", up.shape[0]),), tuple(cores))
    bias = base.store.refs.get(f"{module}.bias")
    return FactorizedLinear(module, down.shape[0], up.shape[0], (branch,), bias, NAME)


def _replace(part: Path, module: str, base: Checkpoint, tensors: dict[str, StoredTensor]) -> None:
    """Parameters of a norm in place of the base model's."""
    path = paths.required_file(part, _NORM, _AGAIN)
    file = open_torch_file(path)
    if not is_tensors(file.value):
        raise CheckpointError(f"{path}: holds no state_dict; {_AGAIN}.")
    for key, view in file.value.items():
        name = f"{module}.{key}"
        before = base.store.refs.get(name)
        if before is None or before.shape != view.shape:
            shape = "no such tensor" if before is None else f"{before.shape}"
            raise CheckpointError(f"{path}: holds {name!r} of shape {view.shape}, the base model {base.path} {shape}.")
        tensors[name] = file.stored(view, name)
