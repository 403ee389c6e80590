"""Masked response tokens: no gradient of their own, in every trainer and store; the benchmark."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from taught.core.example import Example, example_losses, make_batch, sft
from taught.estimators.finite_step import example_gradient
from taught.estimators.token_shares import token_effects
from taught.sketches.fill import example_row
from taught.study.schema import ValidationSpec
from taught.training.loop import train
from taught.training.recipe import Recipe
from taught.training.retrain import Retrainer
from tiny_models import plain_gradient, tiny_examples, tiny_model, tiny_problem
from tiny_study import write_tiny_study

ROOT = Path(__file__).parents[2]


def masked(example: Example, *places: int) -> Example:
    """The example without these of its response tokens in the loss, counted from the first."""
    return sft(example.id, example.ids, example.start, [example.start + place for place in places])


def plain_masked_loss(model: nn.Module, example: Example) -> torch.Tensor:
    """Cross-entropy with the prompt and the masked tokens labelled -100."""
    ids = torch.tensor([example.ids])
    labels = ids.clone()
    labels[:, : example.start] = -100
    labels[:, [t for t, w in enumerate(example.weights[0]) if not w]] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)


def test_a_masked_token_has_no_part_in_the_loss_and_its_gradient() -> None:
    model = tiny_model("tied")
    examples = [masked(tiny_examples()[0], 0, 2), masked(tiny_examples()[3], 5), tiny_examples()[1]]
    losses = example_losses(model, examples, 1000)
    for example, loss in zip(examples, losses, strict=True):
        expected = plain_masked_loss(model, example)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
        whole = plain_gradient(model, expected)
        found = example_gradient(model, example)[1]
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12)


def test_logits_that_predict_a_masked_token_get_no_gradient() -> None:
    model, example = tiny_model("untied"), masked(tiny_examples()[3], 1, 4)
    seen: list[torch.Tensor] = []

    def keep(_module, _inputs, out: torch.Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    model.lm_head.register_forward_hook(keep)
    make_batch([example], [0]).losses(model).sum().backward()
    n = len(example.ids) - tiny_examples()[3].start
    sizes = seen[0].grad[0, -n:].abs().sum(-1)
    assert (sizes > 0).tolist() == [place not in (1, 4) for place in range(n)]


def test_training_on_masked_examples_is_training_on_the_masked_loss() -> None:
    recipe = replace(Recipe.of(ValidationSpec()), optimizer="sgd", lr=0.1, epochs=1, batch=1)
    example = masked(tiny_examples()[0], 1)
    model, expected = tiny_model("tied"), tiny_model("tied")
    train(model, [example], recipe)
    step = plain_gradient(expected, plain_masked_loss(expected, example))
    for name, p in expected.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], p - 0.1 * step[name], rtol=1e-10, atol=1e-12)


def test_a_mask_is_part_of_what_a_sketch_and_a_retraining_are_known_by(tmp_path) -> None:
    example = tiny_examples()[0]
    recipe = Recipe.of(ValidationSpec())

    def key(example: Example) -> str:
        problem = tiny_problem(tiny_model("tied"))
        return Retrainer(problem, [example], recipe, tmp_path, weights={}).key([example.id], 0)

    others = [masked(example, 0), masked(example, 1), masked(example, 0, 1)]
    assert len({example_row(p).digest for p in (example, *others)}) == 4
    assert len({key(p) for p in (example, *others)}) == 4


def test_a_masked_token_has_no_share_and_the_others_add_up() -> None:
    problem = tiny_problem(tiny_model("padded"))
    example = masked(tiny_examples()[3], 2, 5)
    A = torch.ones(1, len(problem.prompts), len(problem.features.ids), dtype=torch.float64)
    (shares,) = token_effects(problem, [example], A, None)
    from taught.estimators.adjoint import target_effects

    effect, _ = target_effects(problem, [example], A, None)
    assert len(shares) == example.n_scored == 4
    assert float(shares.sum()) == pytest.approx(float(effect), rel=1e-10)


@pytest.mark.parametrize("places", [(3,), (9,), tuple(range(5, 9))])
def test_a_mask_that_is_none_is_refused(places) -> None:
    example = tiny_examples()[0]  # its response stands at 5 to 8
    with pytest.raises(ValueError, match="some, not all, of the response tokens"):
        sft("z", example.ids, 5, places)


# The benchmark


@pytest.fixture
def token_masks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.token_masks

    return benchmarks.token_masks


def test_every_mask_leaves_out_as_many_tokens_of_each_example(token_masks) -> None:
    examples = [*tiny_examples(), sft("short", (0, 1), 1)]
    shares = [np.arange(p.n_scored) * (-1.0) ** np.arange(p.n_scored) for p in examples]
    sets = token_masks.masked_sets(examples, shares, 0.4, 3)
    lengths = [p.n_scored for p in examples]
    masked = {
        name: [token_masks.masked_places(p, n) for p, n in zip(some, lengths, strict=True)]
        for name, some in sets.items()
    }
    counts = {name: [len(places) for places in some] for name, some in masked.items()}
    assert set(map(tuple, counts.values())) == {(2, 1, 1, 2, 0)}
    assert masked["largest shares"][3] == [2, 4]  # 0 -1 2 -3 4 -5: 2 and 4
    assert masked["smallest shares"][3] == [3, 5]
    assert masked["first tokens"][3] == [0, 1]
    assert len({str(masked[f"random {k}"]) for k in range(3)}) > 1


def test_the_summary_compares_with_random_masks(token_masks) -> None:
    inside = np.array([True] * 40 + [False] * 5)
    noise = np.random.default_rng(0).normal(0, 0.1, 45)
    changes = {
        "none": 1 + noise,
        "largest shares": 0.2 + noise,
        "smallest shares": 0.9 + noise,
        "first tokens": 0.3 + noise,
    }
    changes |= {f"random {k}": 0.7 + 0.02 * k + noise for k in range(5)}
    for values in changes.values():
        values[~inside] = 99
    found = token_masks.summary(changes, inside)
    assert found["largest shares"]["less than random"] == pytest.approx(0.2 - 0.74)
    assert found["largest shares"]["random masks below it"] == 0
    assert found["smallest shares"]["random masks below it"] == 5
    assert found["largest shares"]["hi"] < 0 < found["smallest shares"]["lo"]


def test_it_runs_and_writes_a_row_a_mask(token_masks, tmp_path) -> None:
    study = write_tiny_study(tmp_path / "study")
    flags = ["--study", str(study), "--label", "harmful-refusal", "--others", "2", "--random", "2"]
    token_masks.main([*flags, "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "token_masks.json").read_text())
    assert record["complete"] and record["conditions"]["examples"] == 6
    rows = {row["mask"]: row for row in record["rows"]}
    assert list(rows) == ["none", "largest shares", "smallest shares", "first tokens", "random 0", "random 1"]
    assert len({row["masked_tokens"] for name, row in rows.items() if name != "none"}) == 1
    assert rows["largest shares"]["masked_influence"] > rows["random 0"]["masked_influence"]
    assert len({row["change_negative"] for row in rows.values()}) == 6
