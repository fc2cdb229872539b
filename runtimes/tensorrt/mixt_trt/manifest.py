"""Read ``mixt_manifest.json``: what the graph is, and the shapes that its engine must accept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TrtError

FILE = "mixt_manifest.json"
GRAPH_FILE = "model.onnx"
SCHEMA = 1

#: Bytes per element of the dtypes that weights, activations and the cache may have.
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_BOUNDS = ("min", "opt", "max")
_MAX_JSON_BYTES = 64 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Smallest, tuned-for and largest shape of every input, as TensorRT's optimisation profile takes them."""

    name: str
    inputs: Mapping[str, tuple[Shape, Shape, Shape]]

    def admits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether an engine with this profile accepts these input shapes."""
        return shapes.keys() == self.inputs.keys() and all(
            len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
            for shape, (low, _, high) in ((shapes[name], bounds) for name, bounds in self.inputs.items())
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON data."""
        inputs = {name: dict(zip(_BOUNDS, map(list, shapes), strict=True)) for name, shapes in self.inputs.items()}
        return {"name": self.name, "inputs": inputs}


@dataclass(frozen=True)
class Manifest:
    """The part of the manifest that building and running need. Lengths in tokens; ``heads`` are key/value heads."""

    folder: Path
    dialect: str
    tensorrt: str
    """Version the graph was written for, such as "10.3"."""
    dtype: str
    layers: int
    heads: int
    head_dim: int
    kv_dtype: str
    max_seq_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    profiles: tuple[Profile, ...]
    files: Mapping[str, str]
    """SHA-256 of the graph and of every weight file, by name."""

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.folder / GRAPH_FILE


def check_own(path: Path) -> None:
    """Raise TrtError when ``path`` is a link out of its folder, unless into the blobs of a Hugging Face cache.

    Likewise for what is no file, a pipe for instance, which would be waited for; nothing at all is left to the caller.
    """
    try:
        present, linked = path.exists(), path.is_symlink()
        home, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise TrtError(f"{path}: cannot be read ({error}); export the model again.") from None
    if present and not path.is_file():
        raise TrtError(f"{path}: is no file; export the model again.")
    roots = {home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")}
    if linked and roots.isdisjoint(target.parents):
        raise TrtError(f"{path}: is a link that leads out of the folder; put the file itself there.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises TrtError when it is missing, too large or not one."""
    try:
        check_own(path)
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise TrtError(f"{path}: larger than {_MAX_JSON_BYTES} bytes, which no exported folder needs.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrtError(f"{path}: no such file; give the folder that `mixt export --target trt` wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TrtError(f"{path}: cannot be read as JSON ({error}); export the model again.") from None
    if not isinstance(data, dict):
        raise TrtError(f"{path}: holds no JSON object; export the model again.")
    return data


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an exported ``folder``. Raises TrtError naming what is wrong."""
    path = folder / FILE
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise TrtError(
            f"{path}: schema {data.get('schema')!r} is not {SCHEMA}, the one these scripts read; export again."
        )
    if not isinstance(data.get("trt"), dict):
        raise TrtError(
            f"{path}: the folder was exported for target {data.get('target')!r}; export the model with --target trt."
        )
    try:
        kv, files = data["kv"], data["files"]
        manifest = Manifest(
            folder=folder,
            dialect=_text(data["dialect"]),
            tensorrt=_text(data["trt"]["tensorrt"]),
            dtype=_dtype(data["dtype"]),
            layers=_count(kv["layers"]),
            heads=_count(kv["heads"]),
            head_dim=_count(kv["head_dim"]),
            kv_dtype=_dtype(kv["dtype"]),
            max_seq_len=_count(data["limits"]["max_seq_len"]),
            vocab_size=_count(data["vocab_size"]),
            eos_token_ids=tuple(_token(token) for token in data["eos_token_ids"]),
            bos_token_id=None if data["bos_token_id"] is None else _token(data["bos_token_id"]),
            profiles=tuple(parse_profile(profile) for profile in data["trt"]["profiles"]),
            files={_file_name(name): _text(facts["sha256"]) for name, facts in files.items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise TrtError(f"{path}: {what}; export the model again.") from None
    if GRAPH_FILE not in manifest.files or not manifest.profiles:
        raise TrtError(f"{path}: names no {GRAPH_FILE} or no profiles; export the model again.")
    first, *others = ({name: len(shapes[0]) for name, shapes in p.inputs.items()} for p in manifest.profiles)
    if any(other != first for other in others):
        raise TrtError(f"{path}: its profiles name different inputs; export the model again.")
    if len(first) < 2 + 2 * manifest.layers:
        raise TrtError(
            f"{path}: says {manifest.layers} layers, but its profiles name {len(first)} inputs; export the model again."
        )
    return manifest


def parse_profile(data: Any) -> Profile:
    """One profile of the manifest or of a stamp. Raises TrtError when its bounds contradict each other."""
    name = _text(data["name"])
    inputs = {}
    for key, bounds in data["inputs"].items():
        low, tuned, high = (tuple(_size(size) for size in bounds[bound]) for bound in _BOUNDS)
        same_rank = len(low) == len(tuned) == len(high)
        if not same_rank or not all(a <= b <= c for a, b, c in zip(low, tuned, high, strict=True)):
            raise TrtError(
                f"profile {name!r} contradicts itself: {key} has min {list(low)}, opt {list(tuned)}, max {list(high)}, "
                "but min <= opt <= max must hold; export again with other --max-batch, --max-input-len, --max-seq-len."
            )
        inputs[key] = (low, tuned, high)
    _check_lengths(name, inputs)
    return Profile(name, inputs)


def merged(profiles: tuple[Profile, ...]) -> Profile:
    """One profile that admits what any of ``profiles`` admits, tuned for the last of them (decoding).

    An engine with two profiles may hold its weights twice; one profile holds them once. The longest mask is as long as
    the longest cache and the longest input together, or TensorRT finds sizes that disagree at the upper bounds.
    """
    inputs = {}
    for key, (_, tuned, _) in profiles[-1].inputs.items():
        lows, highs = ([profile.inputs[key][bound] for profile in profiles] for bound in (0, 2))
        inputs[key] = (_each(min, lows), tuned, _each(max, highs))
    past = next(shapes[2][2] for key, shapes in inputs.items() if key.startswith("past_key_values."))
    low, tuned, (batch, _) = inputs["attention_mask"]
    inputs["attention_mask"] = (low, tuned, (batch, past + inputs["input_ids"][2][1]))
    return Profile("+".join(profile.name for profile in profiles), inputs)


def _each(choose: Callable[[Iterable[int]], int], shapes: list[Shape]) -> Shape:
    return tuple(choose(sizes) for sizes in zip(*shapes, strict=True))


def digest(path: Path) -> str:
    """SHA-256 of a file. Raises TrtError when it cannot be read."""
    check_own(path)
    try:
        with path.open("rb") as file:
            state = hashlib.sha256()
            while block := file.read(1 << 20):
                state.update(block)
    except OSError as error:
        raise TrtError(f"{path}: cannot be read ({error.strerror}); the folder is incomplete, export again.") from None
    return state.hexdigest()


def check_files(manifest: Manifest) -> None:
    """Raise TrtError unless the graph and the weight files are those that the manifest describes."""
    for name, expected in manifest.files.items():
        if digest(manifest.folder / name) != expected:
            raise TrtError(
                f"{manifest.folder / name}: is not the file that {FILE} describes (SHA-256 differs); copy the folder "
                "again or export again."
            )


def _check_lengths(name: str, inputs: Mapping[str, tuple[Shape, Shape, Shape]]) -> None:
    """The mask is as long as past and new tokens together; bounds that exclude every such run are refused."""
    past = next((shapes for key, shapes in inputs.items() if key.startswith("past_key_values.")), None)
    if past is None or "input_ids" not in inputs or "attention_mask" not in inputs:
        raise TrtError(f"profile {name!r} lacks input_ids, attention_mask or the cache; export the model again.")
    new, total = inputs["input_ids"], inputs["attention_mask"]
    if (len(new[0]), len(total[0]), len(past[0])) != (2, 2, 4):
        raise TrtError(
            f"profile {name!r} contradicts itself: input_ids and attention_mask have two dimensions, the cache has "
            "four; export the model again."
        )
    sums = [new[bound][1] + past[bound][2] for bound in range(3)]
    if not (sums[0] <= total[2][1] and total[0][1] <= sums[2] and total[1][1] == sums[1]):
        raise TrtError(
            f"profile {name!r} contradicts itself: attention_mask has lengths {[shape[1] for shape in total]}, but "
            f"past and new tokens together have {sums} (min, opt, max); export the model again."
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _file_name(value: Any) -> str:
    """A plain name in the folder: a manifest from elsewhere must not make us read other files."""
    name = _text(value)
    if name != Path(name).name or name.startswith("."):
        raise ValueError(f"{name!r} is no plain file name")
    return name


def _dtype(value: Any) -> str:
    if value not in ITEMSIZE:
        raise ValueError(f"{value!r} is none of the dtypes {', '.join(ITEMSIZE)}")
    return str(value)


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no size")
    return value


def _count(value: Any) -> int:
    if _size(value) == 0:
        raise ValueError("a size is 0")
    return int(value)


def _token(value: Any) -> int:
    return _size(value)
