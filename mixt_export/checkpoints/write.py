"""Write a model folder, tensor by tensor: peak memory is the largest tensor that is produced, not the model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mixt_export.checkpoints import layout, mixt
from mixt_export.checkpoints.checkpoint import CONFIG_FILE, Checkpoint
from mixt_export.checkpoints.dtypes import CODE_OF_NAME, numpy_dtype
from mixt_export.checkpoints.finite import FiniteScan, non_finite
from mixt_export.checkpoints.packed import Packed
from mixt_export.checkpoints.store import INDEX_FILE, SINGLE_FILE, StoredTensor, TensorStore
from mixt_export.errors import NetworkError
from mixt_export.network import FactorizedLinear, TensorRef
from mixt_export.progress import SILENT, Advance, Progress
from mixt_export.staging import require_space

#: Largest weight file unless the caller says otherwise, bytes.
MAX_SHARD_BYTES = 4_000_000_000
#: The data of a file begins at a multiple of this, so that a mapped core is aligned for any vector instruction.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write: numpy dtype name and shape now, values when ``produce()`` is called (once, at its turn)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray[Any, Any]]

    @property
    def ref(self) -> TensorRef:
        """Name, shape and dtype."""
        return TensorRef(self.name, tuple(self.shape), self.dtype)


def write_checkpoint(
    folder: Path,
    source: Checkpoint,
    tensors: Iterable[NewTensor],
    factors: Mapping[str, FactorizedLinear],
    info: Mapping[str, Any],
    progress: Progress = SILENT,
    *,
    max_shard_size: int = MAX_SHARD_BYTES,
    packed: Mapping[str, Packed] | None = None,
) -> None:
    """Write ``source`` with ``tensors`` added or replaced and the linears of ``factors`` factorised, into ``folder``.

    ``factors`` describes every factorised linear of the result, those that ``source`` already had included. Dropped are
    the dense weight of each factorised linear and the cores of ``source`` that no linear uses any more; every other
    tensor is streamed from ``source``; config.json and the companions are copied byte for byte. ``folder`` exists and
    is empty; use staging.staged_folder around the call. ``max_shard_size``: bytes of data per weight file. ``packed``:
    tensors of ``factors`` by name that are stored in parts; those parts are among ``tensors``.

    Without ``factors`` the result is a plain Hugging Face folder. Raises CheckpointError for non-finite values and
    missing tensors, NetworkError for tensors that do not fit ``factors``, ResourceError when the disk is too small.
    """
    folder = Path(folder)
    plan = _plan(source, list(tensors), factors)
    _check_features(source, factors)
    packed = packed or {}
    refs = [*(item.ref for item in plan), *(tensor.ref for tensor in packed.values())]
    planned = TensorStore({ref.name: StoredTensor(ref, folder / SINGLE_FILE, 0, ref.nbytes) for ref in refs})
    mixt.check_against_store(factors, planned, str(folder))
    # A tool that sees only a weight file can tell that linears are missing from it by design.
    metadata = {"format": mixt.FORMAT if factors else "pt"}
    write_weights(folder, source.store, plan, metadata, progress, max_shard_size=max_shard_size)
    if factors:
        write_json(folder / mixt.FACTORS_FILE, mixt.describe_factors(factors, info, packed))
    (folder / CONFIG_FILE).write_bytes(source.config_bytes())
    for companion in source.companions():
        shutil.copyfile(companion, folder / companion.name)


def write_weights(
    folder: Path,
    store: TensorStore,
    plan: list[NewTensor | StoredTensor],
    metadata: Mapping[str, str],
    progress: Progress = SILENT,
    *,
    max_shard_size: int = MAX_SHARD_BYTES,
) -> None:
    """Write the tensors of ``plan`` in its order as safetensors, with an index where there is more than one file.

    Stored ones are streamed from ``store``, checked to be finite. Raises CheckpointError, ResourceError.
    """
    total = sum(item.ref.nbytes for item in plan)
    require_space(folder, total, "writing the model folder")
    shards = list(_shards(plan, max_shard_size))
    scan = FiniteScan()
    weight_map = {}
    with progress.task("writing weights", total) as advance:
        for number, shard in enumerate(shards, 1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path = folder / name
            with path.open("wb") as file:
                file.write(encode_header([item.ref for item in shard], metadata))
                for item in shard:
                    _write_item(file, item, store, scan, advance)
            weight_map.update({item.ref.name: name for item in shard})
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def encode_header(refs: Iterable[TensorRef], metadata: Mapping[str, str], alignment: int = ALIGNMENT) -> bytes:
    """The first bytes of a safetensors file whose data are ``refs`` in that order; a multiple of ``alignment``."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for ref in refs:
        end = position + ref.nbytes
        fields[ref.name] = {
            "dtype": CODE_OF_NAME[ref.dtype],
            "shape": list(ref.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def _plan(
    source: Checkpoint, new: list[NewTensor], factors: Mapping[str, FactorizedLinear]
) -> list[NewTensor | StoredTensor]:
    """Every tensor of the result, in the order of the data."""
    names = [tensor.name for tensor in new]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"tensors given more than once: {', '.join(twice)}")
    used = {ref.name for linear in factors.values() for ref in linear.tensors()}
    dropped = {f"{name}.weight" for name in factors}
    before = {ref.name for linear in source.factors.values() for ref in linear.tensors() if ref != linear.bias}
    dropped |= before - used
    plan: dict[str, NewTensor | StoredTensor] = {
        name: stored for name, stored in source.store.items() if name not in dropped
    }
    plan.update({tensor.name: tensor for tensor in new})
    return sorted(plan.values(), key=lambda item: layout.place(item.ref.name))


def _check_features(source: Checkpoint, factors: Mapping[str, FactorizedLinear]) -> None:
    """Raise NetworkError when a linear of ``factors`` has other features than the dense weight that it replaces."""
    for name, linear in factors.items():
        ref = source.store.refs.get(f"{name}.weight")
        if ref is not None and sorted(ref.shape) != sorted((linear.out_features, linear.in_features)):
            before = " → ".join(str(size) for size in reversed(ref.shape))
            raise NetworkError(
                f"{source.path}: the linear {name!r} is {linear.in_features} → {linear.out_features}, but the dense "
                f"weight it replaces is {before}; compress the model again."
            )


def _shards(plan: list[NewTensor | StoredTensor], limit: int) -> Iterator[list[NewTensor | StoredTensor]]:
    """``plan`` cut into files of at most ``limit`` bytes of data; a larger tensor gets a file of its own."""
    shard: list[NewTensor | StoredTensor] = []
    size = 0
    for item in plan:
        if shard and size + item.ref.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.ref.nbytes
    yield shard


def _write_item(
    file: IO[bytes], item: NewTensor | StoredTensor, store: TensorStore, scan: FiniteScan, advance: Advance
) -> None:
    """Write the bytes of ``item``, checked to be finite. Nothing of it stays in memory: the next one needs the room."""
    ref = item.ref
    if isinstance(item, StoredTensor):
        where, remedy = str(item.path), "download the model again"
        pieces: Iterable[bytes | memoryview] = store.chunks(ref.name)
    else:
        where, remedy = Path(file.name).name, "use other calibration texts or keep this linear dense"
        pieces = [_produced(item)]
    seen = 0
    for piece in pieces:
        bad = scan.first_bad(piece, ref.dtype)
        if bad is not None:
            dtype = numpy_dtype(ref.dtype)
            value = np.frombuffer(piece, dtype)[bad]
            raise non_finite(where, ref.name, ref.shape, seen // dtype.itemsize + bad, value, remedy)
        seen += len(piece)
        file.write(piece)
        advance(len(piece))


def _produced(item: NewTensor) -> memoryview:
    """The bytes of ``item.produce()``. Raises ValueError when it is not what ``item`` said: the caller's mistake."""
    array = item.produce()
    if array.dtype.name != item.dtype or array.shape != tuple(item.shape):
        raise ValueError(
            f"tensor {item.name!r} was announced as {item.dtype} {tuple(item.shape)} and produced as "
            f"{array.dtype.name} {array.shape}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON; ValueError for NaN and Infinity."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        _dump(value, file)


def _dump(value: Any, file: IO[str]) -> None:
    json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
    file.write("\n")
