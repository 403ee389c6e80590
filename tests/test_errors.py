"""The one error class: four lines at most, nothing of the value lost that helps."""

from __future__ import annotations

import pytest

from taught.errors import TaughtError, UserError


def test_message_says_what_value_rule_fix_in_this_order():
    error = UserError("k is odd", value=3, rule="k is even", fix="set k to 4")
    assert str(error).splitlines() == ["k is odd", "  value: 3", "  rule:  k is even", "  fix:   set k to 4"]


def test_parts_that_are_not_given_take_no_line():
    assert str(UserError("k is odd", fix="set k to 4")) == "k is odd\n  fix:   set k to 4"


@pytest.mark.parametrize("value", ["x" * 5000, "a\nb\n" * 500, list(range(5000))])
def test_a_long_value_stays_on_one_short_line(value):
    message = str(UserError("too long", value=value, rule="short", fix="cut it"))
    assert len(message.splitlines()) == 4
    assert max(map(len, message.splitlines())) < 220
    assert "…" in message


def test_false_and_zero_are_values_that_are_shown():
    assert "value: 0" in str(UserError("wrong", value=0))
    assert "value: False" in str(UserError("wrong", value=False))


def test_the_users_mistakes_exit_with_2_and_ours_with_1():
    assert UserError("x").exit_code == 2
    assert TaughtError("x").exit_code == 1
    assert isinstance(UserError("x"), TaughtError)
