"""Rows of a table: JSONL, JSON, Parquet, CSV, a folder written by ``datasets``, the hub, or memory."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taught.errors import UserError
from taught.run.files import write_bytes

Row = dict[str, Any]
HUB = "hf:"
# No text of a language: half of a character (a lone surrogate), and the byte that ends texts in C.
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Rows, and where they came from.

    Attributes
    ----------
    rows : the rows
    name : what the table is called in messages
    sha256 : hex digest of the file; of the rows where there is none
    path : the file or folder; None for rows from memory or the hub
    """

    rows: list[Row]
    name: str
    sha256: str
    path: Path | None = None


def open_table(source: str | Path | Iterable[Mapping[str, Any]]) -> Table:
    """Read rows from a path, from ``"hf:owner/name[:split]"``, or from mappings in memory.

    Raises
    ------
    UserError
        As :func:`read_rows`; a row in memory is no mapping; the data set cannot be had.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return _in_memory(_hub_dataset(source), source)
    if isinstance(source, str | Path):
        return Table(read_rows(source), Path(source).name, table_sha256(source), Path(source))
    return _in_memory(source, "the data")


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a table.

    Parameters
    ----------
    path : a file that ends in .jsonl, .json (a list of objects), .parquet or .csv, or a folder made by
        ``Dataset.save_to_disk``

    Raises
    ------
    UserError
        Missing or unreadable file, unknown ending, a line that is not a JSON object (the line is
        named), or a text with a NUL or half a character (the row is named).
    """
    path = Path(path)
    if not path.exists():
        raise UserError("no such file", value=str(path), fix="check the path; it is relative to the study's file")
    reader = _saved_dataset if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            "unknown kind of table",
            value=path.name,
            rule=f"the file name ends in one of {', '.join(_READERS)}",
            fix="rename the file, or convert it to JSONL",
        )
    try:
        rows = reader(path)
    except OSError as error:
        raise UserError(
            f"cannot read the file: {error.strerror}", value=str(path), fix="check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 text: byte {error.start} cannot be decoded", value=str(path), fix="save the file as UTF-8"
        ) from error
    _refuse_no_text(rows, path.name)
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, UTF-8, all or nothing."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(Path(path), "".join(lines).encode())


def table_sha256(path: str | Path) -> str:
    """Hex sha256 of a table file, or of the names and contents of a folder's files."""
    path = Path(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(part.relative_to(path).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(part.read_bytes()).digest())
    return digest.hexdigest()


def _jsonl(path: Path) -> list[Row]:
    # Split at newlines only: str.splitlines would also break at U+2028 inside a JSON string.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path.name}, line {number}: not JSON ({_why(error)})",
                value=line,
                rule="every line of a .jsonl file is one JSON object",
                fix=f"correct line {number}",
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path.name}, line {number}: not a JSON object",
                value=line,
                rule='every line is an object with named fields: {"prompt": …}',
            )
        rows.append(row)
    return rows


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(
            f"{path.name}, line {line}: not JSON ({_why(error)})",
            value=text.split("\n")[line - 1],
            fix="correct the line; a file with one object per line ends in .jsonl",
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path.name}: not a list of objects",
            value=type(rows).__name__,
            rule="a .json table is a list of objects: [{…}, {…}]",
        )
    return rows


def _csv(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        twice = [column for column, times in Counter(reader.fieldnames or ()).items() if times > 1]
        if twice:
            raise UserError(
                f"{path.name}, line 1: two columns have one name", value=", ".join(twice), fix="rename one of them"
            )
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path.name}, line {reader.line_num}: not as many cells as the header",
                    rule=f"the header has {len(reader.fieldnames or ())} columns",
                    fix='put a cell that contains a comma between "…"',
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path.name}, line {reader.line_num}: not CSV ({error})", fix="correct the line") from error
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.ParquetFile(path).read().to_pylist())
    except pa.ArrowException as error:
        raise UserError(f"{path.name}: not a Parquet file ({_first_line(error)})", value=str(path)) from error


def _saved_dataset(folder: Path) -> list[Row]:
    """Read the Arrow files of ``Dataset.save_to_disk``, in the order of its ``state.json``."""
    import pyarrow as pa

    state = folder / "state.json"
    if not state.exists():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        raise UserError(
            "a folder without state.json is not a saved dataset",
            value=str(folder),
            rule="a folder is one written by Dataset.save_to_disk",
            fix=f"name one split: {', '.join(splits)}" if splits else "give a .jsonl file",
        )
    content = json.loads(state.read_text(encoding="utf-8"))
    if content.get("_indices_data_files"):
        raise UserError(
            "the saved dataset has an index of selected rows, which is not read",
            value=str(folder),
            fix="save it again after dataset.flatten_indices()",
        )
    rows: list[Row] = []
    for name in (entry["filename"] for entry in content["_data_files"]):
        try:
            with pa.memory_map(str(folder / name)) as source:
                rows += pa.ipc.open_stream(source).read_all().to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"cannot read {name} of a saved dataset ({_first_line(error)})", value=str(folder)
            ) from error
    return rows


def _why(error: BaseException) -> str:
    """Why a text is no JSON: its error, a number of thousands of digits, brackets in thousands."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else _first_line(error)


def _in_memory(source: Iterable[Any], name: str) -> Table:
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise UserError(
            f"{name}: no rows can be read from this",
            value=f"{type(source).__name__}"
            + (f" of {', '.join(map(str, source))}" if isinstance(source, Mapping) else ""),
            rule="rows are a list of dicts, a datasets.Dataset, or a file",
            fix="pass one split of a DatasetDict, a list of dicts, or a path",
        )
    rows = []
    for number, row in enumerate(source, 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{name}, row {number}: not a mapping",
                value=row,
                rule='every row has named fields: {"prompt": …}',
                fix="pass a list of dicts (of a data frame: frame.to_dict('records'))",
            )
        rows.append({str(key): value for key, value in row.items()})
    _refuse_no_text(rows, name)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return Table(rows, name, digest.hexdigest())


def _hub_dataset(source: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            "reading a data set of the hub needs the library datasets",
            value=source,
            fix="pip install 'taught[datasets]', or download the data set to a file",
        ) from error
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        found = load_dataset(name, split=split or None)
    except Exception as error:  # the library's own, and those of the network below it
        raise UserError(
            f"cannot load the data set {name} ({type(error).__name__}: {_first_line(error)})",
            value=source,
            rule="hf:owner/name, or hf:owner/name:split",
            fix="check the name and the network",
        ) from error
    if isinstance(found, Mapping):
        if len(found) > 1:
            raise UserError(
                f"the data set {name} has several splits",
                value=", ".join(found),
                fix=f"name one: {HUB}{name}:{next(iter(found))}",
            )
        (found,) = found.values()
    return found


def _refuse_no_text(rows: Iterable[Row], name: str) -> None:
    for number, row in enumerate(rows, 1):
        bad = _no_text(row)
        if bad is not None:
            raise UserError(
                f"{name}, row {number}: a text holds a NUL byte or half of a character",
                value=ascii(bad[:80]),
                rule="every text can be written as UTF-8 and has no NUL",
                fix="remove the character, or write a surrogate together with its other half",
            )


def _no_text(row: Row) -> str | None:
    """The first text in a row, its names included, that is none."""
    parts: list[Any] = [row]
    while parts:
        value = parts.pop()
        if isinstance(value, str):
            if _NO_TEXT.search(value):
                return value
        elif isinstance(value, Mapping):
            parts += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            parts += value
    return None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
