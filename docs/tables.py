"""Write the tables of these pages that are made of the code and of pyproject.toml: ``python docs/tables.py``."""

from pathlib import Path

from dependencies import dependency_table

from taught.run.stage import file_table
from taught.stages import STAGES
from taught.study.template import template

TABLES = {
    "formats.md": {"study": f"```yaml\n{template()}```", "files": file_table(STAGES)},
    "threats.md": {"dependencies": dependency_table()},
}
for page, tables in TABLES.items():
    file = Path(__file__).with_name(page)
    text = file.read_text(encoding="utf-8")
    for name, content in tables.items():
        start = text.index("\n", text.index(f"<!-- {name}:")) + 1
        text = text[:start] + content.rstrip("\n") + "\n" + text[text.index(f"<!-- /{name} -->") :]
    file.write_text(text, encoding="utf-8")
