"""Examples whose prompt is also an evaluation prompt: found, and dropped only on request.

Training on a prompt that is also measured makes any attribution look good for the wrong reason.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from taught.data.columns import name_ids
from taught.errors import UserError

if TYPE_CHECKING:
    from taught.data.examples import ExampleSet
    from taught.data.prompts import PromptSet


def normalise(text: str) -> str:
    """Return the text without what does not make it another prompt.

    Unicode NFKC, typographic apostrophes made plain, case folded, white space collapsed, trailing punctuation removed.
    """
    folded = unicodedata.normalize("NFKC", text).translate(_PLAIN).casefold()
    # Folding may leave letters that NFKC composes again: twice is stable, once is not always.
    words = " ".join(unicodedata.normalize("NFKC", folded).split())
    end = len(words)
    while end and (words[end - 1].isspace() or unicodedata.category(words[end - 1]).startswith("P")):
        end -= 1
    return words[:end] or words


def find_overlap(examples: ExampleSet, prompts: PromptSet) -> list[tuple[str, str]]:
    """Return (example id, prompt id) for every example whose prompt is an evaluation prompt.

    In a conversation of several turns every user turn counts; of a document the whole and each line.
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        by_text[normalise(prompt.text)].append(prompt.id)
    return [
        (example.id, prompt_id)
        for example in examples
        for text in dict.fromkeys(normalise(turn) for turn in example.user_texts)
        for prompt_id in by_text.get(text, ())
    ]


def drop_shared(shown: ExampleSet, examples: ExampleSet, drop: bool) -> tuple[ExampleSet, list[str]]:
    """Return the labelled answers of a concept whose prompt is no example's, and the ids that were dropped.

    A concept that was made from the rows that it is to find would find them for that reason.

    Parameters
    ----------
    drop : False: a shared prompt is an error

    Raises
    ------
    UserError
        There are some and ``drop`` is false: their ids.
    """
    texts = {normalise(example.prompt) for example in examples}
    both = [row.id for row in shown if normalise(row.prompt) in texts]
    if both and not drop:
        raise UserError(
            "labelled answers of the concept are examples of the study",
            value=name_ids(both),
            rule="a concept is made from other rows than it is to find",
            fix="remove them from one of the files, or pass --set examples.drop_overlap=true",
        )
    gone = set(both)
    kept = tuple(row for row in shown if row.id not in gone)
    return replace(shown, examples=kept), both


def drop_overlap(examples: ExampleSet, prompts: PromptSet, drop: bool) -> tuple[ExampleSet, list[tuple[str, str]]]:
    """Return the examples that are not evaluation prompts, and the overlap that was dropped.

    Parameters
    ----------
    drop : False: overlap is an error. True: the overlapping examples are left out and named.

    Raises
    ------
    UserError
        There is overlap and ``drop`` is false.
    """
    overlap = find_overlap(examples, prompts)
    gone = {example_id for example_id, _ in overlap}
    if overlap and not drop:
        raise UserError(
            f"{len(gone)} examples have a prompt that is also an evaluation prompt",
            value=name_ids([f"{example_id} = {prompt_id}" for example_id, prompt_id in overlap]),
            rule="an example is never scored on its own prompt (case, spacing and final punctuation are ignored)",
            fix="remove them from one of the files, or pass --set examples.drop_overlap=true",
        )
    kept = tuple(example for example in examples if example.id not in gone)
    return replace(examples, examples=kept), overlap


_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})
