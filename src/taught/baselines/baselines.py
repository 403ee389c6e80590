"""Baselines: cheap values of an example that every method has to beat.

No method of data attribution wins everywhere, and cheap ones often come close (DATE-LM, arXiv
2507.09424), so these stand beside the others wherever effects are compared with retraining.

    random            a hash of the example's id; says nothing
    response-length   tokens of the response
    label             1 for the label of examples that show the behavior, 0 for others
    loss              L(z) at the base model
    gradient-norm     |grad L(z)|
    bm25              words that the example shares with the group's prompts
    similarity        cosine of the example's residual with those of the group's prompts
    gradient-dot      - <grad L(z), q>,   q = gradient of the group's mean y
    gradient-cosine   - <grad L(z), q> / (|grad L(z)| |q|)

The last four are about a group of prompts, the others about no target. Sign: the last two are positive where training
on the example raises the group's mean y (gradient-dot is the effect of a plain SGD step divided by the learning rate);
``label`` and ``random`` and all others are only what they say, and a table of correlations shows which way they work. A
sentence embedding needs a second model: recipes/embedding makes a table of it for ``validation.scores``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taught.core.curvature import Metric
from taught.core.example import Example, Examples, batch_examples, example_losses, refuse_nonfinite
from taught.core.gradient import by_parameter, example_gradients, refuse_unfit
from taught.core.problem import Problem
from taught.core.query import build_queries
from taught.errors import UserError
from taught.model.gradients import Factor, contract, dot, evaluating, find_sites, frozen
from taught.model.readout import ReadPrompt, pack, read_packed
from taught.progress import Progress, SilentProgress
from taught.stats.arrays import Floats

Groups = Mapping[str, Sequence[str]]  # group -> ids of its prompts

BASELINES = (
    "random",
    "response-length",
    "label",
    "loss",
    "gradient-norm",
    "bm25",
    "similarity",
    "gradient-dot",
    "gradient-cosine",
)
_GRADIENTS = ("gradient-norm", "gradient-dot", "gradient-cosine")
# Saturation of a word's count, and how much longer texts are discounted: usual values.
_K1, _B = 1.5, 0.75
# Queries whose scores are held at a time.
_QUERIES = 64


@dataclass(frozen=True, eq=False)
class Texts:
    """What baselines read beside tokens.

    Attributes
    ----------
    examples : example id -> prompt and response
    prompts : prompt id -> text
    labels : example id -> label
    positive_label : the label of examples that show the behavior
    """

    examples: Mapping[str, str]
    prompts: Mapping[str, str]
    labels: Mapping[str, str]
    positive_label: str


@dataclass(frozen=True, eq=False)
class BaselineScores:
    """One baseline's value of each example.

    Attributes
    ----------
    baseline : one of :data:`BASELINES`
    group : group of prompts that it is about, or None
    example_ids : P ids
    values : float64 [P]
    """

    baseline: str
    group: str | None
    example_ids: tuple[str, ...]
    values: Floats


def baseline_scores(
    problem: Problem,
    examples: Examples,
    groups: Groups,
    texts: Texts,
    *,
    names: Collection[str] = BASELINES,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[BaselineScores]:
    """All baselines that are named, in the order of :data:`BASELINES`, then of the groups.

    Cost: one forward pass over the examples for the loss, one more up to the block for the similarity
    (and one over the prompts), one forward and backward pass over both for the gradients. Curvature
    is left out: gradients are plain, of the parameters that move.

    Raises
    ------
    UserError
        A name is unknown, a group has no prompts, an example has no text or label, or a value is not finite.
    """
    unknown = sorted(set(names) - set(BASELINES))
    if unknown:
        raise UserError("there are no such baselines", value=unknown, rule=f"some of {', '.join(BASELINES)}")
    ids = tuple(example.id for example in examples)
    makers: dict[str, Callable[[], Mapping[str | None, Floats]]] = {
        "random": lambda: {None: random_scores(ids, seed)},
        "response-length": lambda: {None: np.array([response_length(p) for p in examples])},
        "label": lambda: {None: label_scores(ids, texts.labels, texts.positive_label)},
        "loss": lambda: {None: example_losses(problem.model, examples, problem.batch_tokens).numpy()},
        "bm25": lambda: {
            group: bm25(ids, texts.examples, [texts.prompts[i] for i in prompts]) for group, prompts in groups.items()
        },
        "similarity": lambda: {group: found for group, found in similarities(problem, examples, groups).items()},
    }
    found = {name: make() for name, make in makers.items() if name in names}
    if set(names) & set(_GRADIENTS):
        made = gradient_products(problem, examples, groups, progress=progress)
        found["gradient-norm"] = {None: made.norms}
        found["gradient-dot"] = {group: made.dots[group] for group in groups}
        found["gradient-cosine"] = {group: made.cosines(group) for group in groups}
    return [
        BaselineScores(name, group, ids, values)
        for name in BASELINES
        if name in names
        for group, values in found[name].items()
    ]


def response_length(example: Example) -> float:
    """Number of tokens that the loss is on; of a preference those of the chosen answer less those of the rejected."""
    return float(sum((w > 0) - (w < 0) for of in example.weights for w in of))


def random_scores(ids: Sequence[str], seed: int = 0) -> Floats:
    """Numbers from 0 to 1, [P], that depend on the seed and each id alone."""
    digests = (hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in ids)
    return np.array([int.from_bytes(digest[:6]) / 2**48 for digest in digests])


def label_scores(ids: Sequence[str], labels: Mapping[str, str], positive: str) -> Floats:
    """1 for the examples with the positive label, 0 for the others, [P].

    Raises
    ------
    UserError
        An example has no label.
    """
    _all_there(ids, labels, "label")
    return np.array([float(labels[i] == positive) for i in ids])


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def bm25(ids: Sequence[str], texts: Mapping[str, str], queries: Sequence[str], *, top: int | None = 10) -> Floats:
    """Mean over the ``top`` best queries (None: all) of each text's BM25 score, [P].

        score(q, z) = sum over words w of q   idf(w) n (k1 + 1) / (n + k1 (1 - b + b |z| / mean))
        idf(w) = ln(1 + (P - P_w + 1/2) / (P_w + 1/2))

    n is how often w stands in z, P_w the number of texts that hold it; k1 = 1.5, b = 0.75
    (Robertson and Zaragoza 2009, with the idf of Lucene, which is never negative).

    Parameters
    ----------
    ids : the texts that are scored; together they are the collection that idf is about
    top : by few queries an example stands out that is near to some of the group

    Raises
    ------
    UserError
        An example has no text, or there are no queries.
    """
    _all_there(ids, texts, "text")
    if not queries:
        raise UserError("the group has no prompts to compare with", rule="at least one")
    counts = [Counter(words(texts[i])) for i in ids]
    lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
    weights = _postings(counts, _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1.0)))
    keep = min(top or len(queries), len(queries))
    best = np.zeros((0, len(ids)))
    for start in range(0, len(queries), _QUERIES):
        scores = np.zeros((len(queries[start : start + _QUERIES]), len(ids)))
        for row, query in zip(scores, queries[start : start + _QUERIES], strict=True):
            for word, times in Counter(words(query)).items():
                if word in weights:
                    rows, values = weights[word]
                    row[rows] += times * values
        best = -np.sort(-np.concatenate([best, scores]), axis=0)[:keep]
    return np.asarray(best.mean(0))


def _postings(counts: Sequence[Counter[str]], norm: Floats) -> dict[str, tuple[NDArray[np.int64], Floats]]:
    """Word -> the texts that hold it, and what it adds to their scores."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, count in enumerate(counts):
        for word in count:
            rows[word].append(row)
    found = {}
    for word, some in rows.items():
        n = np.array([counts[row][word] for row in some], dtype=np.float64)
        idf = math.log(1 + (len(counts) - len(some) + 0.5) / (len(some) + 0.5))
        found[word] = np.array(some), idf * n * (_K1 + 1) / (n + norm[some])
    return found


def similarities(problem: Problem, examples: Examples, groups: Groups) -> dict[str, Floats]:
    """Mean over a group's prompts of the cosine between the example's h and the prompt's, group -> float64 [P].

    h is read at the problem's point: the prompt's at its read-out tokens (their mean), the example's at its last token.

    Raises
    ------
    UserError
        A group has no prompts, or an h is not finite.
    """
    directions = _directions(problem, [ReadPrompt(p.id, p.ids, p.places[-1:]) for p in examples])
    refuse_nonfinite(examples, range(len(examples)), directions, "residual")
    asked = _directions(problem, problem.prompts)
    return {group: (directions @ asked[_rows(problem, group, ids)].mean(0)).numpy() for group, ids in groups.items()}


@torch.no_grad()
def _directions(problem: Problem, reads: Sequence[ReadPrompt]) -> Tensor:
    """Mean residual of each sequence over its read tokens, at length 1: float64 [n, D]."""
    found: list[Tensor] = [torch.empty(0)] * len(reads)
    with evaluating(problem.model):
        for packed in pack(reads, None, tokens=problem.batch_tokens):
            h = read_packed(problem.model, packed, None, problem.point)[0].double().cpu()
            for row, i in enumerate(packed.index):
                found[i] = h[packed.offsets[row] : packed.offsets[row + 1]].mean(0)
    return torch.nn.functional.normalize(torch.stack(found), dim=1, eps=0.0)


@dataclass(frozen=True, eq=False)
class GradientProducts:
    """Plain gradients of examples, and their products with those of groups' mean y.

    Attributes
    ----------
    norms : float64 [P], |grad L(z)|
    dots : group -> float64 [P], - <grad L(z), q>
    query_norms : group -> |q|
    """

    norms: Floats
    dots: Mapping[str, Floats]
    query_norms: Mapping[str, float]

    def cosines(self, group: str) -> Floats:
        """- <grad L(z), q> / (|grad L(z)| |q|), [P]; 0 where a gradient is 0."""
        size = self.norms * self.query_norms[group]
        return np.divide(self.dots[group], size, out=np.zeros_like(size), where=size > 0)


def gradient_products(
    problem: Problem, examples: Examples, groups: Groups, *, progress: Progress | None = None
) -> GradientProducts:
    """Norms and products of the gradients of the parameters that move.

    An example's gradient is the one that training is given (look-ups of the padding row have none), the
    target's is the derivative, as in the adjoint. Norms are exact and in float64, by the products
    of an example's tokens with one another (``taught.model.gradients``).

    Cost: one forward and backward pass over the prompts and the examples. Memory: a query a group.

    Raises
    ------
    UserError
        A group has no prompts, or a loss or gradient is not finite.
    """
    sites = find_sites(problem.model, problem.parameters)
    norms = torch.zeros(len(examples), dtype=torch.float64)
    dots = torch.zeros(len(examples), len(groups), dtype=torch.float64)
    with frozen(problem.model):
        refuse_unfit(problem, sites, examples)
        mean = torch.zeros(len(groups), len(problem.prompts), dtype=torch.float64)  # dF/dy of each group's mean y
        for k, (group, ids) in enumerate(groups.items()):
            rows = _rows(problem, group, ids)
            mean[k, rows] = 1 / len(rows)
        queries = build_queries(replace(problem, metric=Metric()), sites, None, mean)
        for batch in batch_examples(examples, problem.batch_tokens):
            found = example_gradients(problem, sites, batch, examples)[1]
            index = list(batch.index)
            for name, factors in by_parameter(found).items():
                norms[index] += squared_norms(factors)
                if name in queries:
                    for factor in factors:
                        dots[index] -= contract(factor, queries[name]).double().cpu()
            (progress or SilentProgress()).advance(len(index))
    refuse_nonfinite(examples, range(len(examples)), norms, "gradient")
    sizes = torch.zeros(len(groups), dtype=torch.float64)
    for q in queries.values():
        assert isinstance(q, Tensor)
        sizes += q.double().flatten(1).pow(2).sum(1).cpu()
    return GradientProducts(
        norms.sqrt().numpy(),
        {group: dots[:, k].numpy() for k, group in enumerate(groups)},
        {group: float(sizes[k].sqrt()) for k, group in enumerate(groups)},
    )


def squared_norms(factors: Sequence[Factor]) -> Tensor:
    """Squared norm of each example's gradient of one parameter, float64 [B]."""
    norms = []
    for example in range(len(factors[0].d)):
        own = [f.examples(slice(example, example + 1)).double() for f in factors]
        norms.append(dot(own, own)[0, 0])
    return torch.stack(norms).cpu()


def _rows(problem: Problem, group: str, ids: Sequence[str]) -> list[int]:
    place = {prompt.id: i for i, prompt in enumerate(problem.prompts)}
    missing = [i for i in ids if i not in place]
    if missing or not ids:
        raise UserError(
            f"the prompts of {group} are not there",
            value=missing[:8],
            rule="a group has prompts, all of them the problem's",
        )
    return [place[i] for i in ids]


def _all_there(ids: Sequence[str], values: Mapping[str, str], what: str) -> None:
    missing = [i for i in ids if i not in values]
    if missing:
        raise UserError(
            f"examples have no {what}", value=missing[:8], rule=f"this baseline needs the {what} of every example"
        )
