"""The shipped texts: pinned bytes, disjointness, cleanliness; and the rules that select them."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest

from mixt_export.sample.texts import CALIBRATION, EVALUATION, IN_DOMAIN, OUT_OF_DOMAIN

ROOT = Path(__file__).parents[2]
DIGESTS = {
    "calib_addresses.txt": "1f6a7f48abf351272f845edf465b694c260f1f7d2d58b5de1fc762cd67a75a54",
    "calib_jargon.txt": "9ebd87dbfadc35d08cae728c9f1f22598bc37f68307323cae12387282d6a9b07",
    "eval_addresses.txt": "dc85b0dfad0019b368f990a525c1562eddd38642ac698e9aef39421e8f0f6b94",
    "eval_jargon.txt": "78e35628f2595f25058941f4652a5503a35d2b13f6df1a62b6f0843b79c0ffb6",
    "eval_novel.txt": "e820828de38b7fc942e8d6f075000046876b0027d3716bac38991a0ce43fa72b",
}
FILES = [*CALIBRATION.values(), *EVALUATION.values()]


def test_the_domains() -> None:
    assert IN_DOMAIN == ("addresses", "jargon")
    assert OUT_OF_DOMAIN == ("novel",)
    assert {path.name for path in FILES} == DIGESTS.keys()
    assert {path.name for path in FILES[0].parent.glob("*.txt")} == DIGESTS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bytes_are_as_pinned_and_as_documented(path: Path) -> None:
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == DIGESTS[path.name]
    row = next(
        line for line in (ROOT / "docs/texts.md").read_text().splitlines() if line.startswith(f"| `{path.name}`")
    )
    assert DIGESTS[path.name] in row
    assert f"| {len(data):,} |" in row
    assert 200_000 < len(data) <= 300_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_text_is_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == text.strip() + "\n"
    assert not re.search(r"[^\S\n ]|\r|\ufffd|\n{3,}| \n|[\u2500-\u257f]", text)
    assert not re.search(r"applause\)|\[laughter|Project Gutenberg|https?://\S*gutenberg", text, re.IGNORECASE)
    paragraphs = text.strip().split("\n\n")
    assert not any("\n" in paragraph for paragraph in paragraphs)


def passages(path: Path) -> set[str]:
    """Every run of 12 words, lower case, without punctuation."""
    words = re.findall(r"[a-z0-9]+", path.read_text(encoding="utf-8").lower())
    return {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}


def test_evaluation_shares_no_passage_with_calibration() -> None:
    seen = {domain: passages(path) for domain, path in CALIBRATION.items()}
    assert min(map(len, seen.values())) > 30_000
    for path in EVALUATION.values():
        here = passages(path)
        for domain, there in seen.items():
            assert not here & there, (path.name, domain, sorted(here & there)[:3])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_texts", ROOT / "benchmarks" / "make_texts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_excerpts_are_whole_sentences_of_equal_share(script) -> None:
    speech = " ".join(f"{'Sentence' if i % 2 else 'Phrase'} number {i} is here. [Laughter]" for i in range(20_000))
    text = script.address_excerpts(
        {"1950_a.txt": speech, "1951_b.txt": speech, "2001_c.txt": "Not me."}, range(1950, 1960)
    )
    first, second = text.strip().split("\n\n")
    assert first == second
    assert re.match(r"(Sentence|Phrase) number 5\d\d\d is here\. ", first)
    assert first.endswith(" is here.")
    assert "aughter" not in first
    assert 144_000 < len(first) < 145_000


def test_entries_are_plain_prose(script) -> None:
    prose = "   A {foo} is described in as many words as it takes to be an entry that\n   stays. " + "More words. " * 60
    prose += "See also {bar}, {baz}."
    lexicon = (
        f"Glossary\n\n   A\n\n   foo\n\n   :foo: n.\n\n{prose}\n\n   B\n\n   :bar: n.\n\n{prose}\n\n  x  y\n  1  2\n\n"
        f"   :again: n.\n\n{prose}\n\n   :short: n.\n\n   See {{foo}}.\n\n"
        f"Appendix\xa0A.\xa0Folklore\n\n   :late: n.\n\n{prose}\n"
    )
    (entry,) = script.jargon_entries(lexicon)
    head, body = entry.split("\n\n")
    assert head == "foo: n."
    assert body.startswith("A foo is described in as many words as it takes to be an entry that stays. More words.")
    assert body.endswith("More words.")


def test_nth_parts_are_disjoint_and_fit(script) -> None:
    parts = [f"{i:05d}" + "x" * 995 for i in range(1000)]
    one, two = (script.every_nth(parts, start) for start in (0, 1))
    assert {len(one.encode()), len(two.encode())} <= set(range(200_000, 290_001))
    assert not set(one.split("\n\n")) & set(two.split("\n\n"))
