"""One self-contained HTML page for a run: no network, works without JavaScript, opens from disk.

Text from data reaches the page in two ways only: through jinja2 with autoescape, or as JSON in a
data block that the script puts in place with ``textContent``. Script and style are allowed by their
hash, nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from taught.report import charts, text
from taught.report.drawer import page_data
from taught.report.sections import sections
from taught.report.verdict import verdict
from taught.report.view import View

HERE = Path(__file__).parent
MAKES = {
    "policy": "taught policy STUDY",
    "clamp": "taught clamp RUN",
    "attribute": "taught attribute STUDY",
    "curate": "taught curate RUN",
    "clusters": "taught clusters RUN",
    "concept-influence": "taught concept-influence STUDY --concept FOLDER --run RUN",
    "validate": "taught validate STUDY",
}


def render(view: View) -> str:
    """Return the page of a run."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in ("number", "signed", "percent", "tens", "count", "shorten"):
        environment.filters[name] = getattr(text, name)
    environment.globals["forest_row"] = charts.forest_row
    environment.globals["bar"] = charts.bar
    script, style = _asset("script.js"), _asset("style.css")
    return environment.get_template("template.html.j2").render(
        script=Markup(script),
        style=Markup(style),
        csp=_policy_of(script, style),
        data=Markup(embed(page_data(view))),
        sentences=verdict(view),
        makes=MAKES,
        **sections(view),
    )


def embed(record: object) -> str:
    """Return JSON that cannot end its script element: no ``<``, ``>``, ``&`` or line separator."""
    raw = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        raw = raw.replace(char, f"\\u{ord(char):04x}")
    return raw


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _policy_of(script: str, style: str) -> str:
    def digest(body: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
