"""What ``concept-influence`` found: the strongest examples by concept and method, and agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc

from taught.report.stats import Estimate
from taught.report.strips import Strip, strips
from taught.report.text import clean, cleaned, common_power
from taught.run.folder import RunFolder

Row = dict[str, Any]
STRONGEST = 5
AGREE = 0.5


@dataclass(frozen=True, eq=False)
class Ranking:
    """The examples with the largest absolute values of one concept by one method."""

    method: str
    power: int
    rows: list[tuple[str, float]]


@dataclass(frozen=True, eq=False)
class ConceptFound:
    """One concept.

    Attributes
    ----------
    rankings : by method
    separation : AUC of the direction between the two groups that judge it, or None
    agreement : method -> other method -> rank correlation over examples; None where it is not defined
    apart : couples of methods whose rank correlation is below ``AGREE``
    strips : of the examples that were split into tokens
    """

    name: str
    facts: Row
    separation: Estimate | None
    rankings: list[Ranking]
    agreement: dict[str, dict[str, Estimate | None]]
    apart: list[tuple[str, str, Estimate]]
    strips: list[Strip]

    @property
    def from_examples(self) -> bool:
        """Whether labelled answers judge the direction, in place of the groups of prompts."""
        return "examples sha256" in self.facts.get("provenance", {})


def read_concepts(run: RunFolder) -> list[ConceptFound]:
    """Everything of a run folder in which the stage is complete; text is made safe to show."""
    record = cast(Row, cleaned(run.read_json("concept_influence")))
    names = run.read_table("concept_influence", ["concept"])["concept"].unique().to_pylist()
    facts = {concept["name"]: concept for concept in record["concepts"]}
    return [_concept(run, name, facts[clean(name)], record["methods"]) for name in names]


def _concept(run: RunFolder, name: str, facts: Row, methods: list[str]) -> ConceptFound:
    of_one = pc.field("concept") == name
    couples = [
        (row["method"], row["other"], Estimate.of([row["rank_correlation"], row.get("lo"), row.get("hi")]))
        for row in run.read_table("concept_agreement", rows=of_one).to_pylist()
    ]
    matrix: dict[str, dict[str, Estimate | None]] = {method: {} for method in methods}
    for a, b, value in couples:
        matrix[a][b] = matrix[b][a] = value
    apart = [(a, b, r) for a, b, r in couples if r is not None and r.value < AGREE]
    tokens = cast("list[Row]", cleaned(run.read_table("concept_tokens", rows=of_one).to_pylist()))
    return ConceptFound(
        clean(name),
        facts,
        Estimate.of(facts.get("card", {}).get("auc")),
        [_ranking(run, name, method) for method in methods],
        matrix,
        apart,
        strips(tokens, "concept"),
    )


def _ranking(run: RunFolder, name: str, method: str) -> Ranking:
    rows = (pc.field("concept") == name) & (pc.field("method") == method)
    table = run.read_table("concept_influence", ["example_id", "value"], rows)
    values = table["value"].to_numpy()
    order = np.argsort(-np.abs(values), kind="stable")[:STRONGEST]
    ids = table["example_id"].take(order).to_pylist()
    found = [(clean(i), float(values[j])) for i, j in zip(ids, order, strict=True)]
    return Ranking(method, common_power(value for _, value in found), found)
