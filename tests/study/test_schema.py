"""The study: one set of rules for YAML, flags and Python, and messages that name the key."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from taught.errors import UserError
from taught.presets import list_presets, preset_path
from taught.study.schema import COMMENTED_TEMPLATE, Checkpoint, Study, dump_study, load_study, study_from_dict

ROOT = Path(__file__).parents[2]
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).filter(
    lambda text: text.strip()
)
positive = st.floats(min_value=1e-12, max_value=1e12)
counts = st.integers(1, 10**9)
maybe_counts = st.none() | counts

STUDIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {},
            optional={
                "revision": st.none() | words,
                "dtype": st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
                "device": words,
            },
        ),
        "sae": st.fixed_dictionaries(
            {},
            optional={
                "block": st.none() | st.integers(0, 200),
                "encoder": st.sampled_from(["sae", "relu"]),
                "max_fvu": positive,
            },
        ),
        "behavior": st.fixed_dictionaries({"prefixes": st.lists(words, min_size=1, max_size=5, unique=True)}),
        "prompts": st.fixed_dictionaries({}, optional={"limit": maybe_counts}),
        "examples": st.fixed_dictionaries({}, optional={"max_tokens": counts, "drop_overlap": st.booleans()}),
        "features": st.fixed_dictionaries(
            {},
            optional={
                "ids": st.none() | st.lists(st.integers(0, 10**6), min_size=1, unique=True),
                "threshold": st.just(0.0) | positive,
            },
        ),
        "policy": st.fixed_dictionaries({}, optional={"alpha": st.just("cv") | positive, "intercept": st.booleans()}),
        "attribution": st.fixed_dictionaries(
            {},
            optional={
                "lr": positive,
                "checkpoints": st.none()
                | st.lists(
                    st.builds(Checkpoint, st.just("org/model"), positive, st.none() | words),
                    min_size=1,
                    max_size=3,
                    unique=True,
                ),
                "curvature": st.sampled_from(["identity", "adam", "ekfac"]),
                "adam_eps": positive,
                "damping": positive,
                "parameters": st.none() | st.lists(words, min_size=1, max_size=3, unique=True),
            },
        ),
        "curation": st.fixed_dictionaries({}, optional={"rule": st.sampled_from(["paper", "top-k"]), "k": counts}),
    },
)


def write(folder: Path, text: str) -> Path:
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        load_study(write(tmp_path, text))
    return str(caught.value)


@given(content=STUDIES)
def test_yaml_round_trip_is_exact(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = study_from_dict(content, folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert load_study(write(elsewhere, dump_study(study))) == study
    for section, values in content.items():
        for name, value in values.items():
            kept = study.get(f"{section}.{name}")
            assert kept == (tuple(value) if isinstance(value, list) else value)


def test_template_loads_back_to_the_defaults(tmp_path):
    assert load_study(write(tmp_path, COMMENTED_TEMPLATE)) == Study().resolved(tmp_path)


def test_template_names_every_key_and_nothing_else():
    content = yaml.safe_load(COMMENTED_TEMPLATE)
    named = {f"{s}.{k}" for s, v in content.items() if isinstance(v, dict) for k in v}
    assert named | {"name"} == set(Study().flat())


def test_the_defaults_in_the_documentation_are_the_defaults(tmp_path):
    (block,) = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "docs" / "formats.md").read_text(), re.DOTALL)
    assert load_study(write(tmp_path, block)) == Study().resolved(tmp_path)


def test_an_empty_file_is_the_default_study(tmp_path):
    assert load_study(write(tmp_path, "")) == Study().resolved(tmp_path)
    assert load_study(write(tmp_path, "policy:\n")) == Study().resolved(tmp_path)


@pytest.mark.parametrize("name", list_presets())
def test_presets_load_by_name_and_their_paths_stand_beside_them(name):
    study = load_study(name)
    assert study.name == name
    assert Path(study.prompts.path).parent == preset_path(name)
    # The presets share one SAE.
    assert Path(study.sae.path) == preset_path("refusal-smollm2") / "sae"


def test_there_is_the_demo_preset():
    assert "refusal-smollm2" in list_presets()


# Keys


def test_unknown_key_names_it_its_neighbours_and_the_closest(tmp_path):
    message = refused(tmp_path, "policy: {alfa: 3}")
    assert message.splitlines()[0] == "unknown key policy.alfa"
    assert "value: 3" in message
    assert "alpha, intercept, folds, bootstrap, seed" in message
    assert "did you mean policy.alpha?" in message


def test_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path):
    assert "did you mean attribution.lr?" in refused(tmp_path, "policy: {lr: 3}")


def test_unknown_section(tmp_path):
    message = refused(tmp_path, "modle: {id: x}")
    assert "unknown key modle" in message
    assert "did you mean model?" in message


def test_key_that_is_like_nothing_still_has_a_fix(tmp_path):
    assert "fix:   remove it" in refused(tmp_path, "zzzzzz: 1")


def test_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    message = refused(tmp_path, "policy:\n  alpha: 3\n  seed: 1\n  alpha: 4\n")
    assert "'alpha' stands twice" in message
    assert "line 2" in message


def test_section_given_a_value(tmp_path):
    message = refused(tmp_path, "policy: 5")
    assert "policy is a section" in message
    assert "alpha" in message


def test_a_study_that_is_a_list(tmp_path):
    assert "a study is a mapping" in refused(tmp_path, "- a\n- b\n")


def test_text_that_is_not_yaml_names_the_line(tmp_path):
    message = refused(tmp_path, "name: a\nmodel: [1, 2\nsae: {}\n")
    assert "not valid YAML" in message
    assert "line 3" in message


def test_yaml_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"
    refused(tmp_path, f"name: !!python/object/apply:os.mkdir ['{marker}']")
    assert not marker.exists()


# Values

WRONG = [
    ("name", "2024", "text, in quotes"),
    ("name", "a/b", "run folder"),
    ("name", '""', "text"),
    ("model.dtype", "int8", "one of float32, bfloat16, float16, float64"),
    ("model.id", "null", "text"),
    ("sae.block", "-1", "a whole number, at least 0, or null"),
    ("sae.block", "1.0", "a whole number"),
    ("sae.block", "true", "a whole number"),
    ("sae.max_fvu", "0", "above 0"),
    ("readout.position", "first", "last_user, last_prompt, mean_user, max_user"),
    ("behavior.prefixes", "[]", "a list"),
    ("behavior.prefixes", "I cannot", "a list"),
    ("behavior.prefixes", "[no]", "in quotes"),
    ("behavior.prefixes", "[a, a]", "without repetitions"),
    ("prompts.positive_group", "no", "in quotes"),
    ("prompts.limit", "0", "at least 1, or null"),
    ("examples.drop_overlap", "1", "true or false"),
    ("features.ids", "[3, 3]", "without repetitions"),
    ("features.ids", "['3']", "a whole number"),
    ("features.threshold", "-0.1", "at least 0"),
    ("policy.alpha", "0", "above 0, or cv"),
    ("policy.alpha", ".nan", "a finite number"),
    ("policy.alpha", ".inf", "a finite number"),
    ("policy.alpha", "auto", "or cv"),
    ("policy.folds", "1", "at least 2"),
    ("policy.intercept", "1", "true or false"),
    ("attribution.lr", "fast", "a finite number, above 0"),
    ("attribution.estimator", "finite_step", "one of adjoint, finite-step"),
    ("curation.rule", "topk", "one of paper, top-k, keep-k"),
]


@pytest.mark.parametrize(("key", "value", "rule"), WRONG)
def test_a_wrong_value_names_key_value_rule_and_fix(key, value, rule, tmp_path):
    section, _, name = key.rpartition(".")
    message = refused(tmp_path, f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}")
    assert message.splitlines()[0].startswith(key)
    assert "value:" in message
    assert rule in message.split("rule:")[1]
    assert "fix:" in message


def test_a_close_word_is_suggested(tmp_path):
    assert "did you mean finite-step?" in refused(tmp_path, "attribution: {estimator: finite_step}")


def test_the_same_rules_hold_in_python():
    with pytest.raises(UserError, match="policy.alpha is not valid"):
        dataclasses.replace(Study().policy, alpha=-1.0)


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    study = load_study(write(tmp_path, "attribution: {lr: 1e-4}\npolicy: {alpha: 2e1}"))
    assert (study.attribution.lr, study.policy.alpha) == (1e-4, 20.0)


def test_one_group_only_is_refused(tmp_path):
    message = refused(tmp_path, "prompts: {positive_group: a, negative_group: a}")
    assert "the same" in message
    assert "prompts.positive_group" in message


# Files and folders


def test_missing_study_says_what_may_stand_there():
    with pytest.raises(UserError, match="no such study") as caught:
        load_study("refusal-smolm2")
    assert "did you mean refusal-smollm2?" in str(caught.value)


def test_a_study_that_is_no_text(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match="cannot be read"):
        load_study(file)


def test_relative_paths_belong_to_the_file_not_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    file = write(tmp_path / "deep", "prompts: {path: ../data/p.csv}\nfeatures: {labels: l.json}")
    monkeypatch.chdir(tmp_path)
    study = load_study(file)
    assert study.prompts.path == str(tmp_path / "data" / "p.csv")
    assert study.features.labels == str(tmp_path / "deep" / "l.json")


@pytest.mark.parametrize("key", ["model.id", "sae.path"])
def test_local_folder_or_hub_id(key, tmp_path):
    (tmp_path / "org" / "here").mkdir(parents=True)
    study = Study()

    def given(value: str) -> str:
        return study.replace(key, value, base=tmp_path).get(key)

    assert given("org/elsewhere") == "org/elsewhere"
    assert given("org/here") == str(tmp_path / "org" / "here")
    assert given("./absent") == str(tmp_path / "absent")
    assert given("../absent") == str(tmp_path.parent / "absent")
    assert given("/absent") == "/absent"


def test_a_missing_data_file_is_named_with_its_key(study):
    study.require_files()
    with pytest.raises(UserError, match=r"examples\.path does not exist") as caught:
        study.replace("examples.path", "/nowhere/pairs.jsonl").require_files()
    assert "/nowhere/pairs.jsonl" in str(caught.value)


def test_a_hub_id_is_no_missing_file(study):
    study.replace("model.id", "org/model").replace("sae.path", "org-sae").require_files()


# Overrides


def test_replace_changes_one_value_and_nothing_else(study):
    changed = study.replace("policy.alpha", 3)
    assert changed.policy.alpha == 3.0
    assert {k for k, v in changed.flat().items() if v != study.flat()[k]} == {"policy.alpha"}


def test_replace_refuses_what_yaml_refuses(study):
    with pytest.raises(UserError, match="unknown key policy"):
        study.replace("policy", {})
    with pytest.raises(UserError, match="did you mean policy.alpha"):
        study.replace("policy.alhpa", 1)
    with pytest.raises(UserError, match="policy.alpha is not valid"):
        study.replace("policy.alpha", "many")


def test_paths_in_flags_are_relative_to_the_current_folder(study, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    changed = study.replace("prompts.path", "mine.csv")
    assert changed.prompts.path == str(tmp_path / "elsewhere" / "mine.csv")


def test_a_study_cannot_be_changed_in_place(study):
    with pytest.raises(dataclasses.FrozenInstanceError):
        study.policy.alpha = 3.0
