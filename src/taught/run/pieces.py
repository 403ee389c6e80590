"""Finished pieces of an unfinished stage, so that a killed run continues where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from taught.run.files import tensors_bytes, tensors_from_bytes, write_bytes, write_error

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class PartialFolder:
    """Pieces under one fingerprint; another fingerprint is another folder and is never read.

    Parameters
    ----------
    path : ``RUN/partial/<stage>-<fingerprint>``; created with the first piece
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store one piece, whole or not at all.

        Raises
        ------
        UserError
            No space left, or the folder cannot be made or written to.
        """
        file, content = self._file(key), tensors_bytes(arrays)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error, needed=len(content)) from error
        write_bytes(file, content)

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the piece, or None when it is missing or damaged: then it is computed again."""
        from safetensors import SafetensorError

        try:
            return tensors_from_bytes(self._file(key).read_bytes())
        except (OSError, ValueError, LookupError, SafetensorError):
            return None

    def _file(self, key: str) -> Path:
        if not key or not key.replace("-", "").replace("_", "").isalnum() or not key.isascii():
            raise ValueError(f"a piece's key is made of letters, digits, - and _: {key!r}")
        return self.path / f"{key}.safetensors"


class Pieces(Protocol):
    """Where pieces are kept: a :class:`PartialFolder`, or anything like it."""

    def load(self, key: str) -> Any:
        """Arrays of a piece, or None."""

    def save(self, key: str, arrays: Any) -> None:
        """Keep a piece."""


def piece_key(*parts: str) -> str:
    """A key for a piece of which only the description is known, such as an example's id."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


def kept(pieces: Pieces | None, key: str, compute: Callable[[], Tensor]) -> Tensor:
    """A piece from an earlier attempt, or computed and kept."""
    import torch

    name = piece_key(key)
    found = pieces.load(name) if pieces is not None else None
    if found is not None and "effects" in found:
        return torch.from_numpy(found["effects"])
    effects = compute()
    if pieces is not None:
        pieces.save(name, {"effects": effects.numpy()})
    return effects


class Prefixed:
    """Pieces of one part of a computation, apart from those of the others."""

    def __init__(self, pieces: Pieces, prefix: str) -> None:
        self._pieces, self._prefix = pieces, f"{prefix}-" if prefix else ""

    def load(self, key: str) -> Any:
        """Arrays of a piece, or None."""
        return self._pieces.load(self._prefix + key)

    def save(self, key: str, arrays: Any) -> None:
        """Keep a piece."""
        self._pieces.save(self._prefix + key, arrays)
