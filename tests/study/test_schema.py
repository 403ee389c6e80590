"""The study: one set of rules for YAML, flags and Python, and messages that name the key."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taught.cli.given import parse_set
from taught.core import rules
from taught.core.registry import CURVATURES, Choice, setting
from taught.errors import UserError
from taught.presets import list_presets, preset_path
from taught.study.load import dump_study, load_study, study_from_dict
from taught.study.schema import Study
from taught.study.template import template

ROOT = Path(__file__).parents[2]
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).filter(
    lambda text: text.strip()
)
positive = st.floats(min_value=1e-12, max_value=1e6)
counts = st.integers(1, 2**31 - 1)
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
        "behavior": st.builds(
            lambda prefixes: {"kind": "prefixes", "prefixes": prefixes},
            st.lists(words, min_size=1, max_size=5, unique=True),
        ),
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
                "trajectory": st.just("base")
                | st.builds(
                    lambda checkpoints: {"kind": "checkpoints", "checkpoints": checkpoints},
                    st.lists(
                        st.fixed_dictionaries({"id": st.just("org/model"), "lr": positive}), min_size=1, max_size=1
                    ),
                ),
                "curvature": st.sampled_from(["identity", "adam", "ekfac"])
                | st.builds(lambda damping: {"kind": "ekfac", "damping": damping}, positive),
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
            if name not in ("kind", "curvature", "trajectory"):
                kept = study.get(f"{section}.{name}")
                assert kept == (tuple(value) if isinstance(value, list) else value)
            elif name != "kind":
                kept = study.flat()[f"attribution.{name}"]
                assert kept == (value["kind"] if isinstance(value, dict) else value)


def test_template_loads_back_to_the_defaults(tmp_path):
    assert load_study(write(tmp_path, template())) == Study().resolved(tmp_path)


def test_template_names_every_key_and_every_parameter_of_a_method():
    named = set(re.findall(r"^[ #-]*([a-z_]+):", template(), re.MULTILINE))
    assert {key.rpartition(".")[2] for key in Study().flat()} <= named
    assert {"kind", "prefixes", "damping", "moments", "checkpoints", "dim", "controls", "source"} <= named


def test_a_method_from_outside_stands_in_the_template_and_in_a_study(tmp_path):
    @CURVATURES.register("test-bent")
    @dataclasses.dataclass(frozen=True)
    class Bent:
        """Bent."""

        bend: float = setting(0.5, rules.number(above=0), "how much it bends")

    try:
        assert re.search(r"# kind: test-bent\n +# bend: 0.5 +# how much it bends", template())
        study = load_study(write(tmp_path, "attribution: {curvature: {kind: test-bent, bend: 2}}"))
        assert study.attribution.curvature.make(CURVATURES) == Bent(2.0)
    finally:
        del CURVATURES._found["test-bent"]


def test_an_empty_file_is_the_default_study(tmp_path):
    assert load_study(write(tmp_path, "")) == Study().resolved(tmp_path)
    assert load_study(write(tmp_path, "policy:\n")) == Study().resolved(tmp_path)


@pytest.mark.parametrize("name", list_presets())
def test_presets_load_by_name_and_their_paths_stand_beside_them(name):
    study = load_study(name)
    assert study.name == name
    assert Path(study.prompts.path).parent.parent == preset_path(name).parent  # one may use data of another
    # The presets share one SAE; preferences need none.
    if study.examples.kind != "preference":
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
    ("model.id", "null", "a folder or a hub id"),
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
    ("examples.kind", "text", "pair, document"),
    ("attribution.targets", "[score, score]", "without repetitions"),
    ("attribution.curvature", "3", "the name of a method"),
    ("clamp.prompts", "1", "at least 2"),
    ("concepts", "{name: a}", "a list"),
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
    ("attribution.memory_gb", "1e300", "above 0 and at most 1e+06"),
    ("attribution.lr", "1e300", "above 0 and at most 1e+09"),
    ("attribution.lr", "fast", "a finite number, above 0"),
    ("attribution.estimator", "finite_step", "one of adjoint, forward, finite-step"),
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
    with pytest.raises(UserError, match="policy is a section"):
        study.replace("policy", {"alpha": 1})
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


# Methods


def test_a_method_is_a_name_or_a_mapping_with_its_parameters(tmp_path):
    short = load_study(write(tmp_path, "attribution: {curvature: ekfac}"))
    long = load_study(write(tmp_path, "attribution: {curvature: {kind: ekfac, damping: 0.1}}"))
    assert short == long and short.attribution.curvature == Choice("ekfac")
    own = load_study(write(tmp_path, "attribution: {curvature: {kind: ekfac, damping: 5e-2}}"))
    assert own.attribution.curvature == Choice("ekfac", {"damping": 0.05})
    assert own.flat()["attribution.curvature"] == "ekfac"
    assert own.flat()["attribution.curvature.damping"] == 0.05
    assert short.get("attribution.curvature.damping") == 0.1  # the default of the method


def test_parameters_are_set_by_their_key_and_go_with_the_method():
    study = Study().replace("attribution.curvature", "ekfac").replace("attribution.curvature.damping", 0.05)
    assert study.attribution.curvature == Choice("ekfac", {"damping": 0.05})
    assert study.replace("attribution.curvature", "adam").attribution.curvature == Choice("adam")
    assert study.replace("attribution.curvature.kind", "identity").attribution.curvature == Choice("identity")
    with pytest.raises(UserError, match=r"unknown key attribution\.curvature\.damping"):
        Study().replace("attribution.curvature.damping", 0.05)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attribution.curvature", "ekfak", "did you mean ekfac?"),
        ("attribution.curvature", {"kind": "ekfac", "dampin": 1}, "did you mean attribution.curvature.damping?"),
        ("attribution.curvature", {"kind": "ekfac", "damping": -1}, "attribution.curvature.damping is not valid"),
        ("attribution.curvature", {"kind": "identity", "damping": 1}, "identity has no parameters"),
        ("behavior", "prefix", "did you mean prefixes?"),
        ("attribution.targets", ["scor"], "did you mean score?"),
        ("attribution.targets", ["coefficient"], "coefficient does not name a target like this"),
    ],
)
def test_a_method_or_a_target_that_is_not_there(key, value, said):
    with pytest.raises(UserError) as caught:
        Study().replace(key, value)
    assert said in str(caught.value) and key in caught.value.what


def test_targets_are_kept_as_they_print(tmp_path):
    study = load_study(write(tmp_path, "attribution: {targets: [score, 'coefficient:*', 'behavior:a - behavior:b']}"))
    assert study.attribution.targets == ("score", "coefficient:*", "behavior:a - behavior:b")


def test_paths_among_parameters_and_in_lists_are_resolved(tmp_path):
    (tmp_path / "early").mkdir()
    text = """
attribution:
  trajectory: {kind: checkpoints, checkpoints: [{id: early, lr: 1e-5}, {id: org/late, lr: 1e-5}]}
  estimator: {kind: sketch, store: sketches}
concepts:
  - {name: a, source: "file:v.safetensors:w"}
  - {name: b, path: saved}
validation: {scores: [s.csv]}
"""
    study = load_study(write(tmp_path, text))
    ids = [checkpoint.id for checkpoint in study.attribution.trajectory.values["checkpoints"]]
    assert ids == [str(tmp_path / "early"), "org/late"]
    assert study.attribution.estimator.values["store"] == str(tmp_path / "sketches")
    assert study.concepts[0].source == f"file:{tmp_path / 'v.safetensors'}:w"
    assert study.concepts[1].path == str(tmp_path / "saved")
    assert study.validation.scores == (str(tmp_path / "s.csv"),)
    with pytest.raises(UserError, match=r"prompts\.path does not exist"):
        study.require_files()


# Sections that may be null, and concepts


def test_clamp_clusters_and_bins_are_asked_for_by_their_keys(tmp_path):
    assert Study().clamp is None and Study().clusters is None
    assert load_study(write(tmp_path, "clamp: {}")).clamp.prompts == 24
    assert Study().replace("clamp", True).clamp.controls == 8
    assert Study().replace("clusters.k", 4).clusters.k == 4
    assert Study().replace("clusters.k", 4).replace("clusters", None).clusters is None
    assert load_study(write(tmp_path, "bins: {columns: [domain]}")).bins.columns == ("domain",)


@pytest.mark.parametrize(
    ("concepts", "said"),
    [
        ("[{name: a}]", "either source or path"),
        ("[{name: a, source: probe, path: x}]", "either source or path"),
        ("[{name: a, source: guess}]", "one of difference, probe"),
        ("[{nam: a, source: probe}]", "did you mean concepts.name?"),
        ("[{name: a, source: probe}, {name: a, source: difference}]", "each name once"),
    ],
)
def test_a_concept_that_is_wrong(tmp_path, concepts, said):
    assert said in refused(tmp_path, f"concepts: {concepts}")


# Keys and values of earlier studies


@pytest.mark.parametrize(
    ("text", "became"),
    [
        ("pairs: {path: a}", "it is examples now"),
        ("sketch: {dim: 64}", "kind: sketch"),
        ("attribution: {damping: 0.2}", "attribution.curvature.damping"),
        ("attribution: {moments: m}", "kind: adam"),
        ("attribution: {checkpoints: null}", "kind: checkpoints"),
        ("attribution: {coefficients: false}", "attribution.targets"),
        ("attribution: {estimator: jvp}", "forward"),
        ("validation: {remove_by: 'mean_y:harmless'}", "write behavior:harmless"),
        ("curation: {target: 'mean_y:a:b'}", "write behavior:a:b"),
    ],
)
def test_what_became_of_an_old_key_is_said(tmp_path, text, became):
    assert became in refused(tmp_path, text).split("fix:")[1]


# What no study holds


def bomb(levels: int) -> str:
    """Aliases of aliases: 9 ** levels values in a few hundred bytes."""
    lines = ["name: &a0 [x]", *(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))]
    return "\n".join(lines)


HOSTILE = {
    "bomb": bomb(10),
    "small bomb": bomb(4),
    "itself": "policy: &a {alpha: *a}",
    "deep": "[" * 50_000,
    "deep lists": "- " * 50_000,
    "deep below a key": "policy: " + "[" * 60 + "]" * 60,
    "long": "name: " + "x" * 300_000,
    "digits": "policy: {folds: " + "9" * 5000 + "}",
    "bits": "policy: {folds: 0x" + "f" * 20_000 + "}",
    "minutes": "policy: {folds: 1" + ":2" * 2000 + "}",
    "huge key": "? 0x" + "f" * 20_000 + "\n: 1",
    "long key": "k" * 5000 + ": 1",
    "tag of Python": "name: !!python/object/apply:os.getcwd []",
    "tag of another type": "policy: {folds: !!int x}",
    "date that is none": "name: !!timestamp x",
    "no day": "name: 2001-99-99",
    "binary": "name: !!binary aGk=",
    "surrogate": r'name: "\ud800"',
    "surrogate in a prefix": r'behavior: {prefixes: ["a\udfffb"]}',
    "NUL": r'model: {id: "./a\0b"}',
    "NUL in the file": "name: a\0b",
    "escape": r'name: "\e]0;title\a"',
    "line end in the name": r'name: "a\nb"',
    "name": "name: " + "a" * 5000,
    "path": "prompts: {path: " + "a" * 5000 + "}",
    "path of parts": "prompts: {path: " + "a/" * 5000 + "}",
    "method": "attribution: {estimator: " + "a" * 5000 + "}",
    "target": "attribution: {targets: [" + "a" * 5000 + "]}",
    "list as key": "? [a]\n: 1",
    "two documents": "name: a\n--- b",
    "merge twice": "a: &a {b: 1}\n<<: *a\n<<: *a",
    "none": "policy: {folds: null}",
}


@pytest.mark.timeout(60)  # minutes, and gigabytes, where nothing is bounded
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_few_plain_words(tmp_path, kind):
    message = refused(tmp_path, HOSTILE[kind])
    assert len(message) < 2000 + 2 * len(str(tmp_path))
    assert all(char.isprintable() or char == "\n" for char in message)


def test_aliases_and_merges_of_a_usual_size_are_read(tmp_path):
    study = load_study(write(tmp_path, "policy: &p {alpha: 3, seed: 1}\nexamples: {limit: 4}\n"))
    again = load_study(write(tmp_path, "policy:\n  <<: &p {alpha: 3}\n  seed: 1\nexamples: {limit: 4}\n"))
    assert (study.policy, study.examples) == (again.policy, again.examples)


NUMBERS = [
    "-1",
    "0",
    "1",
    "1.5",
    ".nan",
    ".inf",
    "-.inf",
    "1e400",
    "2147483648",
    str(10**30),
    "true",
    "'1'",
    "[1]",
    "{}",
]


def numeric_keys() -> list[str]:
    return [key for key, value in Study().flat().items() if isinstance(value, int | float)] + [
        "sae.block",
        "curation.k",
    ]


@pytest.mark.parametrize("key", numeric_keys())
def test_a_number_of_any_size_is_a_finite_one_in_bounds_or_refused(key):
    for text in NUMBERS:
        try:
            found = Study().replace(*parse_set(f"{key}={text}")).get(key)
        except UserError as error:
            assert error.what.startswith(key)
        else:
            assert math.isfinite(found) and (isinstance(found, float) or found < 2**31)


@pytest.mark.parametrize("source", ["a" * 5000, "a\0b", "/dev/zero", "~nobody-of-this-name/x", "a/" * 3000, "\ud800"])
def test_a_study_of_a_name_that_no_file_has_is_a_user_error(source):
    with pytest.raises(UserError, match="no such study"):
        load_study(source)
