"""Labels for documents that come without: by a function of yours, or a text classifier of transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from taught.core.registry import load_function
from taught.data.readers import first_line
from taught.errors import UserError

Classifier = Callable[[str, Sequence[str]], Sequence[Any]]

BATCH = 32
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_classifier(name: str) -> Classifier:
    """The classifier of that name: a function ``(column, texts) -> one label a text``.

    Parameters
    ----------
    name : ``module:function``, which gets the name of the column that it stands in for, and the texts; or the folder or
        hub id of a text classifier of transformers, whose labels are those of its configuration, and which sees the
        beginning of a text that is too long for it. The module is imported, so its code runs: name none that you do not
        trust. Of a model no code runs, and its weights are safetensors.

    Raises
    ------
    UserError
        No such module, function or model.
    """
    if not _FUNCTION.fullmatch(name) or os.path.exists(name):
        return _of_transformers(name)
    return load_function(name, "classifier", "a column's name and texts", "bins.classifier")


def _of_transformers(name: str) -> Classifier:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds: no such id, no network, remote code, other weights
        raise UserError(
            "the classifier cannot be loaded",
            value=f"{name}: {first_line(error)}",
            rule="module:function, or a text classifier of transformers (safetensors, no code of its own)",
            fix="correct bins.classifier: the folder or hub id",
        ) from error
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) or 512)

    @torch.no_grad()
    def label(column: str, texts: Sequence[str]) -> list[str]:
        found = []
        for start in range(0, len(texts), BATCH):
            some = list(texts[start : start + BATCH])
            batch = tokenizer(some, padding=len(texts) > 1, truncation=True, max_length=longest, return_tensors="pt")
            found += [model.config.id2label[int(k)] for k in model(**batch).logits.argmax(-1)]
        return found

    return label
