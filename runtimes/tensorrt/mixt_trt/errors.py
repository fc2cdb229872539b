"""Errors a user can act on, each one sentence and with the exit code that the scripts return."""

from __future__ import annotations


class TrtError(Exception):
    """Base, and what is wrong with the request or the folder. Exit code 2."""

    exit_code = 2


class NotSupportedError(TrtError):
    """TensorRT cannot take this graph, or cannot build for this device here. Exit code 4."""

    exit_code = 4


class OutOfMemoryError(TrtError):
    """The build or the run needs more memory, workspace or disk than there is. Exit code 5."""

    exit_code = 5


class MissingLibraryError(TrtError):
    """TensorRT or the CUDA runtime is not installed or does not load. Exit code 6."""

    exit_code = 6
