"""What a policy must beat: predictors of the behavior that know nothing of its features.

All are fitted on training rows only and give a prediction for every row:

    group, category    mean y of the prompt's group, of its category
    length             straight line in the prompt's length
    direction          straight line in h_i'(mean h of the positive - mean h of the negative group)
    words              ridge on log(1 + count) of the words in the prompt's text

The direction is the difference-of-means probe of the residual itself: what the residual says about
the group, without a sparse autoencoder. The words say how much of the behavior stands in the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from taught.policy.evaluate import each_fold, group_means, straight_line, training_ridge
from taught.stats.arrays import Bools, Floats, Ints

WORDS = 512
_WORD = re.compile(r"\w+")


class Known(NamedTuple):
    """What is known of the prompts besides their features, one entry a prompt; None where absent.

    Attributes
    ----------
    groups : length N
    positive, negative : names of the two groups that the behavior is to tell apart
    categories : length N, or None. A prompt without a category counts as one of its group's own.
    length : float64 [N], in any unit
    h : float64 [N, D], residual at the read-out, pooled as the features are
    texts : length N
    """

    groups: Sequence[str]
    positive: str
    negative: str
    categories: Sequence[str | None] | None = None
    length: Floats | None = None
    h: Floats | None = None
    texts: Sequence[str] | None = None

    def taken(self, order: Ints) -> Known:
        """The prompts in another order."""
        moved: dict[str, Any] = {}
        for name, values in self._asdict().items():
            if values is not None and name in ("length", "h"):
                moved[name] = np.asarray(values, np.float64)[order]
            elif values is not None and name in ("groups", "categories", "texts"):
                moved[name] = [values[i] for i in order]
        return self._replace(**moved)


def trivial_predictions(known: Known, y: Floats, fold: Ints, seed: int) -> dict[str, Floats]:
    """Held-out predictions [N] of every predictor that ``known`` allows, by name."""
    found = {}
    for name, fit in _predictors(known, y, seed):
        found[name] = np.empty(len(fold))
        for train, test in each_fold(fold):
            found[name][test] = fit(train)[test]
    return found


def word_counts(texts: Sequence[str], limit: int = WORDS) -> Floats:
    """log(1 + count) float64 [N, V] of the up to ``limit`` words that stand in most texts.

    A word is a run of letters, digits and underscores, without regard to case. Ties: by the word.
    Words of a single text are left out, since they can say nothing about another one.
    """
    counts = [Counter(_WORD.findall(text.casefold())) for text in texts]
    spread = Counter(word for own in counts for word in own)
    frequent = [word for word, n in spread.items() if n > 1]
    chosen = sorted(frequent, key=lambda word: (-spread[word], word))[:limit]
    table = [[own[word] for word in chosen] for own in counts]
    return np.log1p(np.array(table, dtype=np.float64).reshape(len(texts), len(chosen)))


def _predictors(known: Known, y: Floats, seed: int) -> Iterator[tuple[str, Callable[[Bools], Floats]]]:
    length, h = known.length, known.h
    yield "group", lambda train: group_means(known.groups, y, train)
    if known.categories is not None and any(known.categories):
        cells = [f"{group}\n{kind}" for group, kind in zip(known.groups, known.categories, strict=True)]
        yield "category", lambda train: group_means(cells, y, train)
    if length is not None:
        yield "length", lambda train: straight_line(length, y, train)
    if h is not None:
        names = np.asarray(known.groups)

        def direction(train: Bools) -> Floats:
            """By h along the difference of the two groups' training means."""
            inside, outside = ((names == group) & train for group in (known.positive, known.negative))
            if not (inside.any() and outside.any()):  # a fold may hold all of a tiny group
                return straight_line(np.zeros(len(h)), y, train)
            return straight_line(h @ (h[inside].mean(0) - h[outside].mean(0)), y, train)

        yield "direction", direction
    words = np.empty((0, 0)) if known.texts is None else word_counts(known.texts)

    def bag(train: Bools) -> Floats:
        W, intercept = training_ridge(words, y, train, None, True, seed)
        return words @ W + intercept

    if words.size:
        yield "words", bag
