"""Documents as windows of tokens: every token but a document's first is scored exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from taught.errors import UserError

if TYPE_CHECKING:
    from taught.data.chat import EncodedExample
    from taught.data.examples import Record


def encode_document(tokenizer: Any, example: Record, size: int) -> list[EncodedExample]:
    """Encode a document as windows of at most ``size`` tokens.

    The text is tokenised as a whole, with the special tokens that the tokenizer puts around plain text (for many models
    a BOS token first). A window begins with the last token of the window before it, which is seen and not scored again:
    windows advance by ``size - 1`` tokens. What stands before that token is not seen.

    Raises
    ------
    UserError
        The document has fewer than two tokens, or a window has.
    """
    from taught.data.chat import EncodedExample

    if size < 2:
        raise UserError(
            "a window of a document has no token to score",
            value=f"examples.max_tokens: {size}",
            rule="a window has two tokens at least: one is seen, one is predicted",
            fix="raise examples.max_tokens",
        )
    found = tokenizer(example.response, return_offsets_mapping=True, verbose=False)
    ids, offsets = tuple(found["input_ids"]), found["offset_mapping"]
    if len(ids) < 2:
        raise UserError(
            "a document has no token to score",
            value=example.id,
            rule="a document has two tokens at least: the first is only seen",
            fix="remove the row",
        )
    windows = []
    for number, start in enumerate(range(0, len(ids) - 1, size - 1)):
        part = slice(start, start + size)
        # The text of the first window begins with its first token, which may be a BOS token.
        covered = offsets[part][1 if number else 0 :]
        text = example.response[covered[0][0] : max(end for _, end in covered)]
        scored = tuple(range(1, len(ids[part])))
        windows.append(EncodedExample(f"{example.id}#{number}", ids[part], scored, document=example.id, text=text))
    return windows


def windows_note(encoded: Iterable[EncodedExample]) -> str | None:
    """One line that says into how many windows documents were cut; None without documents."""
    counts = Counter(example.document for example in encoded if example.document)
    if not counts:
        return None
    most, n = counts.most_common(1)[0]
    return f"{len(counts)} documents in {counts.total()} windows, at most {n} of one ({most})"
