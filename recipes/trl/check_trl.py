"""Training by TRL against the same training by hand, on tiny random models in float64.

    pip install 'taught[trl]' && PYTHONPATH=src:tests python recipes/trl/check_trl.py

Not one of the tests, which need no trl. Exits with an error where something is wrong.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import trl
from transformers import AutoTokenizer, get_scheduler

from taught.study.schema import ValidationSpec
from taught.training.recipe import Recipe
from taught.training.retrain import Retrainer
from taught.training.trl import train_by_trl
from tiny_models import plain_loss, same, snapshot, tiny_examples, tiny_model, tiny_preferences, tiny_problem
from tiny_study import write_tiny_study


def by_hand(model, examples, steps, recipe: Recipe) -> list[float]:
    """The mean over all response tokens of a step's examples; decay of matrices only."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = kind(groups, lr=recipe.lr)
    warmup = math.ceil(recipe.warmup * len(steps))
    name = {"linear": "linear", "constant": "constant_with_warmup"}[recipe.schedule]
    schedule, losses = get_scheduler(name, optimizer, warmup, len(steps)), []
    for ids in steps:
        batch = [examples[i] for i in ids]
        tokens = sum(p.n_scored for p in batch)
        optimizer.zero_grad()
        if batch[0].link is None:
            loss = sum(plain_loss(model, p) * p.n_scored for p in batch) / tokens
        else:
            loss = sum(preference_loss(model, p) for p in batch) / len(batch)
        loss.backward()
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def preference_loss(model, example) -> torch.Tensor:
    """The loss of DPO, by one pass for each answer."""
    total = 0.0
    for ids, weights in zip(example.sequences, example.weights, strict=True):
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1], -1)
        total = total + (torch.tensor(weights[1:]) * logp[torch.arange(len(ids) - 1), list(ids[1:])]).sum()
    return -torch.nn.functional.logsigmoid(example.link.beta * (total - example.link.reference))


def main() -> None:
    print("trl", trl.__version__)
    folder = Path(tempfile.mkdtemp())
    write_tiny_study(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = Recipe.of(ValidationSpec(trainer="trl", lr=0.01, epochs=3, batch=3))
    variants = (
        {},
        {"weight_decay": 0.1, "schedule": "linear", "warmup": 0.3},
        {"optimizer": "sgd", "max_grad_norm": 0.05, "batch": 2},
    )
    for some, changes in itertools.product((tiny_examples(), tiny_preferences()), variants):
        examples = {p.id: p for p in some}
        recipe = replace(base, **changes)
        model, expected = tiny_model("untied"), tiny_model("untied")
        before = snapshot(model)
        log = train_by_trl(model, some, recipe, tokenizer=tokenizer)
        losses = by_hand(expected, examples, log.ids, recipe)
        worst = max(float((p - q).abs().max()) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
        moved = max(float((w - model.state_dict()[n]).abs().max()) for n, w in before["weights"].items())
        print(changes, "weights differ by at most", worst, "and moved by", moved)
        print("  losses differ by at most", np.abs(np.subtract(log.losses, losses)).max())
        assert worst < 1e-5 * moved
        assert np.allclose(log.losses, losses, rtol=1e-5)
        assert all(
            sorted(sum(log.ids[at : at + len(log.ids) // 3], ())) == sorted(examples)
            for at in range(0, len(log.ids), len(log.ids) // 3)
        )
        after = snapshot(model)
        assert all(before[k] == after[k] for k in ("flags", "grads", "modes", "hooks"))
    for method in ("full", "lora"):
        model = tiny_model("untied")
        plain_loss(model, tiny_examples()[0])
        before = snapshot(model)
        made = Retrainer(
            tiny_problem(model),
            tiny_examples(),
            replace(base, method=method),
            folder / method,
            weights={},
            tokenizer=tokenizer,
        )
        first = made.run(["z0", "z1", "z3"])
        assert same(before, snapshot(model))
        again = Retrainer(
            tiny_problem(model),
            tiny_examples(),
            replace(base, method=method),
            folder / f"{method}-again",
            weights={},
            tokenizer=tokenizer,
        )
        assert np.array_equal(again.run(["z3", "z0", "z1"]).y, first.y)
        assert (first.losses_after < first.losses_before).all()
        print(method, "retraining: the same bits again, base weights put back")


if __name__ == "__main__":
    main()
