from __future__ import annotations

import pytest
import torch

from taught.attribution.pairs import PairInput, batch_pairs
from tiny_models import MODELS, plain_loss, tiny_model, tiny_pairs


def losses(model, pairs, budget: int) -> torch.Tensor:
    out = torch.zeros(len(pairs), dtype=torch.float64)
    for batch in batch_pairs(pairs, budget):
        out[list(batch.index)] = batch.losses(model).detach()
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_trap_8_loss_is_the_cross_entropy_of_fine_tuning_on_the_response(
    name: str, budget: int
) -> None:
    # Trap 8: the same mask as fine-tuning with the prompt labelled -100.
    model, pairs = tiny_model(name), tiny_pairs()
    expected = torch.stack([plain_loss(model, p) for p in pairs]).detach()
    torch.testing.assert_close(losses(model, pairs, budget), expected, rtol=1e-12, atol=1e-12)


def test_loss_agrees_with_transformers_own_labels() -> None:
    model = tiny_model("tied")
    for pair, ours in zip(tiny_pairs(), losses(model, tiny_pairs(), 1000), strict=True):
        labels = torch.tensor([pair.ids])
        labels[:, : pair.start] = -100
        theirs = model(input_ids=torch.tensor([pair.ids]), labels=labels).loss
        torch.testing.assert_close(ours.float(), theirs.detach().float(), rtol=1e-5, atol=1e-6)


def test_only_response_tokens_are_predicted() -> None:
    model, (pair, *_) = tiny_model("untied"), tiny_pairs()
    whole = PairInput("all", pair.ids, 1)
    assert whole.n_response == len(pair.ids) - 1 and pair.n_response == 4
    assert abs(float(losses(model, [pair], 99) - losses(model, [whole], 99))) > 1e-3
    # Another last token of the response changes the loss, though nothing follows it.
    other = PairInput("z", (*pair.ids[:-1], 9), pair.start)
    assert abs(float(losses(model, [pair], 99) - losses(model, [other], 99))) > 1e-3


def test_pairs_do_not_see_each_other() -> None:
    model, pairs = tiny_model("tied"), tiny_pairs()
    together = losses(model, pairs, 1000)
    alone = torch.cat([losses(model, [p], 1000) for p in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_weights_average_over_each_pair_s_own_response() -> None:
    (batch,) = batch_pairs(tiny_pairs(), 1000)
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(4).double())
    for row, index in enumerate(batch.index):
        pair = tiny_pairs()[index]
        assert int((batch.weights[row] > 0).sum()) == pair.n_response
        shown = batch.targets[row, -pair.n_response :].tolist()
        assert shown == list(pair.ids[pair.start :])
