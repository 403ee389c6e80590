"""How much of y a linear read-out explains, block by block and read-out by read-out.

    python sweep.py --out sweep.json

Held-out R^2 (5 folds, ridge, penalty chosen on a grid) on the raw residuals of the preset's prompts,
for the paper's prefixes and for the wider set. It bounds what a policy on features can reach and is
the evidence for the block and the read-out of the preset (CARD.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from taught.behaviors.prefixes import Prefixes
from taught.core.behavior import encode_prompts
from taught.core.point import Point
from taught.data.chat import ChatFormat
from taught.features.pooling import POSITIONS, pool, read_tokens
from taught.model.forward import vectors
from taught.model.load import load_model
from taught.model.readout import ReadPrompt, pack, read_prompts
from taught.stages.subject import prompt_inputs, study_prompts
from taught.study.load import load_study

PREFIXES = {"can't, cannot": ["I can't", "I cannot"], "can't, cannot, sorry": ["I can't", "I cannot", "I'm sorry"]}


def held_out_r2(X: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """Best over penalties of the 5-fold R^2 of ridge with intercept."""
    fold = np.random.default_rng(seed).permutation(len(y)) % 5
    best = -np.inf
    for penalty in 10.0 ** np.arange(-3, 6) * X.var():
        predicted = np.zeros(len(y))
        for f in range(5):
            train = fold != f
            mean, level = X[train].mean(0), y[train].mean()
            centred = X[train] - mean
            gram = centred.T @ centred + penalty * np.eye(X.shape[1])
            weights = np.linalg.solve(gram, centred.T @ (y[train] - level))
            predicted[~train] = (X[~train] - mean) @ weights + level
        best = max(best, 1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    return float(best)


@torch.no_grad()
def read_blocks(model, prompts: list[ReadPrompt], blocks: list[int]) -> list[dict[int, torch.Tensor]]:
    """Residuals of all prompt tokens after each block, prompt by prompt."""
    h: list[dict[int, torch.Tensor]] = [{} for _ in prompts]
    for packed in pack(prompts, None):
        seen = vectors(model, packed.rows, [Point(block) for block in blocks])
        for row, i in enumerate(packed.index):
            where = packed.read[packed.offsets[row] : packed.offsets[row + 1]]
            h[i] = {block: values[0, where] for block, values in zip(blocks, seen, strict=True)}
    return h


def log_probability(model, prompts, chat: ChatFormat, prefix: str) -> np.ndarray:
    """log P that the answer to each prompt begins with a text."""
    behavior = Prefixes((prefix,))
    inputs = prompt_inputs(encode_prompts(behavior, prompts, chat), None)
    return read_prompts(model, inputs, behavior, None).y.numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", default="6,9,12,13,14,15,16,18,21")
    args = parser.parse_args()
    study = load_study("refusal-smollm2")
    loaded = load_model(study.model.id)
    chat, prompts = ChatFormat(loaded.tokenizer), study_prompts(study)
    encoded = [chat.encode_prompt(prompt.content, prompt.id) for prompt in prompts]
    whole = [ReadPrompt(e.id, e.input_ids, tuple(range(len(e.input_ids)))) for e in encoded]
    wide = PREFIXES["can't, cannot, sorry"]
    blocks = [int(b) for b in args.blocks.split(",")]
    h = read_blocks(loaded.model, whole, blocks)
    logp = np.stack([log_probability(loaded.model, prompts, chat, prefix) for prefix in wide], 1)
    rows = []
    for name, prefixes in PREFIXES.items():
        y = np.logaddexp.reduce(logp[:, [wide.index(p) for p in prefixes]], axis=1)
        for block in blocks:
            row: dict[str, object] = {"prefixes": name, "block": block}
            for position in POSITIONS:
                where = [read_tokens(e, position) for e in encoded]
                tokens = torch.cat([h[i][block][w] for i, w in enumerate(where)])
                offsets = torch.tensor([0, *map(len, where)]).cumsum(0)
                X = pool(tokens, offsets, position).double().numpy()
                row[position] = round(held_out_r2(X, y), 3)
            rows.append(row)
            print(row, flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
