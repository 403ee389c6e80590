"""What the stage ``clusters`` found, in sentences, for the terminal and as one flat table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from taught.report.scores import Clustered
from taught.report.stats import Estimate
from taught.report.text import common_power, count, listed, number, percent, shorten, tens
from taught.report.verdict import NOTHING, Sentence

Row = dict[str, Any]
ALPHA = 0.05
APART, HARDLY = 0.5, 0.25  # mean silhouettes: Kaufman and Rousseeuw (1990)
SAID = 5
NAME = 100


def cluster_sentences(it: Clustered) -> list[Sentence]:
    """How clear the clusters are, what they do that random examples do not, and the examples in none."""
    sentences = [_made(it.made), _influence(it)]
    if any(row["outside_share"] is not None for row in it.clusters):
        sentences.append(_outside(it.clusters))
    if it.featureless:
        some = listed(it.featureless, 20)
        found = count(len(it.featureless), "example")
        text = f"{found} without an active feature (cluster 0): {some}."
        sentences.append(Sentence("Without features", "caution", text))
    return sentences


def _made(made: Row) -> Sentence:
    value = made["silhouette"]
    found = count(made["examples"] - made["without"], "example")
    text = f"{found} in {count(made['k'], 'cluster')} by their active features"
    if value is not None:
        clear = "apart" if value > APART else "weakly apart" if value > HARDLY else "hardly apart"
        text += f", {clear} (mean silhouette {number(value)})"
    if made["clustered"] < made["sets"]:
        text += (
            f"; the tree is of {made['clustered']:,} of {made['sets']:,} different sets of "
            "features, the others went to the nearest cluster"
        )
    unclear = value is not None and value <= HARDLY
    return Sentence("Clusters", "caution" if unclear else "found", f"{text}.")


def _influence(it: Clustered) -> Sentence:
    sure = [row for row in it.influence if row["p_holm"] <= ALPHA]
    if not sure:
        text = (
            f"{NOTHING}: no cluster’s mean influence differs from that of as many random examples "
            f"(smallest corrected p {_least(it.influence, 'p_holm')})."
        )
        return Sentence("Influence", "none", text)
    text = f"Mean influence unlike that of as many random examples: {_by_target(sure)}."
    if sure[0]["matched_p_holm"] is None:
        return Sentence("Influence", "found", text)
    beyond = [row for row in sure if row["matched_p_holm"] <= ALPHA]
    if beyond:
        text += f" Also unlike random examples of the same labels: {_by_target(beyond)}."
        return Sentence("Influence", "found", text)
    text += " None is unlike random examples of the same labels: the labels may be all there is to it."
    return Sentence("Influence", "caution", text)


def _by_target(rows: Sequence[Row]) -> str:
    """``score: 1 (higher), 3 (lower); mean_y:harmless: 1 (lower)``."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        side = "higher" if row["mean"] > (row["random_lo"] + row["random_hi"]) / 2 else "lower"
        parts.setdefault(row["target"], []).append(f"{row['cluster']} ({side})")
    return "; ".join(f"{target}: cluster {', '.join(own)}" for target, own in parts.items())


def _outside(clusters: Sequence[Row]) -> Sentence:
    known = [row for row in clusters if row["outside_share"] is not None]
    sure = [row for row in known if row["outside_p_holm"] <= ALPHA]
    if not sure:
        text = (
            f"{NOTHING}: no cluster’s share of the change outside its examples’ features differs from "
            "that of as many random examples (smallest corrected p "
            f"{_least(known, 'outside_p_holm')})."
        )
        return Sentence("Interference", "none", text)
    parts = [
        f"cluster {r['cluster']} {percent(r['outside_share'])} (random examples "
        f"{percent(r['outside_random_lo'])} to {percent(r['outside_random_hi'])}, as many random "
        f"features {percent(r['outside_by_chance'])})"
        for r in sure
    ]
    text = f"Share of the change outside the examples’ own features: {listed(parts, SAID)}."
    return Sentence("Interference", "found", text)


def _least(rows: Sequence[Row], key: str) -> str:
    return number(min(row[key] for row in rows), 3)


def influence_power(rows: Sequence[tuple[Row, Row]]) -> int:
    """The power of ten of one target's table."""
    keys = ("mean", "lo", "hi", "random_lo", "random_hi")
    return common_power(row[key] for _, row in rows for key in keys)


def clusters_shown(it: Clustered) -> Iterator[RenderableType]:
    """Everything for the terminal."""
    for sentence in cluster_sentences(it):
        yield Text(f"{sentence.topic}: {sentence.text}")
    for target, rows in it.targets.items():
        yield _table(target, rows)


def _table(target: str, rows: Sequence[tuple[Row, Row]]) -> Table:
    power = influence_power(rows)
    title = Text(f"\nMean influence of an example on {target}, per step{tens(power)}")
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    heads = ("cluster", "examples", "mean", "random examples", "corrected p", "same labels", "outside")
    for head in heads:
        shown.add_column(Text(head, "dim"), justify="right")
    shown.add_column(Text("name", "dim"))
    for cluster, row in rows:
        mean = Estimate(row["mean"], row["lo"], row["hi"]).text(power=power)
        random = " to ".join(number(row[key], power=power) for key in ("random_lo", "random_hi"))
        p = (number(row[key], 3) for key in ("p_holm", "matched_p_holm"))
        cells = (
            row["cluster"],
            cluster["n_examples"],
            mean,
            random,
            *p,
            percent(cluster["outside_share"]),
            shorten(cluster["name"], NAME),
        )
        shown.add_row(*(Text(str(cell)) for cell in cells))
    return shown


def flat(it: Clustered) -> pa.Table:
    """One row for each cluster and target, with what is known of the cluster."""
    rows = []
    for examples in it.targets.values():
        for cluster, row in examples:
            facts = {key: cluster[key] for key in ("cluster", "name", "n_examples")}
            spread = {key: cluster[key] for key in cluster if key.startswith("outside_")}
            rows.append(facts | row | spread)
    return pa.Table.from_pylist(rows)
