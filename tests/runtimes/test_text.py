"""Tokenizer, chat template and streaming: text never holds half a character."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from mixt_export.runtime import load_runtime
from tests.runtimes.build_tiny import byte_tokenizer
from tests.runtimes.conftest import Tiny

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)


def pieces(stream: Any, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_stream_of_bytes_is_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    parts = pieces(load_runtime("ort").TextStream(tokenizer.decode), ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_characters_come_whole_and_at_once(rt: ModuleType, tiny: Tiny) -> None:
    tokenizer = rt.Tokenizer(tiny.folder)
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("é😀a")] == ["", "é", "", "", "", "😀", "a"]
    assert stream.finish() == ""


def test_an_incomplete_character_is_dropped_at_the_end(rt: ModuleType, tiny: Tiny) -> None:
    tokenizer = rt.Tokenizer(tiny.folder)
    parts = pieces(tokenizer.stream(), tokenizer.encode("ab😀")[:-1])
    assert parts == ["a", "b", "", "", "", ""]


def test_specials_are_not_text(rt: ModuleType, tiny: Tiny) -> None:
    tokenizer = rt.Tokenizer(tiny.folder)
    ids = [256, *tokenizer.encode("hi"), 257, *tokenizer.encode(" é"), 260]
    assert "".join(pieces(tokenizer.stream(), ids)) == "hi é"


def test_leading_space_of_sentencepiece_like_decoders(rt: ModuleType) -> None:
    """Metaspace drops the space of a text's first token only; streaming must agree with decoding at once."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    ids = [0, 1, 2, 1, 0, 0, 2]
    assert "".join(pieces(rt.TextStream(tokenizer.decode), ids)) == tokenizer.decode(ids) == "a bc b a ac"


def test_random_bytes_equal_decoding_at_once(rt: ModuleType) -> None:
    tokenizer = byte_tokenizer()
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, 256, 30).tolist()
        streamed = "".join(pieces(rt.TextStream(tokenizer.decode), ids))
        assert streamed.rstrip("\ufffd") == tokenizer.decode(ids).rstrip("\ufffd")


def test_chat_template_from_tokenizer_config(rt: ModuleType, tiny: Tiny) -> None:
    tokenizer = rt.Tokenizer(tiny.folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(messages, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer.encode_chat(messages)
    assert ids[0] == 256
    assert ids.count(257) == 1


def test_chat_template_file_wins_and_sees_special_tokens(rt: ModuleType, tmp_path: Path) -> None:
    folder = text_folder(tmp_path, {"chat_template": "old", "eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "    {% if true %}\n{{ m.content | tojson }}{{ eos_token }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "é"}]
    assert rt.Tokenizer(folder).render(messages) == '<s>"é"</s>'


def test_named_chat_templates(rt: ModuleType, tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert rt.Tokenizer(text_folder(tmp_path, {"chat_template": templates})).render([]) == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_bad_chat_templates(rt: ModuleType, tmp_path: Path, template: str) -> None:
    with pytest.raises(rt.TemplateError, match="chat template failed"):
        rt.Tokenizer(text_folder(tmp_path, {"chat_template": template})).render([{"role": "user", "content": "x"}])


def test_no_chat_template(rt: ModuleType, tmp_path: Path) -> None:
    tokenizer = rt.Tokenizer(text_folder(tmp_path, {}))
    assert tokenizer.chat_template is None
    with pytest.raises(rt.TemplateError, match=r"has no chat template.*--raw"):
        tokenizer.render([])


def test_bad_tokenizers(rt: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(rt.FolderError, match=r"tokenizer\.json: no such file"):
        rt.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(rt.FolderError, match="is not a tokenizer"):
        rt.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(rt.FolderError, match="not UTF-8"):
        rt.Tokenizer(tmp_path)
    folder = text_folder(tmp_path, {})
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(rt.FolderError, match="holds list"):
        rt.Tokenizer(folder)


def text_folder(folder: Path, config: dict[str, Any]) -> Path:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
