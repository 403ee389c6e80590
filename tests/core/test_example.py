from __future__ import annotations

import pytest
import torch

from taught.core.example import batch_examples, sft
from tiny_models import MODELS, plain_loss, tiny_examples, tiny_model


def losses(model, examples, budget: int) -> torch.Tensor:
    out = torch.zeros(len(examples), dtype=torch.float64)
    for batch in batch_examples(examples, budget):
        out[list(batch.index)] = batch.losses(model).detach()
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_trap_8_loss_is_the_cross_entropy_of_fine_tuning_on_the_response(name: str, budget: int) -> None:
    # Trap 8: the same mask as fine-tuning with the prompt labelled -100.
    model, examples = tiny_model(name), tiny_examples()
    expected = torch.stack([plain_loss(model, p) for p in examples]).detach()
    torch.testing.assert_close(losses(model, examples, budget), expected, rtol=1e-12, atol=1e-12)


def test_loss_agrees_with_transformers_own_labels() -> None:
    model = tiny_model("tied")
    for example, ours in zip(tiny_examples(), losses(model, tiny_examples(), 1000), strict=True):
        labels = torch.tensor([example.ids])
        labels[:, : example.start] = -100
        theirs = model(input_ids=torch.tensor([example.ids]), labels=labels).loss
        torch.testing.assert_close(ours.float(), theirs.detach().float(), rtol=1e-5, atol=1e-6)


def test_only_response_tokens_are_predicted() -> None:
    model, (example, *_) = tiny_model("untied"), tiny_examples()
    whole = sft("all", example.ids, 1)
    assert whole.n_scored == len(example.ids) - 1 and example.n_scored == 4
    assert abs(float(losses(model, [example], 99) - losses(model, [whole], 99))) > 1e-3
    # Another last token of the response changes the loss, though nothing follows it.
    other = sft("z", (*example.ids[:-1], 9), example.start)
    assert abs(float(losses(model, [example], 99) - losses(model, [other], 99))) > 1e-3


def test_examples_do_not_see_each_other() -> None:
    model, examples = tiny_model("tied"), tiny_examples()
    together = losses(model, examples, 1000)
    alone = torch.cat([losses(model, [p], 1000) for p in examples])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_weights_average_over_each_example_s_own_response() -> None:
    (batch,) = batch_examples(tiny_examples(), 1000)
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(4).double())
    for row, index in enumerate(batch.index):
        example = tiny_examples()[index]
        assert int((batch.weights[row] > 0).sum()) == example.n_scored
        shown = batch.targets[row, : example.n_scored].tolist()
        assert shown == list(example.ids[example.start :])
