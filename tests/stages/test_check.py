"""``taught check`` says what a run would do: the same examples, the same drops, what it costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from taught.cli.given import parse_set
from taught.errors import UserError
from taught.stages import check as check_module
from taught.stages.check import CheckReport, check_study
from taught.stages.subject import open_subject, study_examples, study_prompts
from taught.study.load import load_study
from taught.study.schema import Study, ValidationSpec
from tiny_study import SCORED, do, write_tiny_study

OVERLAP = {"id": "same", "label": "x", "prompt": "tell me about locks ", "response": "They lock."}
LONG = {"id": "long", "label": "x", "prompt": "Where to buy tea", "response": "a long answer " * 20}
GONE = {"id": "gone", "label": "x", "prompt": "a long question " * 20, "response": "Yes."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_study(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(autouse=True)
def pace(monkeypatch) -> None:
    """Not measured again by every test: half a second each."""
    monkeypatch.setattr(check_module, "product_rate", lambda weight: 1e10)


@pytest.fixture
def tiny(folder) -> Study:
    return load_study(folder / "study.yaml").replace("attribution.exact_top", 0)


@pytest.fixture
def with_examples(tiny, folder, tmp_path):
    """The study with more examples behind its own eight."""

    def write(*rows: dict, **changes) -> Study:
        own = (folder / "pairs.jsonl").read_text()
        (tmp_path / "pairs.jsonl").write_text(own + "".join(json.dumps(r) + "\n" for r in rows))
        study = tiny.replace("examples.path", str(tmp_path / "pairs.jsonl"))
        for key, value in changes.items():
            study = study.replace(f"examples.{key}", value)
        return study

    return write


def row(report: CheckReport, what: str) -> str:
    return dict(report.rows)[what]


def cost(report: CheckReport) -> dict[str, float]:
    """Operations by part, in 10^12, and their "total"."""
    text = row(report, "cost")
    found = re.fullmatch(r"about (\S+) x 10\^12 floating point operations \((.*)\)", text)
    parts = (part.rsplit(" ", 1) for part in found[2].split(", "))
    return {name: float(value) for name, value in parts} | {"total": float(found[1])}


# Which examples


def test_a_sound_study_has_no_problem_and_check_writes_nothing(tiny, folder):
    before = sorted(folder.rglob("*"))
    report = check_study(tiny)
    assert report.problems == []
    assert row(report, "examples") == "8 (4 harmful-refusal, 4 harmless-compliance)"
    assert row(report, "overlap") == "0 examples are evaluation prompts"
    assert row(report, "truncated") == "0 examples are longer than 128 tokens"
    assert sorted(folder.rglob("*")) == before


HESSIANS = [{"kind": "steps", "hessian": hessian} for hessian in ("gauss-newton", "none")]


@pytest.mark.parametrize("kind", ["base", "steps", *HESSIANS, "segments"])
def test_it_says_what_is_asked_and_what_else_may_be_asked_can_be_set(tiny, kind):
    study = tiny.replace("attribution.trajectory", kind).replace("validation.batch", 2)
    question = dict(check_study(study).rows)["question"]
    others = re.findall(r"--set (\S+?=[\w-]+)", question)
    assert others
    for other in others:
        again = dict(check_study(study.replace(*parse_set(other))).rows)
        assert again["question"] != question and "training" in again["cost"]


def test_it_says_where_training_begins(tiny, folder):
    rows = dict(check_study(tiny).rows)
    assert "training" not in rows and f"weights of {folder / 'model'}" in rows["validate, start"]
    along = tiny.replace("attribution.trajectory", "steps").replace("validation.designs", ("unlearn",))
    rows = dict(check_study(along).rows)
    assert f"weights of {folder / 'model'}" in rows["training"]
    assert "validate, start" not in rows  # what is to be forgotten has been seen


def test_the_limit_of_examples_is_respected_in_counts_and_cost(tiny):
    whole, part = check_study(tiny), check_study(tiny.replace("examples.limit", 4))
    assert row(part, "examples") == "4 (2 harmless-compliance, 2 harmful-refusal)"
    tokens = [int(row(r, "example tokens").rsplit(" ", 1)[1]) for r in (whole, part)]
    assert tokens[1] < 0.6 * tokens[0]
    assert cost(part)["prompts"] < cost(whole)["prompts"]


def test_the_examples_that_are_checked_are_the_ones_that_a_run_would_score(with_examples):
    """Of two examples of one label a limit keeps one: its problems count, the other's do not."""
    study = with_examples(OVERLAP, {**OVERLAP, "id": "again"}, limit=5, drop_overlap=True)
    report = check_study(study)
    kept, dropped = study_examples(study, study_prompts(study))
    assert len(dropped) == 1
    assert row(report, "overlap").endswith(f"dropped on request: {dropped[0]}")
    encoded = check_study(study.replace("examples.drop_overlap", False))
    assert dropped[0] in encoded.problems[0]
    assert ({"same", "again"} - set(dropped)).isdisjoint(re.findall(r"\w+", encoded.problems[0]))
    assert len(kept) == 4


def test_a_problem_beyond_the_limit_is_none(with_examples):
    rows = [OVERLAP, LONG, GONE]
    assert len(check_study(with_examples(*rows)).problems) == 2
    limited = check_study(with_examples(*rows, limit=2))  # labels in proportion: x has 3 of 11
    assert limited.problems == []


# Overlap and truncation


def test_overlap_is_a_problem_that_names_the_example_and_the_flag(with_examples):
    report = check_study(with_examples(OVERLAP))
    (problem,) = report.problems
    assert problem == "1 examples are evaluation prompts: same; --set examples.drop_overlap=true leaves them out"
    assert row(report, "overlap") == "1 examples are evaluation prompts, an error"


def test_a_example_that_overlaps_two_prompts_is_one_example(with_examples):
    turns = [
        {"role": "user", "content": "Tell me about locks"},
        {"role": "assistant", "content": "Gladly."},
        {"role": "user", "content": "Tell me about ships"},
        {"role": "assistant", "content": "They float."},
    ]
    report = check_study(with_examples({"id": "both", "label": "x", "messages": turns}))
    assert row(report, "overlap").startswith("1 examples")
    assert report.problems[0].count("both") == 1


def test_overlap_that_is_dropped_is_named_and_counts_no_more(with_examples, tiny):
    report = check_study(with_examples(OVERLAP, drop_overlap=True))
    assert report.problems == []
    assert row(report, "overlap").endswith("dropped on request: same")
    assert row(report, "example tokens") == row(check_study(tiny), "example tokens")


@pytest.mark.parametrize("example", [LONG, GONE], ids=["cut", "cut to nothing"])
def test_truncation_is_a_problem_that_names_the_example_and_the_flag(with_examples, tiny, example):
    report = check_study(with_examples(example))
    (problem,) = report.problems
    assert problem.startswith(f"1 examples are longer than 128 tokens: {example['id']};")
    assert "examples.drop_truncated=true" in problem
    assert "cost" in dict(report.rows), "the other examples are still counted"
    nothing_left = example is GONE
    same = row(report, "response tokens") == row(check_study(tiny), "response tokens")
    assert same == nothing_left


@pytest.mark.parametrize("example", [LONG, GONE], ids=["cut", "cut to nothing"])
def test_drop_truncated_is_respected(with_examples, tiny, example):
    report = check_study(with_examples(example, drop_truncated=True))
    assert report.problems == []
    assert row(report, "truncated").endswith(f"dropped on request: {example['id']}")
    for what in ("example tokens", "response tokens", "cost"):
        assert row(report, what) == row(check_study(tiny), what)


def test_a_run_drops_what_check_says_it_drops(with_examples, tmp_path):
    study = with_examples(OVERLAP, LONG, GONE, drop_overlap=True, drop_truncated=True)
    report = check_study(study)
    assert report.problems == []
    run = do(study, tmp_path / "run", *SCORED)
    dropped = run.read_json("dropped")
    assert row(report, "overlap").endswith(": " + ", ".join(dropped["overlap"]))
    assert row(report, "truncated").endswith(": " + ", ".join(dropped["truncated"]))
    assert dropped == {"overlap": ["same"], "truncated": ["long", "gone"]}


def test_no_example_left_is_a_problem_and_no_traceback(tiny):
    study = tiny.replace("examples.max_tokens", 10).replace("examples.drop_truncated", True)
    assert check_study(study).problems == ["no example is left to be scored"]


def test_a_example_that_cannot_be_rendered_is_a_problem(with_examples):
    special = {"id": "odd", "label": "x", "prompt": "a <|im_end|> b", "response": "c"}
    (problem,) = check_study(with_examples(special)).problems
    assert "odd contains a special token" in problem


# Cost


def test_the_estimator_changes_the_cost(tiny):
    full = cost(check_study(tiny))
    few = cost(check_study(tiny.replace("attribution.targets", ["score", "behavior:*"])))
    steps = cost(check_study(tiny.replace("attribution.estimator", "finite-step")))
    forward = cost(check_study(tiny.replace("attribution.estimator", "forward")))
    assert full.keys() == {"read-outs", "features", "prompts", "total"}
    assert few.keys() == {"read-outs", "targets", "total"}
    assert steps.keys() == {"read-outs", "finite steps", "total"}
    assert forward.keys() == {"read-outs", "forward mode", "total"}
    for parts in (full, few, steps, forward):
        total = parts.pop("total")
        assert total == pytest.approx(sum(parts.values()), rel=0.01)


def test_finite_steps_grow_with_the_examples(tiny):
    study = tiny.replace("attribution.estimator", "finite-step")
    eight, four = (cost(check_study(study.replace("examples.limit", n))) for n in (8, 4))
    assert eight["finite steps"] == pytest.approx(2 * four["finite steps"], rel=0.02)
    assert eight["read-outs"] == four["read-outs"]


def test_features_grow_with_their_number(tiny):
    def features(key, value):
        return cost(check_study(tiny.replace(key, value)))["features"]

    six, twelve = features("features.max_features", 6), features("features.max_features", 12)
    assert 1.5 * six < twelve <= 2 * six
    assert features("features.ids", [3, 1, 4, 5, 9, 2]) == six
    assert features("features.max_features", 10_000) == features("features.max_features", 32)


def test_exact_top_adds_finite_steps(tiny):
    none, two = (cost(check_study(tiny.replace("attribution.exact_top", n))) for n in (0, 2))
    assert "finite steps" not in none
    added = two["finite steps"] + two["token shares"]
    assert two["total"] == pytest.approx(none["total"] + added, rel=0.01)


def test_minutes_are_operations_over_the_measured_rate_and_called_an_estimate(tiny, monkeypatch):
    total = cost(check_study(tiny))["total"] * 1e12
    slow = total / (30 * 60) / check_module.PACE
    monkeypatch.setattr(check_module, "product_rate", lambda weight: slow)
    text = row(check_study(tiny), "time")
    assert text.startswith("about 30 minutes: an estimate")
    assert "6 features to be active on 40% of the prompts" in text
    few = row(check_study(tiny.replace("attribution.targets", ["score", "behavior:*"])), "time")
    assert "active" not in few
    monkeypatch.setattr(check_module, "product_rate", lambda weight: 1e15)
    assert row(check_study(tiny), "time").startswith("about a minute or less")


def test_what_moves_is_counted(tiny):
    report = check_study(tiny.replace("attribution.parameters", ["*.1.mlp.*", "model.norm.*"]))
    assert row(report, "moving") == f"{(3 * 16 * 32 + 16) / 1e6:.3g}M parameters in 4 tensors"
    wrong = check_study(tiny.replace("attribution.parameters", ["*.mpl.*"]))
    assert "matches none of the model's parameters" in wrong.problems[0]


def test_under_ekfac_only_linear_layers_of_the_blocks_move(tiny):
    report = check_study(tiny.replace("attribution.curvature", "ekfac"))
    assert row(report, "moving").endswith(f"parameters in {3 * 7} tensors")
    assert cost(report)["curvature"] > 0
    assert cost(report).keys() - cost(check_study(tiny)).keys() == {"curvature"}


def test_memory_is_model_and_gradients_and_the_rest(tiny):
    study = tiny.replace("attribution.memory_gb", 2.5)
    assert row(check_study(study), "memory").startswith("about 5.5 GB (model 0.0, gradients 2.5,")


def test_gradients_of_few_targets_take_no_more_than_the_budget_and_a_real_step_one_gradient(tiny, monkeypatch):
    bytes_moved = 4 * sum(p.numel() for p in open_subject(tiny).loaded.model.parameters())
    monkeypatch.setattr(check_module, "GB", bytes_moved / 100)  # the model, and each gradient: 100
    few = tiny.replace("attribution.targets", ["behavior:harmful", "behavior:harmless"])

    def gradients(**spec: float) -> str:
        study = few
        for key, value in spec.items():
            study = study.replace(f"attribution.{key}", value)
        return row(check_study(study), "memory")

    assert "model 100.0, gradients 200.0" in gradients(memory_gb=500.0)
    assert "model 100.0, gradients 25.0" in gradients(memory_gb=25.0)
    assert "model 100.0, gradients 100.0" in gradients(memory_gb=25.0, exact_top=1)


def test_the_subsets_that_are_counted_are_those_that_validate_trains_on(tiny, tmp_path):
    study = tiny.replace("prompts.limit", 12)
    for key, value in {
        "designs": ["random", "matched", "leave-out", "leave-one-out", "removal", "addition", "couples"],
        "subsets": 3,
        "leave_out": 0.25,
        "budgets": [0.25, 0.5],
        "controls": 5,
        "epochs": 1,
        "answer_tokens": 2,
        "repeats": 2,
    }.items():
        study = study.replace(f"validation.{key}", value)
    report = check_study(study)
    run = do(study, tmp_path / "run", *SCORED, "validate")
    models = [r for r in run.read_table("models").to_pylist() if r["design"] != "base"]
    counted = check_module.subset_sizes(study.validation, 8)
    by_design = [
        sorted(r["n_examples"] for r in models if r["design"] == design) for design in study.validation.designs
    ]
    assert sorted(counted) == sorted(size for sizes in by_design for size in sizes)
    assert row(report, "validate").startswith(f"{len(models)} retrainings on 2 to 7 examples, about ")
    kept = sum(path.stat().st_size for path in run.path("retrained").iterdir())
    assert kept / 2.5 < check_module.retrained_bytes(counted, 1, 12, 6) < 2.5 * kept


def test_the_published_rule_is_counted_with_all_examples_and_its_controls():
    assert check_module.subset_sizes(ValidationSpec(designs=("curated",), controls=5), 80) == [80, *6 * [40]]
    spec = ValidationSpec(designs=("curation",), controls=6)
    assert check_module.subset_sizes(spec, 9) == [9] + (1 + 1 + 6) * [4]


@pytest.mark.parametrize(("pairs", "says"), [(4, "nothing can be called supported"), (8, "p is at least 0.0039")])
def test_the_smallest_p_of_so_many_pairs_is_said_before_they_run(tiny, pairs, says):
    study = tiny.replace("validation.designs", ("unlearn", "teach")).replace("validation.pairs", pairs)
    report = check_study(study)
    assert says in row(report, "pairs") and (pairs < 5) == ("cannot fall below 0.0625" in row(report, "pairs"))
    assert row(report, "validate").startswith(f"{6 * pairs} retrainings on 1 to 1 examples")
    more = study.replace("validation.unlearn_steps", 1000)
    assert row(check_study(more), "validate") != row(report, "validate")


def test_a_guard_that_names_no_prompts_is_a_problem(tiny):
    study = tiny.replace("validation.guard", "nobody")
    assert not [p for p in check_study(study).problems if "guard" in p]  # no design asks for it
    (problem,) = check_study(study.replace("validation.designs", ("unlearn",))).problems
    assert "harmful, break" in problem and "validation.guard" in problem


def test_what_the_estimator_refuses_is_a_problem(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError("some parameters are shared between blocks", fix="finite-step")

    monkeypatch.setattr(check_module, "attribution_cost", refuse)
    report = check_study(tiny)
    assert report.problems == ["some parameters are shared between blocks\n  fix:   finite-step"]


# What a run would refuse later

LATE = {
    "policy.folds=1000000": "folds",
    "policy.folds=9999": "policy.folds",
    "features.ids=[0, 99999]": "99999",
    "attribution.targets=[behavior:nobody]": "nobody",
    "attribution.targets=[coefficient:99999]": "99999",
    "attribution.targets=[concept:none]": "none",
    "attribution.targets=[score, prompt:nobody]": "nobody",
    "curation.k=100000": "curation.k",
    "curation.target=behavior:nobody": "curation.target",
    "curation.protect=behavior:nobody": "curation.protect",
    "curation.protect=score": "cannot be protected",
    "curation.rule=swap-k": "only preferences",
    "examples.negative_label=nobody": "no example has the label 'nobody'",
    "validation.remove_by=behavior:nobody": "validation.remove_by",
    "validation.methods=[adjoint+nothing]": "nothing",
    "clusters={k: 100000}": "clusters.k",
    "clusters={target: behavior:nobody}": "clusters.target",
    "bins={columns: [kind]}": "bins.columns",
    "bins={columns: [label], contrasts: [harmful - nobody]}": "bins.contrasts",
    "bins={columns: [a, b, c]}": "bins.columns",
    "concepts=[{name: a, source: 'feature:99999'}]": "99999",
    "concepts=[{name: a, source: difference, group: nobody}]": "nobody",
    "concepts=[{name: a, source: difference, block: 99}]": "99",
    "concepts=[{name: a, source: 'guess'}]": "source",
    "attribution.concept_methods=[vector-filter]": "vector-filter",
    "attribution.concept_methods=[projection-difference-training]": "attribution.checkpoint",
    "attribution.trajectory=checkpoints": "attribution.trajectory",
}


@pytest.mark.parametrize("change", LATE)
def test_what_a_run_would_refuse_is_a_problem_that_names_it(tiny, change):
    try:
        problems = check_study(tiny.replace(*parse_set(change))).problems
    except UserError as error:
        problems = [str(error)]
    assert any(LATE[change] in problem for problem in problems)


@pytest.mark.parametrize(("key", "said"), [("target", "compares scores"), ("protect", "cannot be protected")])
def test_what_the_published_rule_would_refuse_is_a_problem(tiny, key, said):
    asked = tiny.replace("curation.rule", "paper").replace(f"curation.{key}", "behavior:harmful")
    assert [said in problem for problem in check_study(asked).problems] == [True]


def test_files_that_later_stages_read_are_read(tiny, tmp_path):
    files = {
        "features.labels": ("labels.json", '{"x": "a"}'),
        "validation.scores": ("scores.csv", "example_id,value\na,1\n"),
        "attribution.curvature": ("moments.safetensors", "no moments"),
    }
    for key, (name, content) in files.items():
        path = tmp_path / name
        path.write_text(content)
        value = {"validation.scores": [str(path)], "attribution.curvature": {"kind": "adam", "moments": str(path)}}
        (problem,) = check_study(tiny.replace(key, value.get(key, str(path)))).problems
        assert name in problem


# Exit codes


@pytest.mark.parametrize(("rows", "code"), [((), 0), ((OVERLAP,), 2)])
def test_the_exit_code_is_0_without_problems_and_2_with_some(
    taught_here, with_examples, tmp_path, monkeypatch, rows, code
):
    from taught.study.load import dump_study

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command sets it; here it is undone
    (tmp_path / "study.yaml").write_text(dump_study(with_examples(*rows)))
    done = taught_here("check", str(tmp_path / "study.yaml"))
    assert done.returncode == code, done.stderr
    assert ("problem: 1 examples are evaluation prompts" in done.stdout) == bool(rows)
    assert ("nothing stands in the way" in done.stdout) == (not rows)
    assert "Traceback" not in done.stderr
