"""One example, or one feature, in detail: for the page's data block and for ``taught show RUN ID``."""

from __future__ import annotations

from typing import Any

import numpy as np

from taught.report.blocks import Beside, Block, Column, Example, Excerpt, Excerpts, Facts, Pre, Table, Text, columns
from taught.report.examples import PRIMARY, SE, primary, shifts, shown, summary_schema, targets, texts
from taught.report.stats import cluster_order
from taught.report.tables import Floats, Matrix, Row, Rows, Tables, once
from taught.report.text import (
    amount,
    clean,
    common_power,
    interval_of,
    interval_text,
    number,
    percent,
    read_interval,
    shorten,
    signed,
    tens,
    words,
)

Json = dict[str, Any]
MAX_TEXT = 4000
MAX_PROMPT = 320
TOP_COEFFICIENTS = 10
TOP_PROMPTS = 4
MAX_TARGETS = 12


def with_pathways(tables: Tables) -> list[str]:
    """The first targets of the summary, each followed by its pathways where it has them."""
    there = {clean(name) for name in summary_schema(tables).names}
    names = [name for target in targets(tables) for name in (target, f"{target}:x", f"{target}:y") if name in there]
    return names[:MAX_TARGETS]


def effects(tables: Tables) -> Matrix | None:
    """Changes of the behavior on every prompt by the listed examples."""
    return tables.matrix("prompt_effects", "dy", ("example_ids", "prompt_ids"))


@once
def ordered_comovement(tables: Tables) -> tuple[list[int], Any] | None:
    """Features and their co-movement, those that move together side by side."""
    found = tables.matrix("comovement", "r", ("feature_ids", "feature_ids"))
    if found is None:
        return None
    order = cluster_order(found.values)
    return [found.rows[i] for i in order], found.values[np.ix_(order, order)]


@once
def prompt_texts(tables: Tables) -> dict[str, Row]:
    """Prompt id -> its row."""
    return {p["prompt_id"]: p for p in tables.rows("prompts")}


@once
def feature_labels(tables: Tables) -> dict[int, str]:
    """Feature id -> its label, of the policy's features."""
    return {r["feature_id"]: str(r.get("label") or "") for r in tables.rows("coefficients")}


# The page


def page_data(tables: Tables) -> Json:
    """What the script needs for the example drawer and the read-out of the heat map."""
    rows = shown(tables)
    if not rows:
        return {"examples": []}
    names, prompts = with_pathways(tables), dict[str, int]()
    examples = []
    for row in rows:
        example = texts(tables).get(row["example_id"], {})
        moves = [(prompts.setdefault(p, len(prompts)), dy) for p, dy in _moves(tables, row["example_id"])]
        record = {
            "id": row["example_id"],
            "label": row["label"],
            "category": str(example.get("category") or ""),
            "source": str(example.get("source") or ""),
            "values": [row[name] for name in names],
            "loss": row.get("loss"),
            "n": row.get("n_scored"),
            "intended": row.get("intended") or [],
            "dominant": row.get("dominant_feature"),
            "unintended": bool(row.get("unintended")),
            "prompt": shorten(str(example.get("prompt", "")), MAX_TEXT),
            "response": shorten(str(example.get("response", "")), MAX_TEXT),
            "rejected": shorten(str(example.get("rejected") or ""), MAX_TEXT),
            "top": _coefficients(tables, row["example_id"]),
            "moves": moves,
        }
        examples.append(record)
    said = [(p, prompt_texts(tables).get(p, {})) for p in prompts]
    data: Json = {
        "examples": examples,
        "targets": [[words(name), common_power(row[name] for row in rows)] for name in names],
        "prompts": [[p, str(t.get("group", "")), shorten(str(t.get("text", "")), MAX_PROMPT)] for p, t in said],
        "features": {str(feature): label for feature, label in feature_labels(tables).items()},
        "powers": {"W": 0, "y": 0},
    }
    if (moved := shifts(tables)) is not None:
        data["powers"]["W"] = common_power(np.abs(moved.total).max(1).tolist())
    if (dy := effects(tables)) is not None:
        data["powers"]["y"] = common_power(np.abs(dy.values).max(1).tolist())
    if (found := ordered_comovement(tables)) is not None:
        data["heat"] = {"ids": found[0], "r": np.nan_to_num(found[1]).round(2).tolist()}
    return data


def _coefficients(tables: Tables, example: str) -> list[tuple[int, float, float]]:
    """The coefficients that an example moves most, along both pathways."""
    moved = shifts(tables)
    if moved is None or (found := moved.of(example)) is None:
        return []
    x, y = found
    order = np.argsort(-np.abs(x + y))[:TOP_COEFFICIENTS]
    return [(moved.feature_ids[j], float(x[j]), float(y[j])) for j in order]


def _moves(tables: Tables, example: str) -> list[tuple[str, float]]:
    """Prompts whose behavior an example raises most, and those where it lowers it most."""
    found = effects(tables)
    if found is None or example not in found.rows:
        return []
    dy = np.nan_to_num(found.values[found.rows.index(example)])
    return [(found.columns[j], float(dy[j])) for j in _both_ends(dy, TOP_PROMPTS)]


def _both_ends(values: Floats, k: int) -> list[int]:
    """Places of the k values that are most above 0, then of those below it, the lowest last."""
    order = np.argsort(-values)
    return [j for j in order[:k] if values[j] > 0] + [j for j in order[-k:] if values[j] < 0]


# An example


def example_blocks(tables: Tables, row: Row) -> list[Block]:
    """Everything that the run says of one example."""
    example, text = row["example_id"], texts(tables).get(row["example_id"], {})
    blocks: list[Block] = [Text(f"{example}  ({row['label']})", "title"), Facts(_facts(tables, row), "list")]
    said = [(name, str(text[name])) for name in ("prompt", "response", "rejected") if text.get(name)]
    blocks += [Pre(shorten(words_, 1500), name.capitalize()) for name, words_ in said]
    if moved := _coefficients(tables, example):
        power = common_power(x + y for _, x, y in moved)
        own, known = row.get("intended") or [], feature_labels(tables)
        changes_ = (Column(c, "signed", power=power) for c in ("total", "x", "y"))
        rows = [(f, x + y, x, y, "intended" if f in own else "", known.get(f, "")) for f, x, y in moved]
        heads = columns(("feature", "id"), *changes_, "", "label")
        blocks.append(Table(heads, rows, "Coefficients that move most"))
    if moves := _moves(tables, example):
        prompts = prompt_texts(tables)
        changes = [Excerpt(dy, str(prompts.get(p, {}).get("text", "")), about=p, change=True) for p, dy in moves]
        blocks.append(Excerpts("Prompts whose behavior moves most", changes, common_power(dy for _, dy in moves)))
    return blocks


def _facts(tables: Tables, row: Row) -> list[tuple[str, str]]:
    """An example's values, and what stands beside them: interference, real steps, the certificate of the score."""
    facts = []
    for name in with_pathways(tables):
        power, se = common_power([row[name]]), row.get(name + SE)
        error = "" if se is None else f" (standard error {number(se, power=power)})"
        facts.append((words(name), f"{amount(row[name], power)} {tables.per}{error}"))
    facts.append(("loss", f"{number(row.get('loss'))} over {number(row.get('n_scored'), 0)} tokens"))
    if row.get("dominant_feature") is not None:
        mark = " (unintended)" if row["unintended"] else ""
        share = f"{percent(row['outside_share'])} of the change on features that it is not about"
        facts.append(("acts mainly on", f"{row['dominant_feature']}{mark}; {share}"))
    power = common_power([row.get("step_score"), row.get("refit_score")])
    for name, key, of in (("a real step", "step_score", primary(tables)), ("an exact refit", "refit_score", PRIMARY)):
        if row.get(key) is not None:
            facts.append((f"{name} moves {words(of)} by", amount(row[key], power)))
    own = next((c for c in tables.rows("certificates") if c["example_id"] == row["example_id"]), {})
    if own.get("score_bound") is not None:  # dX of the example is known
        power = common_power([row["score"]])
        text = f"on the derivative's changes an exact refit moves S by {signed(own['refit'], power=power)}"
        bound = f"the linear value cannot be further off than {number(own['score_bound'], power=power)}{tens(power)}"
        facts.append(("certificate", f"{text}; {bound}"))
    return facts


# A feature


def feature_blocks(tables: Tables, row: Row) -> list[Block]:
    """Everything that the run says of one feature: its card on the page."""
    feature = row["feature_id"]
    label = tables.json("labels").get(str(feature), {})
    facts: list[tuple[str, Any]] = [
        ("Coefficient", interval_of(row, "coef")),
        ("Same sign", f"{percent(row['sign_stability'])} of resamples"),
    ]
    measured = next((f for f in tables.rows("features") if f["feature_id"] == feature), None)
    if measured:
        facts += [(f"Mean, {side} group", number(measured[f"mean_{side}"])) for side in ("positive", "negative")]
        always = "; always on" if measured["always_on"] else ""
        facts.append(("Active on", f"{percent(measured['rate'])} of prompts{always}"))
    if label.get("label_source"):
        facts.append(("Label from", label["label_source"]))
    tokens = []
    for t in label.get("top_tokens") or []:
        parts = t if "before" in t else t | split(str(t["token"]), str(t.get("context") or ""))
        tokens.append(Excerpt(t.get("activation"), parts["before"], parts["token"], parts["after"]))
    blocks: list[Block] = [Facts(facts)]
    scaled = next((r for r in tables.rows("clamp") if r["feature_id"] == feature and r["n"]), None)
    if scaled is not None:  # response of the behavior to the feature at each scale
        caption = (
            f"Scaled in the model on {scaled['n']} prompts: slope {interval_text(interval_of(scaled, 'slope'))}, "
            f"against random directions p = {number(scaled['p_adjusted'], 3)} (adjusted)"
        )
        doses = [(f"{d['scale']:g}×", read_interval(d)) for d in scaled["doses"]]
        blocks.append(Table(columns("scale", ("change of y", "interval")), doses, caption))
    top = Excerpts("Prompts where it is strongest", _prompts(tables, label.get("top_prompts")))
    without = _prompts(tables, label.get("contrast_prompts") or label.get("contrastive_prompts"))
    blocks.append(Excerpts("Top tokens in context", tokens))
    blocks.append(Beside([top], [Excerpts("Contrast: without it", without)]))
    if (moved := shifts(tables)) is not None and feature in moved.feature_ids:
        j = moved.feature_ids.index(feature)
        values, chosen = (moved.total, moved.x, moved.y), _both_ends(moved.total[:, j], 3)
        rows = [(Example(moved.example_ids[i]), *(float(v[i, j]) for v in values)) for i in chosen]
        power = common_power(float(moved.total[i, j]) for i in chosen)
        heads = columns("Example", *(Column(c, "signed", power=power) for c in ("Change", "x", "y")))
        blocks += [Table(heads, rows, "Examples that move this coefficient most")] if rows else []
    return blocks


def split(token: str, context: str) -> Row:
    """Split a context at the token's occurrence nearest to its middle."""
    if not token or token not in context:
        return {"before": context, "token": "" if context else token, "after": ""}
    places = [i for i in range(len(context)) if context.startswith(token, i)]
    middle = (len(context) - len(token)) / 2
    at = min(places, key=lambda place: abs(place - middle))
    return {"before": context[:at], "token": token, "after": context[at + len(token) :]}


def _prompts(tables: Tables, records: Rows | None) -> list[Excerpt]:
    found = []
    for record in records or []:
        prompt = prompt_texts(tables).get(record["prompt_id"], {})
        about = " · ".join(filter(None, (record["prompt_id"], str(prompt.get("category") or ""))))
        found.append(Excerpt(record.get("activation"), shorten(str(prompt.get("text", "")), MAX_PROMPT), about=about))
    return found
