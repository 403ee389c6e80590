"""What to keep and what to drop, and what that is predicted to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from taught.report.blocks import Beside, Block, Code, Column, Example, File, Line, Sentence, Table, Text
from taught.report.examples import PRIMARY, floats
from taught.report.sections import SECTIONS, Section
from taught.report.tables import UNLABELLED, Row, Rows, Tables
from taught.report.text import clean, cleaned, common_power, count, listed, signed, tens, words

MAX_DROPS = 1000
FARTHEST = 3


@dataclass(frozen=True, eq=False)
class Curated:
    """What to keep and what to drop, counted over all examples.

    Attributes
    ----------
    rule, target, protect : what was decided by; the protected target is empty where there is none
    counts : label -> how many to keep and to drop
    drops : examples to drop with their labels, lowest score first, at most ``MAX_DROPS``
    farthest : ids of the dropped examples that lie farthest past their threshold
    largest : largest absolute score or threshold
    """

    rule: str
    target: str
    protect: str
    counts: dict[str, dict[str, int]]
    drops: Rows
    farthest: list[str]
    largest: float

    @classmethod
    def of(cls, table: pa.Table, labels: pa.Table) -> Curated:
        """From curation.parquet and a table of example_id and label."""
        first = table.slice(0, 1).to_pylist()[0]
        drops = table.filter(pc.equal(table["action"], "drop"))
        past = np.abs(floats(drops, "score") - np.nan_to_num(floats(drops, "threshold")))
        far = np.argsort(-past, kind="stable")[:FARTHEST]
        low = np.argsort(floats(drops, "score"), kind="stable")[:MAX_DROPS]
        sizes = np.abs([floats(table, name) for name in ("score", "threshold")])
        return cls(
            clean(first["rule"]),
            clean(first.get("target") or PRIMARY),
            clean(first.get("protect") or ""),
            _counts(table, labels),
            _labelled(drops.take(low), labels),
            [clean(example) for example in drops["example_id"].take(far).to_pylist()],
            float(np.nanmax(sizes)),
        )

    @classmethod
    def read(cls, tables: Tables) -> Curated:
        """Of a run in which the stage is complete."""
        return tables.once("curated", lambda: cls._read(tables))

    @classmethod
    def _read(cls, tables: Tables) -> Curated:
        table, labels = tables.columns("curation"), tables.columns("summary", ["example_id", "label"])
        assert table is not None and labels is not None
        return cls.of(table, labels)

    @property
    def n(self) -> int:
        """How many examples were decided on."""
        return self.n_drops + sum(own["keep"] for own in self.counts.values())

    @property
    def n_drops(self) -> int:
        """How many of them to drop."""
        return sum(own["drop"] for own in self.counts.values())


def _counts(table: pa.Table, labels: pa.Table) -> dict[str, dict[str, int]]:
    joined = table.select(["example_id", "action"]).join(labels, "example_id")
    counts: dict[str, dict[str, int]] = {}
    for row in joined.group_by(["label", "action"]).aggregate([([], "count_all")]).to_pylist():
        own = counts.setdefault(clean(row["label"] or UNLABELLED), {"keep": 0, "drop": 0})
        own[row["action"]] += row["count_all"]
    return dict(sorted(counts.items()))


def _labelled(drops: pa.Table, labels: pa.Table) -> Rows:
    known = labels.filter(pc.is_in(labels["example_id"], drops["example_id"].combine_chunks()))
    label = dict(zip(known["example_id"].to_pylist(), known["label"].to_pylist(), strict=True))
    rows = [row | {"label": label.get(row["example_id"]) or UNLABELLED} for row in drops.to_pylist()]
    return cast(Rows, cleaned(rows))


def _blocks(tables: Tables) -> list[Block]:
    it, record = Curated.read(tables), tables.json("curation")
    lede = Line(
        (
            f"Rule “{it.rule}”. The rows themselves stand in ",
            Code("keep.jsonl"),
            " and ",
            Code("drop.jsonl"),
            ". The rule rests on estimates before training; only retraining shows whether dropping helps.",
        )
    )
    counts = Table(
        [Column("Label"), Column("Keep", "number", 0), Column("Drop", "number", 0)],
        [(label, n["keep"], n["drop"]) for label, n in it.counts.items()],
        "Counts",
    )
    change = [Text(curation_change(record))] if record else []
    return [Text(lede), *change, Beside([counts], [_drops(it)], lean=True)]


def _drops(it: Curated) -> Table:
    caption: list[object] = [f"{count(it.n_drops, 'example')} to drop"]
    if it.n_drops > len(it.drops):
        caption += [f", the first {len(it.drops)} shown; all in ", File("drop.jsonl")]
    value = Column(words(it.target), "signed", power=common_power([it.largest]))
    rows = [(Example(r["example_id"]), r["label"], r["score"], r["reason"]) for r in it.drops]
    columns = [Column("Example"), Column("Label"), value, Column("Reason")]
    return Table(columns, rows, Line(caption), empty="Nothing to drop.", fold=12, sortable=True)


def _sentences(tables: Tables) -> list[Sentence]:
    return [curation_sentence(Curated.read(tables))]


def curation_sentence(curation: Curated) -> Sentence:
    """What to drop under the study's rule."""
    rule = curation.rule
    rule += "" if curation.target == PRIMARY else f" by {words(curation.target)}"
    rule += f", {words(curation.protect)} protected" if curation.protect else ""
    if not curation.n_drops:
        text = f"The rule “{rule}” keeps all {count(curation.n, 'example')}: nothing to drop."
        return Sentence("To drop", "none", text)
    kinds = sorted(curation.counts.items(), key=lambda item: -item[1]["drop"])
    split = listed([f"{own['drop']} {name}" for name, own in kinds if own["drop"]], 4)
    text = (
        f"The rule “{rule}” suggests to drop {curation.n_drops} of {count(curation.n, 'example')} "
        f"({split}), first of all {listed(curation.farthest)}. It rests on estimates before "
        "training; whether dropping them helps is known only after retraining."
    )
    return Sentence("To drop", "found", text)


def curation_change(record: Row) -> str:
    """What dropping is predicted to do to the target and to the protected one."""
    changes = [(words(record["target"]), record["change"])]
    if record["protect"]:
        changes.append((f"{words(record['protect'])} (protected)", record["protected_change"]))
    parts = []
    for name, change in changes:
        if change is not None:
            power = common_power([change])
            parts.append(f"{name} {signed(change, power=power)}{tens(power)}")
    text = f"{count(record['dropped'], 'example')} to drop."
    if parts:
        text += f" Predicted change without them, one step an example at lr {record['lr']:g}: {', '.join(parts)}."
    if record["change"] is None:
        text += f" {words(record['target'])} ranks examples, and predicts no change."
    if record["missing"]:
        text += (
            f" {count(record['missing'], 'example')} fewer than asked for: the others raise {words(record['protect'])}."
        )
    return text


SECTIONS.register("curation")(
    Section("curation", "Curation", ("curation", "summary"), _blocks, _sentences, overview=True)
)
