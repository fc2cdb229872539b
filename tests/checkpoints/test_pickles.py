"""Pickles as data: real files of torch come back whole, and nothing that a pickle names is imported or called."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixt_export.checkpoints import TensorStore, open_checkpoint, pickles, torch_file
from mixt_export.checkpoints.pickle_values import Global, Record, StorageRef, TensorView
from mixt_export.checkpoints.torch_file import open_torch_file, state_of, tensors_of
from mixt_export.cli.guard import guarded
from mixt_export.errors import CheckpointError, MixtError, UnsupportedError
from tests.tiny import tiny_tensors, write_tiny


class Call:
    """Pickled as the call ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def attacks(mark: Path) -> dict[str, Any]:
    """Objects whose loading by pickle leaves the file ``mark`` behind, by many ways."""
    command = f"touch {mark}"
    source = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, command),
        "posix": Call(__import__("posix").system, command),
        "subprocess": Call(subprocess.call, ["touch", str(mark)]),
        "eval": Call(builtins.eval, source),
        "exec": Call(builtins.exec, source),
        "open": Call(builtins.open, str(mark), "w"),
        "getattr": Call(builtins.getattr, Call(__import__, "os"), "system"),
        "import": Call(__import__, "os"),
        "runpy": Call(__import__("runpy").run_path, str(mark)),
        "pickle": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        "torch.load": Call(torch.load, str(mark)),
        "path": Call(Path.touch, mark),
        "numpy": Call(np.load, str(mark)),
        "shutil": Call(__import__("shutil").copyfile, "/etc/hostname", str(mark)),
        "codecs": Call(__import__("codecs").open, str(mark), "w"),
        "transformers function": Call(__import__("transformers").utils.logging.set_verbosity, 10),
    }


NAMES = tuple(attacks(Path("x")))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_refused_and_do_nothing(tmp_path: Path, name: str, protocol: int) -> None:
    mark = tmp_path / "pwned"
    data = pickle.dumps({"model": attacks(mark)[name]}, protocol)
    with pytest.raises(MixtError) as caught:
        pickles.load(data, "file.pt")
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("file.pt: ")


def test_the_attack_would_work(tmp_path: Path) -> None:
    """What is refused above is no dud: pickle itself runs it."""
    mark = tmp_path / "pwned"
    pickle.loads(pickle.dumps(attacks(mark)["os.system"]))
    assert mark.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("hidden", ["value", "state", "key", "class"])
def test_a_poisoned_file_is_exit_code_4(
    tmp_path: Path, file: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = write_tiny(tmp_path / "model"), tmp_path / "pwned"
    (folder / "model.safetensors").unlink()
    attack = attacks(mark)["os.system"]
    model = torch.nn.Linear(2, 2)
    if hidden == "state":
        model.__dict__["note"] = attack
    content = {"value": {"w": attack}, "state": {"model": model}, "key": [attack], "class": OrderedDict(a=attack)}
    torch.save(content[hidden], folder / file)

    class Command:
        def main(self, **_given: Any) -> None:
            open_checkpoint(folder)

    assert guarded(Command(), "mixt") == 4
    assert not mark.exists()
    message = capsys.readouterr().err
    assert "could run code when loaded; it is refused" in message
    assert message.count("\n") == 1


def test_a_whole_model_comes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny(tmp_path / "model", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save({"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}, tmp_path / "whole.pt")
    file = open_torch_file(tmp_path / "whole.pt")
    views = state_of(file.value["model"], "whole.pt")
    expected = model.state_dict()
    assert set(views) == set(expected)
    store = TensorStore(tensors_of(file, views))
    for name, tensor in expected.items():
        assert np.array_equal(store.read(name), tensor.numpy())
        assert not store[name].in_file  # a zip beside an exported graph is of no use to it


def test_views_of_storages(tmp_path: Path) -> None:
    """Transposed, sliced, expanded, empty, scalar and shared tensors of every dtype have the values torch gives."""
    base = torch.arange(60).reshape(6, 10)
    made = {
        "whole": base.float(),
        "turned": base.double().t(),
        "columns": base.half()[:, 2:7],
        "steps": base.bfloat16()[1::2, ::3],
        "row": base.int()[3],
        "empty": base.float()[:, :0],
        "scalar": torch.tensor(3.5),
        "bool": base > 30,
        "bytes": base.to(torch.uint8).reshape(3, 4, 5).permute(2, 0, 1),
        "one": base.float()[2:3, 4:5],
    }
    made["again"] = made["whole"]
    torch.save(made, tmp_path / "views.pt")
    file = open_torch_file(tmp_path / "views.pt")
    store = TensorStore(tensors_of(file, file.value))
    for name, tensor in made.items():
        expected = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        read = store.read(name, "float32") if tensor.dtype == torch.bfloat16 else store.read(name)
        assert read.shape == expected.shape
        assert np.array_equal(read, expected), name
    assert store["again"].offset == store["whole"].offset
    assert store["whole"].made is None and store["columns"].made is not None


def test_a_dense_folder_with_pytorch_model_bin(tmp_path: Path) -> None:
    """A folder of before safetensors is the same model."""
    folder = write_tiny(tmp_path / "model", shards=1)
    tensors = tiny_tensors(open_checkpoint(folder).config)
    (folder / "model.safetensors").unlink()
    torch.save(
        OrderedDict((name, torch.from_numpy(value)) for name, value in tensors.items()), folder / "pytorch_model.bin"
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "huggingface"
    assert all(np.array_equal(checkpoint.store.read(name), value) for name, value in tensors.items())


def archive(path: Path, pickle_bytes: bytes, storages: dict[str, bytes] | None = None, compress: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("archive/data.pkl", pickle_bytes)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, numel: int = 4) -> bytes:
    """A pickle of one float tensor in the storage "0", as torch writes it, with any claims."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value == "STORAGE" else None

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Pickler(buffer, 2).dump(Call(rebuild, "STORAGE", offset, shape, strides, False, OrderedDict()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "numel"),
    [
        ((5,), (1,), 0, 4),  # longer than its storage
        ((4,), (1,), 1, 4),  # beyond its end
        ((2, 2), (3, 1), 0, 4),
        ((4,), (1,), 0, 8),  # a storage that claims more than its bytes
        ((4,), (1,), 10**18, 4),
        ((1000, 1000), (0, 0), 0, 4),  # made larger by strides of 0
        ((2,), (-1,), 1, 4),
        ((2, 2), (1,), 0, 4),
    ],
)
def test_tensors_that_reach_beyond_their_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, numel: int
) -> None:
    path = archive(tmp_path / "x.pt", tensor_pickle(shape, strides, offset, numel), {"0": bytes(16)})
    with pytest.raises(CheckpointError):
        file = open_torch_file(path)
        file.stored(file.value, "w")


def test_a_missing_storage(tmp_path: Path) -> None:
    file = open_torch_file(archive(tmp_path / "x.pt", tensor_pickle((4,), (1,))))
    with pytest.raises(CheckpointError, match="which has 0"):
        file.stored(file.value, "w")


def test_containers_that_are_refused(tmp_path: Path) -> None:
    good = tensor_pickle((4,), (1,))
    with pytest.raises(UnsupportedError, match="is compressed, which is not read"):
        open_torch_file(archive(tmp_path / "deflated.pt", good * 50, {"0": bytes(16)}, zipfile.ZIP_DEFLATED))
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(UnsupportedError, match=r"since PyTorch 1\.6"):
        open_torch_file(tmp_path / "legacy.pt")
    whole = archive(tmp_path / "whole.pt", good, {"0": bytes(16)}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-30])
    with pytest.raises(UnsupportedError):
        open_torch_file(tmp_path / "cut.pt")
    with zipfile.ZipFile(tmp_path / "none.pt", "w") as file:
        file.writestr("archive/data/0", b"")
    with pytest.raises(CheckpointError, match=r"0 entries called data\.pkl"):
        open_torch_file(tmp_path / "none.pt")


def test_entries_that_overlap(tmp_path: Path) -> None:
    """Two entries of the directory that point at the same bytes."""
    path = archive(tmp_path / "x.pt", tensor_pickle((4,), (1,)), {"0": bytes(16), "1": bytes(16)})
    content = bytearray(path.read_bytes())
    first, second = (content.index(b"archive/data/0"), content.index(b"archive/data/1"))
    start = content.rindex(b"archive/data/1") - 46  # its record in the directory
    content[start + 42 : start + 46] = (first - 30).to_bytes(4, "little")
    content[second - 30 : second - 26] = b"PK\x03\x04"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"another name in its own header|overlap"):
        open_torch_file(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bent_pickles_fail_with_one_sentence_or_load(data: st.DataObject) -> None:
    """Any bytes: a value or one of our errors, never another exception."""
    content = bytearray(pickle.dumps({"a": [1, (2, "x")], "b": OrderedDict(c=torch.float32)}, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        pickles.load(bytes(content), "x")
    except MixtError as error:
        assert str(error).startswith("x: ")


BOMBS: dict[str, Callable[[], bytes]] = {
    "memo": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "length": lambda: b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes8": lambda: b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
    "no end": lambda: b"\x80\x02]q\x00",
    "inst": lambda: b"(ios\nsystem\n.",
    "extension": lambda: b"\x80\x02\x82\x01.",
    "deep": lambda: b"\x80\x02" + b"(" * 20_000 + b"t" * 20_000 + b".",
    "self": lambda: b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_claims_allocate_nothing(name: str) -> None:
    if name in ("memo", "deep", "self"):
        pickles.load(BOMBS[name](), "x")
    else:
        with pytest.raises(MixtError):
            pickles.load(BOMBS[name](), "x")


@pytest.mark.parametrize(
    "repeated",
    [
        b"c__builtin__\ntuple\nq\x00]q\x01(" + b"N" * 200 + b"e" + b"0h\x00h\x01\x85R" * 100,
        b"ctransformers\nA\nq\x00}q\x01("
        + b"".join(b"K%cK\x00" % n for n in range(200))
        + b"u"
        + b"0h\x00)\x81h\x01b" * 100,
        b"c_codecs\nencode\nq\x00X\xff\x00\x00\x00" + b"a" * 255 + b"q\x010" + b"0h\x00h\x01\x85R" * 100,
    ],
)
def test_copies_are_counted(monkeypatch: pytest.MonkeyPatch, repeated: bytes) -> None:
    """A container that is copied again and again, by calls and as a state, is a small file and any amount of memory."""
    data = b"\x80\x02" + repeated + b"."
    pickles.load(data, "x")
    monkeypatch.setattr(pickles, "_COPIES", 0)
    with pytest.raises(CheckpointError, match="copies"):
        pickles.load(data, "x")


#: A tuple of the same tuple twice, and so on: 22 bytes, and millions of elements to whoever walks through it.
_WIDE = b"K\x00" + b"2\x86" * 22
_STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    "program",
    [
        b"}" + _WIDE + b"Ns.",
        b"}(" + _WIDE + b"Nu.",
        b"ccollections\nOrderedDict\n]" + _WIDE + b"N\x86a\x85R.",
        b"ctorch\ndevice\n" + _WIDE + b"\x85R.",
        b"c_codecs\nencode\nX\x01\x00\x00\x00a" + _WIDE + b"\x86R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + b"K\x00K\x01\x85K\x01\x85\x89}]" + _WIDE + b"atR.",
        b"}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"Ns.",
    ],
)
def test_what_takes_long_to_walk_is_not_walked(program: bytes) -> None:
    """Hash, text or order of a value of exponential size; integers that all have the same hash."""
    with pytest.raises(CheckpointError, match="no valid pickle"):
        pickles.load(b"\x80\x02" + program, "x")
    named = pickles.load(b"\x80\x02ctransformers\nA\n)\x81" + _WIDE + b"NsX\x01\x00\x00\x00aK\x05s.", "x")
    assert named.state == {"a": 5}


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\x80\x02" + b"]" * 1000 + b"."
    assert pickles.load(data, "x") == []
    monkeypatch.setattr(pickles, "_INSTRUCTIONS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 instructions"):
        pickles.load(data, "x")


def test_sizes_without_end(tmp_path: Path) -> None:
    """A size of 2^16000 has more digits than Python writes into a message."""
    huge = b"\x8b" + (2001).to_bytes(4, "little") + bytes(2000) + b"\x01"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + b"K\x00" + huge + b"\x85K\x01\x85\x89}tR."
    storage = _STORAGE.replace(b"K\x04tQ", huge + b"tQ.")
    for program in (tensor, storage):
        with pytest.raises(CheckpointError, match="no valid pickle"):
            pickles.load(b"\x80\x02" + program, "x")


def _saved(tmp_path: Path, value: Any) -> Path:
    torch.save(value, tmp_path / "x.bin")
    return tmp_path / "x.bin"


def test_a_tensor_without_elements_reads_nothing(tmp_path: Path) -> None:
    """Strides of an empty tensor say nothing, so they may be of any size."""
    path = _saved(tmp_path, {"a": torch.zeros(4).as_strided((3, 0), (2**40, 1))})
    store = TensorStore(tensors_of(open_torch_file(path), open_torch_file(path).value))
    assert store.read("a").shape == (3, 0)


def test_tensors_share_storage_within_bounds(tmp_path: Path) -> None:
    base = torch.zeros(40960)
    file = open_torch_file(_saved(tmp_path, {str(index): base[:40959] for index in range(2000)}))
    with pytest.raises(CheckpointError, match="times the file"):
        tensors_of(file, file.value)


def test_bools_that_are_gathered_are_bools(tmp_path: Path) -> None:
    path = _saved(tmp_path, {"a": torch.ones(4, 3, dtype=torch.bool).t()})
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo(f"{path.stem}/data/0").header_offset
    content = bytearray(path.read_bytes())
    content[content.index(b"\x01" * 12, at)] = 2
    path.write_bytes(content)
    file = open_torch_file(path)
    with pytest.raises(CheckpointError, match="other than 0 and 1"):
        TensorStore(tensors_of(file, file.value)).read("a")


@pytest.mark.parametrize("place", [2**63 + 5, 2**40, -7])
def test_entries_beyond_the_file(tmp_path: Path, place: int) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        if place > 0:
            archive.filelist[0].header_offset = place
    if place < 0:  # the directory is said to begin later than it does: every place is counted from before the file
        content = bytearray(path.read_bytes())
        at = content.rindex(b"PK\x05\x06") + 16
        content[at : at + 4] = (int.from_bytes(content[at : at + 4], "little") - place).to_bytes(4, "little")
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not where the directory says"):
        open_torch_file(path)


def test_modules_that_share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes may say that each of many modules has the same many parameters."""
    view = TensorView(StorageRef("FloatStorage", "0", 4), 0, (4,), (1,))
    kind = Global("m", "M")
    shared = {"_parameters": {str(index): view for index in range(60)}, "_modules": {}, "_buffers": {"b": view}}
    modules = {str(index): Record(kind, (), dict(shared)) for index in range(20)}
    root = Record(kind, (), {"_modules": modules})
    assert len(state_of(root, "x")) == 20 * 61
    modules["0"].state["_non_persistent_buffers_set"] = 5
    assert len(state_of(root, "x")) == 20 * 61
    modules["0"].state["_non_persistent_buffers_set"] = ["b", []]
    assert len(state_of(root, "x")) == 20 * 61 - 1
    monkeypatch.setattr(torch_file, "_MODULES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 parameters"):
        state_of(root, "x")
    with pytest.raises(CheckpointError, match="nested without end"):
        state_of(Record(kind, (), {"_modules": {"x" * 5000: root}}), "x")
