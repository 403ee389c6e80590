"""Which response tokens carry an example's influence: a strip of tokens, shaded by their shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taught.report.text import amount, common_power, signed

Row = Mapping[str, Any]
LEVELS = 8  # classes of the style sheet
NAMED = 3
REJECTED = "\n[rejected] "


@dataclass(frozen=True)
class Token:
    """One token of a strip.

    Attributes
    ----------
    text : as the tokenizer gives it; a line feed also shows as an arrow
    shade : classes of the style sheet: side (up, down) and level; empty for hardly any share
    number : its share, with the sign
    """

    text: str
    shade: str
    number: str


@dataclass(frozen=True)
class Strip:
    """The response tokens of an example and what they add to its influence on one target."""

    example_id: str
    target: str
    tokens: tuple[Token, ...]
    total: str
    largest: str


def strips(rows: Iterable[Row]) -> list[Strip]:
    """One strip for each example and target, in the order of the rows of token_shares.parquet."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["example_id"], row["target"]), []).append(row)
    return [_strip(*key, sorted(own, key=lambda r: r["position"])) for key, own in found.items()]


def _strip(example_id: str, target: str, rows: Sequence[Row]) -> Strip:
    shares = [float(row["share"]) for row in rows]
    largest, total = max(map(abs, shares)), math.fsum(shares)
    power = common_power([*shares, total])
    second = next((row["position"] for row in rows if row.get("answer")), None)  # of a preference the rejected answer
    tokens = []
    for row, share in zip(rows, shares, strict=True):
        text = (REJECTED if row["position"] == second else "") + row["token"].replace("\n", "↵\n")
        level = round(LEVELS * abs(share) / largest) if largest else 0
        shade = f"{'up' if share > 0 else 'down'} s{level}" if level else ""
        tokens.append(Token(text, shade, signed(share, power=power)))
    strongest = sorted(range(len(rows)), key=lambda j: -abs(shares[j]))[:NAMED]
    named = ", ".join(f"“{tokens[j].text.strip() or '␣'}” {tokens[j].number}" for j in strongest)
    return Strip(example_id, target, tuple(tokens), amount(total, power), named)
