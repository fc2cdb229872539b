"""Writing model folders: what comes back is what went in, in the promised order, with bounded memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixt_export.checkpoints import NewTensor, check_finite, open_checkpoint, write_checkpoint
from mixt_export.errors import CheckpointError, NetworkError, ResourceError
from mixt_export.network import FactorizedLinear, build, densify
from tests.checkpoints.raw import parse
from tests.checkpoints.resident import growth_kb
from tests.tiny import DTYPES, tiny_tensors, write_tiny, write_tiny_low_rank

LAYER = "model.layers.1."
UP = LAYER + "mlp.up_proj"  # (104, 48)


def structures(dtype: str) -> dict[str, dict[str, FactorizedLinear]]:
    """Each known structure for one or more linears of the tiny model (hidden 48, 4 heads of 16, inner 104)."""
    query, output = LAYER + "self_attn.q_proj", LAYER + "self_attn.o_proj"
    single = {
        "low_rank": build.low_rank(UP, 48, 104, 7, dtype=dtype),
        "tucker2": build.tucker2(UP, 48, 104, 5, 3, dtype=dtype),
        "dense": build.dense(UP, 48, 104, dtype=dtype),
        "sparse": build.with_sparse(build.low_rank(UP, 48, 104, 2, dtype=dtype), 11, dtype=dtype, index_dtype="int32"),
        "bias": build.low_rank(UP, 48, 104, 3, dtype=dtype, bias=True),
        "kronecker": build.kronecker(UP, (6, 8), (8, 13), 3, dtype=dtype),
        "tensor_train": build.tensor_train(UP, (3, 4, 4), (2, 4, 13), (5, 3), dtype=dtype),
        "tensor_ring": build.tensor_ring(UP, (3, 4, 4), (2, 4, 13), (2, 5, 3), dtype=dtype),
        "monarch": build.monarch(UP, (6, 8), (13, 8), dtype=dtype),
        "block_tensor_train": build.block_tensor_train(UP, (3, 4, 4), (2, 4, 13), 2, dtype=dtype),
        "blast": build.blast(UP, 48, 104, 5, (2, 3), dtype=dtype),
        "mixt": build.mixt(UP, 48, 104, 3, dtype=dtype),
        "mixt padded": build.mixt(UP, 48, 104, 3, paper_padding=True, dtype=dtype),
    }
    shared = LAYER + "self_attn.shared"
    tucker = {
        name: build.tucker_heads(name, side, 48, 4, 16, (6, 5, 2), shared=shared, dtype=dtype)
        for side, name in (("q", query), ("o", output))
    }
    return {**{kind: {linear.name: linear} for kind, linear in single.items()}, "tucker_heads": tucker}


def random_tensors(factors: dict[str, FactorizedLinear], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    refs = {ref.name: ref for linear in factors.values() for ref in linear.tensors()}
    values = {}
    for name, ref in refs.items():
        if ref.dtype == "int32":
            values[name] = rng.integers(0, 48, ref.shape).astype(np.int32)
        else:
            values[name] = rng.standard_normal(ref.shape).astype(DTYPES[ref.dtype])
    return values


def new_tensors(values: dict[str, np.ndarray]) -> list[NewTensor]:
    return [NewTensor(name, value.dtype.name, value.shape, lambda value=value: value) for name, value in values.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", structures("float32"))
def test_round_trip_of_every_structure(tmp_path: Path, dtype: str, kind: str) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense", "qwen2", dtype=dtype, shards=2, num_hidden_layers=2))
    factors = structures(dtype)[kind]
    values = random_tensors(factors, 5)
    (tmp_path / "out").mkdir()
    info = {"method": kind, "keep": 0.5, "text": "gemäß"}
    write_checkpoint(tmp_path / "out", base, new_tensors(values), factors, info)

    written = open_checkpoint(tmp_path / "out")
    assert written.format == "mixt"
    assert dict(written.factors) == factors
    assert written.info == info
    expected = tiny_tensors(base.config, dtype) | values
    for name in factors:
        expected.pop(f"{name}.weight")
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    assert set(on_disk) == set(expected) == set(written.store)
    for name, value in expected.items():
        assert on_disk[name].tobytes() == value.tobytes()
        assert (on_disk[name].dtype, on_disk[name].shape) == (value.dtype, value.shape)
        assert written.store.read(name).tobytes() == value.tobytes()
    for name, linear in factors.items():
        before = densify(linear, lambda tensor: values[tensor])
        assert np.array_equal(densify(written.factors[name], written.store.read), before)
    for companion in (base.path / "config.json", *base.companions()):
        assert (tmp_path / "out" / companion.name).read_bytes() == companion.read_bytes()


def test_order_alignment_and_metadata(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "dense", "qwen2", tied=False, num_hidden_layers=11, hidden_size=24)
    folder = write_tiny_low_rank(tmp_path / "mixt", base, {"q_proj": 3, "k_proj": 2, "gate_proj": 5, "up_proj": 4})
    content = (folder / "model.safetensors").read_bytes()
    header, _ = parse(content)
    assert header.pop("__metadata__") == {"format": "mixt-factors"}
    assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
    names = list(header)
    assert [field["data_offsets"][0] for field in header.values()] == sorted(
        field["data_offsets"][0] for field in header.values()
    )
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    third = [name.removeprefix("model.layers.3.") for name in names if name.startswith("model.layers.3.")]
    assert third == [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.q_proj.{part}" for part in ("bias", "core0", "core1")),
        *(f"self_attn.k_proj.{part}" for part in ("bias", "core0", "core1")),
        "self_attn.v_proj.bias",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        *(f"mlp.gate_proj.{part}" for part in ("core0", "core1")),
        *(f"mlp.up_proj.{part}" for part in ("core0", "core1")),
        "mlp.down_proj.weight",
    ]


def test_shards(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", base, [], {}, {}, max_shard_size=30_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == base.store.nbytes
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 30_000
    copy = open_checkpoint(tmp_path / "out")
    assert copy.format == "huggingface"
    for name in base.store:
        assert np.array_equal(copy.store.read(name), base.store.read(name))


def test_factorising_a_factorised_folder(tmp_path: Path) -> None:
    """Other linears stay as they were; the cores that were replaced are gone."""
    folder = write_tiny_low_rank(tmp_path / "one", write_tiny(tmp_path / "dense"), {"up_proj": 4, "q_proj": 3})
    first = open_checkpoint(folder)
    redone = build.tensor_train(UP, (6, 8), (8, 13), (3,), names=[f"{UP}.tt0", f"{UP}.tt1"])
    values = random_tensors({UP: redone}, 1)
    (tmp_path / "two").mkdir()
    write_checkpoint(tmp_path / "two", first, new_tensors(values), {**first.factors, UP: redone}, {})
    second = open_checkpoint(tmp_path / "two")
    assert second.factors[UP] == redone
    assert set(first.store) - set(second.store) == {f"{UP}.core0", f"{UP}.core1"}
    assert set(second.store) - set(first.store) == set(values)


def test_a_dense_tensor_can_be_replaced(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    norm = np.arange(48, dtype=np.float16)
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", base, new_tensors({"model.norm.weight": norm}), {}, {})
    assert np.array_equal(open_checkpoint(tmp_path / "out").store.read("model.norm.weight"), norm)


def _low_rank() -> tuple[dict[str, FactorizedLinear], dict[str, np.ndarray]]:
    factors = {UP: build.low_rank(UP, 48, 104, 7)}
    return factors, random_tensors(factors, 2)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_non_finite_factors_are_refused(tmp_path: Path, value: float) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    factors, values = _low_rank()
    values[f"{UP}.core1"][6, 103] = value
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "out", base, new_tensors(values), factors, {})
    message = str(caught.value)
    assert f"tensor '{UP}.core1' of layer 1 holds {value} at element (6, 103)" in message
    assert "other calibration texts" in message


def test_non_finite_source_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "dense", dtype="bfloat16")
    stored = open_checkpoint(folder).store["model.layers.2.self_attn.v_proj.weight"]
    with stored.path.open("r+b") as file:
        file.seek(stored.offset + 2 * 49)
        file.write(b"\x80\x7f")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"tensor .*v_proj.weight' of layer 2 holds inf .*\(1, 1\)"):
        write_checkpoint(tmp_path / "out", open_checkpoint(folder), [], {}, {})


def test_non_finite_element_far_into_a_tensor(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    large = np.zeros((700, 1001), np.float32)
    large[555, 77] = np.nan
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"tensor 'large' holds nan at element \(555, 77\)"):
        write_checkpoint(tmp_path / "out", base, new_tensors({"large": large}), {}, {})


def test_many_cores_lie_in_their_order(tmp_path: Path) -> None:
    """core10 follows core9, not core1."""
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    chain = build.tensor_train(UP, (2, 2, 2, 2, 3, *[1] * 7), (2, 2, 2, 13, *[1] * 8), (2,) * 11)
    values = random_tensors({UP: chain}, 0)
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", base, new_tensors(values), {UP: chain}, {})
    names = [name for name in open_checkpoint(tmp_path / "out").store if name.startswith(f"{UP}.core")]
    assert names == [f"{UP}.core{number}" for number in range(12)]


def test_tensors_that_do_not_fit_their_description(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    factors, values = _low_rank()
    out = tmp_path / "out"
    out.mkdir()
    core = f"{UP}.core0"
    with pytest.raises(NetworkError, match=rf"expects the tensor '{core}' as float32 \(48, 7\), but .* \(48, 6\)"):
        write_checkpoint(out, base, new_tensors({**values, core: values[core][:, :6]}), factors, {})
    with pytest.raises(NetworkError, match="float16"):
        write_checkpoint(out, base, new_tensors({**values, core: values[core].astype(np.float16)}), factors, {})
    with pytest.raises(CheckpointError, match=rf"needs the tensor '{core}', which is in no weight file"):
        write_checkpoint(out, base, new_tensors({f"{UP}.core1": values[f"{UP}.core1"]}), factors, {})
    wide = build.low_rank(UP, 48, 103, 7)
    with pytest.raises(NetworkError, match=rf"'{UP}' is 48 → 103, but the dense weight it replaces is 48 → 104"):
        write_checkpoint(out, base, new_tensors(random_tensors({UP: wide}, 1)), {UP: wide}, {})
    weight = {f"{UP}.weight": np.zeros((104, 48), np.float32)}
    with pytest.raises(CheckpointError, match=r"its dense weight .*up_proj.weight is also"):
        write_checkpoint(out, base, new_tensors({**values, **weight}), factors, {})
    with pytest.raises(ValueError, match=f"given more than once: {core}"):
        write_checkpoint(out, base, [*new_tensors(values), *new_tensors(values)][:3], factors, {})
    assert list(out.iterdir()) == []
    wrong = [replace(tensor, produce=lambda: np.zeros(3, np.float32)) for tensor in new_tensors(values)]
    with pytest.raises(ValueError, match="was announced as float32"):
        write_checkpoint(out, base, wrong, factors, {})


def test_non_contiguous_arrays_are_written_row_major(tmp_path: Path) -> None:
    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    factors, values = _low_rank()
    transposed = {name: np.asfortranarray(value) for name, value in values.items()}
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", base, new_tensors(transposed), factors, {})
    written = open_checkpoint(tmp_path / "out").store
    assert all(np.array_equal(written.read(name), value) for name, value in values.items())


def test_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    base = open_checkpoint(write_tiny(tmp_path / "dense"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 1000, 1000))
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match="writing the model folder needs"):
        write_checkpoint(tmp_path / "out", base, [], {}, {})
    assert list((tmp_path / "out").iterdir()) == []


SETUP = """
import numpy as np
from mixt_export.checkpoints import NewTensor, open_checkpoint, write_checkpoint
source = open_checkpoint(sys.argv[1])
shape = (6_000, 1_000)
new = [NewTensor(f"model.layers.{i}.x", "float32", shape, lambda: np.ones(shape, np.float32)) for i in range(6)]
"""
WRITE = "write_checkpoint(Path(sys.argv[2]), source, new, {}, {})"


def test_peak_memory_is_the_largest_new_tensor(tmp_path: Path) -> None:
    """Six tensors of 24 MB are produced and a source of 72 MB is copied: the peak is one of the six, not the sum."""
    base = write_tiny(tmp_path / "dense", vocab_size=375_000, num_hidden_layers=1)
    (tmp_path / "out").mkdir()
    assert growth_kb(SETUP, WRITE, str(base), str(tmp_path / "out")) < 24_000 + 12_000
    assert open_checkpoint(tmp_path / "out").store.nbytes > 200_000_000


def test_written_weights_pass_the_check(tmp_path: Path) -> None:
    folder = write_tiny_low_rank(tmp_path / "mixt", write_tiny(tmp_path / "dense", dtype="float16"), 5)
    assert check_finite(open_checkpoint(folder).store) == {}
