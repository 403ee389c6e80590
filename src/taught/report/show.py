"""A run in the terminal: the verdict and the strongest rows, or one example or feature in detail.

All text from data is put in :class:`rich.text.Text`, which parses no markup, and lost its control
characters when the run was read, so that it can neither style nor steer the terminal.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from taught.errors import UserError
from taught.report.stats import Estimate
from taught.report.text import common_power, count, number, percent, shorten, signed, tens
from taught.report.verdict import rank_table, scored, verdict
from taught.report.view import Row, Rows, View, load_view
from taught.run.folder import RunFolder

TOP = 5
TOP_FEATURES = 10
STYLES = {"found": "", "none": "dim", "caution": "yellow"}
NEXT = (
    ("coefficients", "taught policy STUDY"),
    ("summary", "taught attribute STUDY"),
    ("curation", "taught curate RUN"),
)


def show_run(run: RunFolder | Path | str, item: str | None = None) -> RenderableType:
    """What a run says, ready for a rich console.

    Parameters
    ----------
    run
        A run folder or its path.
    item
        The id of an example or of a feature, for its details. None: the whole run.

    Raises
    ------
    UserError
        The folder is not a run, or no example or feature has this id (close ids are named).
    """
    view = load_view(run, also=[] if item is None else [item])
    if item is None:
        return _overview(view)
    found: list[RenderableType] = []
    example = next((r for r in view.summary or [] if r["example_id"] == item), None)
    if example is not None:
        found.append(_example(view, example))
    feature = next((r for r in view.coefficients or [] if str(r["feature_id"]) == item), None)
    if feature is not None:
        found.append(_feature(view, feature))
    if not found:
        raise _unknown(view, item)
    return Group(*found)


def show_answers(answers: pa.Table, target: str, top: int) -> RenderableType:
    """The strongest examples of ``taught ask``, with the share that is more than two errors from 0."""
    rows = answers.slice(0, top).to_pylist()
    values, errors = answers["total"].to_numpy(), answers["se"].to_numpy()
    power = common_power([row["total"] for row in rows])
    clear = int((np.abs(values) > 2 * errors).sum())
    title = f"{target}: change per step{tens(power)}; {clear} of {len(values)} examples are more than "
    table = _table(title + "two standard errors from 0", "example", "label", ">x", ">y", ">total", ">error")
    for row in rows:
        effects = (_sign(row[key], power=power) for key in ("x", "y", "total"))
        _add(table, row["example_id"], row["label"], *effects, number(row["se"] / 10**power, 2))
    return table


def _unknown(view: View, item: str) -> UserError:
    ids = [str(r["example_id"]) for r in view.summary or []]
    ids += [str(r["feature_id"]) for r in view.coefficients or []]
    near = difflib.get_close_matches(item, ids, n=5, cutoff=0.5)
    return UserError(
        "No example or feature has this id",
        value=item,
        rule=f"the id of one of {count(len(view.scores), 'example')}, or of a feature",
        fix="close ids: " + ", ".join(near) if near else "taught show RUN lists the strongest",
    )


def _overview(view: View) -> RenderableType:
    parts: list[RenderableType] = [Text(view.name, "bold"), _verdict(view)]
    if view.summary:
        parts.append(_top_examples(view.summary))
    if view.coefficients:
        parts.append(_top_features(view.coefficients))
    if view.audit:
        parts.append(_audit(view.audit))
    if view.faithfulness:
        parts.append(_checks(view.faithfulness["checks"]))
    if view.clamp and view.clamping:
        parts.append(_clamped(view.clamp, view.clamping))
    if view.statements:
        parts.append(_ranks(view.statements))
    missing = [command for name, command in NEXT if getattr(view, name) is None]
    parts += [Text(f"Not there yet: {command} makes it.", "dim") for command in missing]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _verdict(view: View) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for sentence in verdict(view):
        table.add_row(Text(sentence.topic, "bold"), Text(sentence.text, STYLES[sentence.tone]))
    return table


def _table(title: str, *columns: str) -> Table:
    """A table whose columns are right-aligned where the name starts with ``>``."""
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(Text(name.lstrip(">"), "dim"), justify="right" if name.startswith(">") else "left")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def _sign(value: float | None, digits: int = 2, power: int = 0) -> Text:
    style = "" if not value else "blue" if value > 0 else "yellow"
    return Text(signed(value, digits, power=power), style)


def _top_examples(summary: Rows) -> Table:
    rows = sorted(scored(summary), key=lambda r: -r["score"])
    power = common_power(r["score"] for r in rows)
    top = rows[:TOP] + rows[max(TOP, len(rows) - TOP) :]
    table = _table(
        f"Strongest examples (S, x and y per step{tens(power)})",
        "example",
        "label",
        ">S",
        ">x",
        ">y",
        ">outside",
        "acts on",
    )
    for r in top:
        flag = " unintended" if r["unintended"] else ""
        scores = (_sign(r[k], power=power) for k in ("score", "score_x", "score_y"))
        _add(table, r["example_id"], r["label"], *scores, percent(r["outside_share"]), f"{r['dominant_feature']}{flag}")
    return table


def _top_features(coefficients: Rows) -> Table:
    rows = sorted(coefficients, key=lambda r: -abs(r["coef"]))[:TOP_FEATURES]
    table = _table("Strongest features", "feature", ">coefficient", "95% interval", ">same sign", "label")
    for r in rows:
        ends = f"{signed(r['lo'])} to {signed(r['hi'])}"
        _add(table, r["feature_id"], _sign(r["coef"]), ends, percent(r["sign_stability"]), r["label"] or "")
    return table


def _audit(audit: Rows) -> Table:
    table = _table("Coverage by category", "category", "group", ">n", ">mean y", ">gap", ">adjusted p", "")
    for r in sorted(audit, key=lambda r: (not r["uncovered"], r["gap"] or 0.0)):
        mark = Text("uncovered", "bold yellow") if r["uncovered"] else ""
        figures = (r["n"], number(r["mean_y"]), _sign(r["gap"]), number(r["p_adjusted"], 3))
        _add(table, r["category"], r["group"], *figures, mark)
    return table


def _checks(checks: Rows) -> Table:
    """Every check of the policy; what to do where it does not pass."""
    table = _table(
        "Can the policy be trusted? (docs/checks.md)", "code", "check", ">value", "passes", "status", "to do"
    )
    for c in checks:
        value, passed = Estimate.of(c), c["status"] == "pass"
        status = c["status"] if passed else Text(c["status"], "bold yellow")
        shown = "–" if value is None else value.text()
        _add(table, c["code"], c["name"], shown, c["threshold"], status, "" if passed else c["action"])
    return table


def _clamped(rows: Rows, clamping: Row) -> Table:
    """The strongest features' slopes beside their coefficients."""
    scales = clamping["scales"]
    title = "What the strongest features do when scaled in the model (change of y)"
    table = _table(title, "feature", ">coefficient", ">slope", *(f">{s:g}x" for s in scales), ">adjusted p")
    active = (row for row in rows if row["n"])
    for r in sorted(active, key=lambda r: -abs(r["coef"]))[:TOP_FEATURES]:
        line = Estimate(r["slope"], r["lo"], r["hi"]).text()
        doses = (_sign(dose["value"]) for dose in r["doses"])
        _add(table, r["feature_id"], _sign(r["coef"]), line, *doses, number(r["p_adjusted"], 3))
    return table


def _ranks(statements: Rows) -> Table:
    """Whether the k strongest examples stay the k strongest, for each ranking."""
    sizes, rows = rank_table(statements)
    title = "Do the k strongest examples stay the k strongest? (share of resampled prompts)"
    table = _table(title, "by", *(f"k = {k}" for k in sizes))
    for name, cells in rows:
        _add(table, name, *cells)
    return table


def _example(view: View, row: Row) -> RenderableType:
    example = next((p for p in view.examples or [] if p["example_id"] == row["example_id"]), {})
    power = common_power(row[k] for k in ("score", "score_x", "score_y"))
    parts: list[RenderableType] = [Text(f"{row['example_id']}  ({row['label']})", "bold")]
    facts = [
        f"S {signed(row['score'], power=power)}, x {signed(row['score_x'], power=power)}, "
        f"y {signed(row['score_y'], power=power)}{tens(power)} per step" + _error(row, power),
        f"loss {number(row['loss'])}, {count(row['n_response'], 'response token')}",
        f"{percent(row['outside_share'])} of the change on features that it is not about; "
        f"acts mainly on {row['dominant_feature']}{' (unintended)' if row['unintended'] else ''}",
    ]
    if row.get("step_score") is not None:
        facts.append(
            f"a real step moves S by {signed(row['step_score'], power=power)}, an exact refit by "
            f"{signed(row['refit_score'], power=power)}{tens(power)}"
        )
    facts += _certificate(view, row, power)
    parts += [Text(fact) for fact in facts]
    for name in ("prompt", "response"):
        if example.get(name):
            parts += [Text(f"\n{name.capitalize()}", "dim"), Text(shorten(example[name], 1500))]
    parts += _example_coefficients(view, row) + _example_moves(view, row)
    return Group(*parts)


def _certificate(view: View, row: Row, power: int) -> list[str]:
    """What the certificate says of the linear value, where dX of the example is known."""
    own = next((c for c in view.certificates or [] if c["example_id"] == row["example_id"]), {})
    if own.get("score_bound") is None:
        return []
    bound = number(own["score_bound"], power=power)
    return [
        f"on the derivative's changes an exact refit moves S by {signed(own['refit'], power=power)}"
        f"; the linear value cannot be further off than {bound}{tens(power)}"
    ]


def _error(row: Row, power: int) -> str:
    """The standard error of S, where there is one."""
    se = row.get("score_se")
    return "" if se is None else f" (standard error of S {number(se, power=power)})"


def _example_coefficients(view: View, row: Row) -> list[RenderableType]:
    if view.shifts is None or row["example_id"] not in view.shifts.example_ids:
        return []
    i = view.shifts.example_ids.index(row["example_id"])
    x, y = view.shifts.x[i], view.shifts.y[i]
    order = np.argsort(-np.abs(x + y))[:TOP_FEATURES]
    power = common_power(float(x[j] + y[j]) for j in order)
    table = _table(f"\nCoefficients that move most{tens(power)}", "feature", ">total", ">x", ">y", "", "label")
    for j in order:
        feature = view.shifts.feature_ids[j]
        mark = "intended" if feature in (row["intended"] or []) else ""
        values = (_sign(float(v), power=power) for v in (x[j] + y[j], x[j], y[j]))
        _add(table, feature, *values, mark, view.feature_label(feature))
    return [table]


def _example_moves(view: View, row: Row) -> list[RenderableType]:
    if view.effects is None or row["example_id"] not in view.effects.rows:
        return []
    dy = view.effects.values[view.effects.rows.index(row["example_id"])]
    order = np.argsort(-dy)
    texts = {p["prompt_id"]: str(p["text"]) for p in view.prompts or []}
    power = common_power(dy.tolist())
    table = _table(f"\nPrompts whose y moves most{tens(power)}", ">change", "prompt", "text")
    for j in dict.fromkeys([*order[:TOP].tolist(), *order[-TOP:].tolist()]):
        prompt = view.effects.columns[j]
        _add(table, _sign(float(dy[j]), power=power), prompt, shorten(texts.get(prompt, ""), 100))
    return [table]


def _feature(view: View, row: Row) -> RenderableType:
    feature = row["feature_id"]
    label = (view.labels or {}).get(feature, {})
    estimate = Estimate(row["coef"], row["lo"], row["hi"])
    parts: list[RenderableType] = [
        Text(f"Feature {feature}  {row['label'] or ''}", "bold"),
        Text(f"coefficient {estimate.text()}, same sign in {percent(row['sign_stability'])} of resamples"),
    ]
    measured = next((f for f in view.features or [] if f["feature_id"] == feature), None)
    if measured:
        positive, negative = (number(measured[f"mean_{k}"]) for k in ("positive", "negative"))
        means = f"{positive} in the positive, {negative} in the negative"
        parts.append(Text(f"mean activation {means} group; active on {percent(measured['rate'])} of prompts"))
    parts += _doses(view, feature)
    parts += _examples("Prompts where it is strongest", label.get("top_prompts") or [], view)
    parts += _examples("Contrast: without it", label.get("contrast_prompts") or [], view)
    return Group(*parts, *_movers(view, feature))


def _doses(view: View, feature: int) -> list[RenderableType]:
    """Response of the behavior to the feature at each scale."""
    row = next((r for r in view.clamp or [] if r["feature_id"] == feature and r["n"]), None)
    if row is None:
        return []
    line = Estimate(row["slope"], row["lo"], row["hi"])
    head = (
        f"\nScaled in the model on {count(row['n'], 'prompt')}: slope {line.text()}, against "
        f"random directions p = {number(row['p_adjusted'], 3)} (adjusted)"
    )
    table = _table("", ">scale", ">change of y", "95% interval")
    for dose in row["doses"]:
        ends = f"{signed(dose['lo'])} to {signed(dose['hi'])}"
        _add(table, f"{dose['scale']:g}x", _sign(dose["value"]), ends)
    return [Text(head), table]


def _examples(title: str, records: Sequence[Row], view: View) -> list[RenderableType]:
    if not records:
        return []
    texts = {p["prompt_id"]: str(p["text"]) for p in view.prompts or []}
    table = _table(f"\n{title}", ">activation", "prompt", "text")
    for record in records:
        text = shorten(texts.get(record["prompt_id"], ""), 120)
        _add(table, number(record.get("activation")), record["prompt_id"], text)
    return [table]


def _movers(view: View, feature: int) -> list[RenderableType]:
    if view.shifts is None or feature not in view.shifts.feature_ids:
        return []
    j = view.shifts.feature_ids.index(feature)
    total = view.shifts.total[:, j]
    order = np.argsort(-np.abs(total))[:TOP]
    power = common_power(total[order].tolist())
    table = _table(f"\nExamples that move it most{tens(power)}", "example", ">total", ">x", ">y")
    for i in order:
        values = (total[i], view.shifts.x[i, j], view.shifts.y[i, j])
        _add(table, view.shifts.example_ids[i], *(_sign(float(v), power=power) for v in values))
    return [table]
