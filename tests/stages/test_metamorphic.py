"""What must not change the scores of a run: how much is computed at once, and in which order rows stand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from taught.run.folder import RunFolder
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import do, with_values, write_tiny_study

EXACT = 1e-9  # of the largest value on a target


@pytest.fixture(scope="module", autouse=True)
def double():
    """Norms in the precision of their input: those of transformers compute in float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("same")))
    concept = {"name": "c", "source": "difference", "force": True}
    few = {"prompts.limit": 12, "features.max_features": 4}
    return with_values(study, {"model.dtype": "float64", "concepts": [concept], **few})


def scored(study: Study, folder: Path) -> RunFolder:
    return do(study, folder, "readings", "policy", "concepts", "attribute")


@pytest.fixture(scope="module")
def run(study, tmp_path_factory) -> RunFolder:
    return scored(study, tmp_path_factory.mktemp("run") / "run")


def values(run: RunFolder) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in run.read_table("scores").to_pylist():
        found.setdefault(row["target"], {})[row["example_id"]] = row["value"]
    return found


def same_scores(one: RunFolder, other: RunFolder) -> None:
    ours, theirs = values(one), values(other)
    assert ours.keys() == theirs.keys() and len(ours) == 3 + 2 + 3 * 4 + 1
    for target, expected in ours.items():
        largest = max(map(abs, expected.values()))
        assert largest > 0
        assert theirs[target] == pytest.approx(expected, rel=0, abs=EXACT * largest), target


def shuffled(path: str, to: Path) -> str:
    lines = Path(path).read_text().splitlines()
    again = lines.copy()
    random.Random(4).shuffle(again)
    assert again != lines
    to.write_text("\n".join(again))
    return str(to)


@pytest.mark.parametrize(
    "values_",
    [{"attribution.batch_tokens": 64}, {"attribution.memory_gb": 1e-4}],
    ids=["few tokens at once", "little memory"],
)
def test_how_much_is_computed_at_once_changes_nothing(study, run, tmp_path, values_):
    same_scores(run, scored(with_values(study, values_), tmp_path / "run"))


@pytest.mark.parametrize("key", ["examples.path", "prompts.path"])
def test_the_order_of_rows_changes_nothing(study, run, tmp_path, key):
    other = scored(study.replace(key, shuffled(study.get(key), tmp_path / "rows.jsonl")), tmp_path / "run")
    same_scores(run, other)
    for table, column, ids in (("summary", "rank", "example_id"), ("coefficients", "coef", "feature_id")):
        of, again = (
            dict(zip(*(t[c].to_pylist() for c in (ids, column)), strict=True))
            for t in (r.read_table(table) for r in (run, other))
        )
        assert of == pytest.approx(again, rel=1e-9)
    kinds = [
        {r["target"]: (r["example_ids"], r["verdict"]) for r in one.read_table("statements").to_pylist() if r["k"] == 3}
        for one in (run, other)
    ]
    assert kinds[0] == kinds[1]


def test_the_same_example_twice_has_the_same_scores(study, run, tmp_path):
    """Scores are of each example alone: more of them change none."""
    rows = [json.loads(line) for line in Path(study.examples.path).read_text().splitlines()]
    copies = [{**row, "id": f"{row['id']}-again"} for row in rows[:3]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + copies))
    other = values(scored(study.replace("examples.path", str(tmp_path / "rows.jsonl")), tmp_path / "run"))
    for target, expected in values(run).items():
        largest = max(map(abs, expected.values()))
        found = other[target]
        assert {i: found[i] for i in expected} == pytest.approx(expected, rel=0, abs=EXACT * largest)
        twice = np.array([[found[f"{row['id']}{end}"] for end in ("", "-again")] for row in rows[:3]])
        np.testing.assert_allclose(twice[:, 0], twice[:, 1], rtol=0, atol=EXACT * largest)
