"""Features that move together, and examples that act mainly on features that they are not about."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from taught.analysis.interference import top_offenders
from taught.report.blocks import Beside, Block, Example, Feature, Heatmap, Sentence, Table, Text, columns
from taught.report.detail import feature_labels, ordered_comovement
from taught.report.examples import shifts, shown
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.stats import Control, unintended_control
from taught.report.tables import Tables
from taught.report.text import count, interval_text, number, percent, shorten

OFFENDERS = 10
CO_MOVEMENTS = 12


def _blocks(tables: Tables) -> Iterator[Block]:
    found = ordered_comovement(tables)
    assert found is not None
    ids, r = found
    if it := control(tables):
        yield Text(
            f"{it.flagged} of {count(it.n, 'example')} act mainly on a feature that they are not about. Random "
            f"features of the same number: {interval_text(it.random, 0)}. With the intended features of another "
            f"example: {number(it.swapped, 0)}."
        )
    caption = "Correlation over examples of the coefficients’ changes; neighbours are clustered."
    yield Heatmap(r, [str(i) for i in ids], f"Co-movement of {len(ids)} features over examples", caption)
    heads = columns("Example", ("Outside", "percent"), ("Dominant feature", "id"), ("Its share", "percent"))
    rows = [
        (Example(row["example_id"]), row["outside_share"], Feature(row["dominant_feature"]), row["dominant_share"])
        for row in top_offenders(shown(tables), OFFENDERS)
    ]
    caption = "Top offenders: flagged examples with the largest change outside their intended features"
    offenders = Table(heads, rows, caption, empty="No example is flagged.")
    one, other = np.triu_indices(len(ids), 1)
    values = np.nan_to_num(r[one, other])
    order = [k for k in np.argsort(-np.abs(values))[:CO_MOVEMENTS] if values[k]]
    labels = feature_labels(tables)

    def feature(place: int) -> Feature:
        return Feature(ids[place], shorten(labels.get(ids[place], ""), 60))

    made = [(feature(one[k]), feature(other[k]), float(values[k])) for k in order]
    heads = columns(("Feature", "id"), ("Feature", "id"), ("r", "signed"))
    yield Beside([Table(heads, made, "Strongest co-movements")], [offenders])


def control(tables: Tables) -> Control | None:
    """Examples that act mainly on unintended features, against chance; None without all shifts."""
    moved = shifts(tables)
    if moved is None or tables.listed is not None:
        return None
    intended = {row["example_id"]: row["intended"] or [] for row in tables.rows("summary")}
    sets = [intended.get(example, []) for example in moved.example_ids]
    return tables.once("control", lambda: unintended_control(moved.feature_ids, moved.total, sets))


def unintended_sentence(control: Control) -> Sentence:
    """How many examples act mainly on features that they are not about."""
    text = (
        f"{control.flagged} of {count(control.n, 'example')} ({percent(control.flagged / control.n)}) act mainly on a "
        f"feature that they are not about; random features of the same number would give "
        f"{interval_text(control.random, 0)}"
    )
    if control.random.lo <= control.flagged <= control.random.hi:
        return Sentence("Interference", "none", f"{NOTHING}: {text}, which is no different.")
    side = "fewer" if control.flagged < control.random.value else "more"
    text += f", so {side} than chance. With the intended features of another example it would be "
    return Sentence("Interference", "found", f"{text}{number(control.swapped, 0)}.")


def _sentences(tables: Tables) -> list[Sentence]:
    return [unintended_sentence(it)] if (it := control(tables)) else []


add(Section("interference", "Interference", ("coefficients", "summary", "comovement"), _blocks, _sentences))
