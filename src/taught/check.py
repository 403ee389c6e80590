"""``taught check``: what a study would run, counted and estimated before it is run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from taught.data.overlap import find_overlap
from taught.data.pairs import load_pairs
from taught.errors import UserError
from taught.setup import open_subject, study_prompts
from taught.study import Study


@dataclass
class CheckReport:
    """What was found.

    Attributes
    ----------
    rows : (what, value) pairs in reading order
    problems : messages of what would stop the run
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, value: object) -> None:
        """Add one row."""
        self.rows.append((what, str(value)))

    def __rich__(self) -> RenderableType:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        for what, value in self.rows:
            table.add_row(what, Text(value))
        if not self.problems:
            return Group(table, Text("nothing stands in the way", style="green"))
        return Group(table, *(Text(f"problem: {p}", style="red") for p in self.problems))


def check_study(study: Study) -> CheckReport:
    """Load everything that a run would load and count; nothing is written."""
    report = CheckReport()
    subject = open_subject(study)
    _describe_subject(report, study, subject)
    prompts = study_prompts(study)
    encoded = subject.chat.encode_prompts(prompts)
    lengths = [len(e.input_ids) for e in encoded]
    report.add("prompts", f"{len(prompts)} ({_counts(p.group for p in prompts)})")
    report.add("prompt columns", _columns(prompts.columns))
    report.add("prompt tokens", _spread(lengths))
    pairs = load_pairs(study.pairs.path)
    report.add("pairs", f"{len(pairs)} ({_counts(p.label for p in pairs)})")
    report.add("pair columns", _columns(pairs.columns))
    _check_pairs(report, study, subject, pairs, prompts)
    _estimate(report, study, subject, lengths, len(pairs))
    return report


def _describe_subject(report: CheckReport, study: Study, subject: Any) -> None:
    model, sae = subject.loaded.model, subject.sae
    parameters = sum(p.numel() for p in model.parameters())
    report.add("model", f"{subject.loaded.model_id}, {parameters / 1e6:.1f}M parameters, "
                        f"{study.model.dtype} on {study.model.device}")  # fmt: skip
    report.add("weights", subject.loaded.weights.get("source", "local folder"))
    report.add("SAE", f"{sae.n_features} features ({sae.architecture}), block {sae.block}, "
                      f"encoder {study.sae.encoder}")  # fmt: skip
    report.add("read-out", study.readout.position)
    for text, ids in zip(subject.behavior.prefixes, subject.behavior.tokens, strict=True):
        tokens = " | ".join(subject.loaded.tokenizer.decode([i]) for i in ids)
        report.add("prefix", f"{text!r} = {tokens}")
    if subject.behavior.dropped:
        report.add("prefixes left out", f"{subject.behavior.dropped}: contained in a shorter one")


def _check_pairs(report: CheckReport, study: Study, subject: Any, pairs: Any, prompts: Any) -> None:
    overlap = find_overlap(pairs, prompts)
    gone = "dropped on request" if study.pairs.drop_overlap else "an error"
    report.add("overlap", f"{len(overlap)} pairs are evaluation prompts ({gone})")
    if overlap and not study.pairs.drop_overlap:
        report.problems.append(f"overlap with evaluation prompts: {overlap[:5]}; --drop-overlap")
    try:
        encoded, _ = subject.chat.encode_pairs(pairs, study.pairs.max_tokens, truncate="keep")
    except UserError as error:
        report.problems.append(str(error))
        return
    cut = [e.id for e in encoded if e.truncated]
    report.add("truncated", f"{len(cut)} pairs at {study.pairs.max_tokens} tokens")
    if cut and not study.pairs.drop_truncated:
        report.problems.append(f"truncated responses: {cut[:5]}; --drop-truncated")
    report.add("pair tokens", _spread([len(e.input_ids) for e in encoded]))
    report.add("response tokens", _spread([e.n_response for e in encoded]))


def _estimate(
    report: CheckReport, study: Study, subject: Any, lengths: list[int], pairs: int
) -> None:
    """Multiplications of the main parts, in units of one forward pass over all prompts."""
    depth = subject.loaded.model.config.get_text_config().num_hidden_layers
    share = (subject.sae.block + 1) / depth
    features = study.features.max_features
    per_feature = 3 * share * 0.5  # forward, backward, weight gradient; active on about half
    prompts_pass = float(sum(lengths))
    x = features * per_feature if study.attribution.coefficients else 0.0
    report.add("cost", f"about {4 + x:.0f} forward passes over the prompts "
                       f"({prompts_pass / 1e3:.1f}k tokens), and 3 to 6 over the {pairs} pairs for "
                       "every chunk of features and group of parameters")  # fmt: skip
    model = sum(p.numel() * p.element_size() for p in subject.loaded.model.parameters()) / 2**30
    gradients = study.attribution.memory_gb
    report.add(
        "memory",
        f"about {model + gradients + 1.5:.1f} GB (model {model:.1f}, gradients {gradients:g})",
    )


def _counts(values: Any) -> str:
    return ", ".join(f"{n} {name}" for name, n in Counter(values).items())


def _columns(columns: Any) -> str:
    return ", ".join(f"{field_} = {name}" for field_, name in columns.items())


def _spread(lengths: list[int]) -> str:
    return f"median {np.median(lengths):.0f}, longest {max(lengths)}, in all {sum(lengths)}"
