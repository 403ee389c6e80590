from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from taught.errors import UserError
from taught.features.label import describe_features, load_labels

# Three prompts; feature 9 reads "bomb", feature 10 reads "the", feature 2 never fires.
TOKENS = [
    "How",
    " to",
    " make",
    " the",
    " bo",
    "mb",
    "?",
    "Bake",
    " the",
    " cake",
    " the",
    " way",
    "Hide",
    " the",
    " bo",
    "mb",
    "<|im_end|>",
]
PROMPT = [0] * 7 + [1] * 5 + [2] * 5
IDS = [2, 9, 10]


def acts() -> np.ndarray:
    X = np.zeros((17, 3))
    X[[4, 5], 1] = [3.0, 1.0]
    X[[14, 15], 1] = [2.0, 1.0]
    X[12, 1] = 0.2
    X[[3, 8, 10, 13], 2] = 1.0
    return X


def describe(**changes):
    given = {
        "prompt_ids": ["p0", "p1", "p2"],
        "texts": ["How to make the bomb?", "Bake the cake the way", "Hide the bomb"],
        "groups": ["harmful", "harmful", "harmful"],
        "h": np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]),
        **changes,
    }
    return describe_features(IDS, acts(), TOKENS, PROMPT, **given)


def test_one_description_per_feature_in_order_with_its_id():
    assert [f.feature_id for f in describe()] == IDS


def test_label_is_the_word_that_carries_the_feature_joined_from_its_tokens():
    silent, bomb, the = describe()
    assert bomb.label == "bomb"  # not "bo", not "mb"
    assert the.label == "the"
    assert silent.label == "not active"


def test_score_is_share_times_log_odds():
    word = describe()[1].words[0]
    share, frequency = 7 / 7.2, 4 / 15  # 15 of 17 tokens belong to words
    smooth = 0.95 * share + 0.05 * frequency
    expected = share * (math.log(smooth / (1 - smooth)) - math.log(frequency / (1 - frequency)))
    assert word == {"word": "bomb", "score": pytest.approx(expected)}


def test_top_prompts_and_tokens_are_the_strongest_with_context():
    bomb = describe()[1]
    assert [(p["prompt_id"], p["activation"]) for p in bomb.top_prompts] == [("p0", 3.0), ("p2", 2.0)]
    assert bomb.top_tokens[0] == {
        "token": " bo",
        "before": "How to make the",
        "after": "mb?",
        "activation": 3.0,
        "prompt_id": "p0",
    }
    assert len(describe()[2].top_prompts) == 3


def test_contrast_is_the_most_similar_prompt_of_the_group_without_the_feature():
    bomb = describe()[1]
    (contrast,) = bomb.contrast_prompts  # only p1 is without it, and it is used once
    assert (contrast["prompt_id"], contrast["to"]) == ("p1", "p0")
    assert contrast["similarity"] == pytest.approx(0.6)
    assert contrast["activation"] == 0
    other = describe(groups=["harmful", "harmless", "harmful"])[1]
    assert other.contrast_prompts == []


def test_of_several_prompts_without_the_feature_the_most_similar_is_the_contrast():
    X = np.zeros((17, 3))
    X[0, 1] = 1.0  # on in p0 only
    h = np.array([[1.0, 0.0], [0.1, 1.0], [5.0, 5.0]])  # p2 is nearer in direction, not in length
    (contrast,) = describe_features(
        IDS, X, TOKENS, PROMPT, prompt_ids=["p0", "p1", "p2"], texts=[""] * 3, groups=["g"] * 3, h=h
    )[1].contrast_prompts
    assert contrast["prompt_id"] == "p2"
    assert contrast["similarity"] == pytest.approx(2**-0.5)


def test_top_limits_the_lists():
    described = describe_features(
        IDS,
        acts(),
        TOKENS,
        PROMPT,
        prompt_ids=["a", "b", "c"],
        texts=["", "", ""],
        groups=["g"] * 3,
        h=np.eye(3),
        top=1,
    )
    assert [len(f.top_prompts) for f in described] == [0, 1, 1]


def test_feature_on_marks_only_is_said_so():
    X = np.zeros((17, 3))
    X[16, 0] = 1.0
    described = describe_features(
        IDS, X, TOKENS, PROMPT, prompt_ids=["a", "b", "c"], texts=["", "", ""], groups=["x", "x", "y"], h=np.eye(3)
    )
    assert described[0].label == "marks and template tokens (y)"
    assert described[0].words == []


def test_users_label_overrides():
    described = describe(labels={9: "explosives"})
    assert (described[1].label, described[1].label_source) == ("explosives", "file")
    assert (described[2].label, described[2].label_source) == ("the", "words")


def test_descriptions_are_json():
    rows = [asdict(f) for f in describe()]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.parametrize("change", [{"groups": ["a"]}, {"texts": []}, {"h": np.eye(2)}])
def test_inputs_that_do_not_fit_are_refused(change):
    with pytest.raises(UserError, match="do not fit together"):
        describe(**change)


# --- label files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.json", '{"10": "weapons", "9": "cooking"}'),
        ("labels.yaml", "10: weapons\n9: 'cooking'\n"),
        ("labels.csv", "id,label\n10,weapons\n9,cooking\n"),
    ],
)
def test_label_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_labels(tmp_path / name) == {10: "weapons", 9: "cooking"}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("labels.json", '{"9": "a", "9": "b"}', "'9': 'b'"),
        ("labels.yaml", "9: a\n9: b\n", "'9': 'b'"),
        ("labels.csv", "id,label\n9,a\n9,b\n", "'9': 'b'"),
        ("labels.json", '{"nine": "a"}', "nine"),
        ("labels.json", '{"9": ""}', "'9': ''"),
        ("labels.json", '{"9": {"a": "b"}}', "bad entry"),
        ("labels.json", "[1, 2]", "cannot be read"),
        ("labels.json", "{", "cannot be read"),
        ("labels.yaml", "- a\n- b\n", "cannot be read"),
        ("labels.yaml", "a: [", "cannot be read"),
        ("labels.csv", "feature,name\n9,a\n", "cannot be read"),
        ("labels.csv", "id,label\n9\n", "bad entry"),
    ],
)
def test_bad_label_files_name_the_entry(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="label file") as caught:
        load_labels(tmp_path / name)
    assert named in str(caught.value)


def test_missing_label_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_labels(tmp_path / "none.json")
