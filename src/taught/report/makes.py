"""Which stage writes a table, and which command makes it."""

from __future__ import annotations

from taught.report.blocks import Cell, Word
from taught.stages import STAGES

_COMMANDS = {"curate": "taught curate RUN", "validate": "taught validate RUN", "compare": "taught validate RUN"}
# Of a study that does not ask for it.
_ASKED = {name: f" --set {name}=true" for name in ("clamp", "clusters", "bins")}


def made_by(table: str) -> str | None:
    """The stage that writes a table, a record or tensors; None where no stage of ours does."""
    return next((stage.name for stage in STAGES for file in stage.writes if file.split(".")[0] == table), None)


def how_to_make(table: str) -> tuple[Cell, ...]:
    """Which command makes a table, and what it asks of the study."""
    stage = made_by(table)
    if stage is None:
        return (f"No stage of this version writes {table}.",)
    command = _COMMANDS.get(stage, f"taught run STUDY --to {stage}{_ASKED.get(stage, '')}")
    asked = (", with ", Word("concepts:", "code"), " in the study") if stage == "concepts" else ()
    return (Word(command, "code"), " makes it", *asked, "; then ", Word("taught report RUN", "code"), " again.")
