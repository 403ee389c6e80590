"""The base model's own answers to the pairs' prompts: generated once and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from taught.attribution.pairs import PairInput
from taught.errors import UserError
from taught.files import json_bytes, write_bytes
from taught.model.generate import greedy
from taught.progress import Progress
from taught.setup import Subject
from taught.study import Study

FORMAT = "taught own responses 1"
_AT_ONCE = 256  # prompts between two writes


def own_pairs(
    study: Study,
    subject: Subject,
    pairs: Sequence[PairInput],
    file: Path,
    limit: int,
    progress: Progress,
) -> list[PairInput]:
    """The pairs with the model's own greedy answers in the place of their responses.

    Prompts that stand in several pairs are answered once. What ``file`` holds is not generated
    again; what it lacks is added to it.

    Raises
    ------
    UserError
        The file was made by another model or with other settings, or is damaged; prompt and answer
        do not fit into the model's context.
    """
    _require_room(subject, pairs, limit)
    settings = _settings(study, subject, pairs, limit)
    kept = _read(file, settings)
    prompts = {_key(pair): pair.ids[: pair.start] for pair in pairs}
    todo = sorted((key for key in prompts if key not in kept), key=lambda k: len(prompts[k]))
    progress.step("the model's own responses", len(todo))
    for start in range(0, len(todo), _AT_ONCE):
        some = todo[start : start + _AT_ONCE]
        answers = greedy(subject.loaded.model, [prompts[key] for key in some], settings["ends"],
                         limit)  # fmt: skip
        decode = subject.loaded.tokenizer.decode
        kept |= {key: {"tokens": list(answer), "text": decode(answer)}
                 for key, answer in zip(some, answers, strict=True)}  # fmt: skip
        record = {"format": FORMAT, "settings": settings, "responses": kept}
        write_bytes(file, json_bytes(record))
        progress.advance(len(some))
    return [replace(p, ids=(*p.ids[: p.start], *kept[_key(p)]["tokens"])) for p in pairs]


def _settings(
    study: Study, subject: Subject, pairs: Sequence[PairInput], limit: int
) -> dict[str, Any]:
    """What an answer depends on. Greedy decoding draws nothing, so there is no seed."""
    tokenizer = subject.loaded.tokenizer
    # What ends the responses of the pairs ends the model's own; a truncated pair ends anywhere.
    last = [pair.ids[-1] for pair in pairs]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = {token for token in last if token in special} | {tokenizer.eos_token_id}
    return {
        "decoding": "greedy",
        "seed": None,
        "max_new_tokens": limit,
        "ends": sorted(ends - {None}),
        "dtype": study.model.dtype,
        "weights": dict(subject.loaded.weights),
    }


def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_bytes())
        made, responses = record["settings"], dict(record["responses"])
        if record["format"] != FORMAT:
            raise ValueError(record["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("the file of own responses cannot be read", value=f"{file}: {error!r}",
                        rule="a file that this command wrote",
                        fix="name another file with --responses") from error  # fmt: skip
    changed = [key for key in settings if made.get(key) != settings[key]]
    if changed:
        raise UserError("the own responses were made under other conditions",
                        value="; ".join(f"{key}: was {made.get(key)}, now {settings[key]}"
                                        for key in changed),
                        rule="all answers of a file are of one model and one setting",
                        fix="name another file with --responses")  # fmt: skip
    return responses


def _require_room(subject: Subject, pairs: Sequence[PairInput], limit: int) -> None:
    longest, context = max(pair.start for pair in pairs), subject.chat.context
    if context is not None and longest + limit > context:
        raise UserError("prompt and own response do not fit into the model's context",
                        value=f"{longest} tokens of a prompt and {limit} of the response",
                        rule=f"{context} tokens together",
                        fix="lower --max-new-tokens")  # fmt: skip


def _key(pair: PairInput) -> str:
    text = " ".join(map(str, pair.ids[: pair.start]))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
