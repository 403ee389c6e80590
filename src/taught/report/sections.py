"""What each section shows, as plain values for the template; None while its files are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from taught.analysis.interference import top_offenders
from taught.report import charts, text
from taught.report.charts import Point, Scale
from taught.report.clustered import cluster_sentences, influence_power
from taught.report.compared import (
    Cell,
    DesignTable,
    arm_table,
    arms_by_design,
    curve_sentences,
    design_tables,
    differs,
    effect_sentence,
    warnings,
)
from taught.report.conceptual import AGREE
from taught.report.stats import Estimate, mean_interval
from taught.report.strips import Strip, strips
from taught.report.strongest import STRONGEST
from taught.report.verdict import AGREEMENTS, baselines, curation_change, rank_table, scored, trivial_correlations
from taught.report.view import Row, Rows, View

Json = dict[str, Any]

MAX_PROMPT = 320
WITH_METRICS = ("base", "removal", "addition", "curation", "curated")
FOREST = (6.0, 234.0)
METRIC = {"adam": "of Adam", "ekfac": "in the metric of EK-FAC"}  # by attribution.curvature
SOFT = {"precision": "Precision", "recall": "Recall", "f1": "F1", "correctness": "Correctness"}
JUDGED = {"judged_positive": "Judged, positive", "judged_negative": "Judged, negative"}
PREDICTORS = {
    "group": "group label",
    "category": "category label",
    "length": "prompt length",
    "direction": "difference of the groups’ mean residuals",
    "words": "words of the prompt",
}


def sections(view: View) -> Json:
    """Collect all sections."""
    return {
        "head": _head(view),
        "policy": _policy_section(view),
        "trust": _trust_section(view),
        "clamp": _clamp_section(view),
        "audit": _audit_section(view),
        "examples": _examples_section(view),
        "pathways": _pathways_section(view),
        "features": _features_section(view),
        "interference": _interference_section(view),
        "clusters": _clusters_section(view),
        "concepts": _concepts_section(view),
        "trivial": _trivial_section(view),
        "curation": _curation_section(view),
        "validation": _validation_section(view),
        "method": _method_section(view),
        "provenance": _provenance_section(view),
    }


def _head(view: View) -> Json:
    """The facts at the top: name and what went in."""
    study, facts = view.study, []
    model = (study.get("model") or {}).get("id")
    if model:
        facts.append(("Model", str(model)))
    prefixes = (study.get("behavior") or {}).get("prefixes") or []
    if prefixes:
        facts.append(("Behavior", "answer begins " + " or ".join(f"“{p}”" for p in prefixes)))
    if view.prompts is not None:
        sizes = [f"{sum(p['group'] == g for p in view.prompts):,} {g}" for g in view.groups]
        facts.append(("Prompts", ", ".join(sizes)))
    if view.coefficients is not None:
        facts.append(("Features", f"{len(view.coefficients)}"))
    if view.summary is not None:
        facts.append(("Examples", f"{len(view.scores):,}"))
    return {"name": view.name, "facts": facts}


def _policy_section(view: View) -> Json | None:
    """Fit beside trivial predictors, and the forest plot of the coefficients."""
    if view.coefficients is None:
        return None
    rows = sorted(view.coefficients, key=lambda r: -abs(r["coef"]))
    estimates = [Estimate(r["coef"], r["lo"], r["hi"]) for r in rows]
    scale = Scale(*charts.span(estimates), *FOREST)
    unsure = sum(e.includes_zero for e in estimates)
    return {
        "rows": list(zip(rows, estimates, strict=True)),
        "scale": scale,
        "axis": charts.forest_axis(scale),
        "unsure": unsure,
        "fit": _fit_rows(view.policy or {}),
        "fit_scale": (unit := Scale(-0.05, 1.05, *FOREST)),
        "fit_axis": charts.forest_axis(unit),
        "warnings": [
            w["message"] if isinstance(w, dict) else str(w) for w in (view.policy or {}).get("warnings") or []
        ],
    }


def _fit_rows(policy: Row) -> list[tuple[str, str, Estimate]]:
    named = [("R²", "policy", Estimate.of(policy.get("r2")))]
    named += [("R²", name, e) for name, e in baselines(policy)]
    named.append(("Rank correlation", "policy", Estimate.of(policy.get("spearman"))))
    named.append(("Accuracy", "policy, thresholded", Estimate.of(policy.get("accuracy"))))
    named.append(("Accuracy", "larger class always", Estimate.of(policy.get("majority"))))
    return [(measure, of, e) for measure, of, e in named if e is not None]


def _trust_section(view: View) -> Json | None:
    """The numbered checks, predictors without features, sets of prompts, and safe ranks."""
    card = view.faithfulness
    if card is None:
        return None
    found = [(name, Estimate.of(row["r2"]), Estimate.of(row["gain"])) for name, row in card["predictors"].items()]
    known = [(name, r2, gain) for name, r2, gain in found if r2 and gain]
    scale = Scale(*charts.span([gain for *_, gain in known]), *FOREST)
    return {
        "checks": [(check, Estimate.of(check)) for check in card["checks"]],
        "counts": [sum(c["status"] == s for c in card["checks"]) for s in ("pass", "warn", "fail")],
        "needed": Estimate.of(card["features"]["needed"]),
        "share": card["features"]["share"],
        "d": card["signs"]["n"],
        "predictors": [(PREDICTORS.get(name, name), r2, gain) for name, r2, gain in known],
        "scale": scale,
        "axis": charts.forest_axis(scale),
        "sets": card["sets"],
        "ranks": rank_table(view.statements) if view.statements else None,
    }


def _clamp_section(view: View) -> Json | None:
    """What editing each feature does to the behavior, beside its coefficient."""
    if view.clamp is None or view.clamping is None:
        return None
    rows = sorted(view.clamp, key=lambda r: -abs(r["coef"]))
    slopes = [Estimate.of([r["slope"], r["lo"], r["hi"]]) for r in rows]
    scale = Scale(*charts.span([e for e in slopes if e]), *FOREST)
    agreed = [
        (AGREEMENTS[name], found["n"], *(Estimate.of(found[key]) for key in ("same_sign", "spearman", "size")))
        for name, found in view.clamping["agreement"].items()
    ]
    return {
        "it": view.clamping,
        "agreed": agreed,
        "rows": [(r, e, [d["value"] for d in r["doses"] or []]) for r, e in zip(rows, slopes, strict=True)],
        "labels": {r["feature_id"]: view.feature_label(r["feature_id"]) for r in rows},
        "scale": scale,
        "axis": charts.forest_axis(scale),
    }


def _audit_section(view: View) -> Json | None:
    if view.audit is None:
        return None
    rank = {group: i for i, group in enumerate(view.groups)}
    rows = sorted(view.audit, key=lambda r: (rank.get(r["group"], 99), not r["uncovered"], r["gap"] or 0.0))
    estimates = [Estimate.of([r["gap"], r["lo"], r["hi"]]) for r in rows]
    scale = Scale(*charts.span([e for e in estimates if e]), *FOREST)
    return {"rows": list(zip(rows, estimates, strict=True)), "scale": scale, "axis": charts.forest_axis(scale)}


def _examples_section(view: View) -> Json | None:
    """Rows of the example table, strongest first, and the powers of ten of its columns."""
    if view.summary is None:
        return None
    rows = view.shown
    category = {p["example_id"]: p.get("category") for p in view.examples or []}
    means = [k for k in rows[0] if k.startswith("mean_y_")] if rows else []
    return {
        "rows": rows,
        "total": len(view.scores),
        "strongest": STRONGEST,
        "category": category,
        "labels": sorted({str(r["label"]) for r in rows}),
        "categories": sorted({str(category.get(r["example_id"]) or "") for r in rows} - {""}),
        "means": [(k, k.removeprefix("mean_y_")) for k in means],
        "power": text.common_power(r["score"] for r in rows),
        "mean_power": text.common_power(r[k] for r in rows for k in means),
        "largest": max((abs(r["score"]) for r in rows if r["score"] is not None), default=1.0),
        "unscored": len(view.scores) - len(view.scores.finite),
        "flagged": view.scores.unintended,
        "strips": _example_strips(view),
    }


def _example_strips(view: View) -> list[tuple[str, int | None, list[Strip]]]:
    """Example id, place in the page, and its strips: the score, then each group's mean y."""
    found: dict[str, list[Strip]] = {}
    for strip in strips(view.token_shares or []):
        found.setdefault(strip.example_id, []).append(strip)
    index = {r["example_id"]: i for i, r in enumerate(view.shown)}
    return [(example, index.get(example), own) for example, own in found.items()]


def _kinds(view: View) -> dict[str, int]:
    return {name: i for i, name in enumerate(sorted(view.scores.names))}


def _pathways_section(view: View) -> Json | None:
    if not scored(view.summary or []):
        return None
    rows, kinds = view.shown, _kinds(view)
    power = text.common_power(r[k] for r in rows for k in ("score_x", "score_y"))
    unit = 10.0**power
    points = [
        Point(
            r["score_x"] / unit,
            r["score_y"] / unit,
            kinds[str(r["label"])],
            i,
            f"{r['example_id']} ({r['label']}): x {text.signed(r['score_x'], power=power)}, "
            f"y {text.signed(r['score_y'], power=power)}{text.tens(power)}",
        )
        for i, r in enumerate(rows)
        if scored([r])
    ]
    names = (f"x: feature activation{text.tens(power)}", f"y: output probability{text.tens(power)}")
    title = f"Scatter of the two pathways of the score for {len(points)} examples"
    means = _label_means(view, kinds)
    power = text.common_power(v for *_, e in means for v in (e.value, e.lo, e.hi))
    means = [(*of, e.scaled(10.0**-power)) for *of, e in means]
    scale = Scale(*charts.span([e for *_, e in means]), FOREST[0], 150.0)
    return {
        "chart": charts.scatter(points, names, title),
        "even": charts.one_scale(points),
        "means": means,
        "scale": scale,
        "axis": charts.forest_axis(scale),
        "power": power,
    }


def _label_means(view: View, kinds: dict[str, int]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for label, kind in kinds.items():
        if label not in view.scores.finite.names:
            continue
        for key, name in (("score", "S"), ("score_x", "x"), ("score_y", "y")):
            own = view.scores.finite.own(label, key)
            estimate = mean_interval(own)
            if estimate is not None:
                found.append((charts.legend_mark(kind), label, name, len(own), estimate))
    return found


def _features_section(view: View) -> list[Json] | None:
    if view.coefficients is None:
        return None
    rows = sorted(view.coefficients, key=lambda r: -abs(r["coef"]))
    measured = {f["feature_id"]: f for f in view.features or []}
    prompts = {p["prompt_id"]: p for p in view.prompts or []}
    index = {r["example_id"]: i for i, r in enumerate(view.shown)}
    return [_card(view, row, measured.get(row["feature_id"], {}), prompts, index) for row in rows]


def _card(view: View, row: Row, measured: Row, prompts: dict[str, Row], index: dict[str, int]) -> Json:
    feature = row["feature_id"]
    label = (view.labels or {}).get(feature, {})
    return {
        "row": row,
        "estimate": Estimate(row["coef"], row["lo"], row["hi"]),
        "measured": measured,
        "source": label.get("label_source"),
        "top": _examples(label.get("top_prompts"), prompts),
        "contrast": _examples(label.get("contrast_prompts"), prompts),
        "tokens": label.get("top_tokens") or [],
        "movers": _movers(view, feature, index),
    }


def _examples(records: Rows | None, prompts: dict[str, Row]) -> list[tuple[str, str, str, float | None]]:
    found = []
    for record in records or []:
        prompt = prompts.get(record["prompt_id"], {})
        words = text.shorten(str(prompt.get("text", "")), MAX_PROMPT)
        found.append((record["prompt_id"], str(prompt.get("category") or ""), words, record.get("activation")))
    return found


def _movers(view: View, feature: int, index: dict[str, int]) -> Json | None:
    """The three examples that raise a coefficient most and the three that lower it most."""
    shifts = view.shifts
    if shifts is None or feature not in shifts.feature_ids:
        return None
    j = shifts.feature_ids.index(feature)
    total = shifts.total[:, j]
    order = np.argsort(-total)
    chosen = [i for i in order[:3] if total[i] > 0] + [i for i in order[-3:] if total[i] < 0]
    rows = [
        (shifts.example_ids[i], index.get(shifts.example_ids[i]), total[i], shifts.x[i, j], shifts.y[i, j])
        for i in chosen
    ]
    return {"rows": rows, "power": text.common_power(float(r[2]) for r in rows)}


def _interference_section(view: View) -> Json | None:
    if view.comovement is None or not view.summary:
        return None
    r, ids = view.comovement.values, view.comovement.rows
    order = view.comovement_order
    r, ids = r[np.ix_(order, order)], [ids[i] for i in order]
    return {
        "chart": charts.heatmap(r, [str(i) for i in ids], f"Co-movement of {len(ids)} features over examples"),
        "strongest": _strongest(view, r, ids),
        "offenders": _offenders(view),
        "control": view.control,
    }


def _strongest(view: View, r: np.ndarray, ids: list[int]) -> list[tuple[int, str, int, str, float]]:
    rows, columns = np.triu_indices(len(ids), 1)
    values = np.nan_to_num(r[rows, columns])
    order = [k for k in np.argsort(-np.abs(values))[:12] if values[k]]
    found = [(ids[rows[k]], ids[columns[k]], float(values[k])) for k in order]
    return [(a, view.feature_label(a), b, view.feature_label(b), v) for a, b, v in found]


def _offenders(view: View) -> list[tuple[int, Row]]:
    """Flagged examples with the largest coefficient shift outside their intended features."""
    index = {r["example_id"]: i for i, r in enumerate(view.shown)}
    return [(index[r["example_id"]], r) for r in top_offenders(view.shown, 10)]


def _clusters_section(view: View) -> Json | None:
    """Each cluster beside as many random examples: on every target, and outside its features."""
    it = view.clustered
    if it is None:
        return None
    targets = []
    for name, rows in it.targets.items():
        power = influence_power(rows)
        known = [Estimate(r["mean"], r["lo"], r["hi"]).scaled(10.0**-power) for _, r in rows]
        scale = Scale(*charts.span(known), *FOREST)
        shown = [(c, r, e) for (c, r), e in zip(rows, known, strict=True)]
        targets.append({"name": name, "rows": shown, "power": power, "scale": scale, "axis": charts.forest_axis(scale)})
    return {
        "it": it,
        "targets": targets,
        "sentences": cluster_sentences(it),
        "index": {r["example_id"]: i for i, r in enumerate(view.shown)},
        "spread": any(r["outside_share"] is not None for r in it.clusters),
    }


def _concepts_section(view: View) -> Json | None:
    """For each concept the strongest examples by every method, where methods differ, and strips."""
    if view.concepts is None:
        return None
    label = {r["example_id"]: str(r["label"]) for r in view.summary or []}
    return {
        "found": view.concepts,
        "agree": AGREE,
        "label": label,
        "index": {r["example_id"]: i for i, r in enumerate(view.shown)},
    }


def _trivial_section(view: View) -> Json | None:
    if not view.summary:
        return None
    scale = Scale(-1.05, 1.05, *FOREST)
    return {"rows": trivial_correlations(view.scores), "scale": scale, "axis": charts.forest_axis(scale)}


def _curation_section(view: View) -> Json | None:
    if view.curation is None:
        return None
    return {
        "it": view.curation,
        "change": curation_change(view.curating) if view.curating else None,
        "index": {r["example_id"]: i for i, r in enumerate(view.shown)},
        "power": text.common_power([view.curation.largest]),
    }


def _validation_section(view: View) -> Json | None:
    """LDS of every method by design and target, planted examples, removal; None without retrainings.

    Shown target by target, the ten coefficients as their median (without interval).
    """
    if view.lds is None and view.curves is None and view.models is None:
        return None
    unit = Scale(-1.05, 1.05, *FOREST)
    target = (view.study.get("validation") or {}).get("remove_by") or ""
    return {
        "designs": [(table, _lds_rows(table)) for table in design_tables(view.lds or [], view.noise_ceiling or [])],
        "scale": unit,
        "axis": charts.forest_axis(unit),
        "warnings": warnings(view.trivial, view.trivial[0]["method"]) if view.trivial else [],
        "planted": [
            (r, Estimate(r["auc"], r["lo"], r["hi"]))
            for r in view.planted or []
            if not r["target"].startswith("coefficient")
        ],
        "chance": (chance := Scale(-0.05, 1.05, *FOREST)),
        "chance_axis": charts.forest_axis(chance),
        "removal": curve_sentences(view.curves or [], target)
        + [effect_sentence(effect) for effect in view.named_effects or []],
        "arms": [_arms(design, rows) for design, rows in arms_by_design(view.arms or []).items()],
        **_models(view),
        "retrained": sum(row["design"] != "base" for row in view.models or []),
        "costs": view.costs or [],
    }


def _arms(design: str, rows: Sequence[Json]) -> Json:
    """Arms by metrics: value with its interval, difference to random with its own."""
    arms, metrics = arm_table(rows)

    def ends(cell: Json, power: int, *names: str) -> str:
        return f"[{', '.join(text.number(cell[name], 3, power=power) for name in names)}]"

    def gap(cell: Json, power: int) -> tuple[str | None, str]:
        value = cell["difference"]
        return (
            None if value is None else text.signed(value, 3, power=power),
            ends(cell, power, "difference_lo", "difference_hi"),
        )

    return {
        "design": design,
        "arms": arms,
        "rows": [
            (
                metric,
                power,
                [
                    (
                        text.number(cell["value"], 3, power=power),
                        ends(cell, power, "lo", "hi"),
                        *gap(cell, power),
                        differs(cell),
                    )
                    for cell in cells
                ],
            )
            for metric, power, cells in metrics
        ],
    }


def _models(view: View) -> Json:
    """Soft metrics of the models of some designs; the judge's shares where answers were read."""
    rows = [r for r in view.models or [] if r["design"] in WITH_METRICS]
    judged = any(r["judged_positive"] is not None for r in rows)
    named = {**SOFT, **(JUDGED if judged else {})}
    powers = {key: text.common_power(r[key] for r in rows) for key in named}
    return {
        "judged": judged,
        "metrics": [(name, powers[key]) for key, name in named.items()],
        "models": [(r, [text.number(r[key], 3, power=power) for key, power in powers.items()]) for r in rows],
    }


def _lds_rows(table: DesignTable) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Target by target: each method with its raw and its controlled estimate."""
    return [
        (name, [(method, *map(_estimate, _two(cells[k]))) for method, cells in table.rows if cells[k].raw is not None])
        for k, name in enumerate(table.targets)
    ]


def _two(cell: Cell) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return ((cell.raw, *(cell.raw_ends or (None, None))), (cell.controlled, *(cell.controlled_ends or (None, None))))


def _estimate(numbers: tuple[Any, ...]) -> Estimate | None:
    return Estimate.of(list(numbers))


def _method_section(view: View) -> Json:
    study = view.study
    keys = (
        ("sae", "encoder"),
        ("sae", "block"),
        ("readout", "position"),
        ("features", "threshold"),
        ("features", "max_features"),
        ("policy", "alpha"),
        ("policy", "intercept"),
        ("policy", "folds"),
        ("policy", "bootstrap"),
        ("attribution", "estimator"),
        ("attribution", "curvature"),
        ("attribution", "lr"),
    )
    values = ((f"{a}.{b}", (study.get(a) or {}).get(b)) for a, b in keys)
    settings = [(k, str(v).lower() if v is True or v is False else str(v)) for k, v in values if v is not None]
    spec = study.get("attribution") or {}
    metric = METRIC.get(spec.get("curvature", "identity"))
    step = f"one step {metric}" if metric else "one plain SGD step"
    points = len(spec.get("checkpoints") or [])
    if points:
        step += f" from each of {text.count(points, 'checkpoint')}, added up,"
    return {
        "settings": settings,
        "metric": metric,
        "lr": "lr that of each checkpoint" if points else f"lr = {spec.get('lr', 'lr')}",
        "step": step,
    }


def _provenance_section(view: View) -> Json:
    stages = view.manifest.get("stages") or {}
    elsewhere = {"study", "stages", "command", "inputs", "files"}
    rest = {k: v for k, v in view.manifest.items() if k not in elsewhere}
    files = {f"file · {n}": f["sha256"] for n, f in (view.manifest.get("files") or {}).items()}
    commands = [view.manifest.get("command"), *(s.get("command") for s in stages.values())]
    return {
        "commands": list(dict.fromkeys(str(c) for c in commands if c)),
        "stages": stages,
        "records": [*_flat(rest), *files.items()],
        "study": yaml.safe_dump(view.study, sort_keys=False, allow_unicode=True),
    }


def _flat(record: Row, prefix: str = "") -> Any:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}", str(value)
