"""Examples whose prompt is also an evaluation prompt: found, and dropped only on request.

Training on a prompt that is also measured makes any attribution look good for the wrong reason.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from taught.data.words import normalise, shingles, words
from taught.errors import refuse

if TYPE_CHECKING:
    from taught.data.examples import ExampleSet
    from taught.data.prompts import PromptSet


def find_overlap(examples: ExampleSet, prompts: PromptSet) -> list[tuple[str, str]]:
    """Return (example id, prompt id) for every example whose prompt is an evaluation prompt.

    In a conversation of several turns every user turn counts; of a document the whole and each line, and every passage
    of 13 words that a prompt has as well. Of a prompt of 8 to 12 words the passage is all of them; a shorter one is
    looked for as a line.
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        by_text[normalise(prompt.text)].append(prompt.id)
    passages = _passages(prompts) if any(example.kind == "document" for example in examples) else {}
    found = []
    for example in examples:
        texts = dict.fromkeys(normalise(turn) for turn in example.user_texts)
        own = dict.fromkeys(prompt_id for text in texts for prompt_id in by_text.get(text, ()))
        if example.kind == "document" and passages:
            said = words(example.response)
            for n, holding in passages.items():
                both = holding.keys() & shingles(said, n).tolist() if len(said) >= n else ()
                own |= dict.fromkeys(prompt_id for passage in both for prompt_id in holding[passage])
        found += [(example.id, prompt_id) for prompt_id in own]
    return found


LONG, SHORT = 13, 8  # words of a passage that a document and a prompt share


def _passages(prompts: PromptSet) -> dict[int, dict[int, list[str]]]:
    """Number of words -> hash of a passage of so many -> the prompts that hold it."""
    found: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for prompt in prompts:
        said = words(prompt.text)
        if len(said) >= SHORT:
            n = min(LONG, len(said))
            for passage in dict.fromkeys(shingles(said, n).tolist()):
                found[n][passage].append(prompt.id)
    return found


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
    if not drop:
        refuse(
            both,
            "labelled answers of the concept are examples of the study",
            rule="a concept is made from other rows than it is to find",
            fix="remove them from one of the files, or pass --set examples.drop_overlap=true",
        )
    return shown.without(both), both


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
    if not drop:
        what = f"{len(gone)} examples have a prompt that is also an evaluation prompt"
        rule = "an example is never scored on its own prompt (case, spacing and final punctuation are ignored)"
        if any(example.kind == "document" for example in examples):
            what = f"{len(gone)} documents hold an evaluation prompt"
            rule = f"no document has {LONG} words in a row, or a line, in common with a prompt (case is ignored)"
        fix = "remove them from one of the files, or pass --set examples.drop_overlap=true"
        refuse([f"{example_id} = {prompt_id}" for example_id, prompt_id in overlap], what, rule=rule, fix=fix)
    return examples.without(gone), overlap
