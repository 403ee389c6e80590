"""Print how well the response length alone sets the planted examples apart, in tokens.

    python recipes/experiments/lengths.py TOKENIZER_FOLDER

The folder is any that the tokenizer of SmolLM2 loads from, such as the one in taught's cache.
"""

from __future__ import annotations

import json
import statistics
import sys

from build import EXPERIMENTS, PLANTED, PRESETS


def length_auc(planted: list[int], others: list[int]) -> float:
    """Return the chance that a planted response is longer than another one, ties counted half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in planted for b in others)
    return wins / (len(planted) * len(others))


def main() -> None:
    """Print one line per example file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    print("| preset | file | planted: median (min to max) | others | AUC of length |")
    print("|---|---|---:|---:|---:|")
    for experiment in EXPERIMENTS:
        for name in PLANTED:
            text = (PRESETS / experiment.name / name).read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            by: dict[bool, list[int]] = {True: [], False: []}
            for row in rows:
                ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
                by[row["planted"]].append(len(ids))
            cells = [f"{statistics.median(n):.0f} ({min(n)} to {max(n)})" for n in by.values()]
            auc = length_auc(by[True], by[False])
            print(f"| {experiment.name} | {name} | {cells[0]} | {cells[1]} | {auc:.2f} |")


if __name__ == "__main__":
    main()
