"""The stage ``report``: one self-contained page, from the tables of a run."""

from __future__ import annotations

from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.study.schema import Study


def report(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Write ``report.html``."""
    from taught.report.html import render
    from taught.report.tables import Tables

    with run.stage("report", study):
        run.verify()
        run.write_text("report.html", render(Tables(run)))
