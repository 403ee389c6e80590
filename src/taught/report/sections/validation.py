"""What retraining showed: methods by targets, planted examples, removal, ways of choosing examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from taught.report.blocks import Block, Cell, Column, Items, Line, Scatter, Sentence, Table, Text, Tone, Word, columns
from taught.report.charts import Point
from taught.report.examples import is_behavior, primary, targets
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.tables import Row, Rows, Tables
from taught.report.text import (
    MINUS,
    common_power,
    count,
    interval_of,
    interval_text,
    number,
    percent,
    signed,
    tens,
    words,
)
from taught.stats.intervals import Interval

LDS = (
    " LDS: rank correlation, over subsets, of the sum of the examples’ influence with what training on them changed. "
    "Controlled: given the summed response length and the counts of labels, which alone explain much of any training."
)
COEFFICIENTS = "coefficients, median"
CEILING = "noise ceiling"
OF_ONE = ("coefficient:", "prompt:")  # targets that are too many to be shown one by one
DESIGNS = {"curation": "The published way of choosing examples, and others", "curated": "What taught curate kept"}
WITH_METRICS = ("base", "removal", "addition", "curation", "curated")
SOFT = {"precision": "Precision", "recall": "Recall", "f1": "F1", "correctness": "Correctness"}
JUDGED = {"judged_positive": "Judged, positive", "judged_negative": "Judged, negative"}
UNIT = (-1.05, 1.05)
SIDES = ("raw", "controlled")


def _blocks(tables: Tables) -> Iterator[Block]:
    models = tables.rows("models")
    times = count(sum(row["design"] != "base" for row in models), "time")
    meaning = LDS if tables.rows("lds") else ""
    yield Text(f"The model was trained again {times} on chosen examples.{_start(tables, models)}{meaning}")
    yield from _pairs(tables.rows("verdicts"), tables.rows("forgetting"))
    said = curve_sentences(tables.rows("curves"), removed_by(tables))
    for effect in tables.rows("named_effects"):
        how = {"chosen": "in the place of average ones", "couples": "added to others"}[effect["design"]]
        who = f"The {effect['examples']} examples that raise {words(effect['target'])} most, {how}"
        said.append(f"{who}, change it by {_digits(effect, 'value')} ({effect['retrainings']} retrainings)")
    yield from (Text(f"{sentence}.") for sentence in said)
    yield from foreseen_blocks(tables)
    trivial = tables.rows("trivial")
    if trivial and (found := warnings(trivial, trivial[0]["method"])):
        yield Items([*found, "Look at the controlled values there."], warning=True)
    yield from lds_blocks(tables.rows("lds"), tables.rows("noise_ceiling"))
    if planted := [r for r in tables.rows("planted") if not r["target"].startswith(OF_ONE)]:
        auc = Column("AUC", "interval", plot=(-0.05, 1.05))
        made = [(r["method"], words(r["target"]), interval_of(r, "auc"), r["precision"]) for r in planted]
        n, others = planted[0]["planted"], planted[0]["others"]
        caption = f"{n} planted examples among {n + others}: area under the ROC curve (.5 by chance) with "
        caption += "95% interval; share of them among the first as many"
        yield Table(columns("Method", "Target", auc, ("Precision", "number")), made, caption, head=40)
    arms = tables.rows("arms")
    for design in dict.fromkeys(row.get("design", "curation") for row in arms):
        yield arms_table(DESIGNS[design], [row for row in arms if row.get("design", "curation") == design])
    shown = [r for r in models if r["design"] in WITH_METRICS]
    if any(r.get(key) is not None for r in shown for key in SOFT):
        judged = any(r.get("judged_positive") is not None for r in shown)
        named = SOFT | (JUDGED if judged else {})
        power = {key: common_power(r.get(key) for r in shown) for key in named}
        metrics = [Column(name, "number", 3, power=power[key]) for key, name in named.items()]
        measured = [(r["design"], r["subset"], r["n_examples"], *(r.get(key) for key in named)) for r in shown]
        caption = "Soft metrics of the retrained models, with p = exp(y) as degree of the behavior"
        caption += "; judged: share of the group’s prompts whose answer shows the behavior" if judged else ""
        yield Table(columns("Design", "Trained on", ("n", "number", 0), *metrics), measured, caption)
    if costs := tables.rows("costs"):
        parts = (f"{r['method']} {number(r['seconds'], 0)} s, {number(r['memory_gb'], 1)} GB" for r in costs)
        yield Text(f"Time and peak memory: {'; '.join(parts)}.", "note")


def _start(tables: Tables, models: Rows) -> str:
    """From which weights, and what became of the loss there."""
    trained = [row for row in models if row["design"] not in ("base", "unlearn")]
    losses = [(row.get("loss_before"), row.get("loss_after")) for row in trained]
    if not losses or any(loss is None for both in losses for loss in both):
        return ""
    before, after = map(number, np.mean(np.array(losses, float), 0))
    said = f" Each training began at the weights of {tables.start} and brought the loss of its examples from {before}"
    return (
        f"{said} to {after} on the mean. Is that the model before it saw them? Otherwise leaving some out says little."
    )


def foreseen_blocks(tables: Tables) -> Iterator[Block]:
    """Predicted against measured change of every retraining, for the target that examples were chosen by."""
    rows = [row for row in tables.rows("foreseen") if row["target"] == removed_by(tables)]
    if not rows:
        return
    kind_of = [("named, " if row["named"] else "") + row["design"] for row in rows]
    kinds = list(dict.fromkeys(kind_of))
    power, up = (common_power(row[name] for row in rows) for name in ("predicted", "measured"))
    points = []
    for row, kind in zip(rows, kind_of, strict=True):
        said = f"{kind} {row['subset']}: {count(row['left_out'], 'example')} left out"
        points.append(Point(row["predicted"] / 10.0**power, row["measured"] / 10.0**up, kinds.index(kind), -1, said))
    target = words(removed_by(tables))
    axes = (f"Predicted: minus the influence of what was left out{tens(power)}", f"Measured: {target}{tens(up)}")
    caption = f"Each mark is a training: {target} after it, from the base model, against what leaving its examples out "
    caption += "was to do. Points that rise to the right were foreseen."
    title = f"Predicted and measured change of {target}, {count(len(points), 'training')}"
    yield Scatter(points, axes, title, caption, sums=False, kinds=kinds)


def removed_by(tables: Tables) -> str:
    """The target whose strongest examples were left out, or trained on alone: the choice of the stage."""
    named = tables.setting("validation.remove_by") or tables.setting("curation.target")
    behaviors = [name for name in targets(tables) if is_behavior(name)]
    negative = f"behavior:{tables.setting('prompts.negative_group')}"
    return str(named or (negative if negative in behaviors else next(iter(behaviors), primary(tables))))


# How well methods foresaw the outcomes


def lds_blocks(rows: Sequence[Row], ceilings: Sequence[Row] = ()) -> Iterator[Block]:
    """LDS design by design and target by target; coefficients come down to their median.

    A method that knew the outcome but for the noise of training would reach the ceiling (raw).
    """
    for design in dict.fromkeys(row["subsets"] for row in rows):
        some = [row for row in rows if row["subsets"] == design]
        yield Text(f"{some[0]['n']} {design} subsets, controlled for {some[0]['controls']}", "title")
        noise = {row["target"]: row for row in ceilings if row["subsets"] == design}
        for target in dict.fromkeys(row["target"] for row in some):
            if not target.startswith(OF_ONE):
                own = [r for r in some if r["target"] == target and r["raw"] is not None]
                made = [(r["method"], *(interval_of(r, k, f"{k}_lo", f"{k}_hi") for k in SIDES)) for r in own]
                if limit := noise.get(target):
                    made.append((CEILING, Interval(limit["ceiling"], limit["lo"], limit["hi"]), None))
                yield _lds_table(f"{words(target)}, 95% bootstrap intervals over subsets", made)
        medians: list[Sequence[Cell]] = []
        coefficients = [row for row in some if row["target"].startswith("coefficient:")]
        for method in dict.fromkeys(row["method"] for row in coefficients if row["raw"] is not None):
            own = [row for row in coefficients if row["method"] == method]
            known = ([row[name] for row in own if row[name] is not None] for name in SIDES)
            medians.append((method, *(Interval(median(values)) if values else None for values in known)))
        if medians:
            yield _lds_table(COEFFICIENTS, medians)


def _lds_table(caption: str, rows: Sequence[Sequence[Cell]]) -> Table:
    heads = columns("Method", *(Column(name, "interval", plot=UNIT) for name in ("Raw", "Controlled")))
    return Table(heads, rows, caption, head=20)


def warnings(rows: Sequence[Row], method: str) -> list[str]:
    """A sentence for every target on which a trivial predictor does as well as the method."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["explained"] and row["method"] == method and not row["target"].startswith(OF_ONE):
            found.setdefault((row["target"], row["subsets"]), []).append(row)
    sentences = []
    for (target, design), some in found.items():
        best = max(some, key=lambda row: abs(row["trivial_lds"] or 0.0))
        sentences.append(
            f"{words(target)}, {design} subsets: {best['trivial']} alone predicts about as well as "
            f"{method} ({signed(best['trivial_lds'])} against {signed(best['lds'])})"
        )
    return sentences


# What retraining did


def curve_sentences(points: Sequence[Row], target: str) -> list[str]:
    """One for every budget, and of several budgets one for the area of the curve."""
    sentences = []
    for design in dict.fromkeys(point["design"] for point in points):
        some = [point for point in points if point["design"] == design]
        sentences += [removal_sentence(point, target) for point in some]
        if len(some) > 1:
            area = _digits(some[0], "area", "area_lo", "area_hi")
            sentences.append(f"Over these {len(some)} budgets the mean difference ({design}) is {area}")
    return sentences


def removal_sentence(point: Row, target: str) -> str:
    """What training without, or with only, the named examples did, against random ones as many."""
    how = "without" if point["design"] == "removal" else "only on"
    return (
        f"Training {how} the {point['budget']} examples ({percent(point['share'])}) that raise "
        f"{words(target)} most moves it by {_digits(point, 'difference')} against as many random ones"
    )


def _digits(row: Row, value: str, lo: str = "lo", hi: str = "hi") -> str:
    """A value with its interval: two digits that count, whatever the size."""
    value, lo, hi = (f"{row[key]:+.2g}".replace("-", MINUS) for key in (value, lo, hi))
    return f"{value} [{lo}, {hi}]"


# Named documents against random ones of the same topic and size


def _pairs(rows: Rows, runs: Rows) -> Iterator[Block]:
    """A plot of the differences a design, kind of documents and budget, with the verdicts; then what was stopped."""
    for design, arm, k in dict.fromkeys((row["design"], row["arm"], row["documents"]) for row in rows):
        some = [row for row in rows if (row["design"], row["arm"], row["documents"]) == (design, arm, k)]
        power = common_power(row["difference"] for row in some)
        made = []
        for row in some:
            foreseen = "a rise" if row["foreseen"] > 0 else "a fall"
            if row["predicted"] is not None:
                foreseen = signed(row["predicted"], power=power)
            said = words(row["target"]), row["verdict"], interval_of(row, "difference"), foreseen
            made.append((*said, *(row[key] for key in ("p_bh", "p_holm", "rank_biserial", "p_draw"))))
        difference = Column("Named minus random", "interval", power=power, plot="fit")
        heads = columns("Change of", "Verdict", difference, "Influence foresees", ("p (BH)", "p"), ("p (Holm)", "p"))
        heads += columns(("Rank-biserial", "signed"), ("p of the draw", "p"))
        caption = f"{_pair_words(some[0])}: change against random ones of the same topic and size, "
        yield Table(heads, made, caption + count(some[0]["pairs"], "pair"), head=20)
    if rows:
        least = rows[0]["least_p"]
        few = f". So few pairs give no p below {number(least, 3)}: nothing can be called supported"
        text = (
            "Differences with their 95% interval by Student’s t; p is one-sided, and corrected for all rows of a kind. "
            "Supported: p (BH) below .05, and the interval beyond 0 on the side that influence foresees. Not "
            "supported: on the other side, or all of it smaller than what influence foresees. p of the draw: how often "
            f"a random set would look like the named one{few if least >= 0.05 else ''}."
        )
        yield Text(text, "note")
    if stopped := [run for run in runs if run["stopped"]]:
        first = stopped[0]
        why = f"{first['subset']}, pair {first['repeat'] + 1}: {first['stopped']}"
        yield Items([f"{len(stopped)} of {count(len(runs), 'run')} of unlearning stopped early. {why}."], warning=True)


def _pair_words(row: Row) -> str:
    done = {"unlearn": "Forgetting", "teach": "Training on"}[row["design"]]
    most = {"highest": "most", "lowest": "least"}[row["arm"]]
    return f"{done} the {count(row['documents'], 'document')} that raise {words(row['named_by'])} {most}"


def pair_sentence(rows: Rows) -> Sentence | None:
    """What the check of the documents that were named says of the target that they were named by; None without one."""
    own = [row for row in rows if row["arm"] == "highest" and row["target"] == row["named_by"]]
    if not own:
        return None
    said = [
        f"{_pair_words(row)} moves it by {_digits(row, 'difference')} against random ones of the same topic and size "
        f"(p {row['p_bh']:.2g}): {row['verdict']}"
        for row in own
    ]
    found = {row["verdict"] for row in own}
    tone: Tone = "found" if found == {"supported"} else "none" if found == {"not supported"} else "caution"
    return Sentence("Named documents", tone, "; ".join(said) + ".")


# Ways of choosing examples


def arms_table(design: str, rows: Sequence[Row]) -> Table:
    """Arms by metrics: value with its interval, difference to random with its own."""
    arms = {row["arm"]: row["examples"] for row in rows}
    of = {(row["arm"], row["metric"]): row for row in rows}
    made = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        power = common_power(of[arm, metric]["value"] for arm in arms)
        line: list[Cell] = [f"{words(metric) if is_behavior(metric) else metric}{tens(power)}"]
        for cell in (of[arm, metric] for arm in arms):
            said: list[Cell] = [interval_text(interval_of(cell), 3, power=power)]
            if gap := interval_of(cell, "difference", "difference_lo", "difference_hi"):
                mark = "*" if cell["p_holm"] is not None and cell["p_holm"] < 0.05 else ""
                ends = interval_text(gap, 3, power=power).partition(" ")[2]
                said.append(Word(f"{signed(gap.value, 3, power=power)}{mark} {ends}", "soft"))
            line.append(Line(said, "\n"))
        made.append(line)
    caption = (
        f"{design}: each metric [95%, prompts]; below it the difference to random examples [95%, prompts and runs], "
        "* where it is told from 0 after Holm’s correction"
    )
    heads = columns("Metric", *((f"{arm}, {count(n, 'example')}", "number") for arm, n in arms.items()))
    return Table(heads, made, caption)


# The verdict


def _sentences(tables: Tables) -> list[Sentence | None]:
    retrained = retraining_sentence(tables.rows("curves"), removed_by(tables))
    retrained = retrained or kept_sentence(tables.rows("arms"), removed_by(tables))
    return [retrained, pair_sentence(tables.rows("verdicts")), foreseen_sentence(tables.rows("lds"))]


def retraining_sentence(curves: Rows, target: str) -> Sentence | None:
    """What training without the named examples did, at the first budget; None if it was not tried."""
    point = next((row for row in curves if row["design"] == "removal"), None)
    if point is None:
        return None
    return _retrained(removal_sentence(point, target), point["lo"], point["hi"])


def kept_sentence(arms: Rows, target: str) -> Sentence | None:
    """What training on what was kept did to a behavior, beside as many random examples; None if it was not tried."""
    kept = next((r for r in arms if r["arm"] == "kept" and r["metric"] == target), None)
    if kept is None:
        return None
    said = f"Training on the {count(kept['examples'], 'example')} that are kept moves {words(target)} by "
    said += f"{_digits(kept, 'difference', 'difference_lo', 'difference_hi')} against as many random ones"
    return _retrained(said, kept["difference_lo"], kept["difference_hi"])


def _retrained(said: str, lo: float, hi: float) -> Sentence:
    """What retraining did; where its interval includes 0, that nothing was found."""
    if lo <= 0 <= hi:
        return Sentence("Retraining", "none", f"{NOTHING}: {said[0].lower()}{said[1:]}.")
    return Sentence("Retraining", "found", f"{said}.")


def foreseen_sentence(lds: Rows) -> Sentence | None:
    """How well the run's own method foresaw what retraining did; None if it was not compared."""
    own = [r for r in lds if r["method"] == lds[0]["method"] and not r["target"].startswith(OF_ONE)]
    pairs = [(r, interval_of(r, "raw", "raw_lo", "raw_hi")) for r in own]
    known = [(r, e) for r, e in pairs if e is not None]
    if not known:
        return None
    said = "; ".join(f"{words(r['target'])} {interval_text(e)} ({r['subsets']})" for r, e in known[:4])
    sure = any(e.lo > 0 for _, e in known)
    text = f"Rank correlation of {own[0]['method']} with what retraining on subsets did: {said}."
    return Sentence("Checked", "found" if sure else "caution", text)


add(Section("validation", "Validation", ("models",), _blocks, _sentences, overview=True))
