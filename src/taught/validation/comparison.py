"""Methods side by side on the same retrainings: what is known in, rows of tables out.

LDS raw and controlled, differences between methods, trivial predictors, noise ceilings, and how
well planted examples stand out. Nothing is computed with a model here, and no file is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from taught.errors import refuse
from taught.stats.auc import auc, precision_at_k
from taught.validation.lds import (
    Difference,
    LdsRow,
    NoiseCeiling,
    TrivialCheck,
    differences,
    explained_by_trivial,
    lds_rows,
    noise_ceiling,
)
from taught.validation.subsets import Subsets

if TYPE_CHECKING:
    import pyarrow as pa

Scores = dict[str, dict[str, dict[str, float]]]  # method -> target -> example id -> influence

LEAST_SUBSETS = 8  # fewer have no rank correlation worth an interval
RANK_DESIGNS = ("random", "matched", "leave-out", "leave-one-out")


@dataclass(frozen=True, eq=False)
class Truth:
    """What retraining did, for one design.

    Attributes
    ----------
    measured : target -> repeat (another seed of training) -> subset name -> change
    """

    design: str
    subsets: Subsets
    measured: dict[str, dict[int, dict[str, float]]]

    def outcomes(self) -> dict[str, dict[str, float]]:
        """Target -> subset -> change, the mean over the repeats; none where one is missing."""
        return {
            target: {
                name: float(np.mean([of[name] for of in repeats.values()]))
                for name in self.subsets.names
                if all(name in of for of in repeats.values())
            }
            for target, repeats in self.measured.items()
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is set side by side.

    Attributes
    ----------
    methods, baselines : scores of both kinds; among the baselines are "response-length" and "loss"
    truths : what retraining did, design by design
    labels : example id -> label, of all examples
    planted : ids of planted examples; with none of them, or all, there is nothing to set apart
    rivals : (method, other) whose LDS is compared
    """

    methods: Scores
    baselines: Scores
    truths: Sequence[Truth]
    labels: Mapping[str, str]
    planted: Collection[str]
    rivals: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PlantedRow:
    """How well a method's influence on a target sets the planted examples apart.

    Attributes
    ----------
    auc, lo, hi : area under the ROC curve with its 95% interval; .5 by chance
    precision : share of planted examples among the k with the highest influence, k their number
    """

    method: str
    target: str
    auc: float
    lo: float
    hi: float
    precision: float
    planted: int
    others: int


@dataclass(frozen=True)
class CeilingRow(NoiseCeiling):
    """The best LDS on a target that the noise of training allows, over one design."""

    target: str
    subsets: str


def by_length(methods: Scores, norms: Mapping[str, float]) -> Scores:
    """Each method's values over the length of the example's gradient, as METHOD/norm.

    Training by Adam moves the parameters about as far for a short gradient as for a long one, so
    the direction of an example's gradient may say more than its length (TrackStar, arXiv 2410.17413,
    does likewise). A gradient of length 0 has influence 0.

    Parameters
    ----------
    norms : example id -> |grad L(example)|
    """
    return {
        f"{method}/norm": {
            target: {i: value / norms[i] if norms[i] else 0.0 for i, value in values.items()}
            for target, values in of.items()
        }
        for method, of in methods.items()
    }


class Compared(NamedTuple):
    """Rows of the tables, in the order of the designs."""

    lds: list[LdsRow]
    lds_differences: list[Difference]
    trivial: list[TrivialCheck]
    noise_ceiling: list[CeilingRow]
    planted: list[PlantedRow]


def compared(it: Comparison) -> Compared:
    """Every table of a comparison.

    Controlled for are the summed response length and, where they vary, the counts of labels
    (subsets of the design "matched" hold them fixed).

    Raises
    ------
    UserError
        A subset has no outcome, or an example no finite score.
    """
    every = {**it.methods, **it.baselines}
    length, loss = (next(iter(it.baselines[name].values())) for name in ("response-length", "loss"))
    names = sorted(set(it.labels.values()))
    labels = {  # 1 for the label's examples; their sums are the counts of labels
        f"label {name}": {example: float(label == name) for example, label in it.labels.items()}
        for name in (names if len(names) > 1 else ())
    }
    tables = Compared([], [], [], [], _planted(every, it.planted))
    for truth in it.truths:
        design, subsets, outcomes = truth.design, truth.subsets, truth.outcomes()
        controls = {"response-length": length, **({} if design == "matched" else labels)}
        trivial = {"response-length": length, "loss": loss, **labels}
        tables.lds.extend(lds_rows(subsets, outcomes, every, controls, design=design))
        tables.lds_differences.extend(differences(subsets, outcomes, every, it.rivals, design=design))
        tables.trivial.extend(explained_by_trivial(subsets, outcomes, it.methods, trivial, design=design))
        for target, repeats in truth.measured.items():
            if len(repeats) > 1:
                ceiling = noise_ceiling(subsets, {str(k): of for k, of in repeats.items()})
                tables.noise_ceiling.append(CeilingRow(**asdict(ceiling), target=target, subsets=design))
    return tables


def truths(
    subsets: pa.Table, outcomes: pa.Table, inclusion: Mapping[str, Mapping[str, float]], targets: Collection[str]
) -> list[Truth]:
    """Designs of which a rank correlation can be taken: those with eight subsets or more.

    Tables and inclusion are as the stage ``validate`` writes them; outcomes of runs without repeats lack that column.

    Raises
    ------
    UserError
        Of a target no outcomes were measured.
    """
    members: dict[str, dict[str, list[str]]] = {}
    for row in subsets.to_pylist():
        members.setdefault(row["design"], {}).setdefault(row["subset"], []).append(row["example_id"])
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for row in outcomes.to_pylist():
        name = row["target"]
        if name in targets:
            repeats = found.setdefault(row["design"], {}).setdefault(name, {})
            repeats.setdefault(row.get("repeat", 0), {})[row["subset"]] = row["value"]
    ranked = [design for design, some in members.items() if len(some) >= LEAST_SUBSETS and design in RANK_DESIGNS]
    for design in ranked:
        missing = [name for name in targets if name not in found.get(design, {})]
        what, rule = f"retraining ({design}) has no outcomes of these targets", "outcomes are of the policy's targets"
        refuse(missing, what, rule=rule, fix="run taught validate again")
    drawn = {d: Subsets(tuple(members[d]), tuple(map(tuple, members[d].values())), inclusion[d]) for d in ranked}
    return [Truth(design, drawn[design], {name: found[design][name] for name in targets}) for design in ranked]


@dataclass(frozen=True)
class ForeseenRow:
    """What leaving examples out was to do, and what training without them did.

    Attributes
    ----------
    named : whether these were left out (or trained on alone) because they raise the target most
    left_out : number of examples that were not trained on
    predicted : minus the sum of their influence
    measured : change of the target by training on the others, from the base model
    """

    design: str
    subset: str
    repeat: int
    named: bool
    target: str
    left_out: int
    predicted: float
    measured: float


def foreseen(subsets: pa.Table, outcomes: pa.Table, influence: Mapping[str, Mapping[str, float]]) -> list[ForeseenRow]:
    """Every retraining beside what was foreseen of it.

    Tables as the stage ``validate`` writes them.

    Parameters
    ----------
    influence : target -> example id -> value; other targets are left out
    """
    members: dict[tuple[str, str], set[str]] = {}
    for row in subsets.to_pylist():
        members.setdefault((row["design"], row["subset"]), set()).add(row["example_id"])
    rows = []
    for row in outcomes.to_pylist():
        design, subset, target = row["design"], row["subset"], row["target"]
        if target in influence:
            left = [value for i, value in influence[target].items() if i not in members[design, subset]]
            named = design in ("removal", "addition") and subset.endswith("-named")
            sums = -math.fsum(left), row["value"]
            rows.append(ForeseenRow(design, subset, row.get("repeat", 0), named, target, len(left), *sums))
    return rows


def _planted(scores: Scores, planted: Collection[str]) -> list[PlantedRow]:
    rows = []
    for method, of in scores.items():
        for target, values in of.items():
            inside, m, n = [i in planted for i in values], len(planted), len(values)
            if 0 < m < n:
                value = list(values.values())
                rows.append(PlantedRow(method, target, *auc(value, inside), precision_at_k(value, inside, m), m, n - m))
    return rows


def is_planted(flags: Mapping[str, object]) -> bool:
    """Whether an example's column ``planted`` marks it, as JSON, Parquet or CSV have it."""
    return str(flags.get("planted")).strip().lower() in ("true", "1", "1.0")
