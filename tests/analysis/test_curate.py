"""Curation: every decision against a naive loop, in any order of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taught.analysis.curate import Outcome, outcome
from taught.analysis.curate import curate as decide
from taught.errors import UserError

LABELS = ["harmful-refusal", "harmless-compliance"]


def curate(*rows, **how):
    return decide(*rows, **{"positive_label": LABELS[0], "negative_label": LABELS[1], **how})


def naive_median(values):
    values = sorted(values)
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def naive_drop(label, score, rows):
    """The sentence of the paper, read literally."""
    harmful = naive_median([s for _, name, s in rows if name == "harmful-refusal"])
    harmless = naive_median([s for _, name, s in rows if name == "harmless-compliance"])
    if label == "harmful-refusal" and score < harmless:
        return True
    return label == "harmless-compliance" and score > harmful


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(-5, 5), min_size=2, max_size=25), seed=st.integers(0, 9999))
def test_paper_rule_is_decided_per_id_in_any_order(scores, seed):
    rng = np.random.default_rng(seed)
    label = [*LABELS, *rng.choice([*LABELS, "other"], len(scores) - 2)]
    rows = [(f"p{i}", label[i], float(s)) for i, s in enumerate(scores)]
    expected = {example: naive_drop(name, s, rows) for example, name, s in rows}
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    out = curate(*map(list, zip(*shuffled, strict=True)))
    assert [row["example_id"] for row in out] == [example for example, _, _ in shuffled]
    assert {row["example_id"]: row["action"] == "drop" for row in out} == expected


def test_trap_9_worked_example_with_its_sentences():
    ids, labels = ["a", "b", "c", "d", "e"], [LABELS[0]] * 2 + [LABELS[1]] * 2 + ["other"]
    out = curate(ids, labels, [1.0, 5.0, 2.0, 4.0, 99.0])  # medians: harmful 3, harmless 3
    assert [row["action"] for row in out] == ["drop", "keep", "keep", "drop", "keep"]
    assert out[0]["reason"] == ("score 1 of a harmful-refusal example is below the harmless-compliance median 3")
    assert out[1]["reason"].endswith("is not below the harmless-compliance median 3")
    assert out[3]["reason"].endswith("is above the harmful-refusal median 3")
    assert (out[4]["threshold"], out[0]["threshold"]) == (None, 3.0)
    assert "'other'" in out[4]["reason"]
    assert set(out[0]) == {
        "example_id",
        "action",
        "rule",
        "target",
        "reason",
        "score",
        "change",
        "threshold",
        "protect",
        "protect_change",
        "protect_score",
    }
    assert outcome(out) == Outcome(2, 0, -5.0, None)


def test_equal_to_the_median_is_kept():
    out = curate(["a", "b"], LABELS, [2.0, 2.0])
    assert [row["action"] for row in out] == ["keep", "keep"]


def test_labels_can_have_other_names():
    out = curate(["a", "b"], ["r", "c"], [0.0, 1.0], positive_label="r", negative_label="c")
    assert [row["action"] for row in out] == ["drop", "drop"]


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=15), data=st.data())
def test_invariant_7_top_k_drops_what_raises_the_target_most(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    order = data.draw(st.permutations(range(len(scores))))
    ids = [f"p{i:02d}" for i in order]
    values = [float(scores[i]) for i in order]
    out = curate(ids, [None] * len(ids), values, rule="top-k", k=k)
    dropped = {row["example_id"] for row in out if row["action"] == "drop"}
    assert dropped == {p for _, p in sorted((-s, p) for p, s in zip(ids, values, strict=True))[:k]}
    for row in out:
        assert row["threshold"] == (None if k == 0 else sorted(values)[-k])


def test_messages():
    with pytest.raises(UserError, match=r"missing for 2 examples\n  value: b, c"):
        curate(["a", "b", "c", "d"], [LABELS[0], None, float("nan"), LABELS[1]], [0.0] * 4)
    with pytest.raises(UserError, match=r"no example has the label 'harmless-compliance'\n.*refusal"):
        curate(["a"], LABELS[:1], [0.0])
    with pytest.raises(UserError, match=r"not finite for 1 examples\n  value: b"):
        curate(["a", "b"], LABELS, [0.0, float("nan")])
    with pytest.raises(UserError, match=r"id repeats\n  value: a"):
        curate(["a", "a"], LABELS, [0.0, 1.0])
    with pytest.raises(UserError, match="examples 2, labels 1, scores 2"):
        curate(["a", "b"], LABELS[:1], [0.0, 1.0])
    with pytest.raises(UserError, match=r"value: None\n  rule:  0 <= k <= 2"):
        curate(["a", "b"], LABELS, [0.0, 1.0], rule="top-k")
    with pytest.raises(UserError, match=r"value: median\n  rule:  paper, top-k, keep-k, swap-k"):
        curate(["a", "b"], LABELS, [0.0, 1.0], rule="median")
    with pytest.raises(UserError, match=r"number of examples to keep\n  value: 3\n  rule:  0 <= k"):
        curate(["a", "b"], LABELS, [0.0, 1.0], rule="keep-k", k=3)


# Keeping, and protecting a second target

RANKED = st.sampled_from(["top-k", "keep-k"])


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=15), data=st.data())
def test_keep_k_keeps_what_raises_the_target_least(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    order = data.draw(st.permutations(range(len(scores))))
    rows = [(float(scores[i]), f"p{i:02d}") for i in order]
    out = curate([p for _, p in rows], [None] * len(rows), [s for s, _ in rows], rule="keep-k", k=k)
    kept = {row["example_id"] for row in out if row["action"] == "keep"}
    assert kept == {example for _, example in sorted(rows)[:k]}
    assert outcome(out, k).missing == 0


def naive_drops(rows: list[tuple[str, float, float]], rule: str, k: int) -> list[str]:
    """One example after the other goes, the one that raises the target most, while one may go."""
    left, gone = list(rows), []
    while len(gone) < (k if rule == "top-k" else len(rows) - k):
        may = [row for row in left if not row[2] > 0]
        if not may:
            break
        most = max(score for _, score, _ in may)
        tied = sorted(example for example, score, _ in may if score == most)
        gone.append(tied[0] if rule == "top-k" else tied[-1])
        left = [row for row in left if row[0] != gone[-1]]
    return gone


@settings(max_examples=120, deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-2, 2)), min_size=1, max_size=14),
    rule=RANKED,
    data=st.data(),
)
def test_protection_drops_only_what_does_not_lower_the_second_target(values, rule, data):
    k = data.draw(st.integers(0, len(values)))
    order = data.draw(st.permutations(range(len(values))))
    rows = [(f"p{i:02d}", float(values[i][0]), float(values[i][1])) for i in order]
    ids, scores, held = map(list, zip(*rows, strict=True))
    out = curate(ids, [None] * len(ids), scores, rule=rule, k=k, target="score", protect="mean_y:g", protected=held)
    assert [row["example_id"] for row in out] == ids
    dropped = {row["example_id"] for row in out if row["action"] == "drop"}
    assert dropped == set(naive_drops(rows, rule, k))
    found = outcome(out, k)
    wanted = k if rule == "top-k" else len(rows) - k
    assert (found.dropped, found.missing) == (len(dropped), wanted - len(dropped))
    # Removing examples takes their influence away: what is left against all of them.
    left = [row for row in rows if row[0] not in dropped]
    assert found.change == sum(row[1] for row in left) - sum(scores)
    assert found.protected_change == sum(row[2] for row in left) - sum(held)
    assert found.protected_change >= 0
    for row, value in zip(out, held, strict=True):
        assert row["protect"] == "mean_y:g" and row["protect_score"] == value
        assert ("is above 0" in row["reason"]) == (value > 0)


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=10), rule=RANKED, data=st.data())
def test_protecting_what_no_example_raises_changes_nothing(scores, rule, data):
    k = data.draw(st.integers(0, len(scores)))
    ids = [f"p{i}" for i in range(len(scores))]
    given_ = (ids, [None] * len(ids), [float(s) for s in scores])
    free = curate(*given_, rule=rule, k=k)
    held = curate(*given_, rule=rule, k=k, protect="other", protected=[0.0] * len(ids))
    assert [row["action"] for row in free] == [row["action"] for row in held]
    assert [row["threshold"] for row in free] == [row["threshold"] for row in held]


def test_each_reason_says_which_constraint_held():
    ids, labels = ["a", "b", "c", "d"], [None] * 4
    scores, held = [4.0, 3.0, 2.0, 1.0], [0.5, -1.0, 0.0, 2.0]
    out = curate(ids, labels, scores, rule="top-k", k=1, target="mean_y:harmless", protect="score", protected=held)
    assert [row["reason"] for row in out] == [
        "score 0.5 is above 0, dropping the example would lower it; mean_y:harmless 4",
        "mean_y:harmless 3 ranks 1 of 2 that may be dropped (score -1 is not above 0); the first 1 are dropped",
        "mean_y:harmless 2 ranks 2 of 2 that may be dropped (score 0 is not above 0); the first 1 are dropped",
        "score 2 is above 0, dropping the example would lower it; mean_y:harmless 1",
    ]
    assert outcome(out, 1) == Outcome(1, 0, -3.0, 1.0)
    out = curate(ids, labels, scores, rule="keep-k", k=1, protect="mean_y:g", protected=held)
    assert [row["action"] for row in out] == ["keep", "drop", "drop", "keep"]
    assert out[1]["reason"] == (
        "score 3 ranks 2 of 2 from the lowest that may be dropped (mean_y:g -1 is not above 0); "
        "the first 0 are kept, since only 2 of the 3 examples asked for may be dropped"
    )
    assert outcome(out, 1) == Outcome(2, 1, -5.0, 1.0)
    out = curate(ids, labels, scores, rule="keep-k", k=1)
    assert out[0]["reason"] == "score 4 ranks 4 of 4 from the lowest; the first 1 are kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paper", "protect": "b", "protected": [0.0, 0.0]}, "top-k or keep-k"),
        ({"rule": "top-k", "protect": "a", "protected": [0.0, 0.0]}, "a second target beside"),
        ({"rule": "top-k", "protect": "b"}, "cannot be protected"),
        ({"rule": "top-k", "protect": "b", "protected": [0.0]}, "examples 2, values 1"),
        ({"rule": "keep-k", "protect": "b", "protected": [0.0, float("inf")]}, "value: y"),
    ],
)
def test_a_target_that_cannot_be_protected_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        curate(["x", "y"], LABELS, [0.0, 1.0], k=1, target="a", **options)
