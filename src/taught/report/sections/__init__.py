"""The sections of a report, in order: what each needs, shows, and adds to the verdict.

A package of its own adds one: it registers a :class:`Section` under a name of its own,
``SECTIONS.register("spread")(Section(...))``, from the module of its entry point ``taught.plugins``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from taught.core.registry import Registry
from taught.report.blocks import Block, Line, Sentence, Text
from taught.report.makes import how_to_make
from taught.report.tables import Tables, of_policy


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes
    ----------
    id, title : in the page's address and navigation
    needs : names of tables; while one is missing the section says what makes it
    blocks : what it shows, given that its tables are there
    sentences : what it adds to the verdict, given the same
    overview : whether ``taught show RUN`` prints it without being asked for it
    heading : longer than the title
    """

    id: str
    title: str
    needs: tuple[str, ...]
    blocks: Callable[[Tables], Iterable[Block]]
    sentences: Callable[[Tables], Iterable[Sentence | None]] = lambda tables: ()
    overview: bool = False
    heading: str = ""


_ORDER = (
    "verdict examples curation validation certainty map pathways clusters concepts policy trust clamp coverage "
    "features interference method provenance"
)
SECTIONS: Registry[Section] = Registry("section", {name: f"taught.report.sections.{name}" for name in _ORDER.split()})


def add(section: Section) -> None:
    """Register a section under its id."""
    SECTIONS.register(section.id)(section)


def in_report(tables: Tables) -> list[Section]:
    """The sections of a run's report: without an SAE those that take no policy."""
    every = (SECTIONS.get(name) for name in SECTIONS.names())
    return [section for section in every if tables.with_policy or not of_policy(section.needs)]


def blocks_of(section: Section, tables: Tables) -> list[Block]:
    """What a section shows, or what would make it."""
    missing = [name for name in section.needs if name not in tables]
    if missing:
        return [Text(Line(("Not computed in this run. ", *how_to_make(missing[0]))), "note")]
    return list(section.blocks(tables))


def sentences_of(tables: Tables) -> list[Sentence]:
    """The verdict: what each section whose tables are there adds to it."""
    there = (s for s in in_report(tables) if all(name in tables for name in s.needs))
    return [sentence for section in there for sentence in section.sentences(tables) if sentence is not None]
