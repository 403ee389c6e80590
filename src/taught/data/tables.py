"""Rows of a table file: JSONL, JSON, Parquet, CSV, or a folder written by ``datasets``."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from taught.errors import UserError
from taught.run.files import write_bytes

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a table.

    Parameters
    ----------
    path
        A file that ends in .jsonl, .json (a list of objects), .parquet or .csv, or a folder made by
        ``Dataset.save_to_disk``.

    Raises
    ------
    UserError
        Missing or unreadable file, unknown ending, or a line that is not a JSON object (the line is
        named).
    """
    path = Path(path)
    if not path.exists():
        raise UserError("No such file", value=str(path), fix="check the path; it is relative to the study's file")
    if path.is_dir():
        return _saved_dataset(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            "Unknown kind of table",
            value=path.name,
            rule=f"the file name ends in one of {', '.join(_READERS)}",
            fix="rename the file, or convert it to JSONL",
        )
    try:
        return reader(path)
    except OSError as error:
        raise UserError(
            f"Cannot read the file: {error.strerror}", value=str(path), fix="check its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"Not UTF-8 text: byte {error.start} cannot be decoded", value=str(path), fix="save the file as UTF-8"
        ) from error


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
    return [_json_object(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _json_object(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path.name}, line {number}: not JSON ({error.msg}, column {error.colno})",
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
    return row


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path.name}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})",
            value=text.split("\n")[error.lineno - 1],
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
            "A folder without state.json is not a saved dataset",
            value=str(folder),
            rule="a folder is one written by Dataset.save_to_disk",
            fix=f"name one split: {', '.join(splits)}" if splits else "give a .jsonl file",
        )
    content = json.loads(state.read_text(encoding="utf-8"))
    if content.get("_indices_data_files"):
        raise UserError(
            "The saved dataset has an index of selected rows, which is not read",
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
                f"Cannot read {name} of a saved dataset ({_first_line(error)})", value=str(folder)
            ) from error
    return rows


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
