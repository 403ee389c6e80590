"""Concepts: what they are made of, how they are read, what is refused; the stage ``concepts``."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from taught.core.point import Point
from taught.errors import UserError
from taught.features.concept import (
    Concept,
    concept_map,
    feature_direction,
    file_direction,
    fitted_direction,
    load_concept,
    quality_card,
    save_concept,
)
from taught.features.pooling import pool
from taught.model.readout import read_vectors
from taught.run.folder import RunFolder
from taught.stages.concepts import concepts, run_concepts
from taught.stages.readings import readings
from taught.stages.subject import open_subject, study_prompts
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_models import ENCODERS, MODELS, PROMPT_IDS, WIDTH, plain_read, tiny_model, tiny_prompts, tiny_sae
from tiny_study import BLOCK, TOPICS, write_tiny_study
from tiny_study import WIDTH as STUDY_WIDTH


def some(name: str = "c", seed: int = 0, **fields) -> Concept:
    v = np.random.default_rng(seed).normal(size=WIDTH)
    return Concept(**{"name": name, "direction": v, "point": Point(1), "position": "mean_user", **fields})


# --- directions --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_feature_s_direction_is_what_its_activation_adds_to_the_reconstruction(kind: str):
    sae = tiny_sae(kind)
    acts = torch.zeros(sae.n_features, dtype=torch.float64)
    acts[2], acts[7] = 0.5, -3.0
    expected = sae.decode(acts) - sae.decode(torch.zeros_like(acts))
    np.testing.assert_allclose(feature_direction(sae, {7: -3.0, 2: 0.5}), expected, rtol=1e-12)
    with pytest.raises(UserError, match="no such feature"):
        feature_direction(sae, {10: 1.0})


def test_directions_from_files(tmp_path: Path):
    v = np.arange(4.0)
    save_file({"a": v[None], "b": np.eye(4)}, tmp_path / "two.safetensors")
    save_torch({"v": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    found, origin = file_direction(tmp_path / "two.safetensors", "a")
    assert found.tolist() == v.tolist()
    assert origin["tensor"] == "a" and len(origin["sha256"]) == 64
    assert file_direction(tmp_path / "one.safetensors")[0].tolist() == [1.0, 2.0]
    for tensor, message in ((None, "one of a, b"), ("c", "one of a, b"), ("b", "no vector")):
        with pytest.raises(UserError, match=message):
            file_direction(tmp_path / "two.safetensors", tensor)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            file_direction(tmp_path / name)


def groups(shift: float):
    rng = np.random.default_rng(1)
    positive = np.arange(60) % 2 == 0
    return rng.normal(size=(60, WIDTH)) + shift * np.outer(positive, np.ones(WIDTH)), positive


@pytest.mark.parametrize("method", ["difference", "logistic", "ridge"])
def test_a_direction_that_is_no_better_than_chance_is_refused_unless_forced(method: str):
    X, positive = groups(0.0)
    with pytest.raises(UserError, match=r"no better than chance(.|\n)*force to true"):
        fitted_direction(X, positive, method)
    v, card = fitted_direction(X, positive, method, force=True)
    assert v.shape == (WIDTH,)
    assert card["auc"]["lo"] <= 0.5 and card["held_out"]
    _, good = fitted_direction(*groups(1.0), method)
    assert good["auc"]["lo"] > 0.5
    assert 0.5 < good["fold_cosine"] <= 1 and good["difference_cosine"] > 0.5


def test_the_card_describes_the_read_out_along_the_unit_direction():
    X, positive = groups(1.0)
    w = 3 * np.eye(WIDTH)[0]
    card = quality_card(w, X, positive)
    assert card["norm"] == pytest.approx(3)
    assert card["mean_positive"] == pytest.approx(X[positive, 0].mean())
    assert card["mean_negative"] == pytest.approx(X[~positive, 0].mean())
    parts = X[:, 0] - np.where(positive, X[positive, 0].mean(), X[~positive, 0].mean())
    assert card["spread"] == pytest.approx(np.sqrt(np.mean(parts**2)))
    assert not card["held_out"]


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last_user", "last_prompt", "mean_user"])
def test_read_outs_of_all_blocks_are_those_of_plain_passes(name: str, position: str):
    model, prompts = tiny_model(name), tiny_prompts(position)
    concepts = [some("a", 0), some("b", 1)]
    features = concept_map(concepts, position, next(model.parameters()))
    found = read_vectors(model, prompts, [Point(0), Point(1)], features, tokens=12)
    assert found.shape == (2, len(prompts), 2)
    for block in (0, 1):
        for i, (ids, prompt) in enumerate(zip(PROMPT_IDS, prompts, strict=True)):
            h = plain_read(model, ids, block)[0][list(prompt.read)].mean(0).detach().numpy()
            expected = [concept.direction @ h for concept in concepts]
            np.testing.assert_allclose(found[block, i], expected, rtol=1e-10)


def test_the_last_block_is_read_before_the_final_norm():
    model, prompts = tiny_model("tied"), tiny_prompts("last_prompt")
    kept = []
    handle = model.model.layers[2].register_forward_hook(lambda _m, _a, out: kept.append(out))
    model(input_ids=torch.tensor([PROMPT_IDS[0]]))
    handle.remove()
    (h,) = read_vectors(model, prompts[:1], [Point(2)], lambda h, offsets: pool(h, offsets, "last_"))
    torch.testing.assert_close(h[0], kept[0][0, -1].detach(), rtol=1e-10, atol=1e-12)


def test_a_concept_map_responds_linearly_and_can_be_narrowed():
    features = concept_map([some("a", 0), some("b", 1)], "mean_user", torch.zeros(1).double())
    gen = torch.Generator().manual_seed(0)
    h, dh = (torch.randn(6, WIDTH, generator=gen, dtype=torch.float64) for _ in range(2))
    offsets = torch.tensor([0, 3, 4, 6])
    torch.testing.assert_close(features.response(h, dh, offsets), features(h + dh, offsets) - features(h, offsets))
    narrowed = replace(features, ids=torch.tensor([1]))
    torch.testing.assert_close(narrowed(h, offsets), features(h, offsets)[:, 1:])


def test_read_outs_that_are_not_finite_name_their_prompts_only():
    model, prompts = tiny_model("untied"), tiny_prompts("last_prompt")
    with torch.no_grad():
        model.model.embed_tokens.weight[14] = torch.nan  # a token of the last prompt alone
    with pytest.raises(UserError, match=r"\['q5'\]"):
        read_vectors(model, prompts, [Point(0)], lambda h, offsets: h)


# --- files -------------------------------------------------------------------------------------


def test_a_concept_survives_its_files_and_damage_is_noticed(tmp_path: Path):
    made = some(weights={"sha256": "x"}, provenance={"source": "probe"}, card={"norm": 1.0})
    save_concept(made, tmp_path / "c")
    read = load_concept(tmp_path / "c")
    assert np.array_equal(read.direction, made.direction)
    fields = ("name", "point", "position", "tokens", "weights", "provenance", "card")
    assert [getattr(read, f) for f in fields] == [getattr(made, f) for f in fields]
    save_concept(replace(made, direction=-made.direction), tmp_path / "d")
    (tmp_path / "d" / "concept.json").write_bytes((tmp_path / "c" / "concept.json").read_bytes())
    for folder in ("d", "nowhere"):
        with pytest.raises(UserError, match="the concept cannot be read"):
            load_concept(tmp_path / folder)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"width": WIDTH + 1, "blocks": 3, "weights": {"sha256": "x"}}, "width 9"),
        ({"width": WIDTH, "blocks": 1, "weights": {"sha256": "x"}}, "blocks 0 to 0"),
        ({"width": WIDTH, "blocks": 3, "weights": {"sha256": "y"}}, "other weights"),
    ],
)
def test_a_concept_of_another_width_block_or_model_is_refused(fit, message):
    made = some(weights={"sha256": "x"})
    made.require_fit(width=WIDTH, blocks=3, weights={"sha256": "x"})
    with pytest.raises(UserError, match=message):
        made.require_fit(**fit)


@pytest.mark.parametrize(
    "fields",
    [
        {"direction": np.zeros(4)},
        {"direction": np.ones((2, 2))},
        {"direction": [np.nan, 1]},
        {"direction": np.full(4, 1e-200)},
        {"position": "max_user"},
        {"tokens": "all"},
    ],
)
def test_what_is_no_direction_or_no_place_is_refused(fields):
    with pytest.raises(UserError):
        some(**fields)


# --- the stage ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("concept")
    study = load_study(write_tiny_study(folder)).replace("readout.position", "mean_user")
    readings(study, RunFolder(folder / "run"))
    return study


def with_concepts(study: Study, *some: dict[str, Any]) -> Study:
    return study.replace("concepts", [{"name": "c", **one} for one in some])


def make(study: Study, folder: Path, source: str, **options: Any) -> Concept:
    """One concept by the stage, in a run folder of its own, read again from its files."""
    study = with_concepts(study, {"source": source, **options})
    shutil.copytree(Path(study.model.id).parent / "run", folder)
    run = RunFolder(folder)
    concepts(study, run)
    (found,) = run_concepts(study, run, open_subject(study))
    return found.concept


def plain_pooled(study: Study, block: int, module: str = ""):
    """Pooled h [N, D] of each prompt by its own plain pass, and which are positive; of a module of the block."""
    subject, rows, positive = open_subject(study), [], []
    seen: list[torch.Tensor] = []
    watched = subject.loaded.model.model.layers[block].get_submodule(module)
    watched.register_forward_hook(lambda module, args, output: seen.append(output))
    for prompt in study_prompts(study):
        encoded = subject.chat.encode_prompt(prompt.text, prompt.id)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            out = subject.loaded.model(input_ids=ids, output_hidden_states=True)
        h = seen[-1] if module else out.hidden_states[block + 1]
        rows.append(h[0, slice(*encoded.user_span)].mean(0))
        positive.append(prompt.group == "harmful")
    return torch.stack(rows).double().numpy(), np.array(positive)


def test_the_stage_makes_the_difference_of_means_of_plain_passes(study: Study, tmp_path: Path):
    made = make(study, tmp_path / "c", "difference", block=0)
    X, positive = plain_pooled(study, 0)
    v = X[positive].mean(0) - X[~positive].mean(0)
    np.testing.assert_allclose(made.direction, v / np.linalg.norm(v), atol=1e-5)
    assert made.card["norm"] == pytest.approx(np.linalg.norm(v), rel=1e-4)
    assert (made.name, made.point, made.position) == ("c", Point(0), "mean_user")
    assert made.provenance["groups"] == ["harmful", "harmless"]
    assert made.weights["sha256"]


def test_a_direction_of_what_the_mlp_adds_is_made_and_kept_there(study: Study, tmp_path: Path):
    made = make(study, tmp_path / "c", "difference", block=0, point="mlp_out", sweep=True)
    X, positive = plain_pooled(study, 0, "mlp")
    v = X[positive].mean(0) - X[~positive].mean(0)
    np.testing.assert_allclose(made.direction, v / np.linalg.norm(v), atol=1e-5)
    assert made.point == Point(0, "mlp_out") and [row["block"] for row in made.card["sweep"]] == [0, 1, 2]
    assert made.card["sweep"][0]["auc"] == made.card["auc"]["value"]
    save_concept(made, tmp_path / "saved")
    assert load_concept(tmp_path / "saved").point == made.point
    before = {key: value for key, value in made.record().items() if key != "point"}
    assert Concept.of(before, made.direction).point == Point(0)


def test_a_concept_that_is_there_is_taken_from_its_folder_or_from_a_run(study: Study, tmp_path: Path):
    made = make(study, tmp_path / "made", "difference", block=0)
    save_concept(made, tmp_path / "saved")
    for name in ("run", "other"):
        shutil.copytree(Path(study.model.id).parent / "run", tmp_path / name)
    paths = ({"path": str(tmp_path / "made")}, {"name": "d", "path": str(tmp_path / "saved")})
    named, run = with_concepts(study, *paths), RunFolder(tmp_path / "run")
    concepts(named, run)
    found = run_concepts(named, run, open_subject(named))
    assert [read.name for read in found] == ["c", "d"]
    assert all(np.array_equal(read.concept.direction, made.direction) for read in found)
    assert all(read.concept.card == made.card and read.concept.point == Point(0) for read in found)
    other = with_concepts(study, {"name": "e", "path": str(tmp_path / "made")})
    with pytest.raises(UserError, match=r"no concept of this name(.|\n)*one of c"):
        concepts(other, RunFolder(tmp_path / "other"))


def test_every_source_gives_a_concept_and_a_sweep_a_row_for_every_block(study, tmp_path: Path):
    save_file({"v": np.ones(STUDY_WIDTH, np.float32)}, tmp_path / "v.safetensors")
    found = {}
    for number, (source, options) in enumerate(
        [
            ("probe", {"sweep": True}),
            ("probe", {"method": "ridge"}),
            ("feature:3", {}),
            ("feature:3=0.5,20=-2", {"norm": "none"}),
            (f"file:{tmp_path}/v.safetensors:v", {}),
        ]
    ):
        found[number] = made = make(study, tmp_path / str(number), source, **options)
        assert made.point == Point(BLOCK) and made.width == STUDY_WIDTH
        if options.get("norm") != "none":
            assert np.linalg.norm(made.direction) == pytest.approx(1)
        if "sweep" in options:
            assert [row["block"] for row in made.card["sweep"]] == [0, 1, 2]
            assert made.card["sweep"][BLOCK]["auc"] == made.card["auc"]["value"]
    four = found[3].direction  # features 3 and 20 are e_3 and -e_4
    expected = np.zeros(STUDY_WIDTH)
    expected[3], expected[4] = 0.5, 2.0
    np.testing.assert_allclose(four, expected)


def write_examples(file: Path, rows: int = 24, **changes) -> Path:
    """Answers of three lengths, half of them with an exclamation."""
    lines = [
        {
            "id": f"e{n}",
            "prompt": f"Say {TOPICS[n % 10]} {n}?",
            "response": f"{'Arr! ' if n % 2 else ''}{TOPICS[(n * 3) % 10]}{' and so on' * (n % 3)}.",
            "label": "with" if n % 2 else "without",
            **changes,
        }
        for n in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


WITH = {"positive": "with", "negative": "without"}


@pytest.mark.parametrize("tokens", ["mean_response", "last_response"])
def test_a_concept_from_examples_is_the_difference_of_plain_passes_at_their_responses(
    study: Study, tmp_path: Path, tokens: str
):
    file = write_examples(tmp_path / "e.jsonl")
    made = make(study, tmp_path / "c", "difference", block=0, tokens=tokens, examples=str(file), force=True, **WITH)
    subject, found, positive = open_subject(study), [], []
    for row in map(json.loads, file.read_text().splitlines()):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        start = len(subject.loaded.tokenizer(text).input_ids)
        ids = subject.loaded.tokenizer(f"{text}{row['response']}<|im_end|>").input_ids
        with torch.no_grad():
            out = subject.loaded.model(torch.tensor([ids]), output_hidden_states=True)
        h = out.hidden_states[1][0, start:].double()
        found.append((h.mean(0) if tokens == "mean_response" else h[-1]).numpy())
        positive.append(row["label"] == "with")
    X, s = np.stack(found), np.array(positive)
    v = X[s].mean(0) - X[~s].mean(0)
    np.testing.assert_allclose(made.direction, v / np.linalg.norm(v), atol=1e-5)
    assert (made.card["n_positive"], made.card["n_negative"]) == (12, 12)
    assert made.provenance["labels"] == ["with", "without"]
    assert made.provenance["examples sha256"] and "groups" not in made.provenance


def test_examples_judge_directions_that_come_from_elsewhere(study: Study, tmp_path: Path):
    file = write_examples(tmp_path / "e.jsonl")
    made = make(study, tmp_path / "c", "feature:3", examples=str(file), **WITH)
    assert made.card["n_positive"] == 12 and not made.card["held_out"]
    swept = make(study, tmp_path / "s", "probe", examples=str(file), sweep=True, force=True, **WITH)
    assert [row["block"] for row in swept.card["sweep"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "sides", "said"),
    [
        ({}, {}, r"present or absent(.|\n)*set positive and negative"),
        ({"label": "with"}, WITH, "24 rows"),
        ({"response": ""}, WITH, "empty"),
    ],
)
def test_examples_that_say_nothing_are_refused(study, tmp_path: Path, changes, sides, said):
    file = write_examples(tmp_path / "e.jsonl", **changes)
    with pytest.raises(UserError, match=said):
        make(study, tmp_path / "c", "probe", examples=str(file), **sides)
    assert not (tmp_path / "c" / "concepts.json").exists()


def test_examples_that_are_examples_or_prompts_of_the_study_are_refused(study, tmp_path: Path):
    example = json.loads(Path(study.examples.path).read_text().splitlines()[0])
    prompt = json.loads(Path(study.prompts.path).read_text().splitlines()[0])
    cases = ((example["prompt"], "are examples of the study"), (prompt["prompt"], "evaluation"))
    for number, (text, said) in enumerate(cases):
        file = write_examples(tmp_path / "e.jsonl", prompt=text)
        with pytest.raises(UserError, match=said):
            make(study, tmp_path / f"c{number}", "probe", examples=str(file), **WITH)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        others = json.loads(write_examples(file).read_text().splitlines()[0])["prompt"]
        rows[4:] = [row | {"prompt": others} for row in rows[4:]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dropping = study.replace("examples.drop_overlap", True)
        made = make(dropping, tmp_path / f"d{number}", "difference", examples=str(file), force=True, **WITH)
        assert made.card["n_positive"] + made.card["n_negative"] == 20


def write_control_vector(file: Path, tensors: dict[str, np.ndarray]) -> str:
    """As repeng writes it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def test_a_control_vector_is_read_after_the_block_it_is_added_to(study: Study, tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(3, STUDY_WIDTH)).astype(np.float32)
    stored = {f"direction.{n}": row for n, row in enumerate(rows)}
    stored["direction.2"] = rows[2].astype(np.float16)
    file = write_control_vector(tmp_path / "v.gguf", stored)
    cases = (
        (f"file:{file}", {}, BLOCK),
        (f"file:{file}", {"block": 0}, 0),
        (f"file:{file}:direction.2", {}, 2),
        (f"file:{file}:direction.2", {"block": 2}, 2),
    )
    for number, (source, options, block) in enumerate(cases):
        made = make(study, tmp_path / str(number), source, **options)
        assert made.point == Point(block)
        expected = rows[block] / np.linalg.norm(rows[block])
        np.testing.assert_allclose(made.direction, expected, atol=1e-3 if block == 2 else 1e-7)
        assert made.provenance["tensor"] == f"direction.{block}"


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        (":direction.0", {"block": 1}, "of another block"),
        (":direction.0", {"point": "mlp_out"}, "of the residual stream"),
        (":direction.x", {}, "no direction of a control vector"),
        (":direction.1", {}, "which tensor of the file"),
        (":direction.9", {}, "no such block"),
        ("", {}, "which tensor of the file"),  # the SAE's block is not in it
    ],
)
def test_a_control_vector_that_does_not_fit_is_refused(study: Study, tmp_path: Path, tensor, options, message):
    file = write_control_vector(
        tmp_path / "v.gguf", {f"direction.{n}": np.ones(STUDY_WIDTH, np.float32) for n in (0, 2)}
    )
    with pytest.raises(UserError, match=message):
        make(study, tmp_path / "c", f"file:{file}{tensor}", **options)
    assert not (tmp_path / "c" / "concepts.json").exists()


def test_a_file_that_is_no_control_vector_is_refused(study: Study, tmp_path: Path):
    (tmp_path / "v.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(UserError, match="cannot be read"):
        make(study, tmp_path / "c", f"file:{tmp_path}/v.gguf")
    with pytest.raises(UserError, match=r"concepts\.source does not exist(.|\n)*none\.gguf"):
        make(study, tmp_path / "d", f"file:{tmp_path}/none.gguf")


def test_a_control_vector_whose_counts_are_lies_is_refused_soon(tmp_path: Path):
    """gguf itself would walk over 2^40 parts that are not there."""
    file = Path(write_control_vector(tmp_path / "v.gguf", {"direction.0": np.ones(4, np.float32)}))
    whole = file.read_bytes()
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**40)  # a field of 2^40 numbers
    lies = {
        "fields": whole[:16] + struct.pack("<Q", 2**62) + whole[24:],
        "tensors": whole[:8] + struct.pack("<Q", 2**62) + whole[16:],
        "array": whole[:8] + struct.pack("<QQ", 0, 1) + array,
        "nested": whole[:8]
        + struct.pack("<QQ", 0, 1)
        + struct.pack("<Q", 1)
        + b"a"
        + struct.pack("<IIQ", 9, 9, 1) * 3000,
        "cut": whole[:-24],  # 16 bytes of padding, and a half of the tensor
        "empty": b"",
    }
    for content in lies.values():
        file.write_bytes(content)
        with pytest.raises(UserError, match="control vector cannot be read"):
            file_direction(file)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_a_tensor_of_codes_is_no_direction(tmp_path: Path, kind: torch.dtype):
    save_torch({"v": torch.ones(4).to(kind)}, tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="no vector(.|\n)*v: "):
        file_direction(tmp_path / "v.safetensors")


def test_half_precision_directions_are_their_numbers(tmp_path: Path):
    save_torch({"v": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "v.safetensors")
    assert file_direction(tmp_path / "v.safetensors")[0].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    "part", [{"block": "3"}, {"point": 3}, {"name": None}, {"weights": [1]}, {"card": 3}, {"position": ["x"]}]
)
def test_a_saved_concept_with_a_part_of_another_type_is_refused(tmp_path: Path, part):
    save_concept(Concept("a", np.ones(3), Point(1)), tmp_path)
    record = json.loads((tmp_path / "concept.json").read_bytes())
    (tmp_path / "concept.json").write_text(json.dumps(record | part))
    with pytest.raises(UserError, match=f"concept cannot be read(.|\n)*{next(iter(part))}"):
        load_concept(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("guess", {}, "source is not valid"),
        ("feature:", {}, "unknown source"),
        ("probe:1", {}, "unknown source"),
        ("feature:x", {}, "not readable"),
        ("feature:1,1", {}, "not readable"),
        ("feature:3", {"block": 0}, "where its SAE reads"),
        ("feature:3", {"point": "mlp_out"}, "where its SAE reads"),
        ("feature:3", {"sweep": True}, "goes with difference and probe"),
        ("probe", {"block": 7}, "no such block"),
        ("probe", {"point": "mlp_in"}, "no such part"),
        ("probe", {"position": "max_user"}, "mean_user"),
    ],
)
def test_what_cannot_be_made_is_said(study: Study, tmp_path: Path, source, options, message):
    with pytest.raises(UserError, match=message):
        make(study, tmp_path / "c", source, **options)
    assert not (tmp_path / "c" / "concepts.json").exists()


def test_a_concept_is_made_or_saved_and_each_name_stands_once(study: Study):
    for some in ([{}], [{"source": "probe", "path": "./saved"}]):
        with pytest.raises(UserError, match="either source or path"):
            with_concepts(study, *some)
    with pytest.raises(UserError, match="each name once"):
        with_concepts(study, {"source": "probe"}, {"source": "difference"})


def test_the_command_line_makes_the_concepts_of_a_study(taught_here, study: Study, tmp_path: Path):
    folder = Path(study.model.id).parent
    shutil.copytree(folder / "run", tmp_path / "run")
    file = write_examples(tmp_path / "e.jsonl")
    one = "{name: of-prompts, source: difference, sweep: true}"
    other = f"{{name: of-answers, source: probe, examples: {file}, positive: with, negative: without, force: true}}"
    keys = ("--set", "readout.position=mean_user", "--set", f"concepts=[{one}, {other}]")
    done = taught_here(
        "run", str(folder / "study.yaml"), "--run", str(tmp_path / "run"), "--only", "concepts", *keys, "--quiet"
    )
    assert done.returncode == 0, done.stderr
    records = RunFolder.open(tmp_path / "run").read_json("concepts")["concepts"]
    assert [record["name"] for record in records] == ["of-prompts", "of-answers"]
    assert [row["block"] for row in records[0]["card"]["sweep"]] == [0, 1, 2]
    assert [record["card"]["n_positive"] for record in records] == [20, 12]
