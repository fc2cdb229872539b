"""A private copy of an exported folder, to be edited: the graph's nodes, its constants, its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

GRAPH, DATA, MANIFEST = "model.onnx", "model.onnx.data", "mixt_manifest.json"


class NotApplicable(Exception):  # noqa: N818 (no error: this model has nothing to break in this way)
    """The exported model lacks what a fault would break."""


class Exported:
    """The copy at ``folder``; unchanged files are links, so that a copy costs nothing.

    ``save`` writes graph and manifest. Recorded digests, node counts and bytes follow the change, as if the exporter
    itself had been wrong, unless ``stale``.
    """

    def __init__(self, clean: Path, folder: Path) -> None:
        self.clean, self.folder = clean, folder
        folder.mkdir(parents=True)
        for path in clean.iterdir():
            if path.is_file() and not path.name.startswith("report."):
                os.link(path, folder / path.name)
        self.proto = onnx.load_model(str(clean / GRAPH), load_external_data=False)
        self.manifest: dict[str, Any] = json.loads((clean / MANIFEST).read_text())
        self.stale = False
        self._inserted = 0
        #: What happens to the folder after it was written.
        self.afterwards: list[Callable[[Path], object]] = []

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def layers(self) -> int:
        return int(self.manifest["kv"]["layers"])

    # nodes

    def under(self, prefix: str) -> list[onnx.NodeProto]:
        """Nodes of that name or below it, in order."""
        return [node for node in self.graph.node if node.name == prefix or node.name.startswith(prefix + "/")]

    def named(self, name: str) -> onnx.NodeProto:
        for node in self.graph.node:
            if node.name == name:
                return node
        raise NotApplicable(name)

    def linear(self, layer: int, last: str, parts: tuple[str, ...] = ("self_attn", "mlp")) -> list[onnx.NodeProto]:
        """Nodes of a linear of block ``layer`` by its last name."""
        for part in parts:
            nodes = self.under(f"/model/layers.{layer}/{part}/{last}")
            if nodes:
                return nodes
        raise NotApplicable(f"no {last}")

    def attention(self, layer: int) -> onnx.NodeProto:
        for node in self.under(f"/model/layers.{layer}"):
            if node.op_type in ("GroupQueryAttention", "Attention"):
                return node
        raise NotApplicable("no attention node")

    def attribute(self, node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
        for attribute in node.attribute:
            if attribute.name == name:
                return attribute
        raise NotApplicable(f"no attribute {name}")

    def before(self, node: onnx.NodeProto, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Insert a node before ``node``; returns the name of its value."""
        self._inserted += 1
        name = f"/fault/{self._inserted}"
        place = next(index for index, other in enumerate(self.graph.node) if other.name == node.name)
        self.graph.node.insert(place, helper.make_node(kind, inputs, [name], name=f"{name}/node", **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small new constant; returns its name."""
        name = f"/fault/constant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    # constants

    def tensor(self, name: str) -> onnx.TensorProto:
        for tensor in self.graph.initializer:
            if tensor.name == name:
                return tensor
        raise NotApplicable(f"no constant {name}")

    def constants(self, suffix: str, layer: int | None = None) -> list[str]:
        """Names of constants that end so, of block ``layer`` where one is given."""
        found = [tensor.name for tensor in self.graph.initializer if tensor.name.endswith(suffix)]
        if layer is not None:
            found = [name for name in found if f"layers.{layer}." in name or f".h.{layer}." in name]
        if not found:
            raise NotApplicable(f"no constant *{suffix}")
        return found

    def weights(self, layer: int, last: str, parts: tuple[str, ...] = ("self_attn", "mlp")) -> list[str]:
        """Matrices of a linear, in the order in which its nodes read them."""
        known = {tensor.name: tensor for tensor in self.graph.initializer}
        read = (name for node in self.linear(layer, last, parts) for name in node.input)
        found = [name for name in read if name in known and len(known[name].dims) >= 2 and last in name]
        if not found:
            raise NotApplicable(f"no weights of {last}")
        return list(dict.fromkeys(found))

    def value(self, name: str) -> np.ndarray:
        tensor = self.tensor(name)
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            return numpy_helper.to_array(tensor).copy()
        dtype, size = helper.tensor_dtype_to_np_dtype(tensor.data_type), int(np.prod(tensor.dims, dtype=np.int64))
        path = self.folder / place["location"]
        return np.fromfile(path, dtype, size, offset=int(place["offset"])).reshape(tuple(tensor.dims))

    def put(self, name: str, value: np.ndarray) -> None:
        """Give the constant another value, at the end of the exporter's own weight file."""
        tensor = self.tensor(name)
        data = np.ascontiguousarray(value.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type)))
        assert list(data.shape) == list(tensor.dims), (name, data.shape)
        if not tensor.external_data:
            tensor.CopyFrom(numpy_helper.from_array(data, name))
            return
        path = self.own(DATA)
        place = {entry.key: entry for entry in tensor.external_data}
        if place["location"].value == DATA:
            with path.open("r+b") as file:
                file.seek(int(place["offset"].value))
                file.write(data.tobytes())
            return
        self._append(tensor, data)

    def add(self, value: np.ndarray, like: str) -> str:
        """A new constant of the dtype of ``like``, in the weight file; returns its name."""
        name = f"{like}/fault_{len(self.graph.initializer)}"
        tensor = self.graph.initializer.add()
        tensor.name, tensor.data_type = name, self.tensor(like).data_type
        tensor.dims.extend(value.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        self._append(tensor, np.ascontiguousarray(value.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))))
        return name

    def _append(self, tensor: onnx.TensorProto, data: np.ndarray) -> None:
        path = self.own(DATA)
        offset = -(-path.stat().st_size // 64) * 64
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data.tobytes())
        del tensor.external_data[:]
        for key, text in (("location", DATA), ("offset", offset), ("length", data.nbytes)):
            tensor.external_data.add(key=key, value=str(text))

    # files

    def own(self, name: str) -> Path:
        """The file, no longer shared with the clean folder."""
        path = self.folder / name
        if not path.exists():
            path.write_bytes(b"")
        elif path.stat().st_nlink > 1:
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        return path

    def edit_json(self, name: str) -> _Json:
        """``with x.edit_json(name) as data`` changes a JSON file."""
        if not (self.folder / name).is_file():
            raise NotApplicable(f"no {name}")
        return _Json(self.own(name))

    def save(self) -> Path:
        for name in (GRAPH, MANIFEST):
            (self.folder / name).unlink(missing_ok=True)
        onnx.save_model(self.proto, str(self.folder / GRAPH))
        if not self.stale:
            self._refresh()
        (self.folder / MANIFEST).write_text(json.dumps(self.manifest))
        for happens in self.afterwards:
            happens(self.folder)
        return self.folder

    def _refresh(self) -> None:
        from mixt_export.verification.memory.weights import count_weights

        self.manifest["graph"]["nodes"] = len(self.graph.node)
        self.manifest["memory"]["weight_bytes"] = count_weights(self.proto).nbytes
        if (self.folder / DATA).is_file():
            self.manifest["files"].setdefault(DATA, {})
        for name, facts in self.manifest["files"].items():
            path = self.folder / name
            if path.stat().st_nlink == 1 or name == DATA:
                facts["bytes"] = path.stat().st_size
                with path.open("rb") as file:
                    facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()


class _Json:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> dict[str, Any]:
        self._data: dict[str, Any] = json.loads(self._path.read_text())
        return self._data

    def __exit__(self, *_: object) -> None:
        self._path.write_text(json.dumps(self._data))


def first(found: Iterable[str], what: str) -> str:
    """The first name of ``found``; NotApplicable where there is none."""
    for name in found:
        return name
    raise NotApplicable(f"no {what}")


def rewired(node: onnx.NodeProto, old: str, new: str) -> None:
    """Let ``node`` read ``new`` where it read ``old``."""
    node.input[:] = [new if name == old else name for name in node.input]


def readers(x: Exported, value: str) -> Iterator[onnx.NodeProto]:
    yield from (node for node in x.graph.node if value in node.input)
