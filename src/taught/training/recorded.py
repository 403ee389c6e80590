"""A training run that ``taught.Record`` wrote: its states, and whether it is one of a study's model and examples.

The weight w of an example scales its share in the loss of every step that saw it. p_z, its share on the mean over the
steps, stands in the place of 1 / N where a run weighs sequences by their tokens or sees some more often than others.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taught.core.example import Example, Examples, conversation, weighed
from taught.core.problem import Problem
from taught.data.columns import name_ids
from taught.errors import UserError, refuse
from taught.model.parameters import moving_parameters
from taught.progress import Progress
from taught.run import files
from taught.sketches.store import example_digest
from taught.training.steps import State

FORMAT = 1
RECORD, STEPS = "record.json", "steps.safetensors"
_SUFFIX = ".exp_avg_sq"
_BEHIND = 4  # tokens behind the end of an answer's turn


def weights_file(step: int) -> str:
    """The weights after so many steps."""
    return f"step-{step}.safetensors"


def moments_file(step: int) -> str:
    """The second moments that the step behind these weights divides by."""
    return f"step-{step}.moments.safetensors"


@dataclass(frozen=True, eq=False)
class Recorded:
    """A finished run in its folder; what is read of it is checked against a problem by :meth:`seen`.

    Attributes
    ----------
    record : ``record.json``
    """

    folder: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Recorded:
        """A run by its folder.

        Raises
        ------
        UserError
            It is no recorded run, of a newer format, damaged, or not finished.
        """
        path = Path(folder).expanduser()
        try:
            record = files.read_json_mapping(path / RECORD)
            newer = int(record["format"]) > FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                "this is no recorded run",
                value=f"{path}: {error}",
                rule=f"a folder that taught.Record wrote holds {RECORD}",
                fix="trainer.add_callback(taught.Record(FOLDER)), and train",
            ) from None
        if newer:
            what, rule = "the recorded run is of a newer format", f"at most {FORMAT}"
            raise UserError(what, value=record["format"], rule=rule, fix="update taught")
        if not _whole(record):
            raise _damaged(path / RECORD)
        if not record["finished"]:
            raise UserError(
                "the recorded run was not finished",
                value=f"{path}: {len(list(path.glob('step-*.safetensors')))} files of states",
                rule="what training did is known once it is over: its last weights and all its steps",
                fix="train again, with taught.Record on a new folder",
            )
        if not record["states"]:
            value, rule = f"{path}: {record['steps']} steps", "weights before one of its steps at least"
            fix = "record it with taught.Record(FOLDER, checkpoints=6)"
            raise UserError("the recorded run has no state", value=value, rule=rule, fix=fix)
        return cls(path, record)

    @property
    def steps(self) -> int:
        """How many were made."""
        return int(self.record["steps"])

    @property
    def states(self) -> tuple[int, ...]:
        """Steps made before each state that was kept; the last weights are apart."""
        return tuple(sorted(map(int, self.record["states"])))

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the parameters that training moved."""
        return tuple(name for name, own in self.record["parameters"].items() if own["moves"])

    @property
    def adam(self) -> bool:
        """Whether the optimizer divides by second moments."""
        return bool(self.record["optimizer"]["kind"] != "sgd")

    @property
    def eps(self) -> float | None:
        """Adam's epsilon; None: it is gradient descent."""
        return float(self.record["optimizer"]["eps"]) if self.adam else None

    @property
    def decay(self) -> dict[str, float]:
        """Weight decay of each parameter that moved."""
        return {name: float(value) for name, value in self.record["optimizer"]["decay"].items()}

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """``steps.safetensors``."""
        found = {name: tensor.numpy() for name, tensor in self._read(STEPS).items()}
        if not _fitting(found, self.steps):
            raise _damaged(self.folder / STEPS)
        return found

    @property
    def lrs(self) -> np.ndarray:
        """Learning rate of every step, float64 [T]."""
        return self.arrays["lr"]

    @property
    def rates(self) -> np.ndarray:
        """What a gradient moves the weights by in all, float64 [T]: with clipping, momentum and dampening."""
        rule = self.record["optimizer"]
        gain = 1.0 if self.adam else (1 - rule["dampening"] * (rule["momentum"] > 0)) / (1 - rule["momentum"])
        return self.lrs * self.arrays["scale"] * gain

    @cached_property
    def sequences(self) -> tuple[str, ...]:
        """Digests of all sequences that were seen, in the order in which they came."""
        return tuple(row.tobytes().hex() for row in self.arrays["sequences"])

    def load(self, step: int) -> State:
        """The weights after so many steps, and the second moments where there are some.

        Raises
        ------
        UserError
            A file is missing or damaged; weights are not finite.
        """
        parts = {"weights": self._read(weights_file(step)), "second": {}}
        if self.record["moments"] and step in self.states:
            moments = self._read(moments_file(step))
            parts["second"] = {name.removesuffix(_SUFFIX): v for name, v in moments.items()}
        for of, file in (("weights", weights_file(step)), ("second", moments_file(step))):
            shapes = {name: list(t.shape) for name, t in parts[of].items()}
            if shapes and shapes != {name: self.record["parameters"][name]["shape"] for name in self.moving}:
                raise _damaged(self.folder / file)
        if not all(bool(w.isfinite().all()) for w in parts["weights"].values()):
            what, value = "the recorded run diverged: weights are not finite", str(self.folder / weights_file(step))
            fix = "train at a lower rate, or with max_grad_norm"
            raise UserError(what, value=value, rule="weights stay finite numbers", fix=fix)
        return State(step, parts)

    def parameters(self, problem: Problem) -> tuple[str, ...]:
        """Those that moved in the run and that the problem's patterns name."""
        asked = moving_parameters(problem.model, problem.parameters)
        found = tuple(name for name in self.moving if name in asked)
        if not found:
            what = "the parameters that are asked for did not move in the recorded run"
            value, rule = ", ".join(problem.parameters or ()), "moved: " + ", ".join(self.moving[:4])
            raise UserError(what, value=value, rule=rule, fix="correct attribution.parameters, or leave it out")
        return found

    def seen(self, problem: Problem, examples: Examples, progress: Progress) -> list[Example]:
        """The examples as the run was trained on them, by the study's ids; refused is a run of another model or data.

        An example is a sequence of the run where its tokens are, or begin, that sequence's, with at most ``_BEHIND``
        more: what a template writes behind the end of a turn. Its loss is the run's: the mean over the tokens that
        were scored there.

        Raises
        ------
        UserError
            The model has other parameters, shapes or weights than the run began with. The run saw sequences that are
            not the study's examples, or never saw some of these; examples that are no single sequences. Its rate was 0
            at every step.
        """
        if not self.lrs.any():
            raise UserError(
                "the recorded run moved nothing: its learning rate was 0 at every step",
                value=f"{self.folder}: {self.steps} steps",
                rule="a warm-up begins at a rate of 0",
                fix="train for more steps than the warm-up takes, with taught.Record on a new folder",
            )
        self._fits_model(problem.model)
        found = self._matched(examples)
        other = [z.id for z, own in zip(examples, found, strict=True) if example_digest(z) != example_digest(own)]
        if other:
            progress.note(
                f"the recorded run was trained on {len(other)} examples with other tokens at their end, or with other "
                f"ones scored, than the study has: its own are followed ({name_ids(other)})"
            )
        return found

    def _fits_model(self, model: nn.Module) -> None:
        own, theirs = dict(model.named_parameters()), self.record["parameters"]
        fix = "name the model that training began with: model.id, and its adapter before training as model.adapter"
        if own.keys() != theirs.keys():
            stray = sorted(own.keys() ^ theirs.keys())
            where = ["the run" if name in theirs else "the study" for name in stray[:3]]
            value = ", ".join(f"{name} only in {at}" for name, at in zip(stray, where, strict=False))
            raise UserError("the recorded run is of another model", value=value, rule="the same parameters", fix=fix)
        for name, p in own.items():
            if list(p.shape) != theirs[name]["shape"]:
                value = f"{name}: {list(p.shape)}, in the run {theirs[name]['shape']}"
                raise UserError("the recorded run is of another model", value=value, rule="the same shapes", fix=fix)
        other = [name for name, p in own.items() if _digest_as(p, theirs[name]["dtype"]) != theirs[name]["sha256"]]
        if other:
            raise UserError(
                "the recorded run began with other weights than the study's model has",
                value=f"{len(other)} of {len(own)} tensors, such as {other[0]}",
                rule="the study's model is the one before training, in the precision that it was trained in or a finer",
                fix=fix + "; model.dtype=float32",
            )

    def shares(self, examples: Examples) -> np.ndarray:
        """p_z of every example as it was seen, float64 [P]: its share in the loss of a step, on the mean over all.

        Examples of the same tokens share what they were seen.
        """
        names = [example_digest(z) for z in examples]
        rows, seen = self.arrays["rows"], self.sequences
        whole = np.bincount(rows, weights=self.arrays["shares"], minlength=len(seen)) / self.steps
        by_name, times = dict(zip(seen, whole, strict=True)), Counter(names)
        return np.array([by_name[name] / times[name] for name in names])

    def _matched(self, examples: Examples) -> list[Example]:
        """Each example with the tokens of its sequence in the run."""
        paired = [z.id for z in examples if len(z.sequences) > 1]
        rule = "each example is one sequence, with labels"
        fix = "use --set attribution.trajectory=steps, with the recipe under validation"
        refuse(paired, "preferences are not in a recorded run", rule=rule, fix=fix)
        exact: dict[str, list[int]] = defaultdict(list)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, z in enumerate(examples):
            exact[example_digest(z)].append(place)
            alike[z.ids].append(place)
        found: dict[int, Example] = {}
        unknown, rest = [], []
        for k, name in enumerate(self.sequences):
            found |= {place: examples[place] for place in exact.get(name, ())}
            if name not in exact:
                rest.append(k)
        for k in rest:
            some = slice(*self.arrays["starts"][k : k + 2])
            tokens, scored = (self.arrays[name][some] for name in ("tokens", "scored"))
            own = conversation("", tokens.tolist(), scored.nonzero()[0].tolist())
            if not own.n_scored:  # it has no part in the loss
                continue
            ends = (own.ids[: len(own.ids) - more] for more in range(_BEHIND + 1))
            places = next((alike[ids] for ids in ends if ids in alike), [])
            if not places or any(place in found for place in places):  # nor is one example two sequences
                unknown.append(k)
                continue
            found |= {place: replace(own, id=examples[place].id) for place in places}
        never = [z.id for place, z in enumerate(examples) if place not in found]
        if unknown or never:
            raise self._other(unknown, never, len(examples))
        return [found[place] for place in range(len(examples))]

    def _other(self, unknown: list[int], never: list[str], count: int) -> UserError:
        """The run saw sequences that are no examples, or never saw some examples."""
        what = "examples of the study were never seen in the recorded run"
        value = f"{len(never)} of {count}: {name_ids(never)}"
        if unknown:
            rows, what = self.arrays["rows"], "the recorded run saw sequences that are not the study's examples"
            visits = np.isin(rows, unknown)
            first = int(np.searchsorted(self.arrays["offsets"], int(visits.argmax()), side="right"))
            value = (
                f"{len(unknown)} of {len(self.sequences)} sequences, {int(visits.sum())} of {len(rows)} times, "
                f"first in step {first}; examples never seen: {name_ids(never) if never else 'none'}"
            )
        rule = f"the same tokens, or up to {_BEHIND} more at the end"
        fix = "use the data of the run as it was trained on: examples.path, examples.turns, examples.max_tokens, "
        return UserError(what, value=value, rule=rule, fix=fix + "examples.limit, model.chat_template")

    def weighted(self, examples: Examples) -> list[Example]:
        """The examples as they were seen, with their losses as the run weighs them: N p_z L_z."""
        shares = self.shares(examples) * len(examples)
        return [weighed(z, float(share)) for z, share in zip(examples, shares, strict=True)]

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            return files.read_tensors(self.folder / name)
        except (OSError, ValueError) as error:
            raise _damaged(self.folder / name) from error


def _digest_as(p: nn.Parameter, dtype: str) -> str:
    """The digest of a parameter in a precision; of none where it holds fewer digits than that."""
    kind = getattr(torch, dtype)
    both = p.is_floating_point() and kind.is_floating_point
    if p.dtype != kind and not (both and torch.finfo(p.dtype).eps <= torch.finfo(kind).eps):
        return ""
    return tensor_digest(p.detach().to(kind))


def _whole(record: Mapping[str, Any]) -> bool:
    """Whether ``record.json`` says all that is read of it."""
    try:
        rule, steps = record["optimizer"], record["steps"]
        numbers = [rule["momentum"], rule["dampening"]] if rule["kind"] == "sgd" else [rule["eps"], *rule["betas"]]
        moving = {name for name, own in record["parameters"].items() if own["moves"] is True}
        return (
            isinstance(record["finished"], bool)
            and isinstance(record["moments"], bool)
            and isinstance(record["precision"], str)
            and isinstance(steps, int)
            and all(isinstance(step, int) and 0 <= step < max(steps, 1) for step in record["states"])
            and rule["kind"] in ("adamw", "adam", "sgd")
            and all(math.isfinite(float(n)) for n in (*numbers, *rule["decay"].values()))
            and float(rule.get("momentum", 0)) < 1
            and bool(moving)
            and moving == rule["decay"].keys()
            and all(
                isinstance(getattr(torch, own["dtype"]), torch.dtype)
                and isinstance(own["sha256"], str)
                and own["shape"]
                for own in record["parameters"].values()
            )
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _fitting(arrays: Mapping[str, np.ndarray], steps: int) -> bool:
    """Whether the arrays of ``steps.safetensors`` are there and fit one another."""
    try:
        sequences, rows, tokens = (len(arrays[name]) for name in ("sequences", "rows", "tokens"))
        return (
            len(arrays["lr"]) == len(arrays["scale"]) == steps
            and len(arrays["shares"]) == rows
            and len(arrays["scored"]) == tokens
            and _bounds(arrays["offsets"], steps, rows)
            and _bounds(arrays["starts"], sequences, tokens)
            and bool(((arrays["rows"] >= 0) & (arrays["rows"] < sequences)).all())
            and all(np.isfinite(arrays[name]).all() for name in ("lr", "scale", "shares"))
        )
    except (KeyError, TypeError, IndexError, ValueError):
        return False


def _bounds(ends: np.ndarray, parts: int, whole: int) -> bool:
    """Whether these are where so many parts of a whole begin, and its end."""
    return len(ends) == parts + 1 and ends[0] == 0 and ends[-1] == whole and bool((np.diff(ends) >= 0).all())


def tensor_digest(tensor: Tensor) -> str:
    """Hex digest of a tensor's numbers as they are held."""
    held: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(held).hexdigest()


def _damaged(path: Path) -> UserError:
    return UserError(
        "a file of the recorded run is missing or damaged",
        value=str(path),
        rule="all files are those that taught.Record wrote",
        fix="copy the folder again, or train again",
    )
