"""How often the default judge agrees with people: refusals of PyRIT's scorer evaluation (MIT).

    pip download --no-deps pyrit==1.1.0 && python recipes/judge/agreement.py pyrit-*.whl

The rules were written while looking at refusal.csv (development), and were not changed after
refusal_extra.csv (held out) was opened. No row is shipped.

PyRIT calls an answer to another question a refusal too: it swapped answers between questions. Such
a row is known by its answer, which also stands under its own question and is no refusal there. The
figures are given with all rows and without these.
"""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from taught.validation.judge import matching_rules, refuses

FOLDER = "pyrit/datasets/scorer_evals/refusal_scorer/"
SETS = {"development": "refusal.csv", "held out": "refusal_extra.csv"}
CUT = 120  # characters, about the 30 tokens that taught generates
DRAWS = 10_000


def read(wheel: Path, name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(FOLDER + name).decode("utf-8-sig")
    lines = text.splitlines(keepends=True)
    while lines[0].startswith("#"):
        lines.pop(0)
    return list(csv.DictReader(lines))


def kappa(human: np.ndarray, judge: np.ndarray) -> float:
    """Cohen's kappa of two binary judgements."""
    agree = (human == judge).mean()
    chance = human.mean() * judge.mean() + (1 - human.mean()) * (1 - judge.mean())
    return float((agree - chance) / (1 - chance)) if chance < 1 else 1.0


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return float((centre - spread) / (1 + z * z / n)), float((centre + spread) / (1 + z * z / n))


def measure(human: np.ndarray, judge: np.ndarray) -> dict[str, object]:
    draw, n = np.random.default_rng(0), len(human)
    rows = draw.integers(0, n, (DRAWS, n))
    kappas = [kappa(human[r], judge[r]) for r in rows]
    agree = float((human == judge).mean())
    return {
        "rows": n,
        "refusals by people": int(human.sum()),
        "refusals by the rules": int(judge.sum()),
        "missed": int((human & ~judge).sum()),
        "false alarms": int((~human & judge).sum()),
        "agreement": round(agree, 3),
        "agreement 95% (Wilson)": [round(v, 3) for v in wilson(agree, n)],
        "kappa": round(kappa(human, judge), 3),
        "kappa 95% (bootstrap)": [round(float(v), 3) for v in np.quantile(kappas, [0.025, 0.975])],
    }


def main() -> None:
    files = {name: read(Path(sys.argv[1]), file) for name, file in SETS.items()}
    answers = {row["assistant_response"] for rows in files.values() for row in rows if row["human_score"] == "0"}
    for name, every in files.items():
        own = [row for row in every if row["human_score"] == "0" or row["assistant_response"] not in answers]
        for which, rows in (("all rows", every), ("without swapped answers", own)):
            human = np.array([row["human_score"] == "1" for row in rows])
            for what, cut in (("whole", None), (f"first {CUT} characters", CUT)):
                texts = [row["assistant_response"][:cut] for row in rows]
                judge = np.array([refuses("", text) == 1 for text in texts])
                print(f"{name} | {which} | {what}", json.dumps(measure(human, judge)))
        for row in own if "--show" in sys.argv else ():
            found = matching_rules(row["assistant_response"])
            if bool(found) != (row["human_score"] == "1"):
                print("   ", row["human_score"], found, repr(row["assistant_response"][:150]))


if __name__ == "__main__":
    main()
