"""EK-FAC: factors and every estimator against dense matrices and plain autograd, float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from reference import Readouts, along, close
from taught.core.estimator import Work
from taught.core.example import Example, batch_examples, make_batch, sft
from taught.core.problem import Problem
from taught.curvatures import ekfac
from taught.curvatures.ekfac import Ekfac, curved_layers, draw_labels, fit_ekfac
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import step_direction
from taught.estimators.forward import tangents
from taught.model.parameters import moving_parameters
from tiny_models import (
    VOCAB,
    plain_gradient,
    plain_loss,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_preferences,
    tiny_problem,
)

DAMPING = 0.1
models = pytest.mark.parametrize("name", ["untied", "padded", "gpt2"])


@cache
def model_of(name: str) -> nn.Module:
    return tiny_model(name)


@cache
def problem_of(name: str):
    return curved(tiny_problem(model_of(name)), tiny_examples())


def curved(problem: Problem, examples: list[Example]) -> Problem:
    return problem.within(Ekfac(damping=DAMPING).fit(problem, examples, Work()))


def labels_of(model: nn.Module, example: Example, seed: int = 0) -> list[int]:
    """What was drawn for one example alone."""
    return draw_labels(model, make_batch([example], [0]), [example], seed)[0].tolist()


def log_probabilities(model: nn.Module, example: Example) -> Tensor:
    """One plain pass: [n_scored, V]."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    return torch.log_softmax(logits, -1)[example.start - 1 : -1]


def sampled(model: nn.Module, example: Example, seed: int = 0) -> Tensor:
    """n^-1/2 sum over response tokens of -log p(drawn label)."""
    logp = log_probabilities(model, example)
    drawn = torch.tensor(labels_of(model, example, seed))
    return -logp[torch.arange(len(drawn)), drawn].sum() / len(drawn) ** 0.5


@cache
def dense(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer the rows' and columns' squares, from hooks in plain passes of one sequence."""
    model = model_of(name)
    squares = {}
    for layer in curved_layers(model):
        module = model.get_submodule(layer.removesuffix(".weight"))
        rows, columns = 0.0, 0.0
        for example in tiny_examples():
            seen = []
            handle = module.register_forward_hook(lambda m, a, out, s=seen: s.append((a[0], out)))
            value = sampled(model, sft(example.id, example.ids, example.start))
            handle.remove()
            x, out = seen[0]
            (d,) = torch.autograd.grad(value, out)
            # The last token predicts nothing, and is no input of training.
            x, d = x.detach()[0, :-1], d[0, :-1]
            x, d = (d, x) if isinstance(module, nn.Linear) else (x, d)
            rows, columns = rows + x.T @ x, columns + d.T @ d
        squares[layer] = (rows, columns)
    return squares


def eigenvalues(name: str, layer: str) -> Tensor:
    """Mean over examples of the squared coordinates of G in the Kronecker basis, written out."""
    model = model_of(name)
    rows, columns = problem_of(name).metric.basis[layer]
    basis = torch.kron(rows, columns)  # columns: rows_i (x) columns_j, the weight flattened by rows
    total = 0.0
    for example in tiny_examples():
        G = plain_gradient(model, sampled(model, example))[layer]
        total = total + (basis.T @ G.flatten()) ** 2
    return (total / len(tiny_examples())).view(len(rows), len(columns))


def inverse(name: str, layer: str) -> Tensor:
    """C^-1 of one layer as a matrix on the flattened weight."""
    basis = torch.kron(*problem_of(name).metric.basis[layer])
    v = eigenvalues(name, layer).flatten()
    return basis @ torch.diag(1 / (v + DAMPING * v.mean())) @ basis.T


@cache
def steps(name: str) -> list[dict[str, Tensor]]:
    """C^-1 grad L of each example by dense matrices; no other parameter moves."""
    model, layers = model_of(name), curved_layers(model_of(name))
    inverses = {layer: inverse(name, layer) for layer in layers}
    out = []
    for example in tiny_examples():
        grads = plain_gradient(model, plain_loss(model, example))
        out.append({n: (inverses[n] @ grads[n].flatten()).view_as(grads[n]) for n in layers})
    return out


def test_the_layers_are_the_linear_ones_of_the_blocks() -> None:
    model = model_of("untied")
    found = curved_layers(model)
    assert len(found) == 3 * 7
    assert all(".layers." in name and name.endswith("proj.weight") for name in found)
    assert len(curved_layers(model_of("gpt2"))) == 3 * 4
    assert curved_layers(model, ("*mlp*", "*norm*")) == tuple(n for n in found if "mlp" in n)
    with pytest.raises(UserError, match=r"no parameter has an EK-FAC(.|\n)*norm(.|\n)*parameters"):
        curved_layers(model, ("*norm*",))


@models
def test_the_basis_are_eigenvectors_of_both_covariances(name: str) -> None:
    for layer, squares in dense(name).items():
        for vectors, square in zip(problem_of(name).metric.basis[layer], squares, strict=True):
            one = torch.eye(len(square), dtype=square.dtype)
            torch.testing.assert_close(vectors.T @ vectors, one, rtol=0, atol=1e-12)
            inside = vectors.T @ square @ vectors
            off = inside - torch.diag(inside.diagonal())
            assert off.abs().max() < 1e-12 * square.trace()


@models
def test_eigenvalues_are_those_of_explicit_gradients_in_the_explicit_basis(name: str) -> None:
    for layer, scale in problem_of(name).metric.scale.items():
        v = eigenvalues(name, layer)
        torch.testing.assert_close(1 / scale, v + DAMPING * v.mean(), rtol=1e-8, atol=0)


@models
def test_the_metric_is_symmetric_and_positive(name: str) -> None:
    problem, draw = problem_of(name), torch.Generator().manual_seed(2)
    for layer, scale in problem.metric.scale.items():
        some = torch.randn(8, *scale.shape, generator=draw, dtype=torch.float64)
        divided = torch.stack([problem.metric.solve(layer, g) for g in some])
        products = some.flatten(1) @ divided.flatten(1).T
        torch.testing.assert_close(products, products.T, rtol=1e-10, atol=1e-10)
        assert torch.linalg.eigvalsh(products).min() > 0
        close(divided[0].flatten(), inverse(name, layer) @ some[0].flatten())


SMALL = {"memory_gb": 1e-6, "batch_tokens": 9}


@pytest.mark.parametrize("name, options", [("untied", {}), ("padded", SMALL), ("gpt2", SMALL)])
def test_every_estimator_divides_by_it(name: str, options) -> None:
    """Against <C^-1 grad L(z), grad F> with dense matrices and plain autograd."""
    problem = replace(problem_of(name), **options)
    model, lr = problem.model, problem.lr
    draw = torch.Generator().manual_seed(5)
    A = torch.randn(2, 6, 5, generator=draw, dtype=torch.float64)
    B = torch.randn(2, 6, generator=draw, dtype=torch.float64)
    effects, _ = target_effects(problem, tiny_examples(), A, B)
    dy = prompt_effects(problem, tiny_examples())
    moves = list(tangents(problem, tiny_examples()))
    F = feature_effects(problem, tiny_examples(), list(A), torch.ones(6, 5))
    exact = along(Readouts(model), [{n: -lr * g for n, g in step.items()} for step in steps(name)])
    for number, (example, step, move) in enumerate(zip(tiny_examples(), steps(name), moves, strict=True)):
        _, direction = step_direction(problem, example)
        assert set(direction) == set(step)
        for layer, g in step.items():
            close(direction[layer], g)
        _, (_, along_step) = exact[number]
        dX, y = move.dX, move.dy
        close(y, along_step)
        close(dy[number], along_step)
        close(effects[number], torch.einsum("knd,nd->k", A, dX) + B @ y)
        close(F[number], torch.einsum("knd,nd->k", A, dX))


@models
def test_batches_padding_and_order_do_not_matter(name: str) -> None:
    found = fit_ekfac(tiny_problem(model_of(name), batch_tokens=9), tiny_examples())
    other = fit_ekfac(tiny_problem(model_of(name), batch_tokens=90), tiny_examples()[::-1])
    by_id = {example.id: labels_of(model_of(name), example) for example in tiny_examples()}
    for batch in batch_examples(tiny_examples(), 90):
        drawn = draw_labels(model_of(name), batch, tiny_examples(), 0)
        for row, number in enumerate(batch.index):
            example = tiny_examples()[number]
            assert drawn[row, : example.n_scored].tolist() == by_id[example.id]
    for layer, v in found.eigenvalues.items():
        torch.testing.assert_close(v.sum(), other.eigenvalues[layer].sum(), rtol=1e-10, atol=0)
        metric = [
            torch.kron(*e.basis[layer])
            @ (e.eigenvalues[layer].flatten() + v.mean()).reciprocal().diag()
            @ torch.kron(*e.basis[layer]).T
            for e in (found, other)
        ]
        torch.testing.assert_close(metric[0], metric[1], rtol=1e-6, atol=1e-6 / float(v.mean()))


class PlainPasses(nn.Module):
    """A model that takes no token trees, and so is given every sequence by itself, padded on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("untied")
        self.config = self.inner.config

    def get_decoder(self) -> nn.Module:
        return self.inner.model

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor):
        return self.inner(input_ids=input_ids, use_cache=False)


@pytest.mark.parametrize("kind", ["pairs", "preferences"])
def test_padding_does_not_matter_where_sequences_stand_by_themselves(kind: str) -> None:
    examples = tiny_examples() if kind == "pairs" else tiny_preferences()
    problem = replace(tiny_problem(model_of("untied")), model=PlainPasses(), parameters=("*layers.1.mlp*",))
    found = fit_ekfac(replace(problem, batch_tokens=9), examples)
    other = fit_ekfac(replace(problem, batch_tokens=90), examples)
    trees = fit_ekfac(tiny_problem(model_of("untied"), parameters=("*layers.1.mlp*",)), examples)
    for layer, v in found.eigenvalues.items():
        torch.testing.assert_close(v, other.eigenvalues[layer], rtol=1e-8, atol=1e-14)
        if kind == "pairs":  # what two answers share is one input of a tree, and two of plain passes
            torch.testing.assert_close(v, trees.eigenvalues[layer.removeprefix("inner.")], rtol=1e-8, atol=1e-14)


def test_labels_are_drawn_from_the_model_and_depend_on_seed_and_id() -> None:
    model, (example, *_) = model_of("untied"), tiny_examples()
    p = log_probabilities(model, example).exp().detach()
    draws = 4000
    many = [replace(example, id=f"z{i}") for i in range(draws)]
    counts = torch.zeros_like(p)
    for batch in batch_examples(many, 4000):
        for labels in draw_labels(model, batch, many, 0):
            counts[torch.arange(len(p)), labels] += 1
    # A chi-square of each token: mean V - 1, variance about twice that.
    chi = ((counts - draws * p) ** 2 / (draws * p)).sum(1)
    assert (chi < VOCAB - 1 + 6 * (2 * VOCAB) ** 0.5).all()
    assert labels_of(model, example) == labels_of(model, example)
    others = [labels_of(model, example, seed) for seed in range(5)]
    assert len({tuple(x) for x in others}) > 1


class OneLayer(nn.Module):
    """A language model with one moving layer, which reads every token apart: x -> x W' -> logits."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.config = type("Config", (), {"num_hidden_layers": 1})()
        self.embed = nn.Embedding(VOCAB, 5).double()
        self.blocks = nn.ModuleList([nn.Linear(5, 3, bias=False).double()])
        self.head = nn.Linear(3, VOCAB, bias=False).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype))

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_: object):
        logits = self.head(self.blocks[0](self.embed(input_ids)))
        return type("Out", (), {"logits": logits[:, -logits_to_keep:] if logits_to_keep else logits})


def test_where_gradients_factorise_it_is_the_damped_fisher_matrix_itself(monkeypatch) -> None:
    """One token in, one out: G = d a'. Inputs and output gradients met in all combinations."""
    model = OneLayer()
    inputs = [torch.eye(5, dtype=torch.float64)[i] * s for i, s in ((0, 2.0), (1, 1.0), (2, -0.5))]
    with torch.no_grad():  # logits do not depend on the token: d is independent of a
        model.blocks[0].weight.zero_()
        for token, a in enumerate(inputs):
            model.embed.weight[token] = a
    labels = {}
    examples = []
    for token in range(3):
        for label in range(4):
            example = sft(f"{token} {label}", (token, 7), 1)
            examples.append(example)
            labels[example.id] = label

    def given(model, batch, examples, seed):
        return torch.tensor([[labels[examples[i].id]] for i in batch.index])

    monkeypatch.setattr(ekfac, "draw_labels", given)
    problem = replace(tiny_problem(tiny_model("tied")), model=model, point=None, features=None)
    made = curved(problem, examples)
    F = torch.zeros(15, 15, dtype=torch.float64)
    for example in examples:
        logits = model(torch.tensor([[example.ids[0]]])).logits[0, 0]
        loss = -torch.log_softmax(logits, -1)[labels[example.id]]
        (g,) = torch.autograd.grad(loss, model.blocks[0].weight)
        F += torch.outer(g.flatten(), g.flatten()) / len(examples)
    exact = torch.linalg.inv(F + DAMPING * F.trace() / 15 * torch.eye(15, dtype=torch.float64))
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    found = made.metric.solve("blocks.0.weight", q)
    torch.testing.assert_close(found.flatten(), exact @ q.flatten(), rtol=1e-9, atol=1e-11)


def test_the_mean_over_labels_is_the_gauss_newton_matrix_of_the_mean_loss() -> None:
    """E G G' over all labels of an example, against J' (diag p - p p') J / n: C is on the loss' scale."""
    model = model_of("untied")
    example = sft("z", (0, 5, 21, 3, 9), 3)  # two response tokens
    weight = model.get_parameter("model.layers.2.mlp.up_proj.weight")
    logp = log_probabilities(model, example)
    n = len(logp)
    rows = torch.stack(
        [
            torch.autograd.grad(logp[t, v], weight, retain_graph=True)[0].flatten()
            for t in range(n)
            for v in range(VOCAB)
        ]
    ).view(n, VOCAB, -1)
    p = logp.exp().detach()
    gauss_newton = sum(rows[t].T @ (torch.diag(p[t]) - torch.outer(p[t], p[t])) @ rows[t] for t in range(n)) / n
    fisher = torch.zeros_like(gauss_newton)
    for u in range(VOCAB):
        for v in range(VOCAB):
            G = (rows[0, u] + rows[1, v]) / n**0.5
            fisher += p[0, u] * p[1, v] * torch.outer(G, G)
    torch.testing.assert_close(fisher, gauss_newton, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("untied")
    before = snapshot(model)
    made = curved(tiny_problem(model, checkpointing=True), tiny_examples())
    assert same(before, snapshot(model))
    assert set(made.metric.scale) == set(moving_parameters(model, made.parameters)) == set(made.metric.basis)
    for layer, scale in problem_of("untied").metric.scale.items():
        torch.testing.assert_close(made.metric.scale[layer], scale, rtol=1e-8, atol=0)


def test_layers_without_a_gradient_or_with_one_that_is_not_finite_are_refused() -> None:
    model = tiny_model("untied")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    with pytest.raises(UserError, match=r"curvature of some layers is zero(.|\n)*layers\.1\.mlp\.up"):
        curved(tiny_problem(model), tiny_examples())
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite(.|\n)*z0"):
        curved(tiny_problem(model), tiny_examples())


def test_several_places_have_one_basis_and_the_mean_of_their_squares() -> None:
    name, model = "model.layers.1.mlp.up_proj.weight", tiny_model("untied")
    module = model.get_submodule(name.removesuffix(".weight"))
    weights = [tiny_model("untied", seed=seed).state_dict() for seed in (0, 5)]
    places = [lambda own=own: model.load_state_dict(own) for own in weights]
    found = fit_ekfac(tiny_problem(model, parameters=(name,)), tiny_examples(), places=places)
    rows, columns = found.basis[name]
    squares, total = 0.0, 0.0
    for enter in places:
        enter()
        for example in tiny_examples():
            seen = []
            handle = module.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].detach()[0, :-1]))
            value = sampled(model, example)  # its first pass is the plain one; labels are drawn in another
            handle.remove()
            squares = squares + seen[0].T @ seen[0]
            total = total + (rows.T @ plain_gradient(model, value)[name] @ columns) ** 2
    close(found.eigenvalues[name], total / (2 * len(tiny_examples())))
    inside = columns.T @ squares @ columns
    close(inside.diagonal().diag(), inside, 1e-9)
    once = fit_ekfac(tiny_problem(model, parameters=(name,)), tiny_examples())
    twice = fit_ekfac(tiny_problem(model, parameters=(name,)), tiny_examples(), places=[lambda: None] * 2)
    torch.testing.assert_close(once.eigenvalues[name], twice.eigenvalues[name], rtol=1e-6, atol=1e-9)


def test_a_preference_has_the_gauss_newton_matrix_of_its_one_output() -> None:
    # f'' = beta^2 sigma(u) sigma(-u) with u = beta (s + reference), gradients of s by autograd; no label is drawn.
    model, examples = model_of("untied"), tiny_preferences()
    name = "model.layers.1.mlp.up_proj.weight"
    problem = tiny_problem(model, parameters=(name,))
    found = fit_ekfac(problem, examples)
    rows, columns = found.basis[name]
    total = torch.zeros_like(found.eigenvalues[name])
    for example in examples:
        plain = replace(example, link=None)
        value = make_batch([plain], [0]).losses(model)[0]
        gradient = plain_gradient(model, value)[name]
        link = example.link
        up = torch.sigmoid(link.beta * (value.detach() + link.reference))
        bend = link.beta**2 * up * (1 - up)
        total += (rows.T @ gradient @ columns).square() * bend
    torch.testing.assert_close(found.eigenvalues[name], total / len(examples), rtol=1e-9, atol=1e-15)
    again = fit_ekfac(problem, examples, seed=1)
    assert torch.equal(found.eigenvalues[name], again.eigenvalues[name])
