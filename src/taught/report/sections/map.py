"""A capability map: which kinds of documents raise which benchmark, how sure that is, and what carries it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.compute as pc

from taught.report.blocks import (
    Block,
    Cell,
    Column,
    Details,
    Example,
    Grid,
    Items,
    Line,
    Sentence,
    Strips,
    Table,
    Text,
    Word,
    columns,
)
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.strips import strips
from taught.report.tables import Row, Rows, Tables
from taught.report.text import (
    amount,
    clean,
    common_power,
    count,
    interval_of,
    listed,
    number,
    read_interval,
    shorten,
    signed,
    tens,
)
from taught.stats.intervals import Interval

ALPHA = 0.05
FAR = 4.0  # z beyond which a bin that is not significant is named
NAMED = 3  # bins and documents that are named
RANKED = 5  # bins at either end of a ranking
CARRIED = 12  # warnings
WIDEST = 40  # letters of a label beside the grid
TIMES = " × "


@dataclass(frozen=True, eq=False)
class Mapped:
    """What the stage ``bins`` wrote; text has lost control characters.

    Attributes
    ----------
    bins, contrasts : rows of the tables
    made : bins.json
    per : what values are a change by
    """

    bins: Rows
    contrasts: Rows
    made: Row
    per: str

    @classmethod
    def read(cls, tables: Tables) -> Mapped:
        """Of a run in which the stage is complete."""
        return cls(tables.rows("bins"), tables.rows("contrasts"), tables.json("bins"), tables.per)

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks."""
        return list(self.made["benchmarks"])

    @property
    def of_two(self) -> bool:
        """Whether bins are by two columns."""
        return len(self.made["columns"]) == 2

    @cached_property
    def power(self) -> int:
        """Of ten, by which effects on all benchmarks are shown."""
        return common_power(row["effect"] for row in self.bins if row["tested"])

    def level(self, name: str, benchmark: str, *, rows: Rows | None = None) -> Rows:
        """Rows of one level and benchmark, or contrast, the largest effect first and the untested ones last."""
        own = [r for r in (rows or self.bins) if r["level"] == name and r["benchmark"] == benchmark]
        return sorted(own, key=lambda row: (not row["tested"], -(row["effect"] or 0.0)))


def _blocks(tables: Tables) -> Iterator[Block]:
    it = Mapped.read(tables)
    lede = (
        f"Documents by {TIMES.join(it.made['columns'])}, and what training on one of each kind does to each benchmark. "
        "Beside the corpus: a bin’s trimmed mean less that of all documents. Positive: training on such documents "
        "raises the benchmark more than training on others does."
    )
    sample = tables.json("sample")
    if sample.get("even"):
        by = " and ".join(sample["by"])
        lede += f" The corpus is the sample here, with as many documents of each {by}, not what it was drawn from."
    behavior = tables.json("readings").get("behavior") or {}
    yield Text(f"{lede} A benchmark is the {behavior['meaning']}." if behavior.get("meaning") else lede)
    yield Items([sentence.text for sentence in bin_sentences(it)])
    if warnings := _warnings(it):
        yield Items(warnings, warning=True)
    for benchmark in it.benchmarks:
        yield Text(f"On {benchmark}", "title")
        if it.of_two:
            yield _grid(it, benchmark)
        yield _ranked(it, "bin", benchmark, it.level("bin", benchmark))
        yield from _documents(tables, it, benchmark)
        if it.of_two:
            yield _ranked(it, "row", benchmark, it.level("row", benchmark))
            yield _ranked(it, "column", benchmark, it.level("column", benchmark))
    if it.contrasts:
        yield Text("Between benchmarks", "title")
        for contrast in it.made["contrasts"]:
            rows = it.level("bin", contrast, rows=it.contrasts)
            rows = rows if len(rows) <= 2 * RANKED or not it.of_two else _ends(rows)
            heads = columns(("Rank", "number", 0), "Bin", ("Documents", "number", 0))
            heads += columns(_effects(rows), ("Corrected p", "p"), ("dz", "number"))
            shown = [(r["rank"], _name(r), r["n_documents"], _effect(r), r["p_holm"], r["z"]) for r in rows]
            caption = f"{contrast}, in robust scales of the benchmarks, with 95% intervals; dz: the published "
            yield Table(heads, shown, caption + "difference of z", head=len(shown), flagged=_sure(rows))
    if it.made["profiles"]:
        yield _profiles(it.made["profiles"])
    made, questions = it.made, it.made["questions"]
    drawn = "documents" if questions is None else "documents and questions"
    note = (
        f"Bins of at least {made['minimum']} documents are tested: mean rank of their documents against "
        f"{made['permutations']:,} permutations of the labels, so one document of extreme value cannot make a bin "
        "significant. Corrected p: Holm’s, over the bins and benchmarks of a table’s level. Above others: share of "
        "pairs in which a document of the bin has the larger influence. Trimmed mean: without "
        f"{100 * made['trim']:g}% of the documents at either end. Intervals: {made['bootstrap']:,} draws of {drawn}. "
    )
    if questions is None:
        note += "The run has not kept single questions, so they say nothing of other questions. "
    yield Text(note + "z: of the plain mean over bins, as published.", "note")


# In words


def bin_sentences(it: Mapped) -> list[Sentence]:
    """What bins do that random documents do not, for each benchmark and for all contrasts; what is left out."""
    found = [_stands_out(it, benchmark) for benchmark in it.benchmarks]
    if it.contrasts:
        tested = [row for row in it.contrasts if row["level"] == "bin" and row["tested"]]
        sure = sorted((row for row in tested if row["p_holm"] <= ALPHA), key=lambda row: -abs(row["effect"]))
        said = [f"{_name(row)} on {row['benchmark']} ({signed(row['effect'])} scales)" for row in sure]
        least = number(min((row["p_holm"] for row in tested), default=None), 3)
        text = f"{NOTHING} between benchmarks: no bin serves one more than another (smallest corrected p {least})."
        text = f"Unlike between benchmarks: {listed(said, NAMED)}." if sure else text
        found.append(Sentence("Contrasts", "found" if sure else "none", text))
    return [*found, *_left_out(it)]


def _stands_out(it: Mapped, benchmark: str) -> Sentence:
    rows = [row for row in it.level("bin", benchmark) if row["tested"]]
    sure = [row for row in rows if row["p_holm"] <= ALPHA]
    if not sure:
        least = min((row["p_holm"] for row in rows), default=None)
        text = (
            f"{NOTHING}: on {benchmark} no bin’s documents stand apart from as many random ones "
            f"({count(len(rows), 'bin')} tested, smallest corrected p {number(least, 3)})."
        )
        return Sentence("Bins", "none", text)
    sides = {"above": [r for r in sure if r["above"] > 0.5], "below": [r for r in reversed(sure) if r["above"] < 0.5]}
    parts = []
    for side, own in sides.items():
        if own:
            named = [f"{_name(row)} ({amount(row['effect'], it.power)})" for row in own]
            parts.append(f"{side} the corpus {listed(named, NAMED)}")
    text = f"On {benchmark} {len(sure)} of {count(len(rows), 'bin')} stand apart from random documents: "
    text += "; ".join(parts) + "."
    unsure = [_name(row) for row in sure if (e := _effect(row)) is not None and e.includes_zero]
    if unsure:
        text += f" With other documents and questions the effect could be zero for {listed(unsure, NAMED)}."
    return Sentence("Bins", "caution" if len(unsure) == len(sure) else "found", text)


def _left_out(it: Mapped) -> Iterator[Sentence]:
    for column, ids in it.made["unlabelled"].items():
        if ids:
            text = f"{count(len(ids), 'document')} without a {column} (shown as unknown, not tested): {listed(ids, 8)}."
            yield Sentence("Without a label", "caution", text)
    first = it.level("bin", it.benchmarks[0])
    for side, column in zip(("row", "column"), it.made["columns"], strict=False):
        names = sorted({row[side] for row in first})
        if alike := [name for name in names if [other.casefold() for other in names].count(name.casefold()) > 1]:
            text = f"Each {column} that differs in case alone is a bin of its own: {listed(alike, NAMED)}."
            yield Sentence("Spelled alike", "caution", text)
    if small := [row for row in first if row["n_documents"] < it.made["minimum"]]:
        text = f"{len(small)} of {count(len(first), 'bin')} hold fewer than {it.made['minimum']} documents"
        yield Sentence("Small bins", "caution", f"{text}: shown, not tested.")
    for column, names in it.made["empty"].items():
        if names:
            yield Sentence("Empty", "none", f"No document has the {column} {listed(names, 24)}.")


def _warnings(it: Mapped) -> list[Cell]:
    """Means that one document or one bin carries, and z that no test bears out."""
    said: list[Cell] = []
    for row in it.bins:
        where = f"{_name(row)} on {row['benchmark']}: "
        if row["over_bins_carried_by"] is not None:
            mean = _left_one_out(it, row, "over_bins", "over_bins_lo", "over_bins_hi")
            said.append(f"{where}one bin, {row['over_bins_carried_by']}, carries the mean over its bins, {mean}.")
        if row["carried_by"] is not None:
            mean = _left_one_out(it, row, "mean", "without_lo", "without_hi")
            said.append(Line((f"{where}one document, ", Example(row["carried_by"]), f", carries the mean, {mean}.")))
        elif row["level"] == "bin" and abs(row["z"] or 0.0) >= FAR and (row["p_holm"] is None or row["p_holm"] > ALPHA):
            size = count(row["n_documents"], "document")
            said.append(f"{where}z of {number(row['z'], 1)} rests on {size}, and no test bears it out.")
    more = len(said) - CARRIED
    return said if more <= 0 else [*said[:CARRIED], f"{more} more in bins.parquet: carried_by, over_bins_carried_by."]


def _left_one_out(it: Mapped, row: Row, *keys: str) -> str:
    mean, least, most = (signed(row[key], power=it.power) for key in keys)
    return f"{mean}{tens(it.power)} ({least} to {most} with one left out)"


# Drawn and listed


def _grid(it: Mapped, benchmark: str) -> Grid:
    own = {(row["row"], row["column"]): row for row in it.level("bin", benchmark)}
    rows, heads = (sorted({key[at] for key in own}) for at in (0, 1))
    cells = [[own.get((a, b)) for b in heads] for a in rows]

    def about(row: Row | None) -> str:
        if row is None:
            return ""
        size, effect = count(row["n_documents"], "document"), amount(row["effect"], it.power)
        p = f"corrected p {number(row['p_holm'], 3)}" if row["tested"] else "not tested"
        return f"{_name(row)}: {effect}, {size}, {p}"

    def each(key: str, missing: object) -> list[list[object]]:
        return [[missing if row is None else row[key] for row in line] for line in cells]

    p = np.array(each("p_holm", None), dtype=np.float64)
    return Grid(
        np.array(each("effect", np.nan), dtype=np.float64),
        list(map(_fitted, rows)),
        list(map(_fitted, heads)),
        p <= ALPHA,
        ~np.array(each("tested", False), dtype=bool),
        [[about(row) for row in line] for line in cells],
        f"{TIMES.join(it.made['columns'])}, beside the corpus",
        Column("", "signed", power=it.power),
        "Dot, or star: significant after correction. Small, or in brackets: too few documents, or no label.",
    )


def _fitted(label: str) -> str:
    return label if len(label) <= WIDEST else f"{label[: WIDEST - 1]}…"


def _ranked(it: Mapped, level: str, benchmark: str, rows: Rows) -> Table:
    """Bins, or rows or columns, by their effect; of many bins both ends."""
    every = len(rows) <= 2 * RANKED + 2 or level != "bin" or not it.of_two
    chosen = rows if every else _ends(rows)
    heads = columns(("Rank", "number", 0), "Bin" if level == "bin" else _column_of(it, level).capitalize())
    heads += columns(("Documents", "number", 0), _effects(chosen, it.power), ("Corrected p", "p"))
    of_bins = level == "bin"
    heads += columns(*((("Above others", "percent"), ("z", "number")) if of_bins else ("Mean over its bins",)))
    made = []
    for row in chosen:
        rest: tuple[Cell, ...] = row["above"], row["z"]
        if not of_bins:
            mean, lo, hi = (signed(row[key], power=it.power) for key in ("over_bins", "over_bins_lo", "over_bins_hi"))
            rest = (mean if row["over_bins_lo"] is None else f"{mean} ({lo} to {hi})",)
        made.append((row["rank"], _name(row), row["n_documents"], _effect(row), row["p_holm"], *rest))
    what = "Bins" if level == "bin" else f"Each {_column_of(it, level)}"
    some = "" if every else ", both ends"
    caption = f"{what} on {benchmark}, {it.per}, by trimmed mean beside the corpus, with 95% intervals{some}"
    if not of_bins:
        caption += "; the mean over its bins with its range with one left out"
    return Table(heads, made, caption, head=len(made), flagged=_sure(chosen), fold=0 if len(made) <= 24 else 12)


def _sure(rows: Rows) -> frozenset[int]:
    return frozenset(i for i, row in enumerate(rows) if row["p_holm"] is not None and row["p_holm"] <= ALPHA)


def _ends(rows: Rows) -> Rows:
    tested = [row for row in rows if row["tested"]]
    return tested if len(tested) <= 2 * RANKED else [*tested[:RANKED], *tested[-RANKED:]]


def _effects(rows: Rows, power: int = 0) -> Column:
    """The column of effects. Its plot is as wide as the values: the interval of a bin with an outlier leaves it."""
    widest = 2 * max((abs(row["effect"]) for row in rows), default=0.0) / 10.0**power or 1.0
    return Column("Beside the corpus", "interval", power=power, plot=(-widest, widest))


def _column_of(it: Mapped, level: str) -> str:
    return str(it.made["columns"][0 if level == "row" else 1])


def _documents(tables: Tables, it: Mapped, benchmark: str) -> Iterator[Block]:
    """Of the bins that stand out most: their example documents, with the shares of tokens that the run has."""
    tested = [row for row in it.level("bin", benchmark) if row["tested"]]
    shared = tables.rows("token_shares")
    for row in sorted(tested, key=lambda row: (row["p_holm"] > ALPHA, -abs(row["effect"])))[:NAMED]:
        blocks: list[Block] = []
        for name in row["examples"]:
            # The scored examples that the document is cut up into.
            condition = (pc.field("document") == name) | (pc.field("example_id") == name)
            found = tables.columns("examples", ["example_id", "prompt", "response"], condition)
            windows = [] if found is None else found.to_pylist()
            first = clean(" ".join(filter(None, (windows[0]["prompt"], windows[0]["response"])))) if windows else ""
            blocks.append(Text(Line((Example(name), Word(" " + shorten(first, 240), "soft")))))
            ids, targets = {clean(r["example_id"]) for r in windows}, (f"behavior:{benchmark}", "behavior")
            shares = [r for r in shared if r["example_id"] in ids and r["target"] in targets]
            if shares:
                blocks.append(Strips([("Tokens", strip) for strip in strips(shares)]))
        yield Details(f"Documents of {_name(row)} that move {benchmark} most", blocks)


def _profiles(rows: Rows) -> Table:
    heads = columns("Benchmarks", ("Bins", "number", 0), Column("Correlation", "interval", plot=(-1.0, 1.0)))
    heads += columns("One bin left out", ("Reliability", "text"), Column("Corrected", "interval"))
    made = []
    for r in rows:
        least, most = number(r["without_lo"]), number(r["without_hi"])
        reliable = f"{number(r['reliability_a'])}, {number(r['reliability_b'])}"
        corrected = read_interval(r["corrected"]) or Word("too unreliable to correct", "soft")
        left = f"{least} to {most}; most by {TIMES.join(r['without'])}"
        made.append((f"{r['a']}, {r['b']}", r["bins"], read_interval(r["plain"]), left, reliable, corrected))
    caption = (
        "Do benchmarks rest on the same bins? Correlation of their profiles over bins, and corrected for noise by "
        "split halves of documents and questions."
    )
    return Table(heads, made, caption)


def _effect(row: Row) -> Interval | None:
    return interval_of(row, "effect", "effect_lo", "effect_hi")


def _name(row: Row) -> str:
    return TIMES.join(shorten(label, 60) for label in (row["row"], row["column"]) if label is not None)


def _sentences(tables: Tables) -> list[Sentence]:
    return bin_sentences(Mapped.read(tables))


add(Section("map", "Map", ("bins", "contrasts"), _blocks, _sentences, heading="Capability map"))
