"""Ground truth by retraining: SmolLM2 trained again on many subsets of 230 examples, 30 planted.

    python -m benchmarks.ground_truth                  # goes on where it was stopped

The examples are the preset's 200 and its 30 planted refusals of harmless questions. The result is a
data set: which subsets, and what training on each one did to every target. It is kept in
benchmarks/ground_truth/ and is what estimators are compared on; benchmarks/README.md says how long
it takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import PRESET, console, run
from taught.environment import versions
from taught.presets import preset_path
from taught.progress import RichProgress
from taught.run import files
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.study.load import dump_study, load_study
from taught.study.schema import Study

DATA = Path(__file__).parent / "ground_truth"
PLANTED = "planted_pairs.jsonl"
REGIMES = {
    # Small steps of one example each: near to the limit that first-order methods are made for.
    "gentle": {
        "validation.designs": ("random", "matched", "addition"),
        "validation.size": 0.1,
        "validation.budgets": (0.1,),
        "validation.controls": 20,
        "validation.subsets": 20,
        "validation.epochs": 2,
        "validation.lr": 3e-7,
        "validation.batch": 1,
    },
    # A dozen steps on few examples, in an order.
    "short": {
        "validation.designs": ("random", "matched", "removal"),
        "validation.size": 0.1,
        "validation.subsets": 32,
        "validation.epochs": 2,
        "validation.lr": 1e-5,
        "validation.batch": 4,
    },
    # Many steps on nearly all examples: nearer to what the field measures, and harder.
    "long": {
        "validation.designs": ("leave-out", "removal"),
        "validation.leave_out": 0.1,
        "validation.budgets": (0.1,),
        "validation.controls": 8,
        "validation.subsets": 8,
        "validation.epochs": 3,
        "validation.lr": 2e-5,
        "validation.batch": 16,
    },
    # The published experiment: all examples, the published rule, as many by this run, at random.
    "curation": {
        "validation.designs": ("curation",),
        "validation.controls": 5,
        "validation.epochs": 3,
        "validation.lr": 2e-5,
        "validation.batch": 16,
    },
}


def ground_truth_study(folder: Path, regime: str) -> Study:
    """The preset on 200 prompts and 40 features, with the planted examples among the others."""
    folder.mkdir(parents=True, exist_ok=True)
    preset = preset_path(PRESET)
    examples = folder / "pairs.jsonl"
    rows = [(preset / name).read_bytes() for name in ("pairs.jsonl", PLANTED)]
    files.write_bytes(examples, b"".join(rows))
    study = load_study(PRESET)
    values = {
        "name": f"ground-truth-{regime}",
        "examples.path": str(examples.resolve()),
        "prompts.limit": 200,
        "features.max_features": 40,
        "attribution.curvature": "adam",
        "attribution.targets": ["score", "behavior:*"],
        **REGIMES[regime],
    }
    for key, value in values.items():
        study = study.replace(key, value)
    return study


def measure(args: argparse.Namespace) -> None:
    """Run the stages, then copy what they made."""
    study = ground_truth_study(args.work, args.regime)
    folder = RunFolder(args.work / args.regime)
    with RichProgress(console) as progress:
        for name in ("readings", "policy", "attribute", "validate"):
            BY_NAME[name](study, folder, progress)
    out = args.out / args.regime
    out.mkdir(parents=True, exist_ok=True)
    for name in (
        "subsets.parquet",
        "outcomes.parquet",
        "models.parquet",
        "curves.parquet",
        "arms.parquet",
        "validation.json",
    ):
        if folder.path(name).exists():  # curves and arms: of some designs alone
            files.write_bytes(out / name, folder.path(name).read_bytes())
    record = {
        "versions": versions(),
        "stages": {name: stage["seconds"] for name, stage in folder.manifest["stages"].items()},
        "sha256": {file.name: files.sha256_file(file) for file in sorted(out.glob("*.parquet"))},
        "examples sha256": files.sha256_file(args.work / "pairs.jsonl"),
    }
    files.write_bytes(out / "made.json", files.json_bytes(record))
    text = dump_study(study).replace(str(preset_path(PRESET)), PRESET)
    text = text.replace(str(args.work.resolve()), ".")
    files.write_bytes(out / "study.yaml", text.encode())
    console.print(f"written: {out}", highlight=False)


def main() -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--regime", choices=REGIMES, default="short")
    flags.add_argument(
        "--work", type=Path, default=Path("runs/ground-truth"), help="folder of the runs and their retrainings"
    )
    flags.add_argument("--out", type=Path, default=DATA, help="folder of the data set")
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
