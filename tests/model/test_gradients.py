"""Factors and their products against explicit per-example gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taught.model.gradients as gradients
from taught.core.example import batch_examples
from taught.errors import UserError
from taught.model.forward import forward
from taught.model.gradients import (
    Factor,
    RowSparse,
    accumulate,
    contract,
    dot,
    dots,
    find_sites,
    frozen,
    mixes_examples,
    tap,
)
from taught.model.tokens import build_tree, stack
from tiny_models import (
    MODELS,
    PAD,
    POINT,
    VOCAB,
    WIDTH,
    plain_gradient,
    plain_loss,
    same,
    snapshot,
    tiny_examples,
    tiny_llama,
    tiny_model,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def factors_of(model, examples) -> tuple[list[int], dict[str, list[Factor]]]:
    (batch,) = batch_examples(examples, 10_000)
    with frozen(model), tap(model, find_sites(model)) as taps:
        out: dict[str, list[Factor]] = {}
        for factor in taps.factors(batch.losses(model).sum(), training=True):
            out.setdefault(factor.param, []).append(factor)
    return list(batch.index), out


def explicit(model, examples) -> dict[str, torch.Tensor]:
    """[P, *shape] of every parameter."""
    each = [plain_gradient(model, plain_loss(model, p)) for p in examples]
    return {n: torch.stack([g[n] for g in each]) for n in each[0]}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_s_gradient_is_rebuilt_from_its_factors(name: str) -> None:
    model, examples = tiny_model(name), tiny_examples()
    grads = explicit(model, examples)
    index, factors = factors_of(model, examples)
    assert factors.keys() == grads.keys()
    kinds = {s.kind for s in find_sites(model)}
    assert kinds == {"embedding", "elementwise", "linear", *(["linear_t"] * (name == "gpt2"))}
    for param, uses in factors.items():
        total = torch.zeros_like(grads[param][0])
        for use in uses:
            accumulate(use, total, weight=-2.0)
        torch.testing.assert_close(total, -2 * grads[param][index].sum(0), **EXACT)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 40])  # 40 queries: one layer's gradients are built
@pytest.mark.parametrize("few", [0, 1 << 20])  # two examples at a time, or all
def test_contract_is_the_inner_product_with_each_query(name: str, count: int, few: int, monkeypatch) -> None:
    monkeypatch.setattr(gradients, "_FEW", few)
    monkeypatch.setattr(gradients, "_FEWEST", 2)
    model, examples = tiny_model(name), tiny_examples()
    built = []
    real = gradients._gradients
    monkeypatch.setattr(gradients, "_gradients", lambda d, a: built.append(1) or real(d, a))
    grads = explicit(model, examples)
    index, factors = factors_of(model, examples)
    for param, uses in factors.items():
        query = randn(count, *grads[param].shape[1:])
        ours = sum(contract(use, query) for use in uses)
        expected = grads[param][index].flatten(1) @ query.flatten(1).T
        torch.testing.assert_close(ours, expected, **EXACT)
    assert bool(built) == (count == 40)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("build", [True, False])
@pytest.mark.parametrize("room", [1, 10**9])
def test_dots_are_the_inner_products_of_many_batches_by_both_routes(
    name: str, build: bool, room: int, monkeypatch
) -> None:
    monkeypatch.setattr(gradients, "_building_is_cheaper", lambda *_: build)
    model, examples = tiny_model(name), tiny_examples()
    grads = explicit(model, examples)
    sides, order = [], []
    for batches in ((examples[:3], examples[3:]), (examples[1:2], examples[2:], examples[:1])):
        found = [factors_of(model, batch) for batch in batches]
        sides.append([factors for _, factors in found])
        order.append(
            [examples.index(batch[i]) for batch, (index, _) in zip(batches, found, strict=True) for i in index]
        )
    for param in sides[0][0]:
        a, b = (grads[param][index].flatten(1) for index in order)
        left, right = ([factors[param] for factors in side] for side in sides)
        torch.testing.assert_close(dots(left, right, room=room), a @ b.T, **EXACT)


def test_the_cheaper_route_follows_from_counting() -> None:
    def use(examples: int, tokens: int, width: int) -> list[list[Factor]]:
        x = torch.zeros(examples, tokens, width)
        return [[Factor("w", "linear", x, x)]]

    cheaper = gradients._building_is_cheaper
    assert cheaper(use(50, 100, 8), use(50, 100, 8))
    assert not cheaper(use(1, 2, 1000), use(1, 2, 1000))
    one, other = use(2, 6, 16), use(2, 6, 16)  # 2 * 16^2 (4 + 24) against 12 * 12 * 32
    assert not cheaper(one, other)
    assert cheaper(one * 5, other * 5)  # the more meet each built gradient, the better


def test_built_gradients_stay_within_the_room() -> None:
    x = torch.zeros(3, 4, 5)
    batches = [[Factor("w", "linear", x, x)]] * 7  # 75 numbers a batch
    assert [len(s) for s in gradients._slices(batches, 160)] == [2, 2, 2, 1]
    assert [len(s) for s in gradients._slices(batches, 1)] == [1] * 7


def test_tied_embedding_has_cross_terms() -> None:
    # Look-up and output use meet in one parameter: the sum of the parts' products is not enough.
    model, examples = tiny_model("tied"), tiny_examples()
    _, factors = factors_of(model, examples)
    lookup, output = sorted(factors["model.embed_tokens.weight"], key=lambda f: f.kind)
    assert (lookup.kind, output.kind) == ("embedding", "linear")
    cross = dot([lookup], [output]) + dot([output], [lookup])
    assert cross.abs().max() > 1e-3
    whole = dot([lookup, output], [lookup, output])
    parts = dot([lookup], [lookup]) + dot([output], [output])
    torch.testing.assert_close(whole, parts + cross, **EXACT)


@pytest.mark.parametrize("count", [1, 40])
def test_row_sparse_queries_are_dense_ones_with_zero_rows(count: int) -> None:
    model, examples = tiny_model("tied"), tiny_examples()
    rows = torch.tensor([0, 3, 5, 9, 16, 23])
    slot = torch.full((VOCAB,), -1)
    slot[rows] = torch.arange(len(rows))
    values = randn(count, len(rows), WIDTH)
    dense = torch.zeros(count, VOCAB, WIDTH, dtype=torch.float64)
    dense[:, rows] = values
    _, factors = factors_of(model, examples)
    for use in factors["model.embed_tokens.weight"]:
        ours = contract(use, RowSparse(rows, slot, values))
        torch.testing.assert_close(ours, contract(use, dense), **EXACT)


def test_row_sparse_totals_hold_their_rows_and_refuse_others() -> None:
    ids = torch.tensor([[3, 5, 3], [0, 5, 9]])
    use = Factor("w", "embedding", ids, randn(2, 3, WIDTH))
    dense = torch.zeros(VOCAB, WIDTH, dtype=torch.float64)
    accumulate(use, dense, weight=-0.5)
    rows = torch.tensor([0, 3, 5, 9, 11])
    slot = torch.full((VOCAB,), -1)
    slot[rows] = torch.arange(5)
    total = RowSparse(rows, slot, torch.zeros(5, WIDTH, dtype=torch.float64))
    accumulate(use, total, weight=-0.5)
    torch.testing.assert_close(total.values, dense[rows], **EXACT)
    with pytest.raises(ValueError, match="missing from the rows"):
        accumulate(Factor("w", "embedding", torch.tensor([[1]]), randn(1, 1, WIDTH)), total)
    with pytest.raises(TypeError, match="dense total"):
        accumulate(Factor("w", "linear", randn(1, 2, WIDTH), randn(1, 2, VOCAB)), total)


def test_look_ups_of_the_padding_row_have_no_gradient_in_training_only() -> None:
    # The end of a turn is the padding token of many chat models; training leaves its look-ups out.
    model, examples = tiny_model("padded"), tiny_examples()
    assert any(PAD in p.ids[:-1] for p in examples)
    (batch,) = batch_examples(examples, 10_000)
    found = []
    for training in (True, False):
        with frozen(model), tap(model, find_sites(model)) as taps:
            uses = list(taps.factors(batch.losses(model).sum(), training=training))
        (lookup,) = (f for f in uses if f.kind == "embedding")
        found.append(lookup.d[lookup.a == PAD].abs().max() > 1e-3)
    assert found == [False, True]


class Scaled(nn.Embedding):
    """As Gemma's: the factor is inside the module."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class Shifted(nn.Embedding):
    """As OPT's positions: another row than the one asked for."""

    def forward(self, ids):
        return super().forward((ids + 1) % self.num_embeddings)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH).double())

    def forward(self, x):
        return x * self.weight**2


class OffsetNorm(nn.LayerNorm):
    """As Gemma's norms: the weight is a deviation from 1."""

    def forward(self, x):
        return nn.functional.layer_norm(x, (WIDTH,), 1 + self.weight, self.bias)


def replaced(name: str, module: nn.Module) -> nn.Module:
    model = tiny_llama(tied=False)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.double())
    return model.eval()


UNDERSTOOD = {
    "scaled embedding": ("model.embed_tokens", lambda: Scaled(VOCAB, WIDTH)),
    "linear subclass": ("model.layers.1.self_attn.o_proj", lambda: Renamed(WIDTH, WIDTH)),
    "norm around 1": ("model.layers.1.input_layernorm", lambda: OffsetNorm(WIDTH)),
    "layer norm without bias": ("model.norm", lambda: nn.LayerNorm(WIDTH, bias=False)),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_modules_with_known_variations_give_their_true_gradient(case: str) -> None:
    name, make = UNDERSTOOD[case]
    model, examples = replaced(name, make()), tiny_examples()
    grads = explicit(model, examples)
    index, factors = factors_of(model, examples)
    assert factors.keys() == grads.keys()
    for param, uses in factors.items():
        query = randn(2, *grads[param].shape[1:])
        expected = grads[param][index].flatten(1) @ query.flatten(1).T
        torch.testing.assert_close(sum(contract(u, query) for u in uses), expected, **EXACT)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Conv(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.mT).mT


class Bypassed(nn.Module):
    """A layer that uses the weights of another without calling it, as state space layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


class Halved(nn.Module):
    """A layer that is called, and whose weights are used once more behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x) + x @ self.inner.weight


WHOLE = {
    "another parameter": ("model.norm", Odd, {"model.norm.scale"}),
    "squared weight at 1": ("model.norm", Squared, {"model.norm.weight"}),
    "shifted rows": ("model.embed_tokens", lambda: Shifted(VOCAB, WIDTH), {"model.embed_tokens.weight"}),
    "linear that does more": (
        "model.layers.1.self_attn.o_proj",
        lambda: Doubled(WIDTH, WIDTH),
        {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.bias"},
    ),
    "convolution": ("model.norm", lambda: Conv(WIDTH, WIDTH, 1), {"model.norm.weight", "model.norm.bias"}),
    "a module that is not called": (
        "model.layers.1.self_attn.o_proj",
        Bypassed,
        {"model.layers.1.self_attn.o_proj.inner.weight", "model.layers.1.self_attn.o_proj.inner.bias"},
    ),
    "a second use": ("model.layers.1.self_attn.o_proj", Halved, {"model.layers.1.self_attn.o_proj.inner.weight"}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_parameter_of_another_use_has_its_gradient_whole_one_example_at_a_time(case: str) -> None:
    name, make, whole = WHOLE[case]
    model, examples = replaced(name, make()), tiny_examples()
    sites = find_sites(model)
    assert {site.weight for site in sites if site.kind == "whole"} == whole
    assert mixes_examples(model, sites)
    grads = explicit(model, examples)
    for i, example in enumerate(examples):
        _, factors = factors_of(model, [example])
        assert factors.keys() == grads.keys()
        for param, uses in factors.items():
            query = randn(2, *grads[param].shape[1:])
            expected = grads[param][i].flatten() @ query.reshape(2, -1).T
            torch.testing.assert_close(sum(contract(u, query) for u in uses)[0], expected, **EXACT)
    with pytest.raises(UserError, match=r"mixes the examples(.|\n)*batch_tokens=1"):
        factors_of(model, examples)


def test_weights_that_are_not_finite_say_nothing_about_uses() -> None:
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert not any(site.kind == "whole" for site in find_sites(model))


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = tiny_llama(tied=False)
    model.model.norm.register_parameter("codes", nn.Parameter(torch.ones(3).char(), requires_grad=False))
    with pytest.raises(UserError, match=r"do not move(.|\n)*model\.norm\.codes(.|\n)*attribution\.parameters"):
        find_sites(model)
    assert find_sites(model, ("*_proj.*",))


class Squashed(nn.Embedding):
    """Rows go through a function after they were looked up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).tanh()


def test_look_ups_of_an_unknown_kind_are_refused_where_a_row_may_have_no_gradient() -> None:
    model = tiny_llama(tied=False, pad=PAD)
    model.model.embed_tokens.__class__ = Squashed
    with pytest.raises(UserError, match=r"not understood(.|\n)*embed_tokens(.|\n)*finite-step"):
        find_sites(model)
    assert find_sites(model, ("*_proj.*",))


def test_finding_sites_leaves_the_random_state_alone() -> None:
    model = tiny_model("gpt2")
    before = torch.get_rng_state()
    find_sites(model)
    assert torch.equal(torch.get_rng_state(), before)


class Flat(nn.Module):
    """A layer that forgets which example a token is of, as routed experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_a_module_that_mixes_examples_is_refused_by_name_and_right_for_one_at_a_time() -> None:
    model, examples = replaced("model.layers.1.self_attn.o_proj", Flat()), tiny_examples()
    assert mixes_examples(model, find_sites(model)) and not mixes_examples(tiny_llama(), find_sites(tiny_llama()))
    with pytest.raises(UserError, match=r"mixes the examples(.|\n)*batch_tokens=1") as error:
        factors_of(model, examples)
    assert "o_proj.inner" in str(error.value)
    grads = explicit(model, examples)
    for i, example in enumerate(examples):
        for param, uses in factors_of(model, [example])[1].items():
            total = torch.zeros_like(grads[param][i])
            for use in uses:
                accumulate(use, total)
            torch.testing.assert_close(total, grads[param][i], **EXACT)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_and_tap_put_everything_back(error) -> None:
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[1].eval()  # a part in another mode than the rest
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    try:
        with frozen(model), tap(model, find_sites(model)):
            assert not any(p.requires_grad for p in model.parameters())
            assert not any(m.training for m in model.modules())
            assert not same(before, snapshot(model))
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert same(before, snapshot(model))


def test_only_the_modules_that_matter_give_factors() -> None:
    model = tiny_model("untied")
    with frozen(model), tap(model, find_sites(model)) as taps:
        h, _ = forward(model, stack([build_tree([(0, 5, 6)])[0]]), point=POINT, stop_at_point=True)
        params = {f.param for f in taps.factors(h.sum())}
    assert {p.split(".")[2] for p in params if ".layers." in p} == {"0", "1"}
    assert "lm_head.weight" not in params and "model.embed_tokens.weight" in params


class Unembedding(torch.nn.Module):
    """An output that multiplies by the embedding's weight without calling the embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.borrowed = [embedding]

    def forward(self, x):
        return torch.nn.functional.linear(x, self.borrowed[0].weight)


def test_a_weight_that_is_used_where_its_module_is_not_called_has_its_whole_gradient():
    model = tiny_model("untied")
    model.lm_head = Unembedding(model.get_input_embeddings())
    kinds = {site.weight: site.kind for site in find_sites(model)}
    assert kinds["model.embed_tokens.weight"] == "whole" and "whole" not in {
        kind for name, kind in kinds.items() if "layers" in name
    }


def test_looking_for_uses_leaves_the_model_as_it_was():
    model = tiny_model("tied")
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before = snapshot(model)
    find_sites(model)
    assert same(before, snapshot(model))
