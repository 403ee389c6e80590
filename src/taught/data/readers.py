"""Rows of one file, a batch of them in memory at a time: JSONL, CSV, Parquet, a folder of ``datasets``; JSON whole."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taught.errors import UserError

Row = dict[str, Any]
STATE = "state.json"  # of a folder made by Dataset.save_to_disk
# No text of a language: half of a character (a lone surrogate), and the byte that ends texts in C.
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the rows of a file that ends in one of ``READERS``, or of a folder made by ``Dataset.save_to_disk``.

    Raises
    ------
    UserError
        Unreadable file, unknown ending, a line that is not a JSON object, or has a key twice (the line is named), two
        columns of one name, or a text with a NUL or half a character (the row is named).
    """
    reader = _saved_dataset if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            "unknown kind of table",
            value=path.name,
            rule=f"the file name ends in one of {', '.join(READERS)}",
            fix="unpack or convert it to JSONL; rename it if it is one of these by another name",
        )
    try:
        yield from only_texts(reader(path), path.name)
    except OSError as error:
        what = f"cannot read the file: {error.strerror}"
        raise UserError(what, value=str(path), fix="check its permissions") from error
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: byte {_bad_byte(path)} cannot be decoded"
        raise UserError(what, value=str(path), fix="save the file as UTF-8") from error


def columns_of(path: Path) -> tuple[str, ...]:
    """Names of the columns of a file, in order: of Parquet from its head, else from its rows."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        import pyarrow.parquet as pq

        with _as_parquet(path):
            return tuple(pq.ParquetFile(path).schema_arrow.names)
    return tuple(dict.fromkeys(name for row in rows_of(path) for name in row))


def only_texts(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """Yield the rows; UserError at one with a text that no language has."""
    for number, row in enumerate(rows, 1):
        if (bad := _no_text(row)) is not None:
            raise UserError(
                f"{name}, row {number}: a text holds a NUL byte or half of a character",
                value=ascii(bad[:80]),
                rule="every text can be written as UTF-8 and has no NUL",
                fix="remove the character, or write a surrogate together with its other half",
            )
        yield row


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _jsonl(path: Path) -> Iterator[Row]:
    # Lines of bytes end at line feeds only: those of text would also end at U+2028 inside a JSON string.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if not text.strip():
                continue
            try:
                row = json.loads(text, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path.name}, line {number}: not JSON ({_why(error)})",
                    value=text,
                    rule="every line of a .jsonl file is one JSON object",
                    fix=f"correct line {number}",
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{path.name}, line {number}: not a JSON object",
                    value=text,
                    rule='every line is an object with named fields: {"prompt": …}',
                )
            yield row


def _json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text, object_pairs_hook=_once)
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
    yield from rows


def _csv(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _refuse_twice(reader.fieldnames or (), f"{path.name}, line 1")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path.name}, line {reader.line_num}: not as many cells as the header",
                        rule=f"the header has {len(reader.fieldnames or ())} columns",
                        fix='put a cell that contains a comma between "…"',
                    )
                yield row
        except csv.Error as error:
            what = f"{path.name}, line {reader.line_num}: not CSV ({error})"
            raise UserError(what, fix="correct the line") from error


@contextmanager
def _as_parquet(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise UserError(f"{path.name}: not a Parquet file ({first_line(error)})", value=str(path)) from error
    except ValueError as error:
        what = f"{path.name}: a value that cannot be read ({first_line(error)})"
        raise UserError(what, value=str(path), fix="save times in microseconds, or as text") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _as_parquet(path):
        file = pq.ParquetFile(path)
        _refuse_twice(file.schema_arrow.names, path.name)
        for batch in file.iter_batches(_BATCH):
            yield from batch.to_pylist()


def _saved_dataset(folder: Path) -> Iterator[Row]:
    """Rows of the Arrow files of ``Dataset.save_to_disk``, in the order of its ``state.json``."""
    import pyarrow as pa

    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if content.get("_indices_data_files"):
        what = "the saved dataset has an index of selected rows, which is not read"
        raise UserError(what, value=str(folder), fix="save it again after dataset.flatten_indices()")
    for name in (entry["filename"] for entry in content["_data_files"]):
        try:
            with pa.memory_map(str(folder / name)) as source:
                for batch in pa.ipc.open_stream(source):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            what = f"cannot read {name} of a saved dataset ({first_line(error)})"
            raise UserError(what, value=str(folder)) from error


def _refuse_twice(columns: Sequence[str], where: str) -> None:
    if twice := [column for column, times in Counter(columns).items() if times > 1]:
        raise UserError(f"{where}: two columns have one name", value=", ".join(twice), fix="rename one of them")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no key stands twice: the last one would go before the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands twice in one object")
    return found


def _bad_byte(path: Path) -> int:
    """Where a file stops to be UTF-8."""
    place = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return place + error.start
            place += len(line)
    return place


def _why(error: BaseException) -> str:
    """Why a text is no JSON: its error, a number of thousands of digits, brackets in thousands."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


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


_BATCH = 4096  # rows of a Parquet file that are in memory as Python values
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
