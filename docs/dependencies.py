"""What is known of each dependency beside its version: the table in docs/threats.md (``python docs/tables.py``)."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass(frozen=True)
class Dependency:
    """One package.

    Attributes
    ----------
    tested : the version that the tests last ran with; None: the tests have not had it
    licence : as SPDX names it; where a package bundles others, they are many
    purpose : what it is used for
    reads : what it parses that others may have written, and what bounds it; empty: nothing
    reaches : code that it loads, and the network; empty: neither
    """

    tested: str | None
    licence: str
    purpose: str
    reads: str = ""
    reaches: str = ""


_ONLY_HUB = "the hub, where a hub id is named"

DEPENDENCIES = {
    "accelerate": Dependency("1.15.0", "Apache-2.0", "spreads a model over devices; what transformers reads GGUF with"),
    "bitsandbytes": Dependency(
        "0.50.2",
        "MIT",
        "weights of 4 and 8 bits: codes and what they stand for",
        "codes and scales of a checkpoint, after its settings were checked",
        "compiled code of its own; kernels of the hub are not fetched",
    ),
    "cyclopts": Dependency("5.5.2", "Apache-2.0", "the command line"),
    "datasets": Dependency(
        None,
        "Apache-2.0",
        "data sets of the hub (`hf:`)",
        "data files of the hub. Rows are then checked as those of a file; their number is not bounded",
        f"{_ONLY_HUB}. From 4 on it runs no code of a data set",
    ),
    "duckdb": Dependency(
        "2.0.1",
        "MIT",
        "SQL over a run's tables",
        "Parquet files of a run, and SQL that is typed. One SELECT, the run's tables alone, a limit of memory",
        "extensions are neither loaded nor fetched",
    ),
    "filelock": Dependency("4.3.1", "MIT", "one process at a time in a run folder"),
    "gguf": Dependency(
        "0.19.0", "MIT", "converts the demo's model, once", "a GGUF file; of the demo's, its checksum is known first"
    ),
    "huggingface-hub": Dependency("2.4.0", "Apache-2.0", "commit of a model, files of an adapter", "", _ONLY_HUB),
    "jinja2": Dependency(
        "3.1.6",
        "BSD-3-Clause",
        "the report; chat templates, by transformers",
        "chat templates of models, in the sandbox of transformers: no attributes of Python; time is not bounded. The "
        "report's own template is ours, and escapes what it shows",
    ),
    "markupsafe": Dependency("3.0.4", "BSD-3-Clause", "escapes text in the report"),
    "numpy": Dependency("2.4.6", "BSD-3-Clause", "policies, statistics, tables"),
    "peft": Dependency(
        "0.21.2",
        "Apache-2.0",
        "LoRA adapters",
        "configuration of an adapter, after its keys were checked; weights are safetensors only",
        "base models that an adapter names are not followed",
    ),
    "pyarrow": Dependency(
        "26.0.1", "Apache-2.0", "tables", "Parquet, CSV and JSON of others. What they unpack to is not bounded"
    ),
    "pyyaml": Dependency(
        "6.0.4", "MIT", "studies, labels", "studies: no tags; size, values and depth are bounded. Labels: no tags"
    ),
    "rich": Dependency("15.0.0", "MIT", "the terminal", "text of data, after control characters are taken out"),
    "sae-lens": Dependency(
        None,
        "MIT",
        "public releases of SAEs (`release:id`)",
        "files of a release, by its own loaders: not bounded by us. Folders of SAELens are read without it",
        "the hub, where a release is named",
    ),
    "safetensors": Dependency(
        "0.8.0", "Apache-2.0", "weights, SAEs, matrices", "tensors of others: numbers, sizes checked against the file"
    ),
    "scipy": Dependency("1.17.1", "BSD-3-Clause", "statistics, solvers"),
    "torch": Dependency("2.13.0", "BSD-3-Clause", "models and gradients", "", "`torch.load` is never called"),
    "transformers": Dependency(
        "5.24.0",
        "Apache-2.0",
        "models and tokenizers",
        "configurations, tokenizers and weights of others. Safetensors only; layers are counted before they are built",
        f"{_ONLY_HUB}; `trust_remote_code` is false everywhere",
    ),
    "trl": Dependency(None, "Apache-2.0", "the trainer of the study `validation.trainer: trl`"),
}


def declared(project: Path = PROJECT) -> dict[str, tuple[str, str]]:
    """Package -> the extra that asks for it ("" for all installations), and the versions that are admitted."""
    known = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    groups = {"": known["dependencies"], **known["optional-dependencies"]}
    found: dict[str, tuple[str, str]] = {}
    for extra, requirements in groups.items():
        for requirement in requirements if extra != "dev" else ():
            name, versions = re.match(r"([A-Za-z0-9._-]+)\s*(.*)", requirement).groups()
            found.setdefault(name, (extra, versions))
    return found


def dependency_table() -> str:
    """Markdown: one row a package, those of every installation first."""
    lines = [
        "| package | for | admitted | tested | licence | reads of others | code, network |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (extra, versions) in sorted(declared().items(), key=lambda item: (item[1][0] != "", item[0])):
        it = DEPENDENCIES[name]
        package = f"{name} (`{extra}`)" if extra else name
        cells = (package, it.purpose, versions, it.tested or "not here", it.licence, it.reads or "–", it.reaches or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
