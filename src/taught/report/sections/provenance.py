"""What made the run: commands, stages, versions, hashes, the study."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from taught.report.blocks import Block, Details, Facts, Pre, Table, Text, columns
from taught.report.sections import Section, add
from taught.report.tables import Row, Tables

ELSEWHERE = {"study", "stages", "command", "inputs", "files"}


def _blocks(tables: Tables) -> Iterator[Block]:
    manifest, stages = tables.manifest, tables.manifest.get("stages") or {}
    commands = [manifest.get("command"), *(s.get("command") for s in stages.values())]
    known = list(dict.fromkeys(str(c) for c in commands if c))
    if known:
        yield Text("This command repeats the run:" if len(known) == 1 else "These commands repeat the run:")
        yield Pre("\n".join(known))
    if stages:
        heads = columns("Stage", "Status", ("Seconds", "number", 1), ("Peak memory, GB", "number"))
        keys = ("status", "seconds", "peak_memory_gb", "finished")
        rows = [(name, *map(s.get, keys), str(s.get("fingerprint") or "")[:12]) for name, s in stages.items()]
        yield Table([*heads, *columns("Finished", "Fingerprint")], rows, "Stages")
    rest = {key: value for key, value in manifest.items() if key not in ELSEWHERE}
    files = [(f"file · {name}", f["sha256"]) for name, f in (manifest.get("files") or {}).items()]
    yield Details("Versions, hashes and weights", [Facts([*_flat(rest), *files], "list")])
    yield Details("Study", [Pre(yaml.safe_dump(tables.study, sort_keys=False, allow_unicode=True))])


def _flat(record: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} · ")
        else:
            yield f"{prefix}{key}", str(value)


add(Section("provenance", "Provenance", (), _blocks))
