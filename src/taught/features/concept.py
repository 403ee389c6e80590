"""Concepts: directions in the residual stream of one block, or elsewhere in it, and how they are read.

    read-out of a prompt or example:  f = < v, mean over its tokens t of h_t >

v [D] comes from two groups of prompts (difference of means, a linear probe), from decoder rows of a sparse autoencoder,
or from a file. By default |v| = 1, so that f is in units of the residual. Source: Concept Influence, arXiv 2602.14869;
differences of means: Persona Vectors, arXiv 2507.21509.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from taught.core.point import RESID_POST, Point
from taught.errors import UserError, reading
from taught.features.pooling import pool
from taught.features.probe import fit_direction, held_out
from taught.features.sae import SparseAutoencoder
from taught.run.files import (
    json_bytes,
    read_json_mapping,
    read_tensors,
    sha256_bytes,
    sha256_file,
    tensors_bytes,
    tensors_from_bytes,
    write_bytes,
)
from taught.stats.arrays import Floats
from taught.stats.auc import auc_within
from taught.stats.intervals import Interval

FORMAT = "taught concept 1"
# A maximum over tokens is no linear read-out: which token counts would change with the model.
PROMPT_POSITIONS = ("last_user", "last_prompt", "mean_user")
PAIR_POSITIONS = ("mean_response", "last_response")
_RECORDED = ("name", "position", "tokens", "weights", "provenance", "card")


@dataclass(frozen=True, eq=False)
class Concept:
    """A direction with all that is needed to read it, and where it is from.

    Attributes
    ----------
    name : its name in tables
    direction : v, float64 [D]; positive read-outs are towards it
    point : where in the model h is read
    position : one of PROMPT_POSITIONS, tokens of a prompt over which h is averaged
    tokens : one of PAIR_POSITIONS, of an example: all of the response, or its last one (the end of the turn)
    weights : identity of the model's weights, or empty where it is not known
    provenance : what the direction was made from, and how; JSON values, like those of the card
    card : how well it separates two groups (:func:`quality_card`)
    """

    name: str
    direction: Floats
    point: Point
    position: str = "mean_user"
    tokens: str = "mean_response"
    weights: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        v = np.asarray(self.direction, np.float64)
        object.__setattr__(self, "direction", v)
        if v.ndim != 1 or not 0 < np.linalg.norm(v) < np.inf:
            rule, fix = "[D], of a length that is finite and not zero", "check the tensor or the features it is made of"
            raise UserError("a concept is one direction", value=f"shape {list(v.shape)}", rule=rule, fix=fix)
        require_place(self.position, self.tokens)

    def record(self) -> dict[str, Any]:
        """All but the direction, as plain values."""
        parts = {name: getattr(self, name) for name in _RECORDED}
        plain = {name: dict(part) if isinstance(part, Mapping) else part for name, part in parts.items()}
        where = {"block": self.point.block, "point": self.point.part}
        return {"format": FORMAT, "name": self.name, "width": self.width, **where, **plain}

    @classmethod
    def of(cls, record: Mapping[str, Any], direction: ArrayLike) -> Concept:
        """A concept from its record and its direction; TypeError where a part of the record is of another type."""
        record = {"point": RESID_POST, **record}  # concepts of before are all of the residual stream
        kinds = {"name": str, "block": int, "point": str, "position": str, "tokens": str}
        named = ("block", "point", *_RECORDED)
        if wrong := [key for key in named if not isinstance(record[key], kinds.get(key, Mapping))]:
            raise TypeError(f"{', '.join(wrong)}: of another type")
        parts = {name: record[name] for name in _RECORDED}
        point = Point(record["block"], record["point"])
        return cls(direction=np.asarray(direction, np.float64), point=point, **parts)

    @property
    def width(self) -> int:
        """D, the width of what is read."""
        return len(self.direction)

    def require_fit(self, *, width: int, blocks: int, weights: Mapping[str, Any]) -> None:
        """Raise a UserError unless the concept belongs to this model."""
        if self.width != width or not 0 <= self.point.block < blocks:
            raise UserError(
                f"the concept {self.name} does not fit the model",
                value=f"width {self.width}, {self.point}",
                rule=f"width {width}, blocks 0 to {blocks - 1}",
                fix="use a concept that was made on this model",
            )
        if self.weights and dict(self.weights) != dict(weights):
            raise UserError(
                f"the concept {self.name} was made on other weights",
                value=dict(self.weights),
                rule=f"the study's model: {dict(weights)}",
                fix="make the concept anew: taught run STUDY --only concepts --fresh",
            )


def require_place(position: str, tokens: str) -> None:
    """Raise a UserError unless prompts can be read at ``position`` and examples at ``tokens``."""
    for key, value, allowed in (("position", position, PROMPT_POSITIONS), ("tokens", tokens, PAIR_POSITIONS)):
        if value not in allowed:
            rule, fix = f"one of {', '.join(allowed)}", f"set the concept's {key} to {allowed[-1]}"
            raise UserError(f"a concept cannot be read at this place ({key})", value=value, rule=rule, fix=fix)


def normalised(direction: ArrayLike, norm: str) -> Floats:
    """The direction at unit length, or as it is (``unit`` or ``none``)."""
    v = np.asarray(direction, np.float64)
    length = float(np.linalg.norm(v))
    return v / length if norm == "unit" and length > 0 else v


# --- where directions come from ----------------------------------------------------------------


def fitted_direction(
    X: ArrayLike, positive: ArrayLike, method: str, *, penalty: float = 1.0, force: bool = False, **draws: Any
) -> tuple[Floats, dict[str, Any]]:
    """Direction [D] from two groups of pooled residuals X [N, D], and its quality card.

    Parameters
    ----------
    method, penalty : :func:`taught.features.probe.fit_direction`
    force : accept a direction that is no better than chance on rows it was not fitted on
    draws : folds, bootstrap, seed (:func:`taught.features.probe.held_out`)

    Raises
    ------
    UserError
        The interval of the held-out AUC begins at .5 or below, unless forced.
    """
    fit = partial(fit_direction, method=method, penalty=penalty)
    found, parts = held_out(X, positive, fit, **draws)
    if not (found.lo > 0.5 or force):
        raise UserError(
            "the direction is no better than chance on rows that it has not seen",
            value=f"AUC {found.value:.3f}, 95% interval {found.lo:.3f} to {found.hi:.3f}",
            rule="the interval lies above .5",
            fix="try another block or more rows, or set the concept's force to true",
        )
    w = fit(X, positive)
    card = quality_card(w, X, positive, found)
    card["fold_cosine"] = min(_cosine(part, w) for part in parts)
    return w, card


def quality_card(
    direction: ArrayLike, X: ArrayLike, positive: ArrayLike, separation: Interval | None = None, **draws: Any
) -> dict[str, Any]:
    """How a direction separates two groups of pooled residuals X [N, D].

    Parameters
    ----------
    separation
        AUC on rows that the direction was not fitted on; None for a direction that was not fitted
        on any of these, whose AUC is taken here.
    draws : bootstrap, seed

    Returns
    -------
    dict
        ``auc`` {value, lo, hi} and whether it is ``held_out`` (out of fold); ``n_positive``, ``n_negative``;
        ``mean_positive``, ``mean_negative`` and ``spread`` (pooled standard deviation) of the read-out along the unit
        direction; ``norm`` before normalisation; ``difference_cosine`` with the difference of means. Directions that
        are fitted also have ``fold_cosine``, the smallest cosine with the direction of a fold.
    """
    X, s = np.asarray(X, np.float64), np.asarray(positive, bool)
    v = normalised(direction, "unit")
    f = X @ v
    a, b = f[s], f[~s]
    measured = separation or auc_within(f, s, np.zeros(len(f)), **{"bootstrap": 500, "seed": 0, **draws})
    return {
        "auc": measured.to_dict(),
        "held_out": separation is not None,
        "n_positive": len(a),
        "n_negative": len(b),
        "mean_positive": float(a.mean()),
        "mean_negative": float(b.mean()),
        "spread": float(np.sqrt((a.var() * len(a) + b.var() * len(b)) / len(f))),
        "norm": float(np.linalg.norm(np.asarray(direction))),
        "difference_cosine": _cosine(v, X[s].mean(0) - X[~s].mean(0)),
    }


def _cosine(a: Floats, b: Floats) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0


def feature_direction(sae: SparseAutoencoder, shares: Mapping[int, float]) -> Floats:
    """sum_k share_k (what feature k adds to the reconstruction per activation), [D].

    Raises
    ------
    UserError
        An id that the autoencoder does not have.
    """
    rows = sae.decoder_rows(list(shares)).double().cpu().numpy()
    return np.asarray(np.array(list(shares.values())) @ rows)


def file_direction(path: str | Path, tensor: str | None = None) -> tuple[Floats, dict[str, Any]]:
    """Direction [D] from a safetensors file or a control vector, and its provenance.

    Parameters
    ----------
    tensor : name of the tensor, [D] or [1, D]; None where the file holds one only

    Raises
    ------
    UserError
        The file cannot be read, has no such tensor or several, or the tensor is no vector.
    """
    file = Path(path).expanduser()
    if is_control_vector(file):
        tensors = _read_control_vector(file)
    else:
        rule = "a safetensors file, or a control vector (GGUF)"
        with reading("the direction cannot be read", file, rule=rule, fix="check the path"):
            tensors = read_tensors(file)
    if tensor is None and len(tensors) == 1:
        (tensor,) = tensors
    if tensor is None or tensor not in tensors:
        rule, fix = "one of " + ", ".join(sorted(tensors)[:20]), "set the concept's source to file:PATH:TENSOR"
        raise UserError("which tensor of the file is the direction?", value=tensor, rule=rule, fix=fix)
    value = tensors[tensor]
    if value.numel() != max(value.shape, default=0) or not value.is_floating_point():
        rule, fix = "[D], or [1, D], of floating point numbers", "name another tensor"
        found = f"{tensor}: {list(value.shape)}, {value.dtype}"
        raise UserError("the tensor is no vector", value=found, rule=rule, fix=fix)
    # Through torch: numpy has no bfloat16.
    origin = {"file": file.name, "tensor": tensor, "sha256": sha256_file(file)}
    return value.reshape(-1).to(torch.float64).numpy(), origin


def is_control_vector(path: str | Path) -> bool:
    """Whether the file is in the format of repeng and llama.cpp: GGUF."""
    return Path(path).suffix.lower() == ".gguf"


def control_tensor(block: int) -> str:
    """Name of a control vector's direction that is added to the output of a block."""
    return f"direction.{block}"


def control_block(tensor: str) -> int:
    """The block, counted from 0, whose output a control vector's tensor is added to.

    Raises
    ------
    UserError
        Not a name of the format.
    """
    head, _, number = tensor.partition(".")
    if head != "direction" or not re.fullmatch("[0-9]{1,6}", number):
        rule, fix = "direction.N, N the block that it is added to", "for example the source file:PATH:direction.15"
        raise UserError("this is no direction of a control vector", value=tensor, rule=rule, fix=fix)
    return int(number)


def _read_control_vector(file: Path) -> dict[str, Tensor]:
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(
            "reading a control vector needs the package gguf", value=str(file), fix="pip install gguf"
        ) from error

    class Bounded(GGUFReader):
        """One that refuses parts beyond the end, which gguf takes for empty: a count in the file may be any number."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("the file ends before a part of it")
            return super()._get(offset, dtype, count, *rest, **more)

    # gguf checks little: what is damaged shows as whatever Python raises then.
    errors = (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, NotImplementedError)
    rule = "a GGUF file with the tensors direction.N"
    with reading("the control vector cannot be read", file, errors, rule=rule, fix="check the path"):
        if not file.is_file():
            raise FileNotFoundError("no such file")
        found = {t.name: np.asarray(dequantize(t.data, t.tensor_type)) for t in Bounded(file).tensors}
        return {name: torch.from_numpy(np.array(value, np.float64)) for name, value in found.items()}


# --- reading h ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ConceptMap:
    """h -> X for concepts that are read at one point and position: X_ic = <v_c, pooled h_i>.

    It stands where a :class:`taught.features.pooling.FeatureMap` does, wherever changes of X are asked for. One thing
    differs: the read-out is linear, has no gate, and where X_ic is 0 its change need not be.

    Attributes
    ----------
    directions : [C, D]
    ids : int64 [d], rows of ``directions``, in the order of the columns of X
    position : one of PROMPT_POSITIONS or PAIR_POSITIONS
    """

    directions: Tensor
    ids: Tensor
    position: str

    def __call__(self, h: Tensor, offsets: Tensor) -> Tensor:
        """X [N, d] from residuals h [M, D] at the tokens that are read."""
        v = self.directions[self.ids]
        return pool(h.to(v.device, v.dtype) @ v.T, offsets.to(v.device), self.position)

    def response(self, h: Tensor, dh: Tensor, offsets: Tensor) -> Tensor:
        """dX for a change dh: the read-out is linear, so it is the read-out of dh."""
        return self(dh, offsets)


def concept_map(concepts: Sequence[Concept], position: str, like: Tensor) -> ConceptMap:
    """The read-out of concepts of one point on the device of ``like``.

    In its precision, or in float32 where that is less.
    """
    stacked = torch.from_numpy(np.stack([concept.direction for concept in concepts]))
    ids = torch.arange(len(concepts), device=like.device)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return ConceptMap(stacked.to(like.device, dtype), ids, position)


# --- files -------------------------------------------------------------------------------------


def save_concept(concept: Concept, folder: Path) -> None:
    """Write ``concept.safetensors`` (direction) and ``concept.json`` (the rest) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tensors_bytes({"direction": concept.direction})
    record = {**concept.record(), "sha256": sha256_bytes(content)}
    write_bytes(folder / "concept.safetensors", content)
    write_bytes(folder / "concept.json", json_bytes(record))


def load_concept(folder: str | Path) -> Concept:
    """Read a concept that :func:`save_concept` wrote.

    Raises
    ------
    UserError
        Nothing is there, another format, or the two files do not belong together.
    """
    from safetensors import SafetensorError

    path = Path(folder).expanduser()
    try:
        record = read_json_mapping(path / "concept.json")
        content = (path / "concept.safetensors").read_bytes()
        if record["format"] != FORMAT or record["sha256"] != sha256_bytes(content):
            raise ValueError("the files are of another format, or not of one concept")
        return Concept.of(record, tensors_from_bytes(content)["direction"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        rule, fix = "a folder with concept.json and concept.safetensors", "make it anew, or name another folder"
        raise UserError("the concept cannot be read", value=f"{path}: {error!r}", rule=rule, fix=fix) from error
