"""Write the tables of docs/formats.md that are made of the code: ``python docs/tables.py``."""

from pathlib import Path

from taught.run.stage import file_table
from taught.stages import STAGES
from taught.study.template import template

page = Path(__file__).with_name("formats.md")
text = page.read_text(encoding="utf-8")
for name, content in (("study", f"```yaml\n{template()}```"), ("files", file_table(STAGES))):
    start = text.index("\n", text.index(f"<!-- {name}:")) + 1
    text = text[:start] + content.rstrip("\n") + "\n" + text[text.index(f"<!-- /{name} -->") :]
page.write_text(text, encoding="utf-8")
