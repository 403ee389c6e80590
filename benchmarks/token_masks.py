"""Does leaving out the tokens that carry the influence take the behavior away, and random ones not?

    python -m benchmarks.token_masks                   # goes on where it was stopped

Training on planted refusals of harmless questions raises the behavior on harmless prompts. Shares say
which response tokens do that (``taught.estimators.token_shares``). The model is trained with a
loss that skips, of every example, the 40% of its tokens with the largest shares; as a control as many
random ones of each example, the first ones, and the ones with the smallest shares. SmolLM2, 30 planted
examples and 30 others; benchmarks/README.md says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, Results, Row, Setting, console, kept, opened, run
from benchmarks.ground_truth import ground_truth_study
from taught.progress import RichProgress
from taught.study.load import load_study

if TYPE_CHECKING:
    from taught.core.example import Example
    from taught.training.retrain import Retraining

Shares = Sequence[NDArray[np.float64]]
DRAWS = 1000


def measure(args: argparse.Namespace) -> None:
    """Compute the shares, train under every mask, write the result."""
    with RichProgress(console) as progress:
        study = ground_truth_study(args.work, "short") if args.study is None else load_study(args.study)
        setting = opened(study, progress)
        examples = chosen(setting, args.label, args.others)
        progress.step("shares of the tokens", None)
        shares = _shares(setting, examples)
        sets = {"none": list(examples), **masked_sets(examples, shares, args.share, args.random)}
        results = Results(
            "token_masks",
            {
                "study": study.name,
                "examples": len(examples),
                "label": args.label,
                "response_tokens": sum(example.n_scored for example in examples),
                "share": args.share,
                "prompts": len(setting.problem.prompts),
                "target": _target(setting),
                "curvature": "adam",
                "recipe": {
                    key: getattr(study.validation, key) for key in ("optimizer", "lr", "epochs", "batch", "seed")
                },
            },
            args.out,
        )
        with kept(results, _COLUMNS):
            base = _retrained(setting, examples, args.work, progress).base()
            progress.step(f"{len(sets)} trainings", len(sets) * len(examples) * study.validation.epochs)
            made = {}
            for name, some in sets.items():
                made[name] = _retrained(setting, some, args.work, progress).run([example.id for example in some])
                results.add(_row(setting, name, some, shares, base, made[name]))
            results.summary = summary({name: model.y - base.y for name, model in made.items()}, _inside(setting))


def chosen(setting: Setting, label: str, others: int) -> list[Example]:
    """The examples of one label, and so many of the others, evenly over the file."""
    labels = {row.id: row.label for row in setting.ready.examples}
    inside = [example for example in setting.examples if labels[example.id] == label]
    rest = [example for example in setting.examples if labels[example.id] != label]
    places = np.linspace(0, len(rest) - 1, min(others, len(rest))).round().astype(int)
    return inside + [rest[i] for i in places]


def _target(setting: Setting) -> str:
    return f"behavior:{setting.study.prompts.negative_group}"


def _inside(setting: Setting) -> NDArray[np.bool_]:
    """The prompts of the negative group."""
    found: NDArray[np.bool_] = setting.inside(setting.study.prompts.sides[1])
    return found


def _shares(setting: Setting, examples: Sequence[Example]) -> list[NDArray[np.float64]]:
    """Share of each response token in its example's effect on the target, by a step of Adam."""
    from taught.core.driver import fitted
    from taught.core.estimator import Work
    from taught.core.target import TargetSet
    from taught.curvatures.adam import Adam
    from taught.estimators.token_shares import token_effects

    problem = fitted(setting.problem, examples, Adam(), Work())
    A, B = TargetSet.of([_target(setting)], setting.ready.readings).cotangents()
    return [share[:, 0].numpy() for share in token_effects(problem, examples, A, B)]


def masked_sets(examples: Sequence[Example], shares: Shares, share: float, draws: int) -> dict[str, list[Example]]:
    """Name of a mask -> the examples with it: of each example as many tokens, all but one at most."""
    from taught.core.example import sft

    counts = [min(round(share * len(values)), len(values) - 1) for values in shares]

    def masked(order: Callable[[NDArray[np.float64]], NDArray[np.int64]]) -> list[Example]:
        return [
            sft(example.id, example.ids, example.start, [example.start + int(j) for j in order(values)[:n]])
            for example, values, n in zip(examples, shares, counts, strict=True)
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


def masked_places(example: Example, n: int) -> list[int]:
    """Of the n tokens of a response, which ones the loss leaves out."""
    return [j for j, weight in enumerate(example.weights[0][-n:]) if not weight]


def _retrained(setting: Setting, examples: Sequence[Example], folder: Path, progress: RichProgress) -> Any:
    from taught.training.recipe import Recipe
    from taught.training.retrain import Retrainer

    return Retrainer(
        setting.problem,
        examples,
        Recipe.of(setting.study.validation),
        folder / "retrained",
        weights=setting.ready.subject.loaded.weights,
        progress=progress,
    )


def _row(
    setting: Setting, name: str, examples: Sequence[Example], shares: Shares, base: Retraining, after: Retraining
) -> Row:
    unscored = [masked_places(example, len(values)) for example, values in zip(examples, shares, strict=True)]
    left_out = [values[places].sum() for values, places in zip(shares, unscored, strict=True)]
    change, inside = after.y - base.y, _inside(setting)
    return {
        "mask": name,
        "masked_tokens": sum(map(len, unscored)),
        "masked_influence": float(sum(left_out) / sum(values.sum() for values in shares)),
        "change_negative": float(change[inside].mean()),
        "change_positive": float(change[~inside].mean()),
        "loss_after": float(after.losses_after.mean()),
        "seconds": after.seconds_training + after.seconds_reading,
    }


def summary(changes: dict[str, NDArray[np.float64]], inside: NDArray[np.bool_]) -> Row:
    """What masking leaves of the change of the behavior on the group; the 95% intervals are over prompts.

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
            "less than random": float(gap.mean()),
            "lo": float(lo),
            "hi": float(hi),
            "random masks below it": int((random.mean(1) < rows[name].mean()).sum()),
        }
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
    flags.add_argument("--label", default="planted-over-refusal", help="examples that are all trained on")
    flags.add_argument("--others", type=int, default=30, help="examples of other labels beside them")
    flags.add_argument("--share", type=float, default=0.4, help="share of the tokens left out")
    flags.add_argument("--random", type=int, default=5, help="random masks")
    flags.add_argument("--work", type=Path, default=Path("runs/token-masks"), help="folder of the retrainings")
    flags.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    run(measure, flags.parse_args(argv))


if __name__ == "__main__":
    main()
