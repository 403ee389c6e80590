"""Evaluation prompts: what the policy is fitted on and every target is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from taught.data.columns import detect_columns, name_ids, repeated, text_cell
from taught.data.overlap import normalise
from taught.data.tables import Row, read_rows, table_sha256
from taught.errors import UserError

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "prompt_id"),
    "text": ("text", "prompt", "instruction", "question", "goal", "behavior"),
    "group": ("group", "label"),
    "category": ("category", "topic"),
    "source": ("source",),
    "licence": ("licence", "license"),
}


@dataclass(frozen=True)
class Prompt:
    """One evaluation prompt: a user message and the group and category it belongs to."""

    id: str
    text: str
    group: str
    category: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Evaluation prompts in the order of their file.

    Attributes
    ----------
    prompts
        The prompts; ids and texts are unique.
    columns
        Field -> the column it was read from.
    sha256
        Hex digest of the file.
    """

    prompts: tuple[Prompt, ...]
    columns: Mapping[str, str]
    sha256: str

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids, in order."""
        return tuple(prompt.id for prompt in self.prompts)

    @property
    def groups(self) -> tuple[str, ...]:
        """Group names, each once, in order of first appearance."""
        return tuple(dict.fromkeys(prompt.group for prompt in self.prompts))


def load_prompts(path: str | Path, columns: Mapping[str, str] | None = None) -> PromptSet:
    """Read and check evaluation prompts.

    Parameters
    ----------
    path
        A table (see :func:`taught.data.tables.read_rows`).
    columns
        Field -> column name, where the names are not the usual ones. Fields: id, text, group,
        category, source, licence. A prompt without id is called after its text.

    Raises
    ------
    UserError
        No rows, no text or group column, empty texts or groups, repeated ids or texts; the
        offending ids are named.
    """
    rows = read_rows(path)
    where = Path(path).name
    if not rows:
        raise UserError("No prompts in the file", value=str(path), fix="give at least two groups")
    found = detect_columns(rows, COLUMNS, columns, where)
    for field in ("text", "group"):
        if field not in found:
            raise _no_column(field, rows, where)
    prompts = tuple(_prompt(row, found) for row in rows)
    _check(prompts, where)
    return PromptSet(prompts, found, table_sha256(path))


def _prompt(row: Row, columns: Mapping[str, str]) -> Prompt:
    cells = {field: text_cell(row, columns, field) for field in COLUMNS}
    return Prompt(**{**cells, "id": cells["id"] or content_id(cells["text"])})


def content_id(text: str) -> str:
    """Return "sha1:" and 12 hex digits of the text: the same wherever the row stands."""
    return "sha1:" + hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]


def _no_column(field: str, rows: list[Row], where: str) -> UserError:
    present = ", ".join(dict.fromkeys(name for row in rows for name in row))
    return UserError(
        f"{where} has no {field} column",
        value=f"columns: {present}",
        rule=f"usual names of the {field} are {', '.join(COLUMNS[field])}",
        fix=f"rename the column to {field}, or load with columns={{{field!r}: …}}",
    )


def _check(prompts: tuple[Prompt, ...], where: str) -> None:
    for field in ("text", "group"):
        empty = [prompt.id for prompt in prompts if not getattr(prompt, field).strip()]
        if empty:
            raise UserError(
                f"{where}: {len(empty)} prompts have an empty {field}",
                value=name_ids(empty),
                rule="every evaluation prompt has a text and a group",
                fix="fill the cells or remove the rows",
            )
    same_id = repeated((prompt.id, prompt.id) for prompt in prompts)
    if same_id:
        raise UserError(
            f"{where}: {len(same_id)} prompt ids are used more than once",
            value=name_ids([names[0] for names in same_id]),
            rule="ids name prompts in every table and must be unique",
            fix="rename or remove the repeats",
        )
    same_text = repeated((normalise(prompt.text), prompt.id) for prompt in prompts)
    if same_text:
        raise UserError(
            f"{where}: {len(same_text)} prompt texts occur more than once",
            value=name_ids([" = ".join(names) for names in same_text]),
            rule="a repeated prompt would count twice (case and spacing are ignored)",
            fix="remove the repeats",
        )
