"""Words of a text, and hashes of so many in a row: what tells whether texts share a passage."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})
_ODD = 0x9E3779B97F4A7C15  # a hash of words in a row is a polynomial in it, modulo 2^64
# Scripts that put no spaces between words (Thai, Lao, kana, Chinese characters): a letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def normalise(text: str) -> str:
    """Return the text without what does not make it another prompt.

    Unicode NFKC, typographic apostrophes made plain, case folded, white space collapsed, trailing punctuation removed.
    """
    folded = unicodedata.normalize("NFKC", text).translate(_PLAIN).casefold()
    # Folding may leave letters that NFKC composes again: twice is stable, once is not always.
    words = " ".join(unicodedata.normalize("NFKC", folded).split())
    end = len(words)
    while end and (words[end - 1].isspace() or unicodedata.category(words[end - 1]).startswith("P")):
        end -= 1
    return words[:end] or words


def words(text: str) -> list[str]:
    """Words of the normalised text, without punctuation."""
    return _WORD.findall(normalise(text))


def shingles(words: Sequence[str], n: int) -> NDArray[np.uint64]:
    """64-bit hashes of every ``n`` words in a row, in order; of a shorter text one hash of all of it."""
    import numpy as np

    if not words:
        return np.empty(0, np.uint64)
    each = np.array([_hash(word) for word in words], np.uint64)
    n = min(n, len(each))
    found = np.zeros(len(each) - n + 1, np.uint64)
    for k in range(n):
        found = found * np.uint64(_ODD) + each[k : len(each) - n + 1 + k]
    return found


@lru_cache(2**16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
