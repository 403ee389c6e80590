"""What to keep and what to drop, and what that is predicted to do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from taught.report.blocks import Beside, Block, Column, Example, Line, Sentence, Table, Text, Word, columns
from taught.report.examples import PRIMARY, floats
from taught.report.sections import Section, add
from taught.report.tables import UNLABELLED, Row, Rows, Tables
from taught.report.text import amount, clean, cleaned, common_power, count, listed, words

MAX_DROPS = 1000
FARTHEST = 3


@dataclass(frozen=True, eq=False)
class Curated:
    """What to keep and what to drop: curation.parquet with the examples' labels, in the order of their ids."""

    table: pa.Table

    @classmethod
    def of(cls, table: pa.Table, labels: pa.Table) -> Curated:
        """From the table of the stage and one of example_id and label."""
        return cls(table.join(labels, "example_id").sort_by("example_id"))

    @classmethod
    def read(cls, tables: Tables) -> Curated:
        """Of a run in which the stage is complete."""
        table, labels = tables.columns("curation"), tables.columns("summary", ["example_id", "label"])
        assert table is not None and labels is not None
        return tables.once("curated", lambda: cls.of(table, labels))

    def one(self, name: str) -> str:
        """The rule, the target or the protected target: the same in every row, empty where there is none."""
        return clean(self.table[name][0].as_py() or "") if name in self.table.column_names else ""

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Label -> how many to keep and to drop."""
        counts: dict[str, dict[str, int]] = {}
        for row in self.table.group_by(["label", "action"]).aggregate([([], "count_all")]).to_pylist():
            own = counts.setdefault(clean(row["label"] or UNLABELLED), {"keep": 0, self.deed: 0})
            own[row["action"]] += row["count_all"]
        return dict(sorted(counts.items()))

    @property
    def deed(self) -> str:
        """What is done to examples that are not kept: drop, or swap (chosen and rejected answer)."""
        return "swap" if self.one("rule") == "swap-k" else "drop"

    @cached_property
    def dropped(self) -> pa.Table:
        """The rows to drop, or to swap."""
        return self.table.filter(pc.not_equal(self.table["action"], "keep"))

    @property
    def drops(self) -> Rows:
        """The first ``MAX_DROPS`` of them, lowest score first."""
        low = np.argsort(floats(self.dropped, "score"), kind="stable")[:MAX_DROPS]
        return cast(Rows, cleaned(self.dropped.take(low).to_pylist()))

    @property
    def farthest(self) -> list[str]:
        """Ids of those that lie farthest past their threshold."""
        past = np.abs(floats(self.dropped, "score") - np.nan_to_num(floats(self.dropped, "threshold")))
        far = np.argsort(-past, kind="stable")[:FARTHEST]
        return [clean(example) for example in self.dropped["example_id"].take(far).to_pylist()]


def _blocks(tables: Tables) -> list[Block]:
    it, record = Curated.read(tables), tables.json("curation")
    before = f"Rule “{it.one('rule')}”. The rows themselves stand in "
    after = ". The rule rests on estimates before training; only retraining shows whether that helps."
    lede = Line((before, Word("keep.jsonl", "code"), " and ", Word(f"{it.deed}.jsonl", "code"), after))
    split = [(label, n["keep"], n[it.deed]) for label, n in it.counts.items()]
    counts = Table(columns("Label", ("Keep", "number", 0), (it.deed.capitalize(), "number", 0)), split, "Counts")
    change = [Text(curation_change(record))] if record else []
    drops, n = it.drops, it.dropped.num_rows
    caption: list[object] = [f"{count(n, 'example')} to {it.deed}"]
    if n > len(drops):
        caption += [f", the first {len(drops)} shown; all in ", Word(f"{it.deed}.jsonl", "file")]
    power = common_power(np.abs([floats(it.table, name) for name in ("score", "threshold")]).ravel())
    heads = columns("Example", "Label", Column(words(it.one("target") or PRIMARY), "signed", power=power), "Reason")
    rows = [(Example(r["example_id"]), r["label"] or UNLABELLED, r["score"], r["reason"]) for r in drops]
    dropped = Table(heads, rows, Line(caption), empty=f"Nothing to {it.deed}.", fold=12, sortable=True)
    return [Text(lede), *change, Beside([counts], [dropped], lean=True)]


def curation_sentence(curation: Curated) -> Sentence:
    """What to drop under the study's rule."""
    rule, target, protect = (curation.one(name) for name in ("rule", "target", "protect"))
    rule += "" if target in ("", PRIMARY) else f" by {words(target)}"
    rule += f", {words(protect)} protected" if protect else ""
    n, drops, deed = curation.table.num_rows, curation.dropped.num_rows, curation.deed
    if not drops:
        text = f"The rule “{rule}” keeps all {count(n, 'example')}: nothing to {deed}."
        return Sentence(f"To {deed}", "none", text)
    kinds = sorted(curation.counts.items(), key=lambda item: -item[1][deed])
    split = listed([f"{own[deed]} {name}" for name, own in kinds if own[deed]], 4)
    text = (
        f"The rule “{rule}” suggests to {deed} {drops} of {count(n, 'example')} "
        f"({split}), first of all {listed(curation.farthest)}. It rests on estimates before "
        "training; whether that helps is known only after retraining."
    )
    return Sentence(f"To {deed}", "found", text)


def curation_change(record: Row) -> str:
    """What that is predicted to do to the target and to the protected one."""
    at = "each checkpoint" if record["lr"] is None else f"lr {record['lr']:g}"
    unit = "of the trained model" if record["unit"] == "run" else f"one step an example at {at}"
    changes = [(words(record["target"]), record["change"])]
    if record["protect"]:
        changes.append((f"{words(record['protect'])} (protected)", record["protected_change"]))
    parts = [f"{name} {amount(change)}" for name, change in changes if change is not None]
    swaps = record["rule"] == "swap-k"
    text = f"{count(record['dropped'], 'example')} to {'swap' if swaps else 'drop'}."
    if parts:
        how = "with their answers exchanged" if swaps else "without them"
        text += f" Predicted change {how}, {unit}: {', '.join(parts)}."
    if record["change"] is None:
        text += f" The values on {words(record['target'])} rank examples, and predict no change."
    if record["missing"]:
        fewer = f"{count(record['missing'], 'example')} fewer than asked for"
        text += f" {fewer}: the others raise {words(record['protect'])}."
    return text


def _sentences(tables: Tables) -> list[Sentence]:
    return [curation_sentence(Curated.read(tables))]


add(Section("curation", "Curation", ("curation", "summary"), _blocks, _sentences, overview=True))
