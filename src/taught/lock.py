"""One command at a time writes to a run folder."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taught.errors import UserError


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the lock file. The lock belongs to the process, so kill -9 releases it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(handle):
            holder = os.read(handle, 200).decode(errors="replace").strip()
            raise UserError(
                "another command is writing to this run folder",
                value=f"{path.parent}: {holder or 'unknown process'}",
                rule="one command at a time writes to a run folder",
                fix="wait until it ends, or choose another --run folder",
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
