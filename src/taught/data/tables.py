"""Tables of rows: one file or many shards of JSONL, JSON, Parquet or CSV, a folder of ``datasets``, the hub, memory."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from taught.data.readers import READERS, STATE, Row, columns_of, first_line, only_texts, rows_of
from taught.errors import UserError
from taught.run.files import sha256_file, write_bytes

HUB = "hf:"
# What may lie beside shards and is no table.
_BESIDE = (".md", ".txt", ".yaml", ".yml", "")
# What the name of a file says of its split of a data set.
_SPLIT = re.compile("(?<![a-z])(train|test|valid|val|dev|eval|training|validation|evaluation)(?![a-z])")


@dataclass(frozen=True)
class Table:
    """Rows, and where they came from.

    Attributes
    ----------
    rows : the rows
    name : what the table is called in messages
    sha256 : hex digest of the file; of the rows where there is none
    path : the file, folder or pattern; None for rows from memory or the hub
    """

    rows: list[Row]
    name: str
    sha256: str
    path: Path | None = None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: a column is there when any row has it."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True)
class Source:
    """The same, not held: every iteration reads the rows anew, shard by shard, a batch of them in memory.

    Attributes
    ----------
    shards : the files, in the order in which they are read; none for rows from memory or the hub
    given : rows from memory or the hub
    """

    name: str
    shards: tuple[Path, ...] = ()
    path: Path | None = None
    given: Iterable[Any] = field(default=(), repr=False)

    def __iter__(self) -> Iterator[Row]:
        if self.path is None:
            yield from only_texts(_mappings(self.given, self.name), self.name)
        for shard in self.shards:
            yield from rows_of(shard)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns; a column is there when any row has it.

        Raises
        ------
        UserError
            A shard has other columns than the first one.
        """
        if self.path is None:
            return tuple(dict.fromkeys(name for row in self for name in row))
        first = self.shards[0]
        columns: tuple[str, ...] = ()
        for shard in self.shards:
            own = columns_of(shard)
            if not columns:  # those before had no rows
                first, columns = shard, own
            if own and (differing := set(own) ^ set(columns)):
                name = min(differing)
                raise UserError(
                    f"shards of {self.name} disagree in their columns",
                    value=f"{shard.name} {'has' if name in own else 'lacks'} the column {name}, unlike {first.name}",
                    rule="all shards of a table have the same columns",
                    fix="add the column to every shard, with an empty cell where there is nothing, or remove it",
                )
        return columns

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the files; of the rows where there are none."""
        if self.path is not None:
            return table_sha256(self.path)
        digest = hashlib.sha256()
        for row in self:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def open_source(source: str | Path | Iterable[Mapping[str, Any]]) -> Source:
    """Find rows at a path or a pattern, at ``"hf:owner/name[:split]"``, or in memory; none is read yet.

    Parameters
    ----------
    source : a file, a folder of shards, a pattern such as ``corpus/*.parquet``, or anything that yields mappings: a
        list, a ``datasets.Dataset`` or ``IterableDataset``. What can be iterated only once (a generator) is read now
        and held.

    Raises
    ------
    UserError
        There is no such file, or what is given yields no rows.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return Source(source, given=_hub_dataset(source))
    if isinstance(source, str | Path):
        return Source(Path(source).name, shards_of(source), Path(source))
    name = "the data"
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise UserError(
            f"{name}: no rows can be read from this",
            value=type(source).__name__ + (f" of {', '.join(map(str, source))}" if isinstance(source, Mapping) else ""),
            rule="rows are a list of dicts, a datasets.Dataset, or a file",
            fix="pass one split of a DatasetDict, a list of dicts, or a path",
        )
    return Source(name, given=list(source) if iter(source) is source else source)


def open_table(source: str | Path | Iterable[Mapping[str, Any]]) -> Table:
    """Read all rows of a source, as :func:`open_source` finds it.

    Raises
    ------
    UserError
        As :func:`read_rows`; a row in memory is no mapping; the data set cannot be had.
    """
    found = open_source(source)
    if found.path is None:  # read once: a stream of the hub is slow, and rows in memory may be made as they are read
        rows = list(found)
        found = Source(found.name, given=rows)
    else:
        rows = read_rows(found.path)
    return Table(rows, found.name, found.sha256, found.path)


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a table.

    Parameters
    ----------
    path : a file that ends in .jsonl, .json (a list of objects), .parquet or .csv; a folder of such files, or a
        pattern that names some; a folder made by ``Dataset.save_to_disk``

    Raises
    ------
    UserError
        Missing or unreadable file, unknown ending, a line that is not a JSON object (the line is named), a text with
        a NUL or half a character (the row is named), shards with other columns than the first one.
    """
    source = open_source(Path(path))
    if len(source.shards) > 1:
        source.columns  # noqa: B018 - says where shards disagree
    return list(source)


def shards_of(path: str | Path) -> tuple[Path, ...]:
    """Files of a table, sorted: the file itself, those of a folder, those that a pattern names.

    A folder made by ``Dataset.save_to_disk`` is one shard.

    Raises
    ------
    UserError
        There is none, or a folder holds files that are no tables.
    """
    path = Path(path)
    if path.is_file() or (path / STATE).is_file():
        return (path,)
    if path.is_dir():
        return _shards_in(path)
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    files = tuple(file for file in found if file.is_file())
    if not files:
        what = "no file matches" if glob.has_magic(str(path)) else "no such file"
        raise UserError(what, value=str(path), fix="check the path; it is relative to the study's file")
    return files


def _shards_in(folder: Path) -> tuple[Path, ...]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    shards = tuple(p for p in files if p.suffix.lower() in READERS)
    deeper = sorted(p for p in folder.rglob("*") if p.parent != folder and p.suffix.lower() in READERS and p.is_file())
    if not shards:
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir())
        splits = [name for name in inside if (folder / name / STATE).is_file()]
        fix = "give a .jsonl file"
        if splits:
            fix = f"name one split: {', '.join(splits)}"
        elif deeper:
            fix = f"name a folder or a pattern: {deeper[0].parent / ('*' + deeper[0].suffix)}"
        rule = f"a folder holds shards ({', '.join(READERS)}), or is written by Dataset.save_to_disk"
        raise UserError("a folder without tables, and no saved dataset", value=str(folder), rule=rule, fix=fix)
    other = [p.name for p in files if p not in shards and p.suffix.lower() not in _BESIDE]
    if other or deeper:
        raise UserError(
            "a folder of shards holds files that are not read",
            value=", ".join([*other, *(p.relative_to(folder).as_posix() for p in deeper)][:8]),
            rule=f"shards end in one of {', '.join(READERS)} and lie in the folder itself",
            fix=f"name the files to read by a pattern: {folder / ('*' + shards[0].suffix)}",
        )
    named = {found[0]: shard.name for shard in shards if (found := _SPLIT.search(shard.stem.lower()))}
    if len(named) > 1:
        first = next((name for name in named if name.startswith("train")), min(named))
        raise UserError(
            "a folder of shards holds several splits of a data set",
            value=", ".join(named.values()),
            rule="what a model is tested on is not what it was trained on",
            fix=f"name the files of one: {folder / f'*{first}*'}",
        )
    return shards


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, UTF-8, all or nothing."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(Path(path), "".join(lines).encode())


def table_sha256(path: str | Path) -> str:
    """Hex sha256 of a table file, or of the names and contents of a folder's or a pattern's files."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        parts = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    else:
        # Where the files lie does not count: the folder that the pattern begins with.
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        parts = {p.as_posix().removeprefix(f"{fixed.as_posix()}/"): p for p in shards_of(path)}
    digest = hashlib.sha256()
    for name, part in sorted(parts.items(), key=lambda item: item[1]):
        digest.update(name.encode() + b"\0")
        digest.update(bytes.fromhex(sha256_file(part)))
    return digest.hexdigest()


def _mappings(rows: Iterable[Any], name: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{name}, row {number}: not a mapping",
                value=row,
                rule='every row has named fields: {"prompt": …}',
                fix="pass a list of dicts (of a data frame: frame.to_dict('records'))",
            )
        yield {str(key): _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    """A cell without numpy: a data frame holds arrays where its file holds lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


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
            f"cannot load the data set {name} ({type(error).__name__}: {first_line(error)})",
            value=source,
            rule="hf:owner/name, or hf:owner/name:split",
            fix="check the name and the network",
        ) from error
    if isinstance(found, Mapping):
        if len(found) > 1:
            what, fix = f"the data set {name} has several splits", f"name one: {HUB}{name}:{next(iter(found))}"
            raise UserError(what, value=", ".join(found), fix=fix)
        (found,) = found.values()
    return found
