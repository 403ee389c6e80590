"""Work grows in line with the number of examples: calls are counted, nothing is timed."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from taught.analysis.curate import curate
from taught.analysis.interference import interference
from taught.core.example import batch_examples, sft
from taught.data.chat import ChatFormat, EncodedExample
from taught.data.columns import repeated
from taught.data.examples import ExampleSet, Record
from taught.data.overlap import drop_overlap
from taught.data.prompts import Prompt, PromptSet
from taught.data.subset import spread
from tiny_study import write_tiny_study

LABELS = ("harmful-refusal", "harmless-compliance")


class Id(str):
    """An id that counts how often any of its kind is hashed or compared."""

    __slots__ = ()
    uses: ClassVar[int] = 0

    def __hash__(self) -> int:
        Id.uses += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Id.uses += 1
        return super().__eq__(other)


def example_set(n: int) -> ExampleSet:
    examples = [Record(Id(f"z{i}"), f"Question {i % 7}", "Yes.", LABELS[i % 2]) for i in range(n)]
    return ExampleSet(tuple(examples), {}, "")


class _AllTruncated(ChatFormat):
    def __init__(self) -> None:
        self.context = None

    def encode_example(self, example: Record, max_tokens: int = 512) -> EncodedExample:
        return EncodedExample(example.id, (1, 2), (1,), truncated=True)


def _overlap(examples: ExampleSet) -> object:
    prompts = tuple(Prompt(f"p{i}", f"Question {i}", "harmful") for i in range(3))
    return drop_overlap(examples, PromptSet(prompts, {}, ""), drop=True)


def _interference(examples: ExampleSet) -> object:
    return interference(examples.ids, [1, 2], np.ones((len(examples), 2)), [[1]] * len(examples))


def _curate(examples: ExampleSet) -> object:
    labels = {"positive_label": "harmful-refusal", "negative_label": "harmless-compliance"}
    return curate(examples.ids, [p.label for p in examples], [float(len(p.id)) for p in examples], **labels)


@pytest.mark.parametrize(
    "work",
    [
        _overlap,
        _interference,
        _curate,
        lambda examples: _AllTruncated().encode_examples(examples, drop_truncated=True),
        lambda examples: repeated((example.id, example.id) for example in examples),
        lambda examples: spread(examples.examples, len(examples) // 2, lambda p: p.label, lambda p: p.id),
    ],
    ids=["overlap", "interference", "curate", "truncated", "repeated", "spread"],
)
def test_no_id_meets_all_the_others(work: Callable[[ExampleSet], object]) -> None:
    uses = []
    for n in (100, 800):
        examples = example_set(n)
        Id.uses = 0
        work(examples)
        uses.append(Id.uses)
    assert uses[1] <= 8 * 2 * max(uses[0], 100)  # sorting may take a little more than in line


def test_a_batch_is_made_when_its_turn_comes_and_not_kept() -> None:
    examples = [sft(f"z{i}", tuple(range(1, 12)), 8) for i in range(40)]
    batches = batch_examples(examples, 30)
    seen = [weakref.ref(batch) for batch in batches]
    assert len(seen) == 14
    assert sum(ref() is not None for ref in seen) <= 1


@pytest.mark.slow  # over 20 s: every stage at three sizes
def test_every_stage_makes_calls_in_line_with_the_examples(tmp_path: Path) -> None:
    _calls(tmp_path, 4)  # what is imported or cached once is not counted
    few, more, most = (_calls(tmp_path, n) for n in (60, 120, 240))
    for stage in few:
        growth = most[stage] - more[stage], more[stage] - few[stage]
        assert growth[0] <= 2.5 * growth[1], (stage, few, more, most)


def _calls(folder: Path, n: int) -> dict[str, int]:
    """Python and C functions that each stage calls on n examples."""
    from taught import stages
    from taught.run.folder import RunFolder
    from taught.study.load import load_study

    folder = folder / str(n)
    folder.mkdir()
    path = write_tiny_study(folder)
    (folder / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"id": f"z{i}", "label": LABELS[i % 2], "prompt": f"Ask {i:03}", "response": "No."}) + "\n"
            for i in range(n)
        )
    )
    study, run = load_study(str(path)).replace("prompts.limit", 12), RunFolder(folder / "run")
    stages.run(study, run, to="policy")
    after = ("attribute", "curate", "report")
    return {name: _counted(lambda name=name: stages.run(study, run, only=name)) for name in after}


def _counted(do: Callable[[], None]) -> int:
    count = 0

    def seen(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count
