"""What a feature seems to stand for: its strongest prompts and tokens, and a short label.

Nothing is asked of an outside service. The label is made of the words whose tokens carry the feature: for each word w

    log-odds_k(w) = log (c_kw / (A_k - c_kw)) - log (n_w / (M - n_w))

with c_kw the activation of feature k on w's tokens, A_k its activation on all tokens of words, n_w the number of w's
tokens among all M of those (the share c_kw / A_k is first drawn towards n_w / M by 5%). A word scores its activation
share times its log-odds: strong, and not merely frequent. Labels are hints for the reader; no number depends on them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import UserError, misfit, printable, reading, shown
from taught.stats.arrays import Floats, Ints

CONTEXT = 6  # tokens of context on each side
PRIOR = 0.05  # share of the smoothing mass


@dataclass(frozen=True)
class FeatureDescription:
    """One feature in words; plain values for JSON.

    Attributes
    ----------
    feature_id : the SAE's id
    label : short and readable, from the words or from the user's file
    label_source : "words" or "file"
    words : [{"word", "score"}], strongest first
    top_prompts : [{"prompt_id", "text", "group", "activation"}]
        Prompts with the largest activation at any of their tokens.
    contrast_prompts : the same keys and "similarity", "to"
        For each of the top prompts, the prompt of the same group without the feature whose
        residual is most similar (cosine); "to" is the top prompt's id.
    top_tokens : [{"token", "before", "after", "activation", "prompt_id"}]
        At most one per prompt.
    """

    feature_id: int
    label: str
    label_source: str
    words: list[dict[str, Any]]
    top_prompts: list[dict[str, Any]]
    contrast_prompts: list[dict[str, Any]]
    top_tokens: list[dict[str, Any]]


def describe_features(
    feature_ids: ArrayLike,
    acts: ArrayLike,
    tokens: Sequence[str],
    prompt: ArrayLike,
    *,
    prompt_ids: Sequence[str],
    texts: Sequence[str],
    groups: Sequence[str],
    h: ArrayLike,
    labels: Mapping[int, str] | None = None,
    top: int = 5,
) -> list[FeatureDescription]:
    """Describe every feature, in the order of ``feature_ids``.

    Parameters
    ----------
    feature_ids : int64 [d]
    acts : [M, d], activations of the features at the read-out tokens
    tokens : M texts
    prompt : int64 [M], index of each token's prompt; tokens of a prompt stand together, in order
    prompt_ids, texts, groups : N each
    h : [N, D], one residual per prompt (pooled like the read-out), for the similarity of prompts
    labels : labels that override the made ones (:func:`load_labels`)
    top : how many prompts and tokens are listed

    Raises
    ------
    UserError
        The inputs do not fit together.
    """
    ids, at = np.asarray(feature_ids, np.int64), np.asarray(prompt, np.int64)
    acts, h = np.asarray(acts, np.float64), np.asarray(h, np.float64)
    m, n = len(tokens), len(prompt_ids)
    fits = acts.shape == (m, len(ids)) and len(at) == m and len(texts) == len(groups) == len(h) == n
    if not fits or (m and not 0 <= at.min() <= at.max() < n):
        given_ = {"acts": acts, "tokens": m, "prompts": n, "texts": texts, "groups": groups, "h": h}
        rule = "acts [M, d], one token text and prompt index per row, N of each of the others"
        raise misfit("the inputs of the labels", rule, **given_)
    words, word_of = _words(tokens, at)
    units = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-30)
    given = labels or {}

    def row(i: int, strongest: Floats) -> dict[str, Any]:
        return {"prompt_id": prompt_ids[i], "text": texts[i], "group": groups[i], "activation": float(strongest[i])}

    described = []
    for feature_id, own in zip(ids.tolist(), acts.T, strict=True):
        strongest = np.zeros(n)  # of each prompt; 0 for one without tokens
        np.maximum.at(strongest, at, own)
        leading = [i for i in np.argsort(-strongest, kind="stable")[:top].tolist() if strongest[i] > 0]
        scored = _scored_words(own, words, word_of)
        contrasts = _contrasts(leading, strongest, groups, units)
        made = "not active"  # up to three words; where no word stands out, the groups of the strongest prompts
        if scored:
            made = ", ".join(word for word, score in scored[:3] if score >= 0.25 * scored[0][1])
        elif leading:
            made = "marks and template tokens (" + ", ".join(sorted({groups[i] for i in leading})) + ")"
        one = FeatureDescription(
            feature_id=feature_id,
            label=given.get(feature_id, made),
            label_source="file" if feature_id in given else "words",
            words=[{"word": word, "score": score} for word, score in scored],
            top_prompts=[row(i, strongest) for i in leading],
            contrast_prompts=[row(j, strongest) | {"similarity": r, "to": prompt_ids[i]} for i, j, r in contrasts],
            top_tokens=[{**_top_token(tokens, own, at == i), "prompt_id": prompt_ids[i]} for i in leading],
        )
        described.append(one)
    return described


def _contrasts(
    leading: Sequence[int], strongest: Floats, groups: Sequence[str], units: Floats
) -> Iterator[tuple[int, int, float]]:
    """For each leading prompt the most similar prompt of its group with the feature off, once: (i, j, cosine)."""
    off = strongest <= 0
    for i in leading:
        candidates = [j for j in np.flatnonzero(off).tolist() if groups[j] == groups[i]]
        if candidates:
            similarity = units[candidates] @ units[i]
            j = candidates[int(np.argmax(similarity))]
            off[j] = False
            yield i, j, float(similarity.max())


def _top_token(tokens: Sequence[str], acts: Floats, inside: NDArray[np.bool_]) -> dict[str, Any]:
    """Strongest token of a prompt with what stands around it."""
    rows = np.flatnonzero(inside).tolist()
    at = int(np.argmax(acts[rows]))
    text = [tokens[row] for row in rows]
    return {
        "token": text[at],
        "before": "".join(text[max(at - CONTEXT, 0) : at]),
        "after": "".join(text[at + 1 : at + 1 + CONTEXT]),
        "activation": float(acts[rows[at]]),
    }


# --- words ----------------------------------------------------------------------------------------


def _words(tokens: Sequence[str], prompt: Ints) -> tuple[list[str], Ints]:
    """Vocabulary, and the word that each token is a part of (-1: no letters or digits).

    A token that begins with white space, or the first of its prompt, begins a word.
    """
    spans: list[str] = []
    span_of = np.empty(len(tokens), dtype=np.int64)
    for row, token in enumerate(tokens):
        begins = row == 0 or prompt[row] != prompt[row - 1]
        if begins or token[:1].isspace() or not _is_word(token) or not _is_word(tokens[row - 1]):
            spans.append("")
        spans[-1] += token
        span_of[row] = len(spans) - 1
    cleaned = [span.strip().lower() if _is_word(span) else "" for span in spans]
    vocabulary = sorted({*cleaned} - {""})
    index = {word: i for i, word in enumerate(vocabulary)} | {"": -1}
    return vocabulary, np.array([index[cleaned[s]] for s in span_of], dtype=np.int64)


def _is_word(text: str) -> bool:
    """Letters and digits (and marks inside a word), not a special token like <|im_end|>."""
    inner = text.strip()
    return bool(inner) and all(c.isalnum() or c in "'’-_" for c in inner) and any(c.isalnum() for c in inner)


def _scored_words(acts: Floats, words: list[str], word_of: Ints, limit: int = 5) -> list[tuple[str, float]]:
    """Words with the largest activation share times log-odds; only positive ones."""
    part = word_of >= 0
    total = float(acts[part].sum())
    if not words or total <= 0:
        return []
    frequency = np.bincount(word_of[part], minlength=len(words)) / part.sum()
    share = np.bincount(word_of[part], weights=acts[part], minlength=len(words)) / total
    smooth = (1 - PRIOR) * share + PRIOR * frequency
    score = share * (_logit(smooth) - _logit(frequency))
    order = np.argsort(-score, kind="stable")[:limit].tolist()
    return [(words[i], float(score[i])) for i in order if score[i] > 0]


def _logit(p: Floats) -> Floats:
    inside = np.clip(p, 1e-9, 1 - 1e-9)
    return np.log(inside) - np.log1p(-inside)


# --- the user's labels ----------------------------------------------------------------------------


def load_labels(file: str | Path) -> dict[int, str]:
    """Read feature id -> label from JSON or YAML (a mapping) or CSV (columns id, label).

    Raises
    ------
    UserError
        The file cannot be read, an id is not a whole number or appears twice, a label is empty.
    """
    path = Path(file).expanduser()
    errors = (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error)
    rule = ".json or .yaml with id: label, or .csv with columns id and label"
    with reading("the label file cannot be read", path, errors, rule=rule, fix="check features.labels"):
        entries = _label_entries(path)
    labels: dict[int, str] = {}
    for key, label in entries:
        text = shown(key).strip()
        named = isinstance(label, str) and label.strip() and printable(label) == label
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) in labels or not named:
            rule, fix = "feature ids are whole numbers, each once, with a label", f"correct it in {path.name}"
            raise UserError("the label file has a bad entry", value={key: label}, rule=rule, fix=fix)
        labels[int(text)] = str(label).strip()
    return labels


def _label_entries(path: Path) -> list[tuple[object, object]]:
    """(id, label) in the file's order; an id that stands twice is there twice."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        return [(row["id"], row["label"]) for row in csv.DictReader(text.splitlines())]
    if path.suffix.lower() == ".json":
        return [(key, label) for key, label in json.loads(text, object_pairs_hook=list)]
    import yaml

    from taught.core.yaml_text import ShallowLoader

    try:
        node = yaml.compose(text, Loader=ShallowLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("not a mapping of id: label")
    # Of a value with parts nothing is looked at: its aliases may repeat them without end.
    plain = [[part.value if isinstance(part, yaml.ScalarNode) else None for part in pair] for pair in node.value]
    return [(key, label) for key, label in plain]
