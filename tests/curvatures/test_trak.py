"""TRAK against its definition with dense matrices and plain autograd, float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taught.core.example import Example, make_batch
from taught.core.registry import Choice
from taught.sketches.store import SketchStore
from tiny_models import plain_gradient, tiny_examples, tiny_preferences
from tiny_sketches import DIM, WEIGHT, gradients, problem, scored


def probability(model: nn.Module, example: Example) -> Tensor:
    """The geometric mean of the tokens' probabilities; of a preference that the chosen answer is preferred."""
    if example.link is None:
        logp = torch.log_softmax(model(input_ids=torch.tensor([example.ids])).logits[0], -1)
        return torch.stack([logp[t - 1, example.ids[t]] for t in example.places]).mean().exp()
    s = make_batch([replace(example, link=None)], [0]).losses(model)[0]
    return torch.sigmoid(-example.link.beta * (s + example.link.reference))


@pytest.mark.parametrize("kind", ["pairs", "preferences"])
def test_with_an_exact_projection_it_is_the_definition(tmp_path: Path, kind: str) -> None:
    examples = tiny_examples() if kind == "pairs" else tiny_preferences()
    found = scored(tmp_path, Choice("trak", {"damping": 20.0}), examples)
    model, rows, p = problem(WEIGHT).model, [], []
    for example in examples:
        chance = probability(model, example)
        rows.append(plain_gradient(model, (chance / (1 - chance)).log())[WEIGHT].flatten().numpy())
        p.append(float(chance.detach()))
    Phi = np.stack(rows)
    y = gradients()[1]
    damping = 20 * (Phi**2).sum() / len(Phi) / DIM
    inverse = np.linalg.inv(Phi.T @ Phi + len(Phi) * damping * np.eye(Phi.shape[1]))
    targets = np.stack([y[:3].mean(0), y[4]])
    expected = (targets @ inverse @ Phi.T * (1 - np.array(p))).T
    assert (found.method, found.unit, found.se) == ("sketch+trak", "rank", None)
    np.testing.assert_allclose(found.values, expected, atol=5e-3 * np.abs(expected).max())


def test_from_a_random_projection_it_is_the_definition_on_the_sketches(tmp_path: Path) -> None:
    found = scored(tmp_path, Choice("trak", {"damping": 20.0}), parameters=(), dim=128)
    store = SketchStore(tmp_path)
    s, y = (
        {row.id: v for shard, values in store.read(kind) for row, v in zip(shard.rows, values, strict=True)}
        for kind in ("examples", "prompts")
    )
    S = np.stack([s[i] for i in found.example_ids]).astype(np.float64)
    rest = 1 - np.exp(-found.losses)
    Phi = -S / rest[:, None]
    inverse = np.linalg.inv(Phi.T @ Phi + len(Phi) * 20 * (Phi**2).mean() * np.eye(128))
    targets = np.stack([np.mean([y["q0"], y["q1"], y["q2"]], 0), y["q4"]]).astype(np.float64)
    expected = (targets @ inverse @ Phi.T * rest).T
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
