"""Does leaving out the tokens that carry the influence take the behavior away, and random ones not?

    python -m benchmarks.token_masks                   # goes on where it was stopped

Training on planted refusals of harmless questions raises the harmless prompts' mean y. Shares say
which response tokens do that (``taught.attribution.token_effects``). The model is trained with a
loss that skips, of every pair, the 40% of its tokens with the largest shares; as a control as many
random ones of each pair, the first ones, and the ones with the smallest shares. SmolLM2, 30 planted
pairs and 30 others; benchmarks/README.md says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    RESULTS,
    Results,
    Row,
    Setting,
    _opened,
    console,
    cotangents,
    kept,
    run,
)
from benchmarks.ground_truth import ground_truth_study
from taught.progress import RichProgress
from taught.study import load_study

if TYPE_CHECKING:
    from taught.attribution.pairs import PairInput
    from taught.validation.retrain import Retraining

Shares = Sequence[NDArray[np.float64]]
DRAWS = 1000


def measure(args: argparse.Namespace) -> None:
    """Compute the shares, train under every mask, write the result."""
    with RichProgress(console) as progress:
        if args.study is None:
            study = ground_truth_study(args.work, "short")
        else:
            study = load_study(args.study)
        setting = _opened(study, progress)
        pairs = chosen(setting, args.label, args.others)
        progress.step("shares of the tokens", None)
        shares = _shares(setting, pairs)
        sets = {"none": list(pairs), **masked_sets(pairs, shares, args.share, args.random)}
        results = Results("token_masks", {
            "study": study.name, "pairs": len(pairs), "label": args.label,
            "response_tokens": sum(pair.n_response for pair in pairs), "share": args.share,
            "prompts": len(setting.problem.prompts), "target": _target(setting).name,
            "curvature": "adam",
            "recipe": {key: getattr(study.validation, key)
                       for key in ("optimizer", "lr", "epochs", "batch", "seed")},
        }, args.out)  # fmt: skip
        with kept(results, _COLUMNS):
            base = _retrained(setting, pairs, args.work, progress).base()
            progress.step(
                f"{len(sets)} trainings", len(sets) * len(pairs) * study.validation.epochs
            )
            made = {}
            for name, some in sets.items():
                made[name] = _retrained(setting, some, args.work, progress).run(
                    [pair.id for pair in some]
                )
                results.add(_row(setting, name, some, shares, base, made[name]))
            results.summary = summary(
                {name: model.y - base.y for name, model in made.items()}, _inside(setting)
            )


def chosen(setting: Setting, label: str, others: int) -> list[PairInput]:
    """The pairs of one label, and so many of the others, evenly over the file."""
    labels = {row.id: row.label for row in setting.pair_rows}
    inside = [pair for pair in setting.pairs if labels[pair.id] == label]
    rest = [pair for pair in setting.pairs if labels[pair.id] != label]
    places = np.linspace(0, len(rest) - 1, min(others, len(rest))).round().astype(int)
    return inside + [rest[i] for i in places]


def _target(setting: Setting) -> Any:
    from taught.target import mean_y_target

    negative = setting.study.prompts.negative_group
    return mean_y_target(setting.policy.prompt_ids, setting.groups, negative)


def _inside(setting: Setting) -> NDArray[np.bool_]:
    """The prompts of the negative group."""
    return np.array([group == setting.study.prompts.negative_group for group in setting.groups])


def _shares(setting: Setting, pairs: Sequence[PairInput]) -> list[NDArray[np.float64]]:
    """Share of each response token in its pair's effect on the target, by a step of Adam."""
    from taught.attribution.curvature import with_adam
    from taught.attribution.token_effects import token_effects

    problem = with_adam(setting.problem, pairs, moments=None,
                        eps=setting.study.attribution.adam_eps)  # fmt: skip
    A, B = cotangents([_target(setting)], setting.policy)
    return [share[:, 0].numpy() for share in token_effects(problem, pairs, A, B)]


def masked_sets(
    pairs: Sequence[PairInput], shares: Shares, share: float, draws: int
) -> dict[str, list[PairInput]]:
    """Name of a mask -> the pairs with it: of each pair as many tokens, all but one at most."""
    counts = [min(round(share * len(values)), len(values) - 1) for values in shares]

    def masked(order: Callable[[NDArray[np.float64]], NDArray[np.int64]]) -> list[PairInput]:
        return [
            replace(pair, masked=tuple(sorted(pair.start + int(j) for j in order(values)[:n])))
            for pair, values, n in zip(pairs, shares, counts, strict=True)
        ]

    sets = {
        "largest shares": masked(lambda values: np.argsort(-values, kind="stable")),
        "smallest shares": masked(lambda values: np.argsort(values, kind="stable")),
        "first tokens": masked(lambda values: np.arange(len(values))),
    }
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        sets[f"random {seed}"] = masked(lambda values, rng=rng: rng.permutation(len(values)))
    return sets


def _retrained(
    setting: Setting, pairs: Sequence[PairInput], folder: Path, progress: RichProgress
) -> Any:
    from taught.validation.retrain import Retrainer
    from taught.validation.train import Recipe

    return Retrainer(setting.problem, pairs, Recipe.of(setting.study.validation),
                     folder / "retrained", weights=setting.subject.loaded.weights,
                     progress=progress)  # fmt: skip


def _row(
    setting: Setting, name: str, pairs: Sequence[PairInput], shares: Shares, base: Retraining,
    after: Retraining,
) -> Row:  # fmt: skip
    left_out = [values[np.array(pair.masked, int) - pair.start].sum()
                for pair, values in zip(pairs, shares, strict=True)]  # fmt: skip
    change, inside = after.y - base.y, _inside(setting)
    return {
        "mask": name,
        "masked_tokens": sum(len(pair.masked) for pair in pairs),
        "masked_influence": float(sum(left_out) / sum(values.sum() for values in shares)),
        "change_negative": float(change[inside].mean()),
        "change_positive": float(change[~inside].mean()),
        "loss_after": float(after.losses_after.mean()),
        "seconds": after.seconds_training + after.seconds_reading,
    }


def summary(changes: dict[str, NDArray[np.float64]], inside: NDArray[np.bool_]) -> Row:
    """What masking leaves of the change of the group's mean y; the 95% intervals are over prompts.

    ``changes``: mask -> change of y of every prompt.
    """
    rows = {name: values[inside] for name, values in changes.items()}
    random = np.stack([values for name, values in rows.items() if name.startswith("random")])
    rng = np.random.default_rng(0)
    draws = rng.integers(0, inside.sum(), (DRAWS, inside.sum()))
    found: Row = {
        "change, no mask": float(rows["none"].mean()),
        "change, random masks": sorted(random.mean(1).tolist()),
    }
    for name in ("largest shares", "smallest shares", "first tokens"):
        gap = rows[name] - random.mean(0)
        lo, hi = np.quantile(gap[draws].mean(1), [0.025, 0.975])
        found[name] = {
            "change": float(rows[name].mean()),
            "less than random": float(gap.mean()), "lo": float(lo), "hi": float(hi),
            "random masks below it": int((random.mean(1) < rows[name].mean()).sum()),
        }  # fmt: skip
    return found


def _fixed(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.{digits}f}"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "masked": lambda row: row["mask"],
    "tokens": lambda row: f"{row['masked_tokens']}",
    "influence": lambda row: f"{row['masked_influence']:.0%}",
    "change, negative": _fixed("change_negative", 3),
    "change, positive": _fixed("change_positive", 3),
    "loss after": _fixed("loss_after", 3),
    "seconds": _fixed("seconds", 0),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--study", help="another study than that of the ground truth")
    flags.add_argument(
        "--label", default="planted-over-refusal", help="pairs that are all trained on"
    )
    flags.add_argument("--others", type=int, default=30, help="pairs of other labels beside them")
    flags.add_argument("--share", type=float, default=0.4, help="share of the tokens left out")
    flags.add_argument("--random", type=int, default=5, help="random masks")
    flags.add_argument("--work", type=Path, default=Path("runs/token-masks"),
                       help="folder of the retrainings")  # fmt: skip
    flags.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    run(measure, flags.parse_args(argv))


if __name__ == "__main__":
    main()
