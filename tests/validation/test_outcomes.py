"""What a retraining did, against closed forms, scikit-learn and the effects that are predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from taught.core.estimator import Work
from taught.core.names import TargetName
from taught.core.readings import Readings
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators.adjoint import Adjoint
from taught.policy.ridge import fit_policy
from taught.study.schema import ValidationSpec
from taught.training.recipe import Recipe
from taught.training.retrain import Retrainer
from taught.validation.outcomes import changes, soft_metrics
from tiny_models import tiny_examples, tiny_model, tiny_problem

GROUPS = {"harmful": ["p0", "p1", "p4"], "harmless": ["p2", "p3", "p5"]}
CATEGORIES = {"theft": ["p4"]}
FEATURES = (3, 11, 7)


@dataclass(frozen=True)
class Read:
    prompt_ids: tuple[str, ...]
    feature_ids: tuple[int, ...]
    y: np.ndarray
    X: np.ndarray


def read(seed: int) -> Read:
    draw = np.random.default_rng(seed)
    ids = tuple(f"p{i}" for i in range(6))
    return Read(ids, FEATURES, draw.normal(-5, 2, 6), np.abs(draw.normal(size=(6, 3))))


def readings_of(base, groups=GROUPS, categories=CATEGORIES, **how) -> Readings:
    policy = fit_policy(base.X, base.y, prompt_ids=base.prompt_ids, feature_ids=base.feature_ids, **how)
    return Readings(base.prompt_ids, base.y, groups, categories, base.X, tuple(base.feature_ids), policy)


def names_of(readings: Readings) -> list[TargetName]:
    every = [f"coefficient:{k}" for k in readings.columns]
    return list(
        map(TargetName.parse, ["score", *every, *(f"behavior:{g}" for g in readings.groups | readings.categories)])
    )


def changes_of(readings: Readings, base, after) -> dict[str, float]:
    return changes(readings, base, after, names_of(readings))


@pytest.mark.parametrize("intercept", [False, True])
def test_changes_are_those_of_ridges_fitted_before_and_after(intercept: bool) -> None:
    base, after = read(0), read(1)
    found = changes_of(readings_of(base, alpha=0.7, fit_intercept=intercept), base, after)
    ridge = Ridge(alpha=0.7, fit_intercept=intercept)
    W, moved = (ridge.fit(r.X, r.y).coef_.copy() for r in (base, after))
    for feature_id, value in zip(FEATURES, moved - W, strict=True):
        assert found.pop(f"coefficient:{feature_id}") == pytest.approx(value, rel=1e-9)
    assert found.pop("score") == pytest.approx((moved - W) @ W, rel=1e-9)
    dy = after.y - base.y
    expected = {"harmful": dy[[0, 1, 4]], "harmless": dy[[2, 3, 5]], "theft": dy[[4]]}
    for group, values in expected.items():
        value = found.pop(f"behavior:{group}")
        assert value == pytest.approx(values.mean(), rel=1e-12)
    assert found == {}


def test_no_change_is_zero_in_every_target() -> None:
    found = changes_of(readings_of(read(0)), read(0), read(0))
    assert len(found) == 1 + 3 + 3
    assert set(found.values()) == {0.0}


def test_soft_metrics_by_hand() -> None:
    p = np.array([0.8, 0.1, 0.2, 0.05, 0.3, 0.4])
    reads = replace(read(0), y=np.log(p))
    found = soft_metrics(reads, ["p0", "p4"], ["p2", "p3", "p5"])  # p1 is in neither group
    assert found.precision == pytest.approx(1.1 / 1.75)
    assert found.recall == pytest.approx(0.55)
    assert found.f1 == pytest.approx(2 * (1.1 / 1.75) * 0.55 / (1.1 / 1.75 + 0.55))
    assert found.correctness == pytest.approx((0.8 + 0.3 + 0.8 + 0.95 + 0.6) / 5)


def test_soft_metrics_of_a_model_that_never_shows_the_behavior() -> None:
    quiet = replace(read(0), y=np.array([-2000.0, 0, -2001, 0, -2000, -2001]))
    found = soft_metrics(quiet, ["p0", "p4"], ["p2", "p5"])
    assert found.precision == pytest.approx(1 / (1 + np.exp(-1)))
    assert (found.recall, found.f1, found.correctness) == (0.0, 0.0, 0.5)


def test_other_prompts_features_or_groups_are_refused() -> None:
    base = read(0)
    readings = readings_of(base)
    turned = replace(base, prompt_ids=base.prompt_ids[::-1])
    with pytest.raises(UserError, match=r"other prompts or features(.|\n)*value: prompts"):
        changes_of(readings, base, turned)
    other = replace(base, feature_ids=(3, 7, 11))
    with pytest.raises(UserError, match=r"other prompts or features(.|\n)*value: features"):
        changes_of(readings, other, base)
    with pytest.raises(UserError, match=r"value: rest"):
        changes(readings, base, base, [TargetName.parse("behavior:rest")])
    with pytest.raises(UserError, match=r"prompts of negative were not read(.|\n)*p9"):
        soft_metrics(base, ["p0"], ["p1", "p9"])
    with pytest.raises(UserError, match=r"prompts of positive were not read"):
        soft_metrics(base, [], ["p1"])


def test_a_small_step_on_all_examples_does_what_is_predicted(tmp_path) -> None:
    # Names, signs and units: one SGD step at a batch of all is the mean of the examples' effects.
    problem = tiny_problem(tiny_model("untied"), lr=1e-5)
    recipe = Recipe.of(ValidationSpec(optimizer="sgd", lr=1e-5, epochs=1))
    made = Retrainer(problem, tiny_examples(), recipe, tmp_path, weights={"source": "tiny"})
    base, after = made.base(), made.run([p.id for p in tiny_examples()])
    readings = readings_of(base, {"a": base.prompt_ids[:3], "b": base.prompt_ids[3:]}, {}, alpha=0.5)
    found = changes_of(readings, base, after)
    effects = Adjoint().estimate(problem, tiny_examples(), TargetSet.of(names_of(readings), readings), Work())
    for name, value in found.items():
        assert value == pytest.approx(effects[name].mean(), rel=2e-2)
        assert abs(value) > 1e-9
