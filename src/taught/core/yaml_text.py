"""YAML from outside, with a bound on its depth."""

from __future__ import annotations

from typing import Any

import yaml

DEPTH = 50  # levels of a text


class ShallowLoader(yaml.SafeLoader):
    """SafeLoader that gives up on what is nested more than ``DEPTH`` levels: its time grows with their square."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count the levels on the way."""
        self._depth += 1
        if self._depth > DEPTH + 1:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node
