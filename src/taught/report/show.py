"""A run in the terminal: an overview, one section, or one example or feature in detail."""

from __future__ import annotations

import difflib
from pathlib import Path

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.text import Text as Words

from taught.errors import UserError
from taught.report import terminal
from taught.report.blocks import Block, Column, Example, Line, Table, Text
from taught.report.detail import example_blocks, feature_blocks
from taught.report.examples import Summary
from taught.report.sections import Section, blocks_of, in_report
from taught.report.tables import Tables
from taught.report.text import common_power, count
from taught.run.folder import RunFolder


def show_run(run: RunFolder | Path | str, item: str | None = None) -> RenderableType:
    """What a run says, ready for a rich console.

    Parameters
    ----------
    run
        A run folder or its path.
    item
        The id of an example, of a feature or of a section (``validation``), for all of it. None: the overview.

    Raises
    ------
    UserError
        The folder is not a run, or nothing has this id (close ids are named).
    """
    tables = Tables(run, also=[] if item is None else [item])
    if item is None:
        return _overview(tables)
    blocks: list[Block] = []
    for row in tables.rows("summary") or []:
        if row["example_id"] == item:
            blocks += example_blocks(tables, row)
    for row in tables.rows("coefficients") or []:
        if str(row["feature_id"]) == item:
            blocks += [Text(f"Feature {item}  {row['label'] or ''}", "title"), *feature_blocks(tables, row)]
    for section in in_report(tables):
        if section.id == item:
            blocks += _section(section, tables)
    if not blocks:
        raise _unknown(tables, item)
    return terminal.render(blocks)


def show_answers(answers: pa.Table, target: str, top: int) -> RenderableType:
    """The strongest examples of ``taught ask``, with the share that is more than two errors from 0."""
    rows = answers.slice(0, top).to_pylist()
    values, errors = answers["total"].to_numpy(), answers["se"].to_numpy()
    power = common_power([row["total"] for row in rows])
    clear = int((abs(values) > 2 * errors).sum())
    caption = f"{target}: change per step; {clear} of {len(values)} examples are more than two standard errors from 0"
    columns = [Column("example"), Column("label")]
    columns += [Column(key, "signed", power=power) for key in ("x", "y", "total")]
    made = [(Example(r["example_id"]), r["label"], *(r[key] for key in ("x", "y", "total")), r["se"]) for r in rows]
    return terminal.render([Table([*columns, Column("error", "number", power=power)], made, caption, head=top)])


def _overview(tables: Tables) -> RenderableType:
    parts: list[RenderableType] = [Words(tables.name, "bold")]
    there = [section for section in in_report(tables) if section.overview]
    for section in there:
        if all(name in tables for name in section.needs):
            parts.append(terminal.render(b for b in _section(section, tables) if not _is_prose(b)))
    absent = [s for s in there if not all(name in tables for name in s.needs)]
    parts.append(terminal.render([_absent(section, tables) for section in absent]))
    return Group(*parts)


def _section(section: Section, tables: Tables) -> list[Block]:
    return [Text(section.heading or section.title, "title"), *blocks_of(section, tables)]


def _is_prose(block: Block) -> bool:
    return isinstance(block, Text) and block.role != "title"


def _absent(section: Section, tables: Tables) -> Block:
    (note,) = blocks_of(section, tables)
    assert isinstance(note, Text)
    return Text(Line((f"{section.title}: ", note.text)), "note")


def _unknown(tables: Tables, item: str) -> UserError:
    ids = [str(r["example_id"]) for r in tables.rows("summary") or []]
    ids += [str(r["feature_id"]) for r in tables.rows("coefficients") or []]
    ids += [section.id for section in in_report(tables)]
    near = difflib.get_close_matches(item, ids, n=5, cutoff=0.5)
    return UserError(
        "no example, feature or section has this id",
        value=item,
        rule=f"the id of one of {count(len(Summary.read(tables) or ()), 'example')}, of a feature, or of a section",
        fix="close ids: " + ", ".join(near) if near else "taught show RUN lists the strongest",
    )
