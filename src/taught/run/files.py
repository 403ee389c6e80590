"""Whole files or none: every write goes to a temporary file beside the target, then replaces it.

Contents are built in memory first, so that their size and checksum are known before anything
touches the disk. Only the largest tables are written in parts (``row_groups``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from taught.core import rules
from taught.errors import UserError, out_of_memory

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import Tensor

_TEMPORARY = ".tmp"
_JSON_BYTES = 2**24


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, never a part.

    Raises
    ------
    UserError
        No space left, or the folder cannot be written to.
    """
    with replacing(path, needed=len(content)) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, needed: int | None = None) -> Iterator[IO[bytes]]:
    """A file beside ``path`` that takes its place when the body ends without an exception.

    The body does nothing but write: what it cannot write is the user's to be told.

    Parameters
    ----------
    needed : bytes that will be written, where that is known

    Raises
    ------
    UserError
        No space left, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the new name itself must survive a power cut
        finally:
            os.close(handle)
    except OSError as error:
        raise write_error(path, error, needed=needed) from error
    finally:
        with suppress(OSError):  # what went wrong is said above; a read-only disk refuses this too
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed write left behind. Only for the holder of the folder's lock."""
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        with suppress(OSError):  # nothing reads it; the next write says why it cannot be done
            leftover.unlink()


def sha256_bytes(content: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Files of a model, adapter or SAE folder that define it (a README does not).
_TEMPLATES = "additional_chat_templates/*.jinja"
_DEFINING = ("*.safetensors", "*.json", "*.jinja", _TEMPLATES, "*.model", "*.gguf", "*.txt", "*.tiktoken")


def sha256_folder(folder: Path) -> str:
    """Digest of what defines a model, an adapter, an SAE or a concept: weights, configuration, tokenizer, template."""
    lines, folder = [], folder.resolve()
    for file in sorted({file for pattern in _DEFINING for file in folder.glob(pattern)}):
        about = file.stat()
        changed = about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino
        lines.append(f"{_sha256_unchanged(file, changed)}  {file.relative_to(folder).as_posix()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def _sha256_unchanged(file: Path, changed: tuple[int, ...]) -> str:
    """Of a file that has not changed meanwhile: several stages of one command ask for the same weights."""
    return sha256_file(file)


def json_bytes(record: object) -> bytes:
    """UTF-8 JSON, indented; NaN and infinity are refused because JSON has neither."""
    return (json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def json_line(record: object) -> str:
    """One line of a JSONL file; NaN and infinity are refused."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(content: bytes | str) -> Any:
    """What JSON says; ValueError where it is damaged, nested too deeply, or says one key twice."""
    try:
        return json.loads(content, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice: {next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)}")
    return found


def read_json_mapping(path: Path) -> dict[str, Any]:
    """A JSON object of a file; ValueError where it is none, or larger than 16 MB."""
    if not path.is_file():  # a pipe would wait, a device would not end
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"larger than {_JSON_BYTES:,} bytes")
    found = parse_json(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def table_bytes(table: pa.Table) -> bytes:
    """Return an Arrow table as Parquet; equal tables give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


@contextmanager
def row_groups(
    file: IO[bytes], schema: pa.Schema, unique: Collection[str] = ()
) -> Iterator[Callable[[pa.Table], None]]:
    """Write Parquet in parts, each a row group of its own: only one part is in memory.

    Readers skip row groups by their statistics, so a part should hold one value of each column that
    queries select by. Equal parts give equal bytes.

    Parameters
    ----------
    unique : text columns of which no value stands twice in a part: a dictionary would only add to them
    """
    import pyarrow.parquet as pq

    with pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_dictionary=[name for name in schema.names if name not in unique],
        column_encoding=dict.fromkeys(unique, "DELTA_BYTE_ARRAY"),
    ) as writer:
        yield lambda part: writer.write_table(part, row_group_size=max(part.num_rows, 1))


def schema(columns: str) -> pa.Schema:
    """A table's columns, as ``name:kind`` with spaces between; kinds are str, int, float, bool, [str] and [float]."""
    import pyarrow as pa

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    kinds |= {f"[{name}]": pa.list_(kind) for name, kind in kinds.items()}
    return pa.schema([(name, kinds[kind]) for name, kind in (column.split(":") for column in columns.split())])


def tensors_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return named arrays as safetensors."""
    import numpy as np
    from safetensors.numpy import save

    # safetensors writes the memory as it lies: a transposed view would be stored scrambled.
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def tensors_from_bytes(content: bytes) -> dict[str, np.ndarray]:
    """Return the named arrays of a safetensors file."""
    from safetensors.numpy import load

    return load(content)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file; ValueError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        return load_file(path)
    # Of a number type that torch does not have, it raises what torch does.
    except (SafetensorError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise ValueError(str(error)) from error


def place(path: str | Path) -> Path:
    """A path from the command line; UserError where no file can have this name."""
    try:
        rules.path().parse(str(path))
    except ValueError:
        rule = "no control characters, at most 2,048 bytes, 255 between two slashes"
        raise UserError("no file or folder can have this name", value=str(path), rule=rule) from None
    return Path(os.path.expanduser(path))


def free_bytes(folder: Path) -> int:
    """Space left for the user on the disk of ``folder``, which need not exist yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


def write_error(path: Path, error: OSError, *, needed: int | None = None) -> UserError:
    """What to tell the user when ``path`` cannot be made or written.

    Parameters
    ----------
    needed : bytes that were to be written, where that is known
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        wanted = "" if needed is None else f"{needed:,} bytes needed, "
        return UserError(
            f"no space left to write {path}",
            value=f"{wanted}{free_bytes(path.parent):,} bytes free",
            rule="nothing was written; finished work is kept",
            fix="free some space and run the same command again, or choose another --run folder",
        )
    what, fix = f"{path} cannot be written", "choose a --run folder that you may write to"
    return UserError(what, value=str(error), rule="nothing was written", fix=fix)


def check_ids(
    arrays: Mapping[str, np.ndarray], ids: Mapping[str, list[Any]], axes: Mapping[str, Sequence[str | None]] | None
) -> None:
    """Raise ValueError unless ids are unique and as many as the axes that they name."""
    for key, values in ids.items():
        if not isinstance(values, list) or len(set(values)) != len(values):
            raise ValueError(f"{key}: an id stands twice")
        if axes is None and not any(len(values) in array.shape for array in arrays.values()):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"{key}: {len(values)} ids fit no axis of {shapes}")
    for name, names in (axes or {}).items():
        expected = tuple(None if key is None else len(ids[key]) for key in names)
        shape = arrays[name].shape
        if len(shape) != len(expected) or any(w not in (None, n) for w, n in zip(expected, shape, strict=True)):
            raise ValueError(f"{name}: shape {shape}, but the ids {tuple(names)} say {expected}")
