"""Labels for documents that come without: by a function of yours, or a text classifier of transformers."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from taught.data.columns import name_ids
from taught.errors import UserError

Classifier = Callable[[Sequence[str], Sequence[str]], Sequence[str]]

BATCH = 32
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_classifier(name: str) -> Classifier:
    """The classifier of that name: a function ``(texts, names) -> one label a text``.

    Parameters
    ----------
    name : ``module:function``, which gets the texts and the labels that are known (none where any will do); or the
        folder or hub id of a text classifier of transformers, whose labels are those of its configuration. The module
        is imported, so its code runs: name none that you do not trust. Of a model no code runs, and its weights are
        safetensors.

    Raises
    ------
    UserError
        No such module, function or model.
    """
    if not _FUNCTION.fullmatch(name) or os.path.exists(name):
        return _of_transformers(name)
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            "the classifier cannot be loaded",
            value=f"{name}: {error}",
            rule="module:function, importable here; it takes texts and the names of labels",
            fix="check the name, or add its folder to PYTHONPATH",
        ) from error
    if not callable(found):
        raise UserError("the classifier is not a function", value=name, rule="module:function", fix="name a function")
    return found


def classify(
    classifier: Classifier, ids: Sequence[str], texts: Sequence[str], names: Sequence[str] = ()
) -> tuple[str, ...]:
    """The label of each text.

    Parameters
    ----------
    names : the labels that are known; none: any label will do

    Raises
    ------
    UserError
        The classifier fails, gives another number of labels than there are texts, or something else than a text; or a
        label that is not known. The ids are named.
    """
    try:
        found = list(classifier(texts, names))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            "the classifier failed", value=repr(error), rule="it takes texts and names of labels"
        ) from error
    if len(found) != len(texts):
        raise UserError(
            "the classifier does not give one label a text",
            value=f"{len(found)} labels of {len(texts)} texts",
            rule="labels in the order of the texts",
            fix="give an empty document a label too",
        )
    wrong = [f"{id}: {label!r}" for id, label in zip(ids, found, strict=True) if not _is_label(label, names)]
    if wrong:
        raise UserError(
            f"the classifier gives {len(wrong)} texts no label that is known",
            value=name_ids(wrong),
            rule="one of " + ", ".join(names) if names else "a label is a text",
            fix="map its labels to these names in a function of yours, named module:function",
        )
    return tuple(found)


def _is_label(label: object, names: Sequence[str]) -> bool:
    return isinstance(label, str) and bool(label.strip()) and (not names or label in names)


def _of_transformers(name: str) -> Classifier:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds: no such id, no network, remote code, other weights
        raise UserError(
            "the classifier cannot be loaded",
            value=f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            rule="module:function, or a text classifier of transformers (safetensors, no code of its own)",
            fix="check the folder or hub id",
        ) from error
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) or 512)

    @torch.no_grad()
    def label(texts: Sequence[str], names: Sequence[str]) -> list[str]:
        found = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
                padding=len(texts) > 1,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            found += [model.config.id2label[int(k)] for k in model(**batch).logits.argmax(-1)]
        return found

    return label
