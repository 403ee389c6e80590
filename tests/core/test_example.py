from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from taught.baselines.activations import response_reads
from taught.core.example import Dpo, Example, batch_examples, conversation, document, example_losses, sft
from taught.errors import UserError
from taught.estimators.adjoint import target_effects
from tiny_models import (
    MODELS,
    PROMPT_IDS,
    plain_gradient,
    plain_loss,
    plain_read,
    plain_y,
    tiny_examples,
    tiny_model,
    tiny_preferences,
    tiny_problem,
)


def losses(model, examples, budget: int) -> torch.Tensor:
    out = torch.zeros(len(examples), dtype=torch.float64)
    for batch in batch_examples(examples, budget):
        out[list(batch.index)] = batch.losses(model).detach()
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_loss_is_the_cross_entropy_of_fine_tuning_on_the_response(name: str, budget: int) -> None:
    # The same mask as fine-tuning with the prompt labelled -100.
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


# Several sequences and a link


PREFERENCES = tiny_preferences()
MIXED = (*tiny_examples()[:2], *PREFERENCES, *tiny_examples()[2:])


def plain(model: nn.Module, example: Example) -> Tensor:
    """The loss by one unpadded pass for each sequence."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, weights in zip(example.sequences, example.weights, strict=True):
        _, logp = plain_read(model, ids)
        total = total - sum(w * logp[t - 1, ids[t]] for t, w in enumerate(weights) if w)
    return total if example.link is None else example.link(total[None])[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_branches_in_one_row_are_what_separate_passes_say(name: str, budget: int) -> None:
    model = tiny_model(name)
    expected = torch.stack([plain(model, p) for p in MIXED]).detach()
    torch.testing.assert_close(losses(model, MIXED, budget), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 30, 1000])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_effects_of_branches_are_those_of_autograd(name: str, budget: int, checkpointing: bool) -> None:
    model = tiny_model(name)
    problem = tiny_problem(model, lr=1e-3, batch_tokens=budget, checkpointing=checkpointing)
    A = torch.zeros(1, len(problem.prompts), len(problem.features.ids), dtype=torch.float64)
    B = torch.linspace(-1, 2, len(problem.prompts), dtype=torch.float64)[None]
    effects, found = target_effects(problem, MIXED, A, B)
    # The derivative of F has the look-ups of the padding row, the optimizer's gradient has not.
    table = model.get_input_embeddings()
    padding, table.padding_idx = table.padding_idx, None
    query = plain_gradient(model, sum(b * plain_y(model, ids) for b, ids in zip(B[0], PROMPT_IDS, strict=True)))
    table.padding_idx = padding
    for row, example in enumerate(MIXED):
        loss = plain(model, example)
        gradient = plain_gradient(model, loss)
        expected = -1e-3 * float(sum((gradient[n] * query[n]).sum() for n in query))
        assert float(effects[row, 0]) == pytest.approx(expected, rel=1e-9)
        assert float(found[row]) == pytest.approx(loss.item(), rel=1e-12)


def test_slopes_are_the_derivatives_of_the_links() -> None:
    (batch,) = batch_examples(MIXED, 1000)
    sums = torch.linspace(-2, 3, len(MIXED), dtype=torch.float64)
    step = 1e-6
    numeric = (batch.linked(sums + step) - batch.linked(sums - step)) / (2 * step)
    torch.testing.assert_close(batch.slopes(sums), numeric, rtol=1e-8, atol=1e-9)
    own = {MIXED[i].id: float(slope) for i, slope in zip(batch.index, batch.slopes(sums), strict=True)}
    assert own["z0"] == 1.0 and own["a"] != 1.0


# Conversations and documents


def test_a_conversation_is_the_mean_over_the_tokens_that_count() -> None:
    model, ids, scored = tiny_model("tied"), (0, 5, 3, 2, 15, 3, 6, 3, 2, 16, 17, 3), (4, 5, 9, 10, 11)
    example = conversation("c", ids, scored)
    assert example.scored == [(0, t) for t in scored] and example.start == 4 and example.n_scored == 5
    _, logp = plain_read(model, ids)
    expected = -sum(logp[t - 1, ids[t]] for t in scored) / 5
    assert float(example_losses(model, [example], 100)) == pytest.approx(float(expected), rel=1e-12)


def test_a_conversation_is_read_at_the_tokens_that_count() -> None:
    # Forward-only methods read the residual stream where the loss is, not at the questions between answers.
    example = conversation("c", (0, 5, 3, 2, 15, 3, 6, 3, 2, 16, 17, 3), (4, 5, 9, 10, 11))
    assert response_reads([example], "mean_response")[0].read == (4, 5, 9, 10, 11)
    assert response_reads([example], "last_response")[0].read == (11,)
    (pair, *_) = tiny_examples()
    assert response_reads([pair], "mean_response")[0].read == (5, 6, 7, 8) == pair.places


def test_windows_of_a_document_score_each_token_once() -> None:
    model, ids = tiny_model("gpt2"), tuple(range(4, 20))
    whole = document("d", ids)
    assert whole.n_scored == 15
    _, logp = plain_read(model, ids)
    expected = -sum(logp[t - 1, ids[t]] for t in range(1, 16)) / 15
    assert float(example_losses(model, [whole], 100)) == pytest.approx(float(expected), rel=1e-12)
    overlapping = document("d#1", ids[8:], seen=3)
    assert [t for _, t in overlapping.scored] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("sequences", "weights"),
    [((), ()), (((1, 2),), ((0.0,),)), (((1, 2),), ((1.0, 1.0),)), (((1, 2), (1,)), ((0.0, 1.0), (1.0,)))],
)
def test_weights_that_fit_no_token_are_refused(sequences, weights) -> None:
    with pytest.raises(ValueError, match="z: a weight for each token"):
        Example("z", sequences, weights)


def test_losses_that_are_no_numbers_are_named() -> None:
    broken = Example("b", PREFERENCES[0].sequences, PREFERENCES[0].weights, lambda sums: sums / 0)
    with pytest.raises(UserError, match="loss of some examples") as caught:
        example_losses(tiny_model("tied"), [*tiny_examples(), broken], 100)
    assert caught.value.value == ["b"]


def test_a_preference_s_loss_is_that_of_direct_preference_optimisation() -> None:
    # L = -log sigmoid(beta [(log p(c) - log ref(c)) - (log p(r) - log ref(r))]), sums over tokens.
    model, beta, reference = tiny_model("untied"), 0.3, -0.7
    for example in tiny_preferences(beta, reference):
        logp = []
        for ids, weights in zip(example.sequences, example.weights, strict=True):
            _, read = plain_read(model, ids)
            logp.append(sum(read[t - 1, ids[t]] for t, w in enumerate(weights) if w))
        expected = -nn.functional.logsigmoid(beta * (logp[0] - logp[1] - reference))
        assert float(example_losses(model, [example], 99)) == pytest.approx(expected.item(), rel=1e-12)


def test_at_its_reference_a_preference_loses_log_two_and_its_slope_is_half_of_beta() -> None:
    model = tiny_model("tied")
    plain = [replace(p, link=None) for p in tiny_preferences()]
    sums = example_losses(model, plain, 99)
    own = [replace(p, link=Dpo(0.4, -s)) for p, s in zip(plain, sums.tolist(), strict=True)]
    torch.testing.assert_close(example_losses(model, own, 99), torch.full((3,), 2.0).double().log())
    (batch,) = batch_examples(own, 1000)
    slopes = batch.slopes(sums[list(batch.index)])
    torch.testing.assert_close(slopes, torch.full((3,), 0.2).double())
