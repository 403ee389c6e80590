"""Numbered checks of a policy: each passes, warns or fails, and says what to do about it.

Every check grades one number of the faithfulness card or of the evaluation. The codes are stable;
docs/checks.md has a section for each. Thresholds are rules of thumb, stated beside every value;
where a check rests on an interval, the interval decides. A number that is not defined warns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from taught.policy.evaluate import Evaluation
from taught.policy.faithfulness import Card
from taught.stats.arrays import Floats
from taught.stats.intervals import Interval

Status = Literal["pass", "warn", "fail"]
Grade = Callable[[Interval], Status]


class Check(NamedTuple):
    """One finding.

    Attributes
    ----------
    code, name : F01 and so on, and what is checked
    value : Interval, the graded number; lo and hi are nan where it has no interval
    threshold : when it passes, in words
    status : pass, warn or fail
    meaning : what the number says about the policy
    action : what to do where it does not pass
    """

    code: str
    name: str
    value: Interval
    threshold: str
    status: Status
    meaning: str
    action: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``faithfulness.json``."""
        return {**self._asdict(), **self.value.to_dict(), "anchor": f"docs/checks.md#{self.code.lower()}"}


class Rule(NamedTuple):
    """How one number is graded, and what is said about it."""

    code: str
    name: str
    measure: str
    grade: Grade
    threshold: str
    meaning: str
    action: str


def checks(measures: Mapping[str, Interval]) -> list[Check]:
    """Grade every number that is there, in the order of the codes."""
    return [
        Check(r.code, r.name, value := measures[r.measure], r.threshold, r.grade(value), r.meaning, r.action)
        for r in RULES
        if r.measure in measures
    ]


def measures(evaluation: Evaluation, card: Card, y: Floats) -> dict[str, Interval]:
    """Collect the numbers that the checks grade, by name."""
    at, spread = card.calibration, float(np.std(y))
    excess = max(at.error.value - at.error_by_chance, 0.0) / spread if spread > 0 else np.nan
    both = card.comparisons[0]
    flipped = both.sure_flips / both.sure if both.sure else np.nan
    felt = sum(e.lo > 0 for e in card.permuted) / len(card.permuted)
    return {
        "r2": evaluation.r2,
        "spearman": evaluation.spearman,
        "accuracy gain": evaluation.accuracy_gain,
        "slope": at.slope,
        "calibration error": Interval(excess),
        "needed": card.needed,
        "sure signs": Interval(card.sure.mean()),
        "set correlation": Interval(both.correlation),
        "set flips": Interval(flipped),
        "all permuted": card.all_permuted,
        "felt features": Interval(felt),
        **{f"gain over {name}": gain for name, (_, gain) in card.predictors.items()},
        "prompts per feature": Interval(evaluation.n / evaluation.d),
    }


def _above_zero(warn: float = -np.inf) -> Grade:
    """Fails unless the whole interval lies above 0; warns below ``warn``."""
    return lambda e: "fail" if not e.lo > 0 else "warn" if e.value < warn else "pass"


def _gain(e: Interval) -> Status:
    """Fails where the whole interval lies below 0, warns where it includes it."""
    return "pass" if e.lo > 0 else "fail" if e.hi < 0 else "warn"


def _at_least(warn: float, fail: float) -> Grade:
    return lambda e: "fail" if e.value < fail else "pass" if e.value >= warn else "warn"


def _at_most(warn: float, fail: float) -> Grade:
    return lambda e: "fail" if e.value > fail else "pass" if e.value <= warn else "warn"


def _against(code: str, name: str, what: str, meaning: str, action: str) -> Rule:
    passes = "the interval of the difference in R² lies above 0"
    return Rule(code, f"Against {what}", f"gain over {name}", _gain, passes, meaning, action)


MORE = "add prompts, or choose features that follow the behavior (features.threshold, features.ids)"
RULES = (
    Rule(
        "F01",
        "Held-out fit",
        "r2",
        _above_zero(0.3),
        "R² at least 0.3, its interval above 0",
        "the share of the behavior's variance that the features explain on prompts not fitted on",
        "do not read the coefficients or scores as an account of the behavior; " + MORE,
    ),
    Rule(
        "F02",
        "Rank correlation",
        "spearman",
        _above_zero(0.5),
        "at least 0.5, its interval above 0",
        "whether prompts are put in the order of their behavior, whatever the scale",
        MORE,
    ),
    Rule(
        "F03",
        "Accuracy minus majority",
        "accuracy gain",
        _gain,
        "the interval of the difference lies above 0",
        "what the thresholded prediction adds to always naming the larger class",
        "do not use the policy as a classifier of the groups; judge it by R²",
    ),
    Rule(
        "F04",
        "Calibration slope",
        "slope",
        lambda e: "fail" if e.value <= 0 else _at_most(1.25, 2.0)(Interval(max(e.value, 1 / e.value))),
        "between 0.8 and 1.25",
        "above 1 predictions are too timid (a large penalty), below 1 too bold (overfitting)",
        "set policy.alpha to cv; with policy.intercept off, try it on",
    ),
    Rule(
        "F05",
        "Calibration error",
        "calibration error",
        _at_most(0.1, 0.25),
        "at most 0.1 of the behavior's standard deviation beyond chance",
        "how far the mean behavior is from the predicted one, over tenths of the predictions",
        "look at the bins in faithfulness.json: a bend means that the relation is not linear",
    ),
    Rule(
        "F06",
        "Features for 95% of the fit",
        "needed",
        _at_least(2.0, 0.0),
        "at least 2",
        "how many of the strongest features give 95% of the held-out fit; the rest hardly matter",
        "with one feature, read the policy as that feature; without a number there is no fit",
    ),
    Rule(
        "F07",
        "Signs over resamples",
        "sure signs",
        _at_least(0.5, 0.2),
        "at least half of the coefficients",
        "the share of coefficients whose 95% interval excludes 0",
        "read only the features whose interval excludes 0; lower features.max_features",
    ),
    Rule(
        "F08",
        "Coefficients over evaluation sets",
        "set correlation",
        _at_least(0.8, 0.5),
        "correlation at least 0.8",
        "whether prompts of the positive group alone give the policy that all prompts give",
        "name the evaluation set with every result; compare with the control beside it",
    ),
    Rule(
        "F09",
        "Sign flips over evaluation sets",
        "set flips",
        _at_most(0.0, 0.1),
        "none",
        "the share of coefficients with a sure sign that turn it on the positive group alone",
        "do not interpret the features that flip; they stand for the group, not the behavior",
    ),
    Rule(
        "F10",
        "All features permuted",
        "all permuted",
        _above_zero(),
        "the interval of the loss in R² lies above 0",
        "what is lost when activations are dealt to other prompts: what the features do at all",
        "do not read the coefficients as an account of the behavior; " + MORE,
    ),
    Rule(
        "F11",
        "Features that are felt",
        "felt features",
        _at_least(0.25, 1e-9),
        "at least a quarter of the features",
        "the share of features whose permutation lowers R², interval above 0",
        "features that stand for one another hide each other; lower features.max_features",
    ),
    _against(
        "F12",
        "group",
        "the group label",
        "whether the policy knows more of the behavior than which group a prompt is in",
        "read coefficients as differences between groups; give prompts that vary within groups",
    ),
    _against(
        "F13",
        "category",
        "the category label",
        "whether the policy knows more than a table of the categories' means",
        "read coefficients as differences between categories",
    ),
    _against(
        "F14",
        "length",
        "prompt length",
        "whether the policy knows more than how long a prompt is",
        "match the lengths of the groups' prompts",
    ),
    _against(
        "F15",
        "direction",
        "one direction of the residual",
        "whether the features know more than the difference of the groups' mean residuals",
        "the sparse features add nothing here; say so, or choose other features or another block",
    ),
    _against(
        "F16",
        "words",
        "the words of the prompt",
        "whether the features know more than a bag of words of the prompt's text",
        "the behavior stands in the text; use prompts that say the same in other words",
    ),
    Rule(
        "F17",
        "Prompts per feature",
        "prompts per feature",
        _at_least(10.0, 2.0),
        "at least 10",
        "with few prompts for each coefficient the penalty decides much of the policy",
        "add prompts, or lower features.max_features",
    ),
)
