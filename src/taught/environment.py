"""What a result was computed with: package versions, products, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import taught

_VERSIONS_OF = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")
_EXTRAS = ("bitsandbytes", "peft")  # said where they are installed


@cache  # a process keeps the packages that it began with
def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "taught": taught.__version__}
    found |= dict.fromkeys(_VERSIONS_OF, "not installed")
    for name in (*_VERSIONS_OF, *_EXTRAS):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def products_by() -> str | None:
    """Return what computes float32 products on the CPU; None before a model was asked for."""
    kernels = sys.modules.get("taught.model.kernels")
    return kernels.products_by() if kernels else None


def process_share() -> tuple[int, int]:
    """Return (r, n): this is process r of n, as torchrun and ``accelerate launch`` say."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def peak_memory_gb(*, recent: bool = False) -> float | None:
    """Return the largest resident memory of this process so far, in 10^9 bytes.

    Parameters
    ----------
    recent
        Only since :func:`mark_memory` was called.
    """
    own = _peak_in_proc()
    if own is not None:
        return round((own if recent else max(own, *_earlier)) / 1e9, 3)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


_earlier = [0]  # the peaks before each mark


def mark_memory() -> None:
    """Let ``peak_memory_gb(recent=True)`` begin here, where the system can (Linux)."""
    _earlier.append(_peak_in_proc() or 0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_in_proc() -> int | None:
    """Bytes, on Linux. There, what ``resource`` says includes the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def return_freed_memory() -> None:
    """Give freed memory back to the kernel now (on glibc): before work that needs it in pieces of other sizes."""
    import ctypes

    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the kernel, and take large pages.

    Activations come and go thousands of times in a run; mapping their pages anew each time took a third of the
    processor time on the CPU. What is larger than 32 MB (gradients, queries) is still given back at once; glibc takes
    no higher threshold. For these torch asks Linux for pages of 2 MB, which are mapped several times as fast; it reads
    the setting when it first takes memory. Elsewhere than on Linux and glibc nothing happens.
    """
    import ctypes

    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 25)
        mallopt(trim_threshold, (1 << 31) - 1)
