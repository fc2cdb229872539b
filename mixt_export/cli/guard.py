"""Turn exceptions into one sentence and the documented exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from mixt_export.errors import MixtError

_INTERRUPTED = 130
_INTERRUPTED_TEXT = "interrupted; nothing was left half-written."
_WILL_NOT_FIT = 5


def guarded(command: Any, name: str) -> int:
    """Run a click ``command`` as program ``name`` and return its exit code; users see no traceback."""
    try:
        result = command.main(prog_name=name, standalone_mode=False)
    except MixtError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED_TEXT, _INTERRUPTED)
    except MemoryError:
        return _fail("out of memory; close other programs or use a machine with more memory.", _WILL_NOT_FIT)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"the disk is full while writing {error.filename or 'the output'}.", _WILL_NOT_FIT)
        if error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if os.environ.get("MIXT_DEBUG"):
            raise
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot read or write{where}: {error.strerror or error}.", 2)
    except Exception as error:  # the last resort of a command line
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own usage errors
            show = getattr(error, "show", None)
            if show is not None:
                show()
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _fail(_INTERRUPTED_TEXT, _INTERRUPTED)
        if os.environ.get("MIXT_DEBUG"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}. Run again with MIXT_DEBUG=1 for the traceback and "
            "please report it.",
            1,
        )
    if result == _INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
        return _fail(_INTERRUPTED_TEXT, _INTERRUPTED)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code
