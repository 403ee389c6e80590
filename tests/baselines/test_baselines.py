"""Baselines against plain autograd, unpadded passes, worked examples and naive loops."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from taught.baselines.baselines import (
    BASELINES,
    Texts,
    baseline_scores,
    bm25,
    gradient_products,
    label_scores,
    random_scores,
    similarities,
    squared_norms,
    words,
)
from taught.core.readings import Readings
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators.adjoint import target_effects
from taught.model.gradients import Factor
from taught.model.readout import pack
from tiny_models import (
    MODELS,
    PROMPT_IDS,
    moved,
    plain_gradient,
    plain_loss,
    plain_read,
    plain_y,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)

GROUPS = {"odd": ["q1", "q3", "q5"], "first": ["q0"], "some": ["q4", "q0"]}
IDS = [example.id for example in tiny_examples()]
TEXTS = Texts(
    {"z0": "red fish", "z1": "blue fish fish", "z2": "a bird", "z3": "Red, red bird!"},
    {f"q{i}": text for i, text in enumerate(["fish", "bird", "red fish", "cat", "a", "blue"])},
    {"z0": "refusal", "z1": "compliance", "z2": "refusal", "z3": "other"},
    "refusal",
)


# --- gradients ------------------------------------------------------------------------------------


@contextmanager
def true_look_ups(model):
    """Look-ups of the padding token have a gradient, as in the derivative of a read-out."""
    table = model.get_input_embeddings()
    row, table.padding_idx = table.padding_idx, None
    try:
        yield
    finally:
        table.padding_idx = row


def flat(gradient, names=None) -> torch.Tensor:
    return torch.cat([g.flatten() for n, g in gradient.items() if names is None or n in names])


def expected(model, names=None):
    """norms [P], dots and |q| of each group, by autograd over plain passes."""
    examples = torch.stack([flat(plain_gradient(model, plain_loss(model, p)), names) for p in tiny_examples()])
    dots, sizes = {}, {}
    for group, ids in GROUPS.items():
        with true_look_ups(model):
            mean = torch.stack([plain_y(model, PROMPT_IDS[int(i[1:])]) for i in ids]).mean()
            q = flat(plain_gradient(model, mean), names)
        dots[group], sizes[group] = -(examples @ q).numpy(), float(q.norm())
    return examples.norm(dim=1).numpy(), dots, sizes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 24, 1000])  # alone, some padded, all padded
def test_norms_and_products_are_autograds(name, batch_tokens):
    model = tiny_model(name)
    norms, dots, sizes = expected(model)
    made = gradient_products(tiny_problem(model, batch_tokens=batch_tokens), tiny_examples(), GROUPS)
    np.testing.assert_allclose(made.norms, norms, rtol=1e-9)
    for group in GROUPS:
        size = np.abs(dots[group]).max()
        np.testing.assert_allclose(made.dots[group], dots[group], rtol=1e-8, atol=1e-10 * size)
        assert made.query_norms[group] == pytest.approx(sizes[group], rel=1e-9)
        np.testing.assert_allclose(made.cosines(group), dots[group] / (norms * sizes[group]), rtol=1e-8, atol=1e-12)
        assert np.abs(made.cosines(group)).max() < 1


def test_norms_of_some_parameters_and_with_checkpointing():
    model = tiny_model("tied")
    names = [n for n, _ in model.named_parameters() if ".mlp." in n or "embed" in n]
    norms, dots, _ = expected(model, names)
    for checkpointing in (False, True):
        problem = tiny_problem(model, parameters=("*.mlp.*", "*embed*"), checkpointing=checkpointing)
        made = gradient_products(problem, tiny_examples(), GROUPS)
        np.testing.assert_allclose(made.norms, norms, rtol=1e-9)
        np.testing.assert_allclose(made.dots["odd"], dots["odd"], rtol=1e-8)


def test_norms_are_summed_in_double_precision():
    """Of float32 factors, a tied parameter's look-ups and output use: as float64 has them."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 50), generator=rng)
    look, a, d = (torch.randn(3, 50, n, generator=rng) + 1 for n in (6, 6, 9))
    factors = [Factor("w", "embedding", ids, look), Factor("w", "linear", a, d)]
    gradient = d.double().mT @ a.double()
    for example in range(3):
        gradient[example].index_add_(0, ids[example], look[example].double())
    wanted = gradient.pow(2).sum((1, 2))
    torch.testing.assert_close(squared_norms(factors), wanted, rtol=1e-13, atol=0)


def test_a_group_is_the_same_however_its_prompts_are_packed(monkeypatch):
    problem = tiny_problem(tiny_model("tied"))
    wanted = gradient_products(problem, tiny_examples(), GROUPS)
    apart = partial(pack, tokens=8)
    assert len(list(apart(problem.prompts, problem.behavior))) == 6
    monkeypatch.setattr("taught.baselines.baselines.pack", apart)
    found = gradient_products(problem, tiny_examples(), GROUPS)
    for group in GROUPS:
        np.testing.assert_allclose(found.dots[group], wanted.dots[group], rtol=1e-9)
        assert found.query_norms[group] == pytest.approx(wanted.query_norms[group], rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_dot_product_is_the_adjoint_at_a_learning_rate_of_one(name):
    problem = tiny_problem(tiny_model(name), lr=0.02)
    readings = Readings(tuple(prompt.id for prompt in tiny_prompts()), np.zeros(6), GROUPS)
    effects, _ = target_effects(problem, tiny_examples(), *TargetSet.of(["behavior:odd"], readings).cotangents())
    made = gradient_products(problem, tiny_examples(), GROUPS)
    np.testing.assert_allclose(0.02 * made.dots["odd"], effects[:, 0].numpy(), rtol=1e-8)


def test_a_positive_product_means_that_a_step_raises_the_groups_mean():
    model = tiny_model("tied")
    made = gradient_products(tiny_problem(model), tiny_examples(), GROUPS)
    asked = [PROMPT_IDS[int(i[1:])] for i in GROUPS["odd"]]

    def mean() -> float:
        return float(torch.stack([plain_y(model, ids) for ids in asked]).mean())

    for number, example in enumerate(tiny_examples()):
        step = plain_gradient(model, plain_loss(model, example))
        with torch.no_grad():
            before = mean()
            with moved(model, step, -1e-6):
                after = mean()
        assert (after - before) / 1e-6 == pytest.approx(made.dots["odd"][number], rel=1e-3)


def test_a_gradient_of_zero_has_a_cosine_of_zero():
    model = tiny_model("tied")
    made = gradient_products(tiny_problem(model), tiny_examples(), GROUPS)
    none = replace(made, norms=np.zeros(4), dots={"odd": np.zeros(4)})
    assert none.cosines("odd").tolist() == [0, 0, 0, 0]


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    model = tiny_model("tied")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(1e200)
    with pytest.raises(UserError, match="not finite"):
        gradient_products(tiny_problem(model), tiny_examples(), GROUPS)


# --- similarity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last_user", "mean_user"])
def test_similarities_are_cosines_of_plain_residuals(name, position):
    model = tiny_model(name)
    found = similarities(tiny_problem(model, position=position), tiny_examples(), GROUPS)
    reads = {prompt.id: prompt for prompt in tiny_prompts(position)}
    with torch.no_grad():
        for number, example in enumerate(tiny_examples()):
            own = plain_read(model, example.ids)[0][-1]
            for group, ids in GROUPS.items():
                each = []
                for i in ids:
                    other = plain_read(model, reads[i].ids)[0][list(reads[i].read)].mean(0)
                    each.append(float(torch.cosine_similarity(own, other, dim=0)))
                assert found[group][number] == pytest.approx(np.mean(each), rel=1e-9)


def test_similarities_do_not_depend_on_batches_or_order():
    model = tiny_model("tied")
    wanted = similarities(tiny_problem(model), tiny_examples(), GROUPS)
    found = similarities(tiny_problem(model, batch_tokens=1000), tiny_examples()[::-1], GROUPS)
    for group in GROUPS:
        np.testing.assert_allclose(found[group][::-1], wanted[group], rtol=1e-10)


# --- words ----------------------------------------------------------------------------------------


def test_words_are_runs_of_letters_and_digits():
    assert words("Don't panic: über-42!") == ["don", "t", "panic", "über", "42"]


def test_bm25_by_hand():
    """Three texts of 2, 3 and 1 words, mean 2. "fish" stands in two of them, "bird" in one."""
    texts = {"a": "red fish", "b": "blue fish fish", "c": "bird"}
    fish, bird = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    found = bm25(list("abc"), texts, ["Fish, bird"])
    a = fish * 1 * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 2))
    b = fish * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 3 / 2))
    c = bird * 1 * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 1 / 2))
    np.testing.assert_allclose(found, [a, b, c], rtol=1e-12)
    assert found[0] == pytest.approx(0.4700, abs=1e-4)
    np.testing.assert_allclose(bm25(list("abc"), texts, ["bird bird"]), [0, 0, 2 * c])
    np.testing.assert_allclose(bm25(list("abc"), texts, ["fish", "bird", "x"], top=None), [a / 3, b / 3, c / 3])
    np.testing.assert_allclose(bm25(list("abc"), texts, ["fish", "bird", "x"], top=1), [a, b, c])


@pytest.mark.parametrize("top", [None, 1, 10, 500])
def test_bm25_is_the_formula_written_as_loops(top):
    rng = np.random.default_rng(0)
    texts = {f"z{i}": " ".join(f"w{int(w)}" for w in rng.zipf(1.5, 1 + i % 17) % 50) for i in range(30)}
    queries = [" ".join(f"w{int(w)}" for w in rng.zipf(1.5, 4) % 50) for _ in range(150)]
    counts = {i: Counter(words(t)) for i, t in texts.items()}
    mean = np.mean([sum(c.values()) for c in counts.values()])
    wanted = []
    for count in counts.values():
        scores = []
        for query in queries:
            score = 0.0
            for word in words(query):
                holds = sum(word in c for c in counts.values())
                idf = math.log(1 + (30 - holds + 0.5) / (holds + 0.5))
                n, length = count[word], sum(count.values())
                score += idf * n * 2.5 / (n + 1.5 * (0.25 + 0.75 * length / mean))
            scores.append(score)
        wanted.append(np.mean(sorted(scores, reverse=True)[:top]))
    ids = list(texts)
    np.testing.assert_allclose(bm25(ids, texts, queries, top=top), wanted, rtol=1e-10)
    mixed = bm25(ids[::-1], texts, queries[::-1], top=top)
    np.testing.assert_allclose(mixed[::-1], wanted, rtol=1e-10)


def test_texts_that_share_no_word_score_zero():
    assert bm25(["a", "b"], {"a": "red", "b": "!"}, ["green"]).tolist() == [0, 0]
    with pytest.raises(UserError, match="no prompts"):
        bm25(["a"], {"a": "red"}, [])
    with pytest.raises(UserError, match="no text") as error:
        bm25(["a", "b"], {"a": "red"}, ["red"])
    assert "'b'" in str(error.value)


# --- the others, and all together -----------------------------------------------------------------


def test_random_scores_belong_to_ids():
    ids = [f"z{i}" for i in range(2000)]
    found = random_scores(ids, seed=1)
    np.testing.assert_array_equal(random_scores(ids[::-1], seed=1)[::-1], found)
    assert not np.array_equal(random_scores(ids, seed=2), found)
    assert ((found >= 0) & (found < 1)).all() and len(set(found)) == 2000
    assert np.histogram(found, 10, (0, 1))[0].min() > 150


def test_label_scores_go_by_id():
    assert label_scores(["b", "a"], {"a": "x", "b": "y"}, "y").tolist() == [1, 0]
    with pytest.raises(UserError, match="no label"):
        label_scores(["a", "c"], {"a": "x"}, "x")


def test_all_baselines_in_one_call():
    model = tiny_model("padded")
    before = snapshot(model)
    problem = tiny_problem(model)
    made = baseline_scores(problem, tiny_examples(), GROUPS, TEXTS, seed=4)
    assert same(before, snapshot(model))
    by_group = ("bm25", "similarity", "gradient-dot", "gradient-cosine")
    wanted = [(n, g) for n in BASELINES for g in (GROUPS if n in by_group else [None])]
    assert [(some.baseline, some.group) for some in made] == wanted
    assert all(some.example_ids == ("z0", "z1", "z2", "z3") for some in made)
    values = {(some.baseline, some.group): some.values for some in made}
    for some in values.values():
        assert some.shape == (4,) and some.dtype == np.float64 and np.isfinite(some).all()
    assert values["response-length", None].tolist() == [4, 3, 2, 6]
    assert values["label", None].tolist() == [1, 0, 1, 0]
    np.testing.assert_array_equal(values["random", None], random_scores(IDS, 4))
    losses = [plain_loss(model, example).item() for example in tiny_examples()]
    np.testing.assert_allclose(values["loss", None], losses, rtol=1e-10)
    products = gradient_products(problem, tiny_examples(), GROUPS)
    np.testing.assert_allclose(values["gradient-norm", None], products.norms)
    for group, ids in GROUPS.items():
        np.testing.assert_allclose(values["gradient-dot", group], products.dots[group])
        np.testing.assert_allclose(values["gradient-cosine", group], products.cosines(group))
        queries = [TEXTS.prompts[i] for i in ids]
        np.testing.assert_allclose(values["bm25", group], bm25(IDS, TEXTS.examples, queries))


def test_only_what_is_named_is_computed(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("taught.baselines.baselines.gradient_products", refuse)
    made = baseline_scores(tiny_problem(tiny_model("tied")), tiny_examples(), GROUPS, TEXTS, names=["loss", "label"])
    assert [some.baseline for some in made] == ["label", "loss"]


def test_a_mistake_is_named():
    problem, examples = tiny_problem(tiny_model("tied")), tiny_examples()
    with pytest.raises(UserError, match="no such baselines") as error:
        baseline_scores(problem, examples, GROUPS, TEXTS, names=["loss", "length"])
    assert "length" in str(error.value)
    for groups in ({"none": []}, {"strange": ["q0", "q77"]}):
        for name in ("similarity", "gradient-dot"):
            with pytest.raises(UserError, match=next(iter(groups))):
                baseline_scores(problem, examples, groups, TEXTS, names=[name])
