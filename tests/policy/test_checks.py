"""Numbered checks: each passes, warns and fails where its threshold says, and has its section."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planted_policy import made, planted
from taught.policy.checks import RULES, checks, measures
from taught.stats.intervals import Interval

CODES = [rule.code for rule in RULES]
DOCS = Path(__file__).parents[2] / "docs" / "checks.md"
NAN = float("nan")


def at(value: float, lo: float = NAN, hi: float = NAN) -> Interval:
    return Interval(value, lo, hi)


# For each code: values with the status that its threshold asks for.
GAIN = {"pass": at(0.2, 0.01, 0.4), "warn": at(0.2, -0.01, 0.4), "fail": at(-0.2, -0.4, -0.01)}
CASES = {
    "F01": {"pass": at(0.3, 0.1, 0.5), "warn": at(0.29, 0.1, 0.5), "fail": at(0.6, -0.01, 0.9)},
    "F02": {"pass": at(0.5, 0.1, 0.6), "warn": at(0.49, 0.1, 0.6), "fail": at(0.6, 0.0, 0.9)},
    "F03": GAIN,
    "F04": {"pass": at(1.25), "warn": at(0.7), "fail": at(2.1)},
    "F05": {"pass": at(0.1), "warn": at(0.2), "fail": at(0.3)},
    "F06": {"pass": at(2), "warn": at(1)},
    "F07": {"pass": at(0.5), "warn": at(0.49), "fail": at(0.1)},
    "F08": {"pass": at(0.8), "warn": at(0.59), "fail": at(0.4)},  # .59: the paper's
    "F09": {"pass": at(0.0), "warn": at(0.05), "fail": at(16 / 75)},  # 16 of 75: the paper's
    "F10": {"pass": at(0.9, 0.1, 1.5), "fail": at(0.9, -0.1, 1.5)},
    "F11": {"pass": at(0.25), "warn": at(0.1), "fail": at(0.0)},
    **dict.fromkeys(("F12", "F13", "F14", "F15", "F16"), GAIN),
    "F17": {"pass": at(10), "warn": at(5), "fail": at(1.9)},
}


@pytest.mark.parametrize("code", CODES)
def test_each_check_keeps_its_thresholds(code):
    rule = next(rule for rule in RULES if rule.code == code)
    for status, value in CASES[code].items():
        (found,) = checks({rule.measure: value})
        assert (found.code, found.status) == (code, status)
    (found,) = checks({rule.measure: at(NAN)})
    assert found.status == ("fail" if code in {"F01", "F02", "F10"} else "warn")


def test_calibration_slope_is_graded_either_way():
    grades = [checks({"slope": at(v)})[0].status for v in (0.8, 0.79, 0.5, 0.49, 0.0, -1.0, 2.0)]
    assert grades == ["pass", "warn", "warn", "fail", "fail", "fail", "warn"]


def test_every_code_has_its_section_with_name_threshold_and_what_to_do():
    text = DOCS.read_text(encoding="utf-8")
    assert len(set(CODES)) == len(CODES) and CODES == sorted(CODES) == list(CASES)
    assert re.findall(r"^## (F\d\d)$", text, re.M) == CODES
    sections = dict(zip(CODES, re.split(r"^## F\d\d$", text, flags=re.M)[1:], strict=True))
    for rule in RULES:
        words = " ".join(sections[rule.code].split())
        for part in (rule.name, rule.threshold, rule.action):
            assert part in words, (rule.code, part)


def graded(*data, **known):
    result, card = made(*data, **known)
    return {c.code: c.status for c in checks(measures(result, card, data[1]))}


def test_a_good_policy_passes_and_one_of_noise_fails():
    rng = np.random.default_rng(0)
    X, y, groups, ids = planted(n=240, d=2)
    known = dict(
        length=rng.integers(4, 40, 240).astype(float),
        h=rng.normal(size=(240, 4)),
        texts=[f"some words {i % 7}" for i in range(240)],
        categories=["x"] * 240,
    )
    assert set(graded(X, y, groups, ids, **known)) == set(CODES)
    assert set(graded(X, y, groups, ids, **known).values()) == {"pass"}
    noise = graded(rng.normal(size=(60, 40)), rng.normal(size=60), groups[:60])
    assert {noise[code] for code in ("F01", "F02", "F10", "F17")} == {"fail"}
    assert "pass" not in (noise["F11"], noise["F12"])
    assert "F13" not in noise  # no categories: not asked


def test_constant_behavior_fails_and_is_plain_json():
    X, _, groups, _ = planted(n=20)
    result, card = made(X, np.ones(20), groups, bootstrap=20)
    found = checks(measures(result, card, np.ones(20)))
    assert found[0].status == "fail"
    record = json.loads(json.dumps([c.to_dict() for c in found], allow_nan=False))[0]
    assert record["anchor"] == "docs/checks.md#f01" and record["value"] is None
    assert set(record) == {"code", "name", "value", "lo", "hi", "threshold", "status", "meaning", "action", "anchor"}


def test_errors_that_the_bins_expect_are_not_held_against_a_policy():
    X, y, groups, _ = planted()
    result, card = made(X, y, groups)
    by_chance = card.calibration._replace(error=at(0.1), error_by_chance=0.2)
    assert_excess(result, card, by_chance, y, 0.0)
    beyond = card.calibration._replace(error=at(0.5), error_by_chance=0.2)
    assert_excess(result, card, beyond, y, 0.3 / y.std())


def assert_excess(result, card, calibration, y, expected):
    found = measures(result, replace(card, calibration=calibration), y)
    assert found["calibration error"].value == pytest.approx(expected)
