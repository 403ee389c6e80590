"""A study without a sparse autoencoder: every stage it asks for, on behaviors alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages import asked
from taught.stages.ready import read_data, wanted_targets
from taught.stages.subject import study_prompts
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import SMALL_STEPS, do, values_of, with_values, write_tiny_study

GROUPS = ("behavior:harmful", "behavior:harmless")


def without_sae(study: Study) -> Study:
    """The tiny study with no SAE and no word about which prompts or examples should show the behavior."""
    keys = ("sae.path", "prompts.positive_group", "prompts.negative_group")
    labels = ("examples.positive_label", "examples.negative_label")
    return with_values(study, {**dict.fromkeys((*keys, *labels)), "curation.rule": None, "curation.k": None})


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("plain")))
    return without_sae(with_values(study, {"prompts.limit": 12, "attribution.exact_top": 2}))


@pytest.fixture(scope="module")
def run(study, tmp_path_factory) -> RunFolder:
    """All that a run does by itself."""
    names = [stage.name for stage in asked(study)]
    assert names == ["readings", "attribute", "curate", "report"]
    return do(study, tmp_path_factory.mktemp("run") / "run", *names)


@pytest.fixture(scope="module")
def with_sae(study, tmp_path_factory) -> RunFolder:
    """The same with an SAE; its behaviors are the same numbers."""
    full = load_study(Path(study.model.id).parent / "study.yaml").replace("prompts.limit", study.prompts.limit)
    return do(full, tmp_path_factory.mktemp("full") / "run", "readings", "policy", "attribute")


def test_its_values_are_those_of_a_run_with_an_sae(run, with_sae):
    assert run.read_json("attribution")["targets"] == list(GROUPS)
    for target in GROUPS:
        one, other = values_of(run, target), values_of(with_sae, target)
        assert one.keys() == other.keys()
        largest = max(map(abs, one.values()))
        assert one == pytest.approx(other, abs=1e-3 * largest)
    y, other = (folder.read_tensors("readouts")[0]["y"] for folder in (run, with_sae))
    np.testing.assert_allclose(y, other, rtol=1e-5)


def test_there_is_nothing_of_features_and_of_a_policy(run):
    of_policy = {"features", "activations", "coefficients", "audit", "certificates", "comovement", "policy"}
    assert not {Path(name).stem.split(".")[0] for name in run.manifest["files"]} & of_policy
    assert "readouts.safetensors" in run.manifest["files"] and list(run.read_tensors("readouts")[0]) == ["y"]
    columns = run.read_table("summary").column_names
    assert not {"intended", "unintended", "score"} & set(columns) and set(GROUPS) <= set(columns)


def test_examples_are_ranked_and_checked_by_the_first_behavior(run):
    assert run.read_json("attribution")["ranked_by"] == GROUPS[0]
    rows = sorted(run.read_table("summary").to_pylist(), key=lambda row: row["rank"])
    size = [abs(row[GROUPS[0]]) for row in rows]
    assert size == sorted(size, reverse=True)
    for row in rows[:2]:
        assert row["step_score"] == pytest.approx(row[GROUPS[0]], rel=0.2)
        assert row["refit_score"] is None
    shares = run.read_table("token_shares").to_pylist()
    assert {row["target"] for row in shares} == set(GROUPS)
    for row in rows[:2]:
        for target in GROUPS:
            own = [s["share"] for s in shares if (s["example_id"], s["target"]) == (row["example_id"], target)]
            assert sum(own) == pytest.approx(row[target], rel=1e-3, abs=1e-4 * size[0])


def test_top_k_drops_what_raises_the_first_behavior_most(run):
    values = values_of(run, GROUPS[0])
    dropped = {row["example_id"] for row in run.read_table("curation").to_pylist() if row["action"] == "drop"}
    assert dropped == set(sorted(values, key=lambda i: -values[i])[: max(1, len(values) // 10)])  # one in ten


def test_the_report_is_of_what_there_is(run):
    page = run.read_text("report.html")
    assert "z00" in page and "nan" not in page.lower().split(">")
    run.verify()


def test_validate_and_compare_need_no_policy(study, run, tmp_path_factory):
    """In small steps the influence foresees what retraining does; methods stand beside each other."""
    small = {**SMALL_STEPS, "validation.designs": ("random", "removal"), "validation.methods": ("adjoint+adam",)}
    study = with_values(study, small)
    do(study, run, "validate", "compare", "report")
    rows = {(r["method"], r["target"]): r for r in run.read_table("lds").to_pylist() if r["subsets"] == "random"}
    for target in GROUPS:
        assert rows["adjoint", target]["raw"] > 0.95
        assert ("adjoint+adam", target) in rows and ("bm25", target) in rows
    assert {target for _, target in rows} == set(GROUPS)
    assert "label" not in {method for method, _ in rows}  # the study does not say which label is wanted
    models = run.read_table("models").to_pylist()
    assert all(row["f1"] is None and (row["loss_after"] or 0) < 100 for row in models)
    outcomes = run.read_table("outcomes").to_pylist()
    assert {row["target"] for row in outcomes} >= {*GROUPS, "behavior:break"}  # categories are measured too
    named = [row["example_id"] for row in run.read_table("subsets").to_pylist() if row["subset"] == "remove-1-named"]
    values = values_of(run, GROUPS[0])
    assert set(values) - set(named) == {max(values, key=lambda i: values[i])}
    run.verify()


@pytest.mark.parametrize("target", ["score", "coefficient:3", "coefficient:*", "score - behavior:harmful"])
def test_targets_of_a_policy_say_what_to_add(study, tmp_path, target):
    asks = study.replace("attribution.targets", [target])
    with pytest.raises(UserError, match=r"sae\.path"):
        do(asks, tmp_path / "run", "readings", "attribute")


@pytest.mark.parametrize(
    ("stage", "key"), [("policy", "sae.path"), ("clamp", "clamp=true"), ("clusters", "clusters=true")]
)
def test_stages_that_are_not_asked_for_say_what_asks_for_them(study, stage, key):
    with pytest.raises(UserError, match=key):
        asked(study, only=stage)


def test_defaults_are_every_group_and_concepts_where_there_are_some(study):
    from taught.core.readings import Readings

    readings = Readings(("q",), np.zeros(1), {"all": ["q"]})
    assert wanted_targets(study, readings) == ["behavior:*"]
    assert wanted_targets(study, readings, ["refusal"]) == ["behavior:*", "concept:*"]
    assert wanted_targets(study.replace("attribution.targets", ["behavior"]), readings) == ["behavior"]


def test_a_single_group_works(study, tmp_path):
    """Prompts without the column group are one group, ``all``; every prompt counts alike."""
    rows = [json.loads(line) for line in Path(study.prompts.path).read_text().splitlines()]
    for row in rows:
        del row["group"], row["category"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = study.replace("prompts.path", str(tmp_path / "prompts.jsonl"))
    one = f"prompt:{study_prompts(study).prompts[0].id}"
    study = study.replace("attribution.targets", ["behavior:*", "behavior", one])
    run = do(study, tmp_path / "run", "readings", "attribute", "curate", "report")
    assert run.read_json("attribution")["targets"] == ["behavior:all", "behavior", one]
    assert values_of(run, "behavior:all") == pytest.approx(values_of(run, "behavior"), rel=1e-6)
    assert values_of(run, one) != values_of(run, "behavior")


def test_what_was_curated_is_compared_on_prompts_without_groups(study, tmp_path):
    rows = [json.loads(line) for line in Path(study.prompts.path).read_text().splitlines()]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    asked = {"prompts.path": str(tmp_path / "prompts.jsonl"), "curation.rule": "top-k", "curation.k": 3}
    study = with_values(study, {**SMALL_STEPS, **asked, "validation.designs": ("curated",)})
    run = do(study, tmp_path / "run", "readings", "attribute", "curate", "validate", "compare", "report")
    changed = {row["subset"]: row["value"] for row in run.read_table("outcomes").to_pylist()}
    random = np.mean([value for name, value in changed.items() if name.startswith("random-")])
    rows = {(row["arm"], row["metric"]): row for row in run.read_table("arms").to_pylist()}
    assert {metric for _, metric in rows} == {"behavior:all"}
    assert rows["kept", "behavior:all"]["difference"] == pytest.approx(changed["kept"] - random)
    page = run.path("report.html").read_text()
    assert "training on the 5 examples that are kept moves behavior on all prompts by" in page.lower()
    assert "Soft metrics" not in page and "LDS: rank" not in page  # there are none


def test_the_change_on_every_prompt_can_be_asked_for(study, run, tmp_path):
    study = study.replace("attribution.targets", ["behavior:*", "prompt:*"])
    every = do(study, tmp_path / "run", "readings", "attribute")
    dy, ids = every.read_tensors("prompt_effects")
    group = {row["prompt_id"]: row["group"] for row in every.read_table("prompts").to_pylist()}
    for target in GROUPS:
        inside = [group[i] == target.partition(":")[2] for i in ids["prompt_ids"]]
        values = values_of(run, target)
        found = dict(zip(ids["example_ids"], dy["dy"][:, inside].mean(1).tolist(), strict=True))
        assert found == pytest.approx(values, abs=1e-3 * max(map(abs, values.values())))
    statements = every.read_table("statements").to_pylist()
    assert {row["target"] for row in statements} == set(GROUPS)
    assert all(row["share"] is not None for row in statements)


def test_a_finite_step_and_sketches_need_no_features(study, run, tmp_path):
    for number, (estimator, most) in enumerate(((("finite-step"), 0.1), ({"kind": "sketch", "dim": 8192}, 0.3))):
        asks = study.replace("attribution.estimator", estimator)
        other = do(asks, tmp_path / str(number), "readings", "attribute")
        for target in GROUPS:
            one, two = values_of(run, target), values_of(other, target)
            assert one == pytest.approx(two, abs=most * max(map(abs, one.values())))


def test_overlap_and_truncation_are_found_as_with_one(study, tmp_path):
    from taught.progress import SilentProgress

    rows = [json.loads(line) for line in Path(study.examples.path).read_text().splitlines()]
    prompt = study_prompts(study).prompts[0].text
    rows[3]["prompt"] = prompt
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = study.replace("examples.path", str(tmp_path / "pairs.jsonl"))
    with pytest.raises(UserError, match="z03"):
        read_data(study, SilentProgress())
