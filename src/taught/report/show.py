"""A run in the terminal: an overview, one section, or one example or feature in detail."""

from __future__ import annotations

import difflib
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text as Words

from taught.errors import UserError
from taught.report import terminal
from taught.report.blocks import Block, Line, Text
from taught.report.detail import example_blocks, feature_blocks
from taught.report.examples import Summary
from taught.report.sections import Section, blocks_of, in_report
from taught.report.tables import Tables
from taught.report.text import count
from taught.run.folder import RunFolder


def show_run(run: RunFolder | Path | str, item: str | None = None) -> RenderableType:
    """What a run says, ready for a rich console.

    Parameters
    ----------
    run : a run folder or its path
    item : the id of an example, of a feature or of a section (``validation``), for all of it. None: the overview.

    Raises
    ------
    UserError
        The folder is not a run, or nothing has this id (close ids are named).
    """
    tables = Tables(run, also=[] if item is None else [item])
    sections = in_report(tables)
    if item is None:
        parts: list[RenderableType] = [Words(tables.name, "bold")]
        absent: list[Block] = []
        for section in (section for section in sections if section.overview):
            title, *blocks = _section(section, tables)
            if all(name in tables for name in section.needs):
                brief = (b for b in blocks if not isinstance(b, Text) or b.role == "title")
                parts.append(terminal.render([title, *brief]))
            else:  # the only block says what makes it
                absent += [Text(Line((f"{section.title}: ", b.text)), "note") for b in blocks if isinstance(b, Text)]
        return Group(*parts, terminal.render(absent))
    blocks = []
    for row in tables.rows("summary"):
        if row["example_id"] == item:
            blocks += example_blocks(tables, row)
    for row in tables.rows("coefficients"):
        if str(row["feature_id"]) == item:
            blocks += [Text(f"Feature {item}  {row['label'] or ''}", "title"), *feature_blocks(tables, row)]
    for section in sections:
        if section.id == item:
            blocks += _section(section, tables)
    if blocks:
        return terminal.render(blocks)
    ids = [str(r["example_id"]) for r in tables.rows("summary")]
    ids += [str(r["feature_id"]) for r in tables.rows("coefficients")]
    ids += [section.id for section in sections]
    examples = len(Summary.read(tables)) if "summary" in tables else 0
    near = difflib.get_close_matches(item, ids, n=5, cutoff=0.5)
    raise UserError(
        "no example, feature or section has this id",
        value=item,
        rule=f"the id of one of {count(examples, 'example')}, of a feature, or of a section",
        fix="close ids: " + ", ".join(near) if near else "taught show RUN lists the strongest",
    )


def _section(section: Section, tables: Tables) -> list[Block]:
    return [Text(section.heading or section.title, "title"), *blocks_of(section, tables)]
