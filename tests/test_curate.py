"""Curation: every decision against a naive loop, in any order of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taught.analysis.curate import curate
from taught.errors import UserError

LABELS = ["harmful-refusal", "harmless-compliance"]


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
def test_invariant_5_paper_rule_is_decided_per_id_in_any_order(scores, seed):
    rng = np.random.default_rng(seed)
    label = [*LABELS, *rng.choice([*LABELS, "other"], len(scores) - 2)]
    rows = [(f"p{i}", label[i], float(s)) for i, s in enumerate(scores)]
    expected = {pair: naive_drop(name, s, rows) for pair, name, s in rows}
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    out = curate(*map(list, zip(*shuffled, strict=True)))
    assert [row["pair_id"] for row in out] == [pair for pair, _, _ in shuffled]
    assert {row["pair_id"]: row["action"] == "drop" for row in out} == expected


def test_trap_9_worked_example_with_its_sentences():
    ids, labels = ["a", "b", "c", "d", "e"], [LABELS[0]] * 2 + [LABELS[1]] * 2 + ["other"]
    out = curate(ids, labels, [1.0, 5.0, 2.0, 4.0, 99.0])  # medians: harmful 3, harmless 3
    assert [row["action"] for row in out] == ["drop", "keep", "keep", "drop", "keep"]
    assert out[0]["reason"] == (
        "score 1 of a harmful-refusal pair is below the harmless-compliance median 3"
    )
    assert out[1]["reason"].endswith("is not below the harmless-compliance median 3")
    assert out[3]["reason"].endswith("is above the harmful-refusal median 3")
    assert (out[4]["threshold"], out[0]["threshold"]) == (None, 3.0)
    assert "'other'" in out[4]["reason"]
    assert set(out[0]) == {"pair_id", "action", "rule", "target", "reason", "score", "threshold"}


def test_equal_to_the_median_is_kept():
    out = curate(["a", "b"], LABELS, [2.0, 2.0])
    assert [row["action"] for row in out] == ["keep", "keep"]


def test_labels_can_have_other_names():
    out = curate(["a", "b"], ["r", "c"], [0.0, 1.0], refusal_label="r", compliance_label="c")
    assert [row["action"] for row in out] == ["drop", "drop"]


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=15), data=st.data())
def test_invariant_7_top_k_drops_what_raises_the_target_most(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    order = data.draw(st.permutations(range(len(scores))))
    ids = [f"p{i:02d}" for i in order]
    values = [float(scores[i]) for i in order]
    out = curate(ids, [None] * len(ids), values, rule="top-k", k=k)
    dropped = {row["pair_id"] for row in out if row["action"] == "drop"}
    assert dropped == {p for _, p in sorted((-s, p) for p, s in zip(ids, values, strict=True))[:k]}
    for row in out:
        assert row["threshold"] == (None if k == 0 else sorted(values)[-k])


def test_messages():
    with pytest.raises(UserError, match=r"missing for 2 pairs\n  value: b, c"):
        curate(["a", "b", "c", "d"], [LABELS[0], None, float("nan"), LABELS[1]], [0.0] * 4)
    with pytest.raises(UserError, match=r"No pair has the label 'harmless-compliance'\n.*refusal"):
        curate(["a"], LABELS[:1], [0.0])
    with pytest.raises(UserError, match=r"not finite for 1 pairs\n  value: b"):
        curate(["a", "b"], LABELS, [0.0, float("nan")])
    with pytest.raises(UserError, match=r"id repeats\n  value: a"):
        curate(["a", "a"], LABELS, [0.0, 1.0])
    with pytest.raises(UserError, match="2 pairs, 1 labels, 2 scores"):
        curate(["a", "b"], LABELS[:1], [0.0, 1.0])
    with pytest.raises(UserError, match=r"value: None\n  rule:  0 <= k <= 2"):
        curate(["a", "b"], LABELS, [0.0, 1.0], rule="top-k")
    with pytest.raises(UserError, match=r"value: median\n  rule:  paper or top-k"):
        curate(["a", "b"], LABELS, [0.0, 1.0], rule="median")
