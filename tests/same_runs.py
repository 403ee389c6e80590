"""Whether two runs are the same, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

from taught.run.folder import RunFolder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, without the times that are written down in two of them."""
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    page = found["report.html"].decode()
    provenance = r'<section id="provenance".*?</section>'
    found["report.html"] = re.sub(provenance, "", page, flags=re.DOTALL).encode()
    del found["manifest.json"], found[".lock"]
    return found


def assert_the_same(whole: Path, other: Path) -> None:
    """Bit for bit, with nothing left over and a manifest that says so."""
    expected, found = contents(whole), contents(other)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert not (other / "partial").exists()
    ended, never_stopped = RunFolder.open(other).manifest, RunFolder.open(whole).manifest
    assert ended["stages"].keys() == never_stopped["stages"].keys()
    assert {record["status"] for record in ended["stages"].values()} == {"complete"}
    assert ended["inputs"] == never_stopped["inputs"]
    for name, listed in never_stopped["files"].items():
        assert name == "report.html" or ended["files"][name] == listed
    RunFolder.open(other).verify()
