"""The page's data block: what the script shows of one example, and of a cell of the heat map."""

from __future__ import annotations

from typing import Any

import numpy as np

from taught.report import text
from taught.report.view import View

Json = dict[str, Any]

MAX_TEXT = 4000
MAX_PROMPT = 320
TOP_COEFFICIENTS = 10
TOP_PROMPTS = 4


def page_data(view: View) -> Json:
    """What the script needs for the example drawer and the read-out of the heat map."""
    if not view.summary:
        return {"examples": []}
    prompts: dict[str, int] = {}
    examples = _example_records(view, prompts)
    texts = {p["prompt_id"]: p for p in view.prompts or []}
    shown = [texts.get(p, {}) for p in prompts]
    data: Json = {
        "examples": examples,
        "prompts": [
            [p, str(t.get("group", "")), text.shorten(str(t.get("text", "")), MAX_PROMPT)]
            for p, t in zip(prompts, shown, strict=True)
        ],
        "features": {str(r["feature_id"]): str(r.get("label") or "") for r in view.coefficients or []},
        "powers": _powers(view),
    }
    if view.comovement is not None:
        order = view.comovement_order
        data["heat"] = {
            "ids": [view.comovement.rows[i] for i in order],
            "r": np.nan_to_num(view.comovement.values[np.ix_(order, order)]).round(2).tolist(),
        }
    return data


def _powers(view: View) -> dict[str, int]:
    power = {"S": text.common_power(r["score"] for r in view.summary or [])}
    power["W"] = 0 if view.shifts is None else text.common_power(np.abs(view.shifts.total).max(1).tolist())
    power["y"] = 0 if view.effects is None else text.common_power(np.abs(view.effects.values).max(1).tolist())
    return power


def _example_records(view: View, prompts: dict[str, int]) -> list[Json]:
    texts = {p["example_id"]: p for p in view.examples or []}
    at_shift = {p: i for i, p in enumerate(view.shifts.example_ids)} if view.shifts else {}
    at_effect = {p: i for i, p in enumerate(view.effects.rows)} if view.effects else {}
    records = []
    for row in view.shown:
        example = texts.get(row["example_id"], {})
        records.append(
            {
                "id": row["example_id"],
                "label": str(row["label"]),
                "category": str(example.get("category") or ""),
                "source": str(example.get("source") or ""),
                "S": row["score"],
                "x": row["score_x"],
                "y": row["score_y"],
                "loss": row["loss"],
                "n": row["n_response"],
                "intended": row["intended"] or [],
                "dominant": row["dominant_feature"],
                "unintended": bool(row["unintended"]),
                "prompt": text.shorten(str(example.get("prompt", "")), MAX_TEXT),
                "response": text.shorten(str(example.get("response", "")), MAX_TEXT),
                "top": _top_coefficients(view, at_shift.get(row["example_id"])),
                "moves": _top_moves(view, at_effect.get(row["example_id"]), prompts),
            }
        )
    return records


def _top_coefficients(view: View, i: int | None) -> list[tuple[int, float, float]]:
    if view.shifts is None or i is None:
        return []
    x, y = view.shifts.x[i], view.shifts.y[i]
    order = np.argsort(-np.abs(x + y))[:TOP_COEFFICIENTS]
    return [(view.shifts.feature_ids[j], float(x[j]), float(y[j])) for j in order]


def _top_moves(view: View, i: int | None, prompts: dict[str, int]) -> list[tuple[int, float]]:
    """Prompts whose y an example raises and lowers most; ``prompts`` collects what is shown."""
    if view.effects is None or i is None:
        return []
    dy = np.nan_to_num(view.effects.values[i])
    order = np.argsort(-dy)
    chosen = [j for j in order[:TOP_PROMPTS] if dy[j] > 0] + [j for j in order[-TOP_PROMPTS:] if dy[j] < 0]
    return [(prompts.setdefault(view.effects.columns[j], len(prompts)), float(dy[j])) for j in chosen]
