"""The two pathways of the score: feature activation against output probability."""

from __future__ import annotations

from collections.abc import Iterator

from taught.report.blocks import Beside, Block, Scatter, Text
from taught.report.charts import Point
from taught.report.examples import PRIMARY, Summary, scored, shown
from taught.report.sections import Section, add
from taught.report.sections.certainty import label_table
from taught.report.tables import Tables
from taught.report.text import amount, common_power, signed, tens

PATHS = (PRIMARY, "score:x", "score:y")


def _blocks(tables: Tables) -> Iterator[Block]:
    summary, rows = Summary.read(tables), scored(shown(tables), PRIMARY)
    if not rows:
        yield Text("No example has a score.")
        return
    kinds = {name: i for i, name in enumerate(sorted(summary.names))}
    power = common_power(r[k] for r in rows for k in ("score:x", "score:y"))
    place = {r["example_id"]: i for i, r in enumerate(shown(tables))}
    points = []
    for r in rows:
        x, y = r["score:x"], r["score:y"]
        said = f"{r['example_id']} ({r['label']}): x {signed(x, power=power)}, y {amount(y, power)}"
        points.append(Point(x / 10.0**power, y / 10.0**power, kinds[r["label"]], place[r["example_id"]], said))
    axes = (f"x: feature activation{tens(power)}", f"y: output probability{tens(power)}")
    caption = "Each mark is an example. Above the dashed line S = x + y is positive, below it negative."
    chart = Scatter(points, axes, f"Scatter of the two pathways of the score for {len(points)} examples", caption)
    text = (
        "An example reaches the policy by two pathways. x, feature activation: training changes how strongly the "
        "features fire. y, output probability: it changes the probability of the behavior while the features stay."
    )
    yield Beside([chart], [Text(text), label_table(summary, PATHS, kinds)])


add(Section("pathways", "Pathways", ("coefficients", "summary"), _blocks))
