"""The stage ``report``: everything that a run has, as one page."""

from __future__ import annotations

from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.study.schema import Study


def report(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Write ``report.html``."""
    from taught.report.build import render
    from taught.report.view import load_view

    with run.stage("report", study):
        run.verify()
        run.write_text("report.html", render(load_view(run.folder)))
