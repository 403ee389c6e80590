"""Do two run folders hold the same numbers? Every value of both, joined by id, and the largest difference.

    python -m benchmarks.compare_runs runs/before runs/after
    python -m benchmarks.compare_runs runs/before runs/after --relative 1e-6

What is compared: behavior and activations of every prompt, coefficients with their intervals, the
policy's statistics, scores of every example and target, effects on every prompt, losses, real steps and
refits, shares of tokens. A difference is relative to the largest absolute value of its kind, so that
float32 noise in a value near zero does not hide the others. Exit code 1 if one exceeds ``--relative``.

A run folder of the first layout (``influence.parquet`` with columns of its own for feature, group and
pathway; ``pair_id``) is read too: it is how the present layout was checked against the one before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

Values = dict[str, dict[tuple[str, ...], float]]  # what -> key -> value


def main(argv: list[str] | None = None) -> int:
    """Print one line a kind of value; 1 if a difference is too large."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("before", type=Path)
    flags.add_argument("after", type=Path)
    flags.add_argument("--relative", type=float, default=1e-6, help="largest difference allowed (1e-6)")
    args = flags.parse_args(argv)
    before, after = values_of(args.before), values_of(args.after)
    worst = 0.0
    print(f"{'what':<28}{'values':>9}{'largest':>12}{'difference':>12}{'relative':>12}")
    for what in sorted(before):
        found = difference(before[what], after.get(what, {}))
        if found is None:
            print(f"{what:<28}{len(before[what]):>9}  not in {args.after}, or of other ids")
            worst = float("inf")
            continue
        count, size, largest = found
        relative = largest / size if size else largest
        worst = max(worst, relative)
        print(f"{what:<28}{count:>9}{size:>12.4g}{largest:>12.3g}{relative:>12.3g}")
    print(f"largest relative difference {worst:.3g}, allowed {args.relative:g}")
    return int(worst > args.relative)


def difference(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> tuple[int, float, float] | None:
    """Number of values, their largest size, their largest difference; None if a key of ``a`` is missing."""
    if not a or not set(a) <= set(b):
        return None
    x, y = (np.array([of[key] for key in a], dtype=np.float64) for of in (a, b))
    if (np.isnan(x) != np.isnan(y)).any():
        return None
    known = ~np.isnan(x)
    if not known.any():
        return len(x), 0.0, 0.0
    return len(x), float(np.abs(x[known]).max()), float(np.abs(x - y)[known].max())


def values_of(folder: Path) -> Values:
    """All numbers of a run by what they are and whose."""
    found: Values = {}
    readouts, ids = load_file(folder / "readouts.safetensors"), _json(folder / "readouts.ids.json")
    found["behavior"] = {(i,): float(y) for i, y in zip(ids["prompt_ids"], readouts["y"], strict=True)}
    if (folder / "activations.safetensors").exists():
        X, ids = load_file(folder / "activations.safetensors")["X"], _json(folder / "activations.ids.json")
        found["activations"] = _matrix(X, ids["prompt_ids"], ids["feature_ids"])
        for row in _rows(folder, "coefficients"):
            for name in ("coef", "lo", "hi"):
                found.setdefault(f"coefficients: {name}", {})[(str(row["feature_id"]),)] = row[name]
        found["policy"] = {
            key: value for key, value in _numbers(_json(folder / "policy.json")) if "alpha" not in key[0]
        }
    for example, target, method, value in _scores(folder):
        kind = target.partition(":")[0] + ("" if not target.endswith((":x", ":y")) else target[-2:])
        found.setdefault(f"scores: {kind}", {})[(example, target, method)] = value
    for row in _rows(folder, "summary"):
        key = (_example(row),)
        found.setdefault("losses", {})[key] = row["loss"]
        for name in ("step_score", "refit_score", "exact_score"):
            if row.get(name) is not None:
                found.setdefault(name, {})[key] = row[name]
    if (folder / "prompt_effects.safetensors").exists():
        dy, ids = load_file(folder / "prompt_effects.safetensors")["dy"], _json(folder / "prompt_effects.ids.json")
        found["effects on prompts"] = _matrix(dy, ids.get("example_ids") or ids["pair_ids"], ids["prompt_ids"])
    if (folder / "token_shares.parquet").exists():
        for row in _rows(folder, "token_shares"):
            key = (_example(row), _target(row), str(row["position"]))
            found.setdefault("token shares", {})[key] = row["share"]
    return found


def _scores(folder: Path) -> Iterator[tuple[str, str, str, float]]:
    if (folder / "scores.parquet").exists():
        for row in _rows(folder, "scores"):
            yield row["example_id"], row["target"], row["method"].partition("+")[0], row["value"]
        return
    for row in _rows(folder, "influence"):
        yield _example(row), _target(row), row["estimator"].replace("jvp", "forward"), row["value"]


def _target(row: dict[str, Any]) -> str:
    """A target's name, also of the first layout."""
    if "group" not in row:
        return str(row["target"])
    kind = {"mean_y": "behavior"}.get(row["target"], row["target"])
    about = row["group"] if row.get("feature_id") is None else row["feature_id"]
    pathway = None if kind == "behavior" or row.get("pathway") == "total" else row.get("pathway")
    return ":".join(str(part) for part in (kind, about, pathway) if part is not None)


def _example(row: dict[str, Any]) -> str:
    return str(row["example_id"] if "example_id" in row else row["pair_id"])


def _matrix(values: np.ndarray, rows: list[Any], columns: list[Any]) -> dict[tuple[str, ...], float]:
    return {(str(r), str(c)): float(values[i, j]) for i, r in enumerate(rows) for j, c in enumerate(columns)}


def _numbers(record: Any, path: str = "") -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(record, bool) or record is None or isinstance(record, str):
        return
    if isinstance(record, int | float):
        yield (path,), float(record)
        return
    items = record.items() if isinstance(record, dict) else enumerate(record)
    for key, value in items:
        yield from _numbers(value, f"{path}/{key}")


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
