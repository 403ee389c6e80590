"""Which stage writes a table, and which command makes it."""

from __future__ import annotations

from collections.abc import Mapping

from taught.report.blocks import Cell, Word

_WRITTEN_BY: Mapping[str, tuple[str, ...]] = {
    "readings": ("prompts", "readouts", "features", "activations", "labels"),
    "policy": ("coefficients", "policy", "faithfulness", "audit"),
    "clamp": ("clamp",),
    "concepts": ("concepts",),
    "attribute": (
        "examples",
        "scores",
        "summary",
        "prompt_effects",
        "comovement",
        "certificates",
        "statements",
        "token_shares",
        "agreement",
    ),
    "clusters": ("clusters", "cluster_members", "cluster_influence"),
    "curate": ("curation",),
    "validate": ("subsets", "outcomes", "models", "curves", "named_effects", "arms", "answers"),
    "compare": ("lds", "trivial", "noise_ceiling", "planted", "costs"),
}
_STAGE = {table: stage for stage, tables in _WRITTEN_BY.items() for table in tables}
_COMMANDS = {"curate": "taught curate RUN", "validate": "taught validate RUN"}
_ENTRIES = ("clamp", "clusters", "concepts")  # entries of the study that ask for the stage


def made_by(table: str) -> str | None:
    """The stage that writes a table; None where no stage of ours does."""
    return _STAGE.get(table)


def how_to_make(table: str) -> tuple[Cell, ...]:
    """Which command makes a table, and what it asks of the study."""
    stage = made_by(table)
    if stage is None:
        return (f"No stage of this version writes {table}.",)
    command = _COMMANDS.get(stage, f"taught run STUDY --to {stage}")
    asked = (", with ", Word(f"{stage}:", "code"), " in the study") if stage in _ENTRIES else ()
    return (Word(command, "code"), " makes it", *asked, "; then ", Word("taught report RUN", "code"), " again.")
