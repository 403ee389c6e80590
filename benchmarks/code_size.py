"""Size of the code: lines, and the share of private functions that are used once.

    python -m benchmarks.code_size            # this checkout
    python -m benchmarks.code_size OTHER      # another one

Beside all lines stand those of code: neither blank nor in a docstring. A private function (``_name``, methods included)
counts as used once if its name occurs at most once in its own file beside its definition. Such a function may name a
step well; many of them make a reader jump.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Print the figures of a checkout."""
    root = Path(argv[0]) if argv else Path(__file__).parents[1]
    lines, code, private, once = 0, 0, 0, 0
    for path in sorted((root / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines += text.count("\n")
        code += sum(bool(line.strip()) for line in text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                code -= sum(bool(line.strip()) for line in ast.get_source_segment(text, node.body[0]).splitlines())
            if isinstance(node, ast.FunctionDef) and re.match(r"_[^_]", node.name):
                private += 1
                once += len(re.findall(rf"\b{node.name}\b", text)) <= 2
    share = f"{once} of {private} private functions ({once / private:.0%})"
    print(f"{lines:,} lines of Python in src, {code:,} of them code; {share} are used once")


if __name__ == "__main__":
    main(sys.argv[1:])
