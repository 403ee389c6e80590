"""Examples grouped by their active features; what each group does beside as many random examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from taught.report.blocks import (
    Block,
    Column,
    Details,
    Example,
    Feature,
    Items,
    Line,
    Sentence,
    Table,
    Text,
    Word,
    columns,
)
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.tables import Row, Rows, Tables
from taught.report.text import clean, common_power, count, interval_of, listed, number, percent, shorten, words

ALPHA = 0.05
APART, HARDLY = 0.5, 0.25  # mean silhouettes: Kaufman and Rousseeuw (1990)
SAID = 5
MAX_FEATURELESS = 1000


@dataclass(frozen=True, eq=False)
class Clustered:
    """What the stage ``clusters`` wrote; text has lost control characters.

    Attributes
    ----------
    clusters, influence : rows of the tables clusters and cluster_influence
    made : clusters.json
    featureless : ids of the examples on which no feature is active
    """

    clusters: Rows
    influence: Rows
    made: Row
    featureless: list[str]

    @classmethod
    def read(cls, tables: Tables) -> Clustered:
        """Of a run in which the stage is complete."""
        none = tables.columns("cluster_members", ["example_id"], pc.field("cluster") == 0)
        without = [] if none is None else [clean(example) for example in none["example_id"].to_pylist()]
        return cls(tables.rows("clusters"), tables.rows("cluster_influence"), tables.json("clusters"), without)

    @property
    def targets(self) -> dict[str, list[tuple[Row, Row]]]:
        """Target -> for each cluster its row and its influence on the target."""
        own = {row["cluster"]: row for row in self.clusters}
        found: dict[str, list[tuple[Row, Row]]] = {}
        for row in self.influence:
            found.setdefault(row["target"], []).append((own[row["cluster"]], row))
        return found

    @property
    def spread(self) -> bool:
        """Whether shares outside the examples' own features are known."""
        return any(row["outside_share"] is not None for row in self.clusters)

    def flat(self) -> pa.Table:
        """One row for each cluster and target, with what is known of the cluster."""
        rows = []
        for cluster, row in chain.from_iterable(self.targets.values()):
            facts = {key: cluster[key] for key in ("cluster", "name", "n_examples")}
            rows.append(facts | row | {key: cluster[key] for key in cluster if key.startswith("outside_")})
        return pa.Table.from_pylist(rows)


def _blocks(tables: Tables) -> Iterator[Block]:
    it = Clustered.read(tables)
    yield Text(
        "Examples grouped by the policy’s features that are active on them. Each cluster stands beside as many random "
        "examples: does it do what these do not do?"
    )
    yield Items([sentence.text for sentence in cluster_sentences(it)])
    heads = columns(("Cluster", "number", 0), "Features", ("Examples", "number", 0))
    if it.spread:
        heads += columns(("Outside", "percent"), "Random examples", ("Corrected p", "p"))
    caption = (
        "Clusters, the largest first, named by the features of the largest lift (share of its examples, and of the "
        "others, on which the feature is active)."
    )
    if it.spread:
        caption += " Outside: share of the change of coefficients on features that are not active on the example."
    made = []
    for r in it.clusters:
        named = []
        for f in r["features"]:
            shares = Word(f" {percent(f['inside'])} against {percent(f['outside'])}", "soft")
            named.append(Line((Feature(f["feature_id"], shorten(f["label"] or "", 60)), shares)))
        outside = [r["outside_share"], _outside_random(r), r["outside_p_holm"]] if it.spread else []
        nearest = Line([Example(i) for i in r["examples"]], ", ")
        made.append([r["cluster"], Line(named, "\n") if named else r["name"], r["n_examples"], *outside, nearest])
    yield Table([*heads, Column("Nearest to its mean")], made, caption)
    for target, rows in it.targets.items():
        yield _influence_table(target, rows, tables.per)
    if it.featureless:
        some = Line([Example(i) for i in it.featureless[:MAX_FEATURELESS]], ", ")
        rest = " and others, all in cluster_members.parquet" if len(it.featureless) > MAX_FEATURELESS else ""
        title = f"{count(len(it.featureless), 'example')} without an active feature (cluster 0)"
        yield Details(title, [Text(Line((some, rest)))])
    yield Text(
        "Corrected p: two-sided, against as many random examples, by Holm’s method over all clusters and targets; for "
        "the share outside over all clusters. Same labels: the same p against random examples with as many of each "
        "label, since features go with labels.",
        "note",
    )


def _outside_random(row: Row) -> str:
    return f"{percent(row['outside_random_lo'])} to {percent(row['outside_random_hi'])}"


def _influence_table(target: str, rows: Sequence[tuple[Row, Row]], per: str) -> Table:
    keys = ("mean", "lo", "hi", "random_lo", "random_hi")
    power = common_power(row[key] for _, row in rows for key in keys)
    made = []
    for c, r in rows:
        random = " to ".join(number(r[key], power=power) for key in ("random_lo", "random_hi"))
        name, mean = shorten(c["name"], 80), interval_of(r, "mean")
        made.append((c["cluster"], name, mean, random, r["p_holm"], r["matched_p_holm"]))
    heads = columns(("Cluster", "number", 0), "Name", Column("Mean", "interval", power=power, plot="fit"))
    heads += columns("Random examples", ("Corrected p", "p"), ("Same labels", "p"))
    caption = f"Mean influence of an example on {words(target)}, {per}, with 95% bootstrap intervals over examples"
    return Table(heads, made, caption)


def cluster_sentences(it: Clustered) -> list[Sentence]:
    """How clear the clusters are, what they do that random examples do not, and the examples in none."""
    made, value = it.made, it.made["silhouette"]
    found = count(made["examples"] - made["without"], "example")
    text = f"{found} in {count(made['k'], 'cluster')} by their active features"
    if value is not None:
        clear = "apart" if value > APART else "weakly apart" if value > HARDLY else "hardly apart"
        text += f", {clear} (mean silhouette {number(value)})"
    if made["clustered"] < made["sets"]:
        text += f"; the tree is of {made['clustered']:,} of {made['sets']:,} different sets of features, the others "
        text += "went to the nearest cluster"
    unclear = value is not None and value <= HARDLY
    sentences = [Sentence("Clusters", "caution" if unclear else "found", f"{text}."), _influence(it)]
    if it.spread:
        sentences.append(_outside(it.clusters))
    if it.featureless:
        found = count(len(it.featureless), "example")
        text = f"{found} without an active feature (cluster 0): {listed(it.featureless, 20)}."
        sentences.append(Sentence("Without features", "caution", text))
    return sentences


def _influence(it: Clustered) -> Sentence:
    sure = [row for row in it.influence if row["p_holm"] <= ALPHA]
    if not sure:
        text = f"{NOTHING}: no cluster’s mean influence differs from that of as many random examples "
        return Sentence("Influence", "none", f"{text}(smallest corrected p {_least(it.influence, 'p_holm')}).")
    text = f"Mean influence unlike that of as many random examples: {_by_target(sure)}."
    if sure[0]["matched_p_holm"] is None:
        return Sentence("Influence", "found", text)
    if beyond := [row for row in sure if row["matched_p_holm"] <= ALPHA]:
        text += f" Also unlike random examples of the same labels: {_by_target(beyond)}."
    else:
        text += " None is unlike random examples of the same labels: the labels may be all there is to it."
    return Sentence("Influence", "found" if beyond else "caution", text)


def _by_target(rows: Sequence[Row]) -> str:
    """``S: cluster 1 (higher), 3 (lower); behavior on harmless: cluster 1 (lower)``."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        side = "higher" if row["mean"] > (row["random_lo"] + row["random_hi"]) / 2 else "lower"
        parts.setdefault(row["target"], []).append(f"{row['cluster']} ({side})")
    return "; ".join(f"{words(target)}: cluster {', '.join(own)}" for target, own in parts.items())


def _outside(clusters: Sequence[Row]) -> Sentence:
    known = [row for row in clusters if row["outside_share"] is not None]
    sure = [row for row in known if row["outside_p_holm"] <= ALPHA]
    if not sure:
        text = (
            f"{NOTHING}: no cluster’s share of the change outside its examples’ features differs from that of as many "
            f"random examples (smallest corrected p {_least(known, 'outside_p_holm')})."
        )
        return Sentence("Interference", "none", text)
    parts = [
        f"cluster {r['cluster']} {percent(r['outside_share'])} (random examples "
        f"{_outside_random(r)}, as many random features {percent(r['outside_by_chance'])})"
        for r in sure
    ]
    text = f"Share of the change outside the examples’ own features: {listed(parts, SAID)}."
    return Sentence("Interference", "found", text)


def _least(rows: Sequence[Row], key: str) -> str:
    return number(min(row[key] for row in rows), 3)


add(Section("clusters", "Clusters", ("coefficients", "clusters", "cluster_influence"), _blocks))
