"""Faults of the folder around an intact graph: stale, missing or cut files, a manifest that is not true."""

from __future__ import annotations

from tests.verification.faults.exported import DATA, GRAPH, Exported, NotApplicable


def stale_tokenizer(x: Exported, _layer: int) -> None:
    with x.edit_json("tokenizer.json") as data:
        vocabulary = data["model"]["vocab"]
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def stale_tokenizer_settings(x: Exported, _layer: int) -> None:
    with x.edit_json("tokenizer_config.json") as data:
        data["chat_template"] = "{{ messages[0]['content'] }}"


def missing_tokenizer(x: Exported, _layer: int) -> None:
    if not (x.folder / "tokenizer.json").is_file():
        raise NotApplicable("no tokenizer")
    (x.folder / "tokenizer.json").unlink()


def stale_config(x: Exported, _layer: int) -> None:
    with x.edit_json("config.json") as data:
        data["hidden_act"] = "relu"


def wrong_end_token(x: Exported, _layer: int) -> None:
    with x.edit_json("generation_config.json") as data:
        data["eos_token_id"] = 0


def wrong_end_token_in_manifest(x: Exported, _layer: int) -> None:
    x.manifest["eos_token_ids"] = [0]


def wrong_end_token_for_genai(x: Exported, _layer: int) -> None:
    with x.edit_json("genai_config.json") as data:
        data["model"]["eos_token_id"] = [0]


def too_many_positions_promised(x: Exported, _layer: int) -> None:
    """The rotary tables are shorter than the manifest says."""
    rows = [tensor for tensor in x.graph.initializer if tensor.name in ("/rotary/cos", "/rotary/sin")]
    if not rows:
        raise NotApplicable("no rotary tables")
    for tensor in rows:
        half = x.value(tensor.name)[: tensor.dims[0] // 2]
        tensor.dims[0] = len(half)
        x._append(tensor, half)


def wrong_dtype_in_manifest(x: Exported, _layer: int) -> None:
    x.manifest["dtype"] = "float16" if x.manifest["dtype"] == "float32" else "float32"


def wrong_cache_heads_in_manifest(x: Exported, _layer: int) -> None:
    x.manifest["kv"]["heads"] += 1


def wrong_padding_in_manifest(x: Exported, _layer: int) -> None:
    x.manifest["padding"] = {"left": "right", "right": "left"}[x.manifest["padding"]]


def profile_too_short(x: Exported, _layer: int) -> None:
    """The engine's decode profile ends one position early."""
    if "trt" not in x.manifest:
        raise NotApplicable("no profiles")
    bounds = x.manifest["trt"]["profiles"][1]["inputs"]
    for name, shapes in bounds.items():
        if name.startswith("past_key_values."):
            shapes["max"][2] -= 1


def flipped_bit(x: Exported, _layer: int) -> None:
    """One mantissa bit of one weight, behind the digest's back."""
    x.stale = True
    if not (x.folder / DATA).is_file():
        raise NotApplicable("no weights of its own")
    path = x.own(DATA)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 // 4 * 4] ^= 1
    path.write_bytes(bytes(content))


def changed_graph(x: Exported, _layer: int) -> None:
    x.stale = True
    x.graph.doc_string = "changed"


def changed_source_weights(x: Exported, _layer: int) -> None:
    """One bit of the weight file that comes from the model folder; the digest follows."""
    name = next((name for name in x.manifest["files"] if name.endswith(".safetensors")), None)
    if name is None:
        raise NotApplicable("no linked weights")
    path = x.own(name)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(bytes(content))


def cut_weights(x: Exported, _layer: int) -> None:
    if not (x.folder / DATA).is_file():
        raise NotApplicable("no weights of its own")
    path = x.own(DATA)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_graph(x: Exported, _layer: int) -> None:
    x.afterwards.append(lambda folder: (folder / GRAPH).write_bytes((folder / GRAPH).read_bytes()[:-2000]))


def missing_weights(x: Exported, _layer: int) -> None:
    if not (x.folder / DATA).is_file():
        raise NotApplicable("no weights of its own")
    x.afterwards.append(lambda folder: (folder / DATA).unlink())
