"""The weights of a Hugging Face folder: safetensors, else what torch.save wrote before safetensors were the rule."""

from __future__ import annotations

from pathlib import Path

from mixt_export.checkpoints import paths, strictjson
from mixt_export.checkpoints.store import INDEX_FILE, SINGLE_FILE, StoredTensor, TensorStore, open_store
from mixt_export.checkpoints.torch_file import is_tensors, open_torch_file, tensors_of
from mixt_export.errors import CheckpointError, UnsupportedError

SINGLE_PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

#: Names of weight files, in the order in which transformers prefers them.
NAMES = (SINGLE_FILE, INDEX_FILE, SINGLE_PICKLE, PICKLE_INDEX)


def weights_file(folder: Path) -> str | None:
    """The name of the file that says where the weights of ``folder`` are, or None. Looks at file names only."""
    return next((name for name in NAMES if (folder / name).exists() or (folder / name).is_symlink()), None)


def open_weights(folder: Path) -> TensorStore:
    """The tensors of ``folder``. Raises CheckpointError; UnsupportedError for pickles that hold more than tensors."""
    name = weights_file(folder)
    if name == SINGLE_PICKLE:
        path = paths.required_file(folder, SINGLE_PICKLE, "download the model again")
        return TensorStore(pickled_tensors(path))
    if name == PICKLE_INDEX:
        return TensorStore(_sharded(folder, paths.required_file(folder, PICKLE_INDEX, "download the model again")))
    return open_store(folder)


def pickled_tensors(path: Path) -> dict[str, StoredTensor]:
    """The state_dict in the file at ``path``, in place where its tensors are contiguous."""
    file = open_torch_file(path)
    if not is_tensors(file.value):
        raise UnsupportedError(
            f"{path}: holds no state_dict (names and tensors) but something else; save the model's state_dict alone, "
            "or the model as safetensors."
        )
    return tensors_of(file, file.value)


def _sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = strictjson.load_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names; download the file again.")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not paths.is_plain_name(file) or not file.endswith(".bin"):
            raise CheckpointError(
                f"{index}: {file!r} in weight_map is not the plain name of a .bin file in the folder; paths are not "
                "followed: correct the index."
            )
        path = paths.required_file(folder, file, "download the shards and their index together again")
        for name, stored in pickled_tensors(path).items():
            if name in tensors or weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path}: holds the tensor {name!r}, which {index.name} does not place there alone; download the "
                    "shards and their index together again."
                )
            tensors[name] = stored
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{index}: {len(absent)} of its tensors are in none of the shards ({absent[0]!r} …); download the shards "
            "and their index together again."
        )
    return tensors
