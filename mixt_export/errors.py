"""Errors a user can act on, each with the exit code the command line promises.

An error's text is one sentence: what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class MixtError(Exception):
    """Base of every error that is reported without a traceback. Exit code 1."""

    exit_code = 1


class UsageError(MixtError):
    """The command line or an input file is wrong: bad option, corrupt checkpoint, full output folder. Exit code 2."""

    exit_code = 2


class CheckpointError(UsageError):
    """A model folder cannot be read as what it claims to be (missing, truncated, inconsistent, non-finite)."""


class NetworkError(UsageError):
    """A factorised linear is inconsistent: a core of the wrong rank, a label of two sizes, a misfitting shape."""


class ParityError(MixtError):
    """The exported model does not compute what the reference computes. Exit code 3."""

    exit_code = 3


class UnsupportedError(MixtError):
    """The input is valid but this version cannot handle it: unknown model type, method, variant. Exit code 4."""

    exit_code = 4


class ResourceError(MixtError):
    """It will not fit: memory or disk. Exit code 5."""

    exit_code = 5


class MissingDependencyError(MixtError):
    """An optional package is needed and absent. Exit code 6."""

    exit_code = 6
