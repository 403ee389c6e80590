"""TrackStar against its definition with dense matrices and plain autograd, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taught.core.driver import Method
from taught.core.example import batch_examples
from taught.core.gradient import example_gradients
from taught.core.registry import Choice
from taught.errors import UserError
from taught.model.gradients import find_sites, frozen
from taught.report.tables import Tables
from taught.run.folder import RunFolder
from taught.sketches.project import Prescale, Projection
from taught.sketches.store import SketchStore
from taught.stages.ask import Question, ask
from taught.stages.attribute import attribute
from taught.stages.curate import curate
from taught.stages.readings import readings
from taught.stages.scored import read_scores
from taught.study.load import load_study
from tiny_models import plain_gradient, plain_loss, tiny_examples, tiny_model, tiny_problem, tiny_prompts
from tiny_sketches import DIM, WEIGHT, gradients, scored
from tiny_study import write_tiny_study

HALF = 3e-3  # what float16 leaves of a cosine


def definition(examples: np.ndarray, prompts: np.ndarray, targets: np.ndarray, k: int, damping: float) -> np.ndarray:
    """- cosines of (R + damping I)^-1/2 g, [P, T], from gradients in any space."""
    R_examples, R_prompts = (rows.T @ rows / len(rows) for rows in (examples, prompts))
    e, f = (np.linalg.eigvalsh(R)[::-1][k - 1] for R in (R_examples, R_prompts))
    a = e / (e + f)
    values, vectors = np.linalg.eigh(a * R_prompts + (1 - a) * R_examples)
    root = vectors @ np.diag((values.clip(0) + damping) ** -0.5) @ vectors.T
    phi, psi = (rows @ root / np.linalg.norm(rows @ root, axis=1, keepdims=True) for rows in (examples, targets))
    return -phi @ psi.T


@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("component", [1000, 2])
def test_with_an_exact_projection_it_is_the_definition(tmp_path: Path, moments: bool, component: int) -> None:
    found = scored(tmp_path, Choice("trackstar", {"component": component, "moments": moments, "damping": 100.0}))
    g, y = gradients()
    if moments:
        g, y = (of / (np.sqrt((gradients()[0] ** 2).mean(0)) + 1e-8) for of in (g, y))
    targets = np.stack([y[:3].mean(0), y[4]])
    damping = 100 * (g**2).sum() / len(g) / DIM
    expected = definition(g, y, targets, min(component, 4), damping)
    assert (found.method, found.unit, found.se) == ("sketch+trackstar", "rank", None)
    np.testing.assert_allclose(found.values, expected, atol=HALF)
    assert np.ptp(expected) > 0.3


def test_from_a_random_projection_it_is_the_definition_on_the_sketches(tmp_path: Path) -> None:
    found = scored(tmp_path, Choice("trackstar", {"moments": False, "damping": 10.0}), parameters=(), dim=128)
    store = SketchStore(tmp_path)
    kept = {row.id: v for shard, values in store.read("examples") for row, v in zip(shard.rows, values, strict=True)}
    y = {row.id: v for shard, values in store.read("prompts") for row, v in zip(shard.rows, values, strict=True)}
    s = np.stack([kept[i] for i in found.example_ids]).astype(np.float64)
    t = np.stack([y[p.id] for p in tiny_prompts()]).astype(np.float64)
    targets = np.stack([t[:3].mean(0), t[4]])
    expected = definition(s, t, targets, 4, 10 * (s**2).mean())
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["untied", "padded", "gpt2"])
def test_gradients_are_multiplied_before_they_are_projected(name: str) -> None:
    """Of every kind of parameter, factors and whole gradients alike."""
    model, draw = tiny_model(name), torch.Generator().manual_seed(0)
    by = {n: torch.rand(p.shape, generator=draw, dtype=p.dtype) + 0.1 for n, p in model.named_parameters()}
    projection, plain = Projection(model, 256, 0, Prescale(by, "key")), Projection(model, 256, 0)
    it, sites = tiny_problem(model), find_sites(model)
    assert projection.record() == plain.record() | {"projection.multiplied by": "key"}
    with frozen(model):
        for batch in batch_examples(tiny_examples(), 24):
            factors = list(example_gradients(it, sites, batch, tiny_examples())[1])
            made = projection.sketch(factors, len(batch.index))
            for row, n in enumerate(batch.index):
                with torch.enable_grad():
                    for p in model.parameters():
                        p.requires_grad_()
                    g = plain_gradient(model, plain_loss(model, tiny_examples()[n]))
                    for p in model.parameters():
                        p.requires_grad_(False)
                whole = {key: (of * by[key])[None] for key, of in g.items()}
                torch.testing.assert_close(made[row], plain.matrices(whole, 1)[0], rtol=1e-8, atol=1e-12)
                given: dict[str, Any] = {key: of[None] for key, of in g.items()}
                torch.testing.assert_close(made[row], projection.matrices(given, 1)[0], rtol=1e-8, atol=1e-12)


def moments(folder: Path, v: Tensor) -> str:
    save_file({f"{WEIGHT}.exp_avg_sq": v}, folder / "moments.safetensors")
    return str(folder / "moments.safetensors")


def test_moments_of_a_file_are_used_and_zeros_among_them_count_nothing(tmp_path: Path) -> None:
    v = torch.rand(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v[3] = 0
    file = moments(tmp_path, v)
    found = scored(tmp_path / "store", Choice("trackstar", {"file": file, "damping": 100.0}))
    scale = np.where(v.numpy() > 0, 1 / (np.sqrt(v.numpy()) + 1e-8), 0).flatten()
    g, y = (of * scale for of in gradients())
    expected = definition(g, y, np.stack([y[:3].mean(0), y[4]]), 4, 100 * (g**2).sum() / 4 / DIM)
    np.testing.assert_allclose(found.values, expected, atol=HALF)
    v[2:3] = -1
    with pytest.raises(UserError, match="negative"):
        scored(tmp_path / "store", Choice("trackstar", {"file": moments(tmp_path, v)}))


def test_divided_gradients_have_a_store_of_their_own_and_plain_ones_stay(tmp_path: Path) -> None:
    plain = scored(tmp_path, Choice("identity"))
    star = Choice("trackstar", {"damping": 100.0})
    first = scored(tmp_path, star)
    inside = [place for place in tmp_path.iterdir() if place.is_dir()]
    assert len(inside) == 1 and inside[0].name.startswith("multiplied-")
    np.testing.assert_array_equal(scored(tmp_path, star).values, first.values)
    np.testing.assert_array_equal(scored(tmp_path, Choice("identity")).values, plain.values)
    scored(tmp_path, Choice("trackstar", {"damping": 100.0, "eps": 1e-3}))
    assert len([place for place in tmp_path.iterdir() if place.is_dir()]) == 2


def test_a_contrast_has_its_own_direction_and_is_no_difference_of_cosines(tmp_path: Path) -> None:
    wanted = ("behavior:a", "prompt:q4", "behavior:a - prompt:q4")
    found = scored(tmp_path, Choice("trackstar", {"moments": False, "damping": 100.0}), wanted=wanted).values
    g, y = gradients()
    targets = np.stack([y[:3].mean(0), y[4], y[:3].mean(0) - y[4]])
    np.testing.assert_allclose(found, definition(g, y, targets, 4, 100 * (g**2).sum() / 4 / DIM), atol=HALF)
    assert np.abs(found[:, 2] - (found[:, 0] - found[:, 1])).max() > 10 * HALF


def test_too_few_examples_choose_no_damping_and_the_fix_works(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at least 6(.|\n)*damping"):
        scored(tmp_path, Choice("trackstar"))
    assert np.isfinite(scored(tmp_path, Choice("trackstar", {"damping": 1.0})).values).all()


@pytest.mark.parametrize("curvature", ["trackstar", "trak"])
def test_other_estimators_refuse_what_is_made_of_sketches(curvature: str) -> None:
    for name in ("adjoint", "forward"):
        with pytest.raises(UserError, match="made of sketches"):
            Method().named(f"{name}+{curvature}").refuse()
    Method().named(f"sketch+{curvature}").refuse()


def test_a_run_says_that_its_values_have_no_unit(tmp_path: Path) -> None:
    study = load_study(write_tiny_study(tmp_path))
    none = ("sae.path", "prompts.positive_group", "prompts.negative_group", "examples.positive_label")
    changes: dict[str, Any] = dict.fromkeys((*none, "examples.negative_label"))
    changes |= {"attribution.estimator": {"kind": "sketch", "dim": 256, "rescore": 2}, "examples.limit": 6}
    changes |= {"attribution.curvature": "trackstar", "prompts.limit": 4, "curation.k": 2}
    for key, value in changes.items():
        study = study.replace(key, value)
    run = RunFolder(tmp_path / "run")
    for stage in (readings, attribute, curate):
        stage(study, run)
    assert run.read_json("attribution")["unit"] == "rank"
    rows = run.read_table("summary").to_pylist()
    assert all(row["step_score"] is None and row["exact_score"] is None for row in rows)
    assert all(abs(row["behavior:harmful"]) <= 1.0001 for row in rows)
    assert "behavior:harmful se" not in rows[0] and not (run.folder / "statements.parquet").exists()
    assert {row["target"] for row in run.read_table("rescored").to_pylist()} == {
        "behavior:harmful",
        "behavior:harmless",
    }
    assert run.read_json("curation")["change"] is None
    assert Tables(run).per == "to rank by"
    assert not read_scores(run, ["behavior:harmful"]).influence
    with pytest.raises(UserError, match="no values of this target"):
        read_scores(run, ["behavior:harmful - behavior:harmless"])
    with pytest.raises(UserError, match=r"only rank(.|\n)*curvature=identity"):
        ask(run, Question("behavior:harmful"))
