"""One command at a time writes to a run folder."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taught.errors import UserError
from taught.run.files import write_error


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the lock file. The lock belongs to the process, so kill -9 releases it.

    Raises
    ------
    UserError
        Another command holds it; no space left, or the folder cannot be written to.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        _claim(handle, path)
        yield
    finally:
        os.close(handle)


def _claim(handle: int, path: Path) -> None:
    """Take the lock and write into the file who holds it."""
    holder = f"process {os.getpid()} on {platform.node()}\n".encode()
    try:
        if not _try_lock(handle):
            raise _held(path, os.read(handle, 200).decode(errors="replace").strip())
        os.ftruncate(handle, 0)
        os.pwrite(handle, holder, 0)
    except OSError as error:
        raise write_error(path, error, needed=len(holder)) from error


def _held(path: Path, holder: str) -> UserError:
    return UserError(
        "another command is writing to this run folder",
        value=f"{path.parent}: {holder or 'unknown process'}",
        rule="one command at a time writes to a run folder",
        fix="wait until it ends, or choose another --run folder",
    )


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
