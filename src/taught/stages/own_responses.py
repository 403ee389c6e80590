"""The base model's own answers to the examples' prompts: generated once and kept in a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from taught.core.example import Example, Examples, sft
from taught.errors import UserError
from taught.model.generate import greedy
from taught.progress import Progress
from taught.run.files import json_bytes, parse_json, write_bytes
from taught.stages.subject import Subject
from taught.study.schema import Study

FORMAT = "taught own responses 1"
_AT_ONCE = 256  # prompts between two writes


def own_examples(
    study: Study, subject: Subject, examples: Examples, file: Path, limit: int, progress: Progress
) -> list[Example]:
    """The examples with the model's own greedy answers in the place of their responses.

    Prompts that stand in several examples are answered once. What ``file`` holds is not generated
    again; what it lacks is added to it.

    Raises
    ------
    UserError
        The file was made by another model or with other settings, or is damaged; prompt and answer
        do not fit into the model's context.
    """
    longest, context = max(example.start for example in examples), subject.chat.context
    if context is not None and longest + limit > context:
        raise UserError(
            "prompt and own response do not fit into the model's context",
            value=f"{longest} tokens of a prompt and {limit} of the response",
            rule=f"{context} tokens together",
            fix="lower it: --set attribution.max_new_tokens=N",
        )
    tokenizer = subject.loaded.tokenizer
    # What ends the responses of the examples ends the model's own; a truncated example ends anywhere.
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = special & {example.ids[-1] for example in examples} | {tokenizer.eos_token_id}
    settings: dict[str, Any] = {  # what an answer depends on; greedy decoding draws nothing, so there is no seed
        "decoding": "greedy",
        "seed": None,
        "max_new_tokens": limit,
        "ends": sorted(ends - {None}),
        "dtype": study.model.dtype,
        "weights": dict(subject.loaded.weights),
    }
    kept = _read(file, settings) if file.exists() else {}
    prompts = {_key(example): example.ids[: example.start] for example in examples}
    todo = sorted((key for key in prompts if key not in kept), key=lambda k: len(prompts[k]))
    progress.step("the model's own responses", len(todo))
    for start in range(0, len(todo), _AT_ONCE):
        some = todo[start : start + _AT_ONCE]
        answers = greedy(subject.loaded.model, [prompts[key] for key in some], settings["ends"], limit)
        for key, answer in zip(some, answers, strict=True):
            kept[key] = {"tokens": list(answer), "text": tokenizer.decode(answer)}
        write_bytes(file, json_bytes({"format": FORMAT, "settings": settings, "responses": kept}))
        progress.advance(len(some))
    return [sft(p.id, (*p.ids[: p.start], *kept[_key(p)]["tokens"]), p.start) for p in examples]


def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        record = parse_json(file.read_bytes())
        made, responses = record["settings"], dict(record["responses"])
        if record["format"] != FORMAT:
            raise ValueError(record["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the file of own responses cannot be read",
            value=f"{file}: {error!r}",
            rule="a file that taught wrote",
            fix="delete it; the answers are generated again",
        ) from error
    if changed := [key for key in settings if made.get(key) != settings[key]]:
        raise UserError(
            "the own responses were made under other conditions",
            value="; ".join(f"{key}: was {made.get(key)}, now {settings[key]}" for key in changed),
            rule="all answers of a file are of one model and one setting",
            fix=f"delete {file}; the answers are generated again",
        )
    return responses


def _key(example: Example) -> str:
    text = " ".join(map(str, example.ids[: example.start]))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
