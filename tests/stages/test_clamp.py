"""Clamping: the edit alone at its tokens, against passes without trees; slopes; the whole stage."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

from taught.errors import UserError
from taught.features.clamp import Clamp, decoder_direction, random_directions
from taught.model.forward import edited_output, get_block, get_point, run_at
from taught.model.layout import use_plain_passes
from taught.model.readout import pack, pack_apart, read_packed, read_prompts_plain
from taught.policy.dose import agreement, control_p, response, slope
from taught.progress import SilentProgress
from taught.run.folder import RunFolder
from taught.stages.clamp import CONTROL_SCALE, SCALES
from taught.stages.subject import open_subject, prompt_inputs, study_prompts
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_models import (
    BLOCK,
    ENCODERS,
    MODELS,
    POINT,
    WIDTH,
    plain_y,
    same,
    snapshot,
    tiny_behavior,
    tiny_model,
    tiny_prompts,
    tiny_sae,
)
from tiny_study import READ, do, with_values, write_tiny_study

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def residuals(n: int = 40) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# The edit


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_edit_scales_the_features_own_part_of_the_reconstruction(kind: str) -> None:
    sae, h, encoder = tiny_sae(kind), residuals(), "relu" if kind == "relu" else "sae"
    acts = sae.encode(h, encoder=encoder)
    for feature in range(3):
        alone = torch.zeros_like(acts)
        alone[:, feature] = acts[:, feature]
        part = sae.decode(alone) - sae.b_dec
        v = decoder_direction(sae, feature)
        for scale in (0.0, 0.5, 3.0):
            found = Clamp(sae, feature, encoder, scale, v)(h)
            torch.testing.assert_close(found, h + (scale - 1) * part, **EXACT)
        assert torch.equal(Clamp(sae, feature, encoder, 1.0, v)(h), h)
        off = acts[:, feature] == 0
        assert 0 < off.sum() < len(h)
        assert torch.equal(Clamp(sae, feature, encoder, 3.0, v)(h)[off], h[off])


def test_the_edit_keeps_the_residuals_own_precision() -> None:
    sae, h = tiny_sae().to(dtype=torch.float32), residuals().bfloat16()
    v = decoder_direction(sae, 1)
    found = Clamp(sae, 1, "sae", 2.0, v)(h)
    assert found.dtype == torch.bfloat16
    assert torch.equal(Clamp(sae, 1, "sae", 1.0, v)(h), h)


def test_controls_have_the_norm_of_the_feature_and_point_anywhere() -> None:
    own = decoder_direction(tiny_sae(), 2)
    drawn = torch.stack(random_directions(own, 4000, np.random.default_rng(5)))
    assert_allclose(drawn.norm(dim=1), own.norm(), rtol=1e-12)
    cosines = drawn @ own / own.norm() ** 2
    assert abs(cosines.mean()) < 3 / np.sqrt(4000 * WIDTH)
    assert_allclose((cosines**2).mean(), 1 / WIDTH, rtol=0.1)  # uniform on the sphere
    again = random_directions(own, 2, np.random.default_rng(5))
    assert torch.equal(torch.stack(again), drawn[:2])


@pytest.mark.parametrize("name", MODELS)
def test_only_the_named_tokens_are_edited_and_only_in_the_body(name: str) -> None:
    model, ids = tiny_model(name), torch.tensor([[0, 5, 6, 7, 3, 2]])

    def after_block() -> torch.Tensor:
        """What the next block is given."""
        seen: list[torch.Tensor] = []
        handle = get_block(model, BLOCK + 1).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
        )
        try:
            model(ids, use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    with torch.no_grad():
        before, held = after_block(), snapshot(model)
        with edited_output(get_point(model, POINT), torch.tensor([1, 3]), lambda h: 2 * h + 1):
            during = after_block()
        expected = before.clone()
        expected[0, [1, 3]] = 2 * before[0, [1, 3]] + 1
        torch.testing.assert_close(during, expected, **EXACT)
        block, first = get_block(model, BLOCK), torch.tensor([0])
        with pytest.raises(ZeroDivisionError), edited_output(block, first, lambda h: h * (1 // 0)):
            after_block()
        with pytest.raises(KeyboardInterrupt), edited_output(block, first, lambda h: h):
            raise KeyboardInterrupt
        assert torch.equal(after_block(), before) and same(held, snapshot(model))


def plain_edited_y(model: torch.nn.Module, prompt, edit) -> torch.Tensor:
    """y of one prompt from unpadded sequences, one a prefix; the block's output edited by hand."""

    def hook(_module, _args, output):
        h = output[0] if isinstance(output, tuple) else output
        changed = h.clone()
        for t in prompt.read:
            changed[0, t] = edit(h[0, t : t + 1])[0]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = get_block(model, BLOCK).register_forward_hook(hook)
    try:
        return plain_y(model, prompt.ids)
    finally:
        handle.remove()


@torch.no_grad()
def tree_y(model, prompts, edit, packs=pack_apart) -> dict[str, float]:
    found = {}
    for packed in packs(prompts, tiny_behavior()):
        places = run_at(model, packed.rows, packed.read.unique())
        with edited_output(get_point(model, POINT), places, edit):
            _, y = read_packed(model, packed, tiny_behavior(), POINT)
        found |= {prompts[i].id: float(v) for i, v in zip(packed.index, y, strict=True)}
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last_user", "mean_user", "last_prompt"])
@pytest.mark.parametrize("plain", [False, True])
def test_trees_give_the_edited_behavior_of_plain_passes(name: str, position: str, plain: bool) -> None:
    model, prompts, sae = tiny_model(name), tiny_prompts(position), tiny_sae()
    use_plain_passes(model, plain)
    edit = Clamp(sae, 3, "sae", 3.0, decoder_direction(sae, 3))
    found = tree_y(model, prompts, edit)
    with torch.no_grad():
        expected = {p.id: float(plain_edited_y(model, p, edit)) for p in prompts}
        unedited = {p.id: float(plain_y(model, p.ids)) for p in prompts}
    assert_allclose([found[i] for i in expected], list(expected.values()), **EXACT)
    assert max(abs(found[i] - unedited[i]) for i in unedited) > 1e-3
    nothing = Clamp(sae, 3, "sae", 1.0, decoder_direction(sae, 3))
    assert tree_y(model, prompts, nothing) == tree_y(model, prompts, lambda h: h)


def test_a_prompt_that_is_read_in_anothers_history_stands_in_a_tree_of_its_own() -> None:
    """Prompt 4 is the beginning of prompt 3 and is read where prompt 3 is not."""
    prompts = tiny_prompts("last_user")
    together = [sorted(packed.index) for packed in pack(prompts, tiny_behavior())]
    assert together == [[0, 1, 2, 3, 4, 5]]
    apart = [sorted(packed.index) for packed in pack_apart(prompts, tiny_behavior())]
    assert sorted(apart) == [[i] for i in range(6)]
    without = [p for p in prompts if p.id != "q4"]
    assert len(list(pack_apart(without, tiny_behavior()))) == 1
    model, edit = tiny_model("tied"), lambda h: 2 * h + 1
    right, wrong = tree_y(model, prompts, edit), tree_y(model, prompts, edit, pack)
    assert abs(right["q3"] - wrong["q3"]) > 1e-6  # what packing them together would do
    assert_allclose([right[i] for i in ("q0", "q5")], [wrong[i] for i in ("q0", "q5")], **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_a_small_edit_has_the_effect_of_the_gradient(name: str) -> None:
    """(y(1 + e) - y(1 - e)) / 2e = sum over read-out tokens of f_k(h_t) <dy/dh_t, v>."""
    model, sae, eps = tiny_model(name), tiny_sae(), 1e-5
    prompt = tiny_prompts("mean_user")[1]
    for feature in range(6):
        v = decoder_direction(sae, feature)
        up, down = (Clamp(sae, feature, "sae", 1 + e, v) for e in (eps, -eps))
        numbers = [tree_y(model, [prompt], edit)[prompt.id] for edit in (up, down)]
        held: list[torch.Tensor] = []

        def watched(h: torch.Tensor, held=held) -> torch.Tensor:
            held.append(h.detach().requires_grad_())
            return held[-1]

        y = plain_edited_y(model, prompt, watched)
        grads = torch.autograd.grad(y, held)
        slope_of = sum(
            float(sae.encode(h.detach(), [feature])[0, 0] * (g[0] @ v)) for h, g in zip(held, grads, strict=True)
        )
        assert_allclose((numbers[0] - numbers[1]) / (2 * eps), slope_of, rtol=1e-6, atol=1e-8)


# Slopes


def test_slope_is_the_line_through_the_origin() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.gamma(2, 1, size=30)
    dose = (np.array(SCALES)[:, None] - 1) * x
    dy = 0.7 * dose + 0.1 * rng.normal(size=dose.shape)
    found = response(x, SCALES, dy, bootstrap=400, seed=0)
    line = linear_model.LinearRegression(fit_intercept=False)
    line.fit(dose.reshape(-1, 1), dy.ravel())
    assert_allclose(found.slope.value, line.coef_[0])
    assert found.slope.lo < 0.7 < found.slope.hi < found.slope.lo + 0.1
    assert_allclose([e.value for e in found.means], dy.mean(1))
    width = found.means[0].hi - found.means[0].lo
    assert_allclose(width, 2 * 1.96 * dy[0].std() / np.sqrt(30), rtol=0.25)
    assert slope([2.0], [3.0], [[8.0]]) == 2.0  # four units of activation more, y up by 8
    assert np.isnan(slope([0.0], [3.0], [[8.0]]))


def test_few_prompts_have_a_slope_and_no_interval() -> None:
    found = response(np.ones(4), [2.0], np.ones((1, 4)), bootstrap=50, seed=0)
    assert found.slope.to_dict() == {"value": 1.0, "lo": None, "hi": None}
    assert found.means[0].to_dict() == {"value": 1.0, "lo": None, "hi": None}


def test_p_of_controls_is_that_of_loops() -> None:
    rng = np.random.default_rng(3)
    own, controls = rng.normal(size=7), rng.normal(size=(7, 4)) * rng.gamma(2, 1, (7, 1))
    drawn = []
    for k in range(7):
        for r in range(4):
            others = [controls[k, q] ** 2 for q in range(4) if q != r]
            drawn.append(abs(controls[k, r]) / np.sqrt(np.mean(others)))
    for k, p in enumerate(control_p(own, controls)):
        z = abs(own[k]) / np.sqrt(np.mean(controls[k, 1:] ** 2))
        assert_allclose(p, (1 + sum(c >= z for c in drawn)) / 29)
    assert control_p([], np.empty((0, 4))).shape == (0,)


def test_p_of_controls_is_uniform_for_random_directions_and_small_for_others() -> None:
    rng = np.random.default_rng(1)
    p = []
    for _ in range(200):
        size = rng.gamma(2, 1, (30, 1))  # features differ in scale
        drawn = size * rng.normal(size=(30, 9))
        p.append(control_p(drawn[:, 0], drawn[:, 1:]))
    found = np.concatenate(p)
    for level in (0.01, 0.05, 0.5):  # p is one of 1/241 .. 241/241
        assert_allclose((found <= level).mean(), int(level * 241) / 241, rtol=0.15)
    assert (control_p(20 * size[:, 0], drawn[:, 1:]) < 0.02).all()


def test_agreement_is_found_where_slopes_follow_and_not_where_they_are_drawn() -> None:
    rng = np.random.default_rng(1)
    coef, rms = rng.normal(size=40), rng.gamma(2, 1, size=40)
    like = agreement(coef, 0.5 * coef, rms, bootstrap=200, seed=0)
    assert like.n == 40 and like.same_sign.value == 1.0 and like.spearman.value > 0.999
    assert_allclose(like.size, 0.5)
    noise = agreement(coef, rng.normal(size=40), rms, bootstrap=200, seed=0)
    assert noise.spearman.lo < 0 < noise.spearman.hi
    assert noise.same_sign.lo < 0.5 < noise.same_sign.hi and noise.size.lo < 0 < noise.size.hi
    against = agreement(coef, -coef, rms, bootstrap=50, seed=0)
    assert against.same_sign.value == 0.0 and against.size.hi < 0
    assert json.dumps(like.to_dict(), allow_nan=False)


def test_size_is_the_regression_of_what_is_seen_on_what_is_predicted() -> None:
    rng = np.random.default_rng(4)
    X, coef, slopes = rng.gamma(2, 1, size=(50, 6)), rng.normal(size=6), rng.normal(size=6)
    predicted, seen = (X * coef).ravel(), (X * slopes).ravel()  # scale 2: one dose a prompt
    found = agreement(coef, slopes, np.sqrt((X**2).mean(0)), bootstrap=20, seed=0)
    assert_allclose(found.size.value, predicted @ seen / (predicted @ predicted))


def test_agreement_of_nothing_is_not_defined() -> None:
    found = agreement([], [], [], bootstrap=20, seed=0).to_dict()
    assert found["n"] == 0 and found["same_sign"] == {"value": None, "lo": None, "hi": None}


# The stage


def clamping(study: Study, prompts: int, controls: int) -> Study:
    return with_values(study, {"clamp.prompts": prompts, "clamp.controls": controls})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("clamp")))
    return clamping(study.replace("prompts.limit", 12), 12, 3)


@pytest.fixture(scope="module")
def few(study: Study) -> Study:
    return clamping(study, 2, 2)


@pytest.fixture(scope="module")
def read(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its policy."""
    return do(study, tmp_path_factory.mktemp("read") / "run", *READ).folder


@pytest.fixture(scope="module")
def run(study: Study, read: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return do(study, shutil.copytree(read, tmp_path_factory.mktemp("run") / "run"), "clamp")


@pytest.fixture
def copy(read: Path, tmp_path: Path) -> RunFolder:
    """A run with its policy, to play with."""
    return RunFolder(shutil.copytree(read, tmp_path / "run"))


def rows_of(run: RunFolder) -> list[dict]:
    return run.read_table("clamp").to_pylist()


def test_the_table_is_that_of_edits_in_plain_passes(study: Study, run: RunFolder) -> None:
    """Prompt by prompt, without trees: the dose-response of every feature."""
    subject, rows = open_subject(study), rows_of(run)
    model, point = subject.loaded.model, subject.sae.point
    arrays, ids = run.read_tensors("activations")
    encoded = subject.encode(study_prompts(study))
    inputs = {p.id: p for p in prompt_inputs(encoded, study.readout.position)}

    def y(prompt, edit) -> float:
        with edited_output(get_point(model, point), torch.tensor(prompt.read), edit):
            return float(read_prompts_plain(model, [prompt], subject.behavior, None).y)

    coef = {r["feature_id"]: r["coef"] for r in run.read_table("coefficients").to_pylist()}
    assert {row["feature_id"]: row["coef"] for row in rows} == pytest.approx(coef)
    assert [row["n"] for row in rows] == (arrays["X"] > 0).sum(0).tolist()
    column = int(np.argmin([row["n"] for row in rows]))
    row = rows[column]
    chosen = [i for i, x in zip(ids["prompt_ids"], arrays["X"][:, column], strict=True) if x > 0]
    v = decoder_direction(subject.sae, row["feature_id"])
    x = arrays["X"][arrays["X"][:, column] > 0, column]
    base = np.array([y(inputs[i], lambda h: h) for i in chosen])
    edits = [Clamp(subject.sae, row["feature_id"], "sae", scale, v) for scale in SCALES]
    dy = np.array([[y(inputs[i], edit) for i in chosen] for edit in edits]) - base
    assert_allclose([d["value"] for d in row["doses"]], dy.mean(1), rtol=1e-3, atol=1e-5)
    assert_allclose(row["slope"], slope(x, SCALES, dy), rtol=1e-3, atol=1e-5)
    assert_allclose(row["rms_x"], np.sqrt((x**2).mean()))
    doubled = dy[SCALES.index(CONTROL_SCALE)]
    assert_allclose(row["at_control"], (x @ doubled) / (x @ x), rtol=1e-3, atol=1e-5)
    rng = np.random.default_rng([study.policy.seed, row["feature_id"], 1])
    for direction, found in zip(random_directions(v, 3, rng), row["controls"], strict=True):
        edit = Clamp(subject.sae, row["feature_id"], "sae", 2.0, direction)
        dy = np.array([y(inputs[i], edit) for i in chosen]) - base
        assert_allclose(found, (x @ dy) / (x @ x), rtol=1e-3, atol=1e-5)


def test_features_of_what_the_mlp_adds_are_scaled_there(tmp_path: Path) -> None:
    study = clamping(load_study(write_tiny_study(tmp_path)).replace("prompts.limit", 6), 6, 2)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = f"blocks.{BLOCK}.hook_mlp_out"
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    run = do(study, tmp_path / "run", *READ, "clamp")
    subject, row = open_subject(study), max(rows_of(run), key=lambda row: row["n"])
    prompts = prompt_inputs(subject.encode(study_prompts(study)), study.readout.position)
    model, k = subject.loaded.model, row["feature_id"]
    column = run.read_tensors("activations")[1]["feature_ids"].index(k)
    X = dict(zip(*(run.read_tensors("activations")[i][key] for i, key in ((1, "prompt_ids"), (0, "X"))), strict=True))

    def y(prompt, scale: float) -> float:
        def edit(module, args, output):  # features are signed directions: ReLU of one entry of h
            changed, axis, sign = output.clone(), k % output.shape[-1], 1 if k < output.shape[-1] else -1
            for t in prompt.read:
                changed[0, t, axis] += (scale - 1) * sign * torch.relu(sign * output[0, t, axis])
            return changed

        handle = model.model.layers[BLOCK].mlp.register_forward_hook(edit)
        try:
            return float(read_prompts_plain(model, [prompt], subject.behavior, None).y)
        finally:
            handle.remove()

    active = [prompt for prompt in prompts if X[prompt.id][column] > 0]
    assert len(active) == row["n"] > 1
    mean = np.mean([y(prompt, 3.0) - y(prompt, 1.0) for prompt in active])
    assert_allclose(row["doses"][SCALES.index(3.0)]["value"], mean, rtol=1e-3, atol=1e-5)


def test_what_the_policy_predicts_of_an_edit_is_its_coefficient_here(run: RunFolder) -> None:
    """The tiny SAE's features are orthogonal and decode exactly: an edit moves one feature, by its dose."""
    for row in rows_of(run):
        assert_allclose(row["predicted"], row["coef"], rtol=1e-4)


def test_the_record_counts_what_the_table_holds(run: RunFolder) -> None:
    rows, record = rows_of(run), run.read_json("clamp")
    active = [row for row in rows if row["n"]]
    assert record["features"] == len(rows) and record["active"] == len(active)
    assert (record["prompts"], record["controls"], record["scales"]) == (12, 3, list(SCALES))
    assert record["clear"] == sum(row["p_adjusted"] <= 0.05 for row in active)
    found = record["agreement"]
    assert list(found) == ["all", "sure", "clear", "predicted", "control"]
    signs = np.mean([row["coef"] * row["slope"] > 0 for row in active])
    assert_allclose(found["all"]["same_sign"]["value"], signs)
    signs = np.mean([row["coef"] * row["controls"][0] > 0 for row in active])
    assert_allclose(found["control"]["same_sign"]["value"], signs)
    assert found["clear"]["n"] == record["clear"]
    assert all(len(row["controls"]) == 3 for row in active)
    assert all(row["p"] <= row["p_adjusted"] <= 1 for row in active)
    lined = [row for row in active if row["lo"] is not None]
    assert lined and all(row["lo"] <= row["slope"] <= row["hi"] for row in lined)


def test_a_feature_that_is_never_on_is_listed_without_numbers(tmp_path: Path) -> None:
    study = load_study(write_tiny_study(tmp_path))
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    weights["b_enc"][3] = -1e6
    save_file(weights, tmp_path / "sae" / "sae_weights.safetensors")
    study = clamping(with_values(study, {"features.ids": [3, 5], "prompts.limit": 12}), 2, 2)
    run = do(study, tmp_path / "run", *READ, "clamp")
    off, on = rows_of(run)
    assert (off["feature_id"], off["n"], off["slope"], off["doses"]) == (3, 0, None, None)
    assert on["n"] == 2 and on["p"] is not None and on["lo"] is None  # too few for an interval
    assert run.read_json("clamp")["agreement"]["all"]["n"] == 1


class Stops(SilentProgress):
    """Ctrl-C after so many features."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1) -> None:
        self.left -= n
        if self.left < 0:
            raise KeyboardInterrupt


def test_it_continues_behind_the_last_feature_and_comes_to_the_same(
    study: Study, run: RunFolder, copy: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        do(study, copy, "clamp", progress=Stops(2))
    module = import_module("taught.stages.clamp")
    made: list[int] = []
    measured = module._measured
    monkeypatch.setattr(module, "_measured", lambda *a: made.append(a[4]) or measured(*a))
    do(study, copy, "clamp")
    assert made == list(range(3, len(rows_of(run))))
    assert rows_of(copy) == rows_of(run)
    do(study, copy, "clamp")  # complete already
    assert made == list(range(3, len(rows_of(run))))


def test_the_model_is_as_it_was(few: Study, copy: RunFolder, monkeypatch) -> None:
    subject = open_subject(few)
    monkeypatch.setattr(import_module("taught.stages.clamp"), "open_subject", lambda _: subject)
    before = snapshot(subject.loaded.model)
    with pytest.raises(KeyboardInterrupt):
        do(few, copy, "clamp", progress=Stops(0))
    assert same(before, snapshot(subject.loaded.model))


def test_only_what_clamping_reads_makes_it_another(few: Study, copy: RunFolder) -> None:
    do(few, copy, "clamp")
    made = copy.manifest["stages"]["clamp"]
    do(few.replace("attribution.lr", 0.5), copy, "clamp")
    assert copy.manifest["stages"]["clamp"] == made
    with pytest.raises(UserError, match=r"clamp\.prompts: was 2, now 3"):
        do(clamping(few, 3, 2), copy, "clamp")


def test_it_goes_with_the_policy_it_was_made_of(few: Study, copy: RunFolder) -> None:
    do(few, copy, "clamp")
    again = do(few.replace("policy.alpha", 2.0), RunFolder(copy.folder, fresh=("policy",)), "policy")
    assert "clamp" not in again.manifest["stages"] and not again.path("clamp.parquet").exists()
    again.verify()
    with pytest.raises(UserError, match=r"policy\.alpha: was 2\.0, now 1\.0"):
        do(few, again, "clamp")


def test_messages(study: Study, tmp_path: Path) -> None:
    for key in ("clamp.prompts", "clamp.controls"):
        with pytest.raises(UserError, match=key):
            study.replace(key, 1)
    with pytest.raises(UserError, match="has not been run in this run folder"):
        do(study, tmp_path / "run", "clamp")
