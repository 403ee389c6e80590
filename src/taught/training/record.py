"""Record a training run by a trainer of ``transformers`` or TRL while it is made, so that it can be followed after it.

    trainer.add_callback(taught.Record("run-folder", checkpoints=6))

A folder then holds the moving weights before some steps and behind the last one, Adam's second moments there, and of
every step its learning rate, what clipping scaled its gradient by, and the tokens that it saw (docs/formats.md). Read
by :mod:`taught.training.recorded`; safetensors and JSON only.

The loss that is recorded is the mean cross-entropy of scored tokens: of all of a step, or of each micro-batch and then
over these, m a step. The share of a sequence with n scored tokens in the loss of its step is then

    step    n / items, the number that the trainer gives the model, or n / (sum of n over the step)
    micro   n / (sum of n over its micro-batch) / m

Which one it is, no trainer says. So it is measured: at the first step, and at later ones until the two are told apart,
the gradient of one parameter is made again from the sequences that were seen, each alone, and compared with the
trainer's. A trainer whose gradient is neither has another loss, and is refused before its first step is made.

What cannot be followed after training is refused before the first step, not behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback

from taught.core.example import conversation
from taught.curvatures.adam import moments_from_optimizer
from taught.errors import UserError
from taught.run import files
from taught.sketches.store import example_digest
from taught.training.recorded import FORMAT, RECORD, STEPS, moments_file, tensor_digest, weights_file
from taught.training.steps import room_on_disk

_KINDS = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
_WRAPPER = "base_model.model."  # of peft
WAYS = ("step", "micro")
_CHECKS = 8  # steps at which a gradient is made again, at most
_NUMBERS = 2**20  # of the parameter whose gradient it is


@dataclass(frozen=True, eq=False)
class _Micro:
    """One call of the model in training: tokens and labels of each row, without padding, and the items of its step."""

    rows: list[tuple[list[int], list[int]]]
    items: float | None


def _scored(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Places of the scored tokens; nothing predicts the first."""
    return [t for t, label in enumerate(labels) if t and label != -100]


def _shares(step: Sequence[_Micro], way: str) -> list[float]:
    """Shares of all rows of a step in its loss."""
    counts = [[len(_scored(*row)) for row in micro.rows] for micro in step]
    whole = sum(map(sum, counts))
    found = []
    for micro, own in zip(step, counts, strict=True):
        by = sum(own) * len(step) if way == "micro" else whole if micro.items is None else micro.items
        found += [n / by if n else 0.0 for n in own]
    return found


@dataclass(eq=False)
class _Log:
    """What is known of the steps made so far; the arrays of ``steps.safetensors`` (docs/formats.md)."""

    known: dict[str, int] = field(default_factory=dict)
    tokens: list[np.ndarray] = field(default_factory=list)  # of each sequence that is known
    scored: list[np.ndarray] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    scales: list[Tensor | float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    rows: list[int] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def add(self, lr: float, scale: Tensor | float, step: Sequence[_Micro]) -> None:
        """One step."""
        self.lrs.append(lr)
        self.scales.append(scale)
        for ids, labels in (row for micro in step for row in micro.rows):
            places = _scored(ids, labels)
            name = example_digest(conversation("", ids, places))
            if name not in self.known:
                self.known[name] = len(self.known)
                self.tokens.append(np.array(ids, dtype=np.int32))
                self.scored.append(np.isin(np.arange(len(ids)), places).astype(np.uint8))
            self.rows.append(self.known[name])
        for way in WAYS:
            self.shares[way] += _shares(step, way)
        self.offsets.append(len(self.rows))

    def arrays(self, way: str) -> dict[str, np.ndarray]:
        """As they are written."""
        named = np.frombuffer(bytes.fromhex("".join(self.known)), dtype=np.uint8).reshape(-1, 16)
        return {
            "lr": np.array(self.lrs, dtype=np.float64),
            "scale": np.array([float(s) for s in self.scales], dtype=np.float64),
            "offsets": np.array(self.offsets, dtype=np.int64),
            "rows": np.array(self.rows, dtype=np.int64),
            "shares": np.array(self.shares[way], dtype=np.float64),
            "sequences": named,
            "tokens": np.concatenate(self.tokens),
            "scored": np.concatenate(self.scored),
            "starts": np.cumsum([0, *map(len, self.tokens)]),
        }


@dataclass(eq=False)
class _Loss:
    """Which mean a trainer's loss is, found by its gradients.

    Attributes
    ----------
    tolerance : relative, of the precision that is computed in
    errors : of each way, summed over the steps that were looked at
    checks : how many these are
    """

    tolerance: float
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    checks: int = 0
    apart: bool = False

    @property
    def way(self) -> str:
        """The one that is closest."""
        return min(WAYS, key=self.errors.__getitem__)

    def look(
        self, model: nn.Module, moving: Mapping[str, nn.Parameter], step: Sequence[_Micro], scale: Tensor | float
    ) -> None:
        """Compare the gradient of a step, which clipping has scaled, with those of both ways."""
        if self.apart or self.checks >= _CHECKS:
            return
        shares = {way: _shares(step, way) for way in WAYS}
        same = np.allclose(shares["step"], shares["micro"], rtol=1e-6)
        if same and self.checks:
            return
        there = {name: p for name, p in moving.items() if p.grad is not None and bool(p.grad.any())}
        if not there:
            return
        small = {name: p for name, p in there.items() if p.numel() <= _NUMBERS}
        smallest = min(there, key=lambda name: there[name].numel())
        name = max(small, key=lambda n: float(there[n].grad.square().mean()), default=smallest)  # type: ignore[union-attr]
        found = {way: torch.zeros_like(there[name]) for way in WAYS}
        for place, (ids, labels) in enumerate(row for micro in step for row in micro.rows):
            places = _scored(ids, labels)
            if places:
                logits = model(input_ids=torch.tensor([ids], device=there[name].device), use_cache=False).logits[0]
                own = torch.tensor([labels[t] for t in places], device=logits.device)
                loss = nn.functional.cross_entropy(logits[[t - 1 for t in places]].float(), own)
                (gradient,) = torch.autograd.grad(loss, there[name])
                for way in WAYS:
                    found[way].add_(gradient, alpha=shares[way][place])
        grad = there[name].grad
        assert grad is not None
        grad = grad / scale
        wrong = {way: float((g - grad).norm() / grad.norm()) for way, g in found.items()}
        if min(wrong.values()) > self.tolerance:
            raise _refuse(
                "the trainer's gradient is not that of the sequences it saw",
                f"{name}: {min(wrong.values()):.0%} apart",
                "train with the plain cross-entropy of the labels, and nothing that changes the model in training",
            )
        self.checks += 1
        self.apart = not same and max(wrong.values()) > 3 * self.tolerance
        for way in WAYS:
            self.errors[way] += wrong[way]


class Record(TrainerCallback):
    """Record the run of a trainer: its states at some steps, its rates, and what each step saw.

    Parameters
    ----------
    folder : where; made, and must hold no run yet
    checkpoints : how many states are kept, before the steps in the middle of equal parts of the run; or the steps
        themselves, by how many were made before
    every : in place of that, a state before the first step and before every ``every``-th after it
    moments : whether Adam's second moments are kept with each state; ``segments`` needs them where Adam trained

    Raises
    ------
    UserError
        Before the first step: the folder holds a run; the states do not fit on its disk; what cannot be followed
        (several processes, a run that goes on from a checkpoint, dropout, weights that move in half precision, packing,
        another optimizer than AdamW, Adam and SGD, groups of parameters that differ in more than their decay, a loss
        with smoothing or noise). At the first step: the model is called without labels, its gradient is not that of the
        sequences it saw, or its optimizer keeps moments in half precision. At a step: the run began before the callback
        was added, groups of parameters have come to different rates, or other parameters move than at the beginning.

    Notes
    -----
    Cost: a digest of all weights at the beginning, and of each step's tokens; where gradients are clipped one norm of
    each gradient; writing a state; the passes of a step once more at the first one, and at seven more at most. Disk:
    the moving weights, twice with moments, times the states. Training itself is not changed.

    Examples
    --------
    >>> trainer.add_callback(taught.Record("runs/mine", checkpoints=6))  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        checkpoints: int | Sequence[int] | None = None,
        every: int | None = None,
        moments: bool = True,
    ) -> None:
        if checkpoints is not None and every is not None:
            rule, fix = "so many of them, or one before every so many steps", "leave out one of the two"
            value = f"checkpoints={checkpoints}, every={every}"
            raise UserError("the states to record are named twice", value=value, rule=rule, fix=fix)
        if any(k < 1 for k in (every, checkpoints) if isinstance(k, int)):
            raise UserError("a run is recorded at one state at least", value=checkpoints if every is None else every)
        self.folder = files.place(folder)
        self.checkpoints = 6 if checkpoints is None else checkpoints
        self.every, self.moments = every, moments
        self._begun: dict[str, Any] = {}  # of each parameter what it was before the first step

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what cannot be followed, and say what the run begins with."""
        model, optimizer = given["model"], _plain(given["optimizer"])
        _refuse_arguments(args, state)
        self._names = {name.removeprefix(_WRAPPER): p for name, p in model.named_parameters()}
        self._moving = {name: p for name, p in self._names.items() if p.requires_grad}
        _refuse_model(model, self._moving)
        self._rule = _rule(optimizer, self._moving)
        self._wanted = self._states(int(state.max_steps))
        self._kept_moments = self.moments and self._rule["kind"] != "sgd"
        if (self.folder / RECORD).exists():
            fix = "name another one, or delete it"
            raise UserError("this folder holds a recorded run", value=str(self.folder), fix=fix)
        each = sum(p.numel() * p.element_size() for p in self._moving.values())
        needed = each * (len(self._wanted) * (1 + self._kept_moments) + 1)
        rule = "the moving weights at each recorded state, and second moments with moments=True"
        room_on_disk(self.folder, needed, rule)
        files.make_folder(self.folder)
        self._begun = {}
        for name, p in self._names.items():
            self._begun[name] = {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
            self._begun[name] |= {"sha256": tensor_digest(p), "moves": p.requires_grad}
        self._log = _Log()
        self._step: list[_Micro] = []  # what the step that is being made has seen
        self._watching = True
        self._scale: Tensor | float = 1.0
        self._written: list[int] = []
        half = {str(p.dtype) for p in self._names.values() if p.is_floating_point() and p.element_size() < 4}
        self._precision = "bfloat16" if args.bf16 else min(half, default="float32").removeprefix("torch.")
        self._loss = _Loss(tolerance=1e-2 if self._precision == "float32" else 1e-1)
        self._write(0, finished=False)
        self._handles = [model.register_forward_pre_hook(self._see, with_kwargs=True)]
        self._norms: dict[str, Tensor] = {}
        self._accumulation = getattr(given["optimizer"], "gradient_state", None)  # of accelerate
        if args.max_grad_norm:
            for name, p in self._moving.items():
                self._handles.append(p.register_post_accumulate_grad_hook(self._norm_of(name)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the weights that this step begins with."""
        self._refuse_late(state)
        self._step = []
        if state.global_step in self._wanted:
            self._save(weights_file(state.global_step), self._weights())
            self._written.append(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The rate of the step, and what clipping has scaled its gradient by."""
        self._refuse_late(state)
        with self._refusing():
            self._lr = _rate(_groups(_plain(given["optimizer"]), self._moving))
            other = [name for name, p in self._names.items() if p.requires_grad != (name in self._moving)]
            if other:
                value, fix = f"{len(other)}, such as {other[0]}", "freeze parameters before train()"
                raise _refuse("other parameters move than at the beginning", value, fix)
        if self._norms:
            found = [p.grad for p in self._moving.values() if p.grad is not None]
            before = torch.stack([norm.to(found[0].device) for norm in self._norms.values()]).norm()
            scale = torch.nn.utils.get_total_norm(found) / before
            self._scale = torch.where(scale < 1 - 1e-5, scale, torch.ones_like(scale))  # below it: rounding
            self._norms = {}
        self._watching = False
        with self._refusing():
            self._loss.look(given["model"], self._moving, self._step, self._scale)
        self._watching = True

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note what the step saw; keep the moments that it divided by."""
        self._refuse_late(state)
        optimizer, made = _plain(given["optimizer"]), int(state.global_step)
        if made == 1:
            kept = [(key, t) for own in optimizer.state.values() for key, t in own.items() if isinstance(t, Tensor)]
            half = [f"{key}: {t.dtype}" for key, t in kept if t.ndim and t.element_size() < 4]
            if half:
                self._leave()
                fix = "use an optimizer that keeps float32: optim='adamw_torch'"
                raise _refuse("the optimizer's state is in half precision", half[0], fix)
        if made - 1 in self._wanted and self._kept_moments:
            names = {id(p): name for name, p in self._moving.items()}  # the optimizer may hold frozen ones as well
            ordered = [names.get(id(p), "frozen") for group in optimizer.param_groups for p in group["params"]]
            found = moments_from_optimizer(optimizer.state_dict(), ordered)
            second = {  # 0: no gradient yet
                f"{name}.exp_avg_sq": found.get(name, torch.zeros_like(p)) for name, p in self._moving.items()
            }
            self._save(moments_file(made - 1), second)
        self._log.add(self._lr, self._scale, self._step)
        self._step = []

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The last weights, all steps, and that the run is finished: in this order."""
        self._refuse_late(state)
        self._leave()
        steps = len(self._log.lrs)
        self._written = [step for step in self._written if step < steps]
        self._save(weights_file(steps), self._weights())
        files.write_bytes(self.folder / STEPS, files.tensors_bytes(self._log.arrays(self._loss.way)))
        self._write(steps, finished=True)

    def _refuse_late(self, state: Any) -> None:
        if not self._begun:
            what = "the run began before the callback was added"
            raise _refuse(what, f"step {state.global_step}", "add it before train()")

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A run that is refused is watched no longer."""
        try:
            yield
        except UserError:
            self._leave()
            raise

    def _states(self, steps: int) -> set[int]:
        if self.every is not None:
            return set(range(0, steps, self.every))
        if isinstance(self.checkpoints, int):
            return {(2 * k + 1) * steps // (2 * self.checkpoints) for k in range(self.checkpoints)}
        outside = [step for step in self.checkpoints if not 0 <= step < steps]
        if outside or not self.checkpoints:
            raise UserError(
                "states are recorded before a step of the run",
                value=outside or "none",
                rule=f"whole numbers from 0 to {steps - 1}: this run has {steps} steps",
                fix="correct checkpoints, or give how many",
            )
        return set(self.checkpoints)

    def _see(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Read what the model is called on in training."""
        if not (self._watching and model.training and torch.is_grad_enabled()):
            return
        with self._refusing():
            micro = _micro(given)
        self._step.append(micro)

    def _norm_of(self, name: str) -> Callable[[Tensor], None]:
        """Of a gradient once the last micro-batch of a step is added to it, before it is clipped."""

        def take(p: Tensor) -> None:
            assert p.grad is not None
            if getattr(self._accumulation, "sync_gradients", True):
                self._norms[name] = p.grad.detach().norm()

        return take

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._moving.items()}

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        content = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        files.write_bytes(self.folder / name, content)

    def _write(self, steps: int, *, finished: bool) -> None:
        record = {
            "format": FORMAT,
            "finished": finished,
            "steps": steps,
            "states": self._written,
            "moments": self._kept_moments,
            "optimizer": self._rule,
            "precision": self._precision,
            "parameters": self._begun,
        }
        files.write_bytes(self.folder / RECORD, files.json_bytes(record))


def _micro(given: Mapping[str, Any]) -> _Micro:
    """What the model is called on in training; refused are rows that hold several sequences."""
    ids, labels, mask = (given.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if ids is None or labels is None:
        raise UserError(
            "the model is called without labels",
            value=", ".join(given) or "no names",
            rule="a recorded run is supervised fine-tuning: the model computes its loss from input_ids and labels",
            fix="train with the model's own loss; preference training is not recorded",
        )
    positions, lengths = given.get("position_ids"), [name for name in given if name.startswith("cu_seq_lens")]
    again = positions is not None and mask is None and bool((positions[..., 1:] == 0).any())
    several = mask is not None and mask.ndim != 2
    if again or lengths or several:
        value = lengths or ("attention_mask of other shape than [rows, tokens]" if several else "position_ids")
        raise _refuse("sequences are packed into rows", value, "set packing=False and padding_free=False")
    items = given.get("num_items_in_batch")
    micro = _Micro([], None if items is None else float(items))
    masks = (torch.ones_like(ids) if mask is None else mask).tolist()
    for row, own, real in zip(ids.tolist(), labels.tolist(), masks, strict=True):
        places = [t for t, there in enumerate(real) if there]
        micro.rows.append(([row[t] for t in places], [own[t] for t in places]))
        if any(own[t] not in (row[t], -100) for t in places):
            value = "a scored label that is not the token at its place"
            raise _refuse("the labels are not the model's own inputs", value, "let labels be input_ids, or -100")
    return micro


def _plain(optimizer: Any) -> Any:
    """The optimizer of torch inside the one of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)


def _refuse(what: str, value: object, fix: str) -> UserError:
    return UserError(what, value=value, rule="a recorded run can be followed step for step afterwards", fix=fix)


def _refuse_arguments(args: Any, state: Any) -> None:
    """Refuse what a trainer is told that its record would not say."""

    def told(name: str) -> Any:
        return getattr(args, name, None)

    if state.global_step:
        what = "a run that goes on from a checkpoint has no recorded beginning"
        raise _refuse(what, state.global_step, "train from the start")
    if (told("world_size") or 1) > 1 or (told("n_gpu") or 1) > 1 or told("fsdp") or told("deepspeed"):
        value = f"world_size {told('world_size')}, n_gpu {told('n_gpu')}, fsdp {told('fsdp')}"
        raise _refuse("a run in several processes or on several GPUs is not recorded", value, "train in one process")
    wrong = {
        "packing": "sequences are packed into rows",
        "padding_free": "sequences are packed into rows",
        "fp16": "steps are skipped where a scaled gradient overflows",
        "label_smoothing_factor": "the loss is smoothed",
        "neftune_noise_alpha": "embeddings have noise",
        "torch_compile": "a compiled model cannot be watched",
        "load_best_model_at_end": "other weights take the place of the last ones",
    }
    for name, why in wrong.items():
        if told(name):
            raise _refuse(f"this run cannot be followed: {why}", f"{name}={told(name)}", f"set {name} off: {name}=0")
    if told("loss_type") not in (None, "nll", "chunked_nll"):
        raise _refuse("this loss is not recorded", f"loss_type={told('loss_type')}", "use loss_type='nll'")


def _refuse_model(model: Any, moving: Mapping[str, nn.Parameter]) -> None:
    """Refuse dropout (of modules for it, and settings of other ones), a loss of routers, weights in half precision."""
    noise = []
    for name, module in model.named_modules():
        found = {key: value for key, value in vars(module).items() if "drop" in key.lower()}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found = {"p": module.p}
        noise += [f"{name}: {k}={v:g}" for k, v in found.items() if isinstance(v, float) and v > 0]
    if noise:
        fix = "set dropout to 0 in the model's configuration (and lora_dropout=0)"
        raise _refuse("dropout is on", ", ".join(noise[:4]), fix)
    if getattr(model.config, "output_router_logits", False):
        raise _refuse("the loss has a part for the routers", "output_router_logits", "set it to False")
    half = [name for name, p in moving.items() if p.element_size() < 4 or not p.is_floating_point()]
    if half or not moving:
        value = f"{half[0]}: {moving[half[0]].dtype}" if half else "no parameter moves"
        fix = "load the model in float32; bf16=True in the arguments computes in bfloat16 and keeps float32 weights"
        raise _refuse("steps of training round away in half precision", value, fix)


def _groups(optimizer: Any, moving: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's groups that hold something that moves."""
    ids = {id(p) for p in moving.values()}
    return [group for group in optimizer.param_groups if any(id(p) in ids for p in group["params"])]


def _rate(groups: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of all groups."""
    rates = sorted({float(group["lr"]) for group in groups})
    if len(rates) > 1:
        raise _refuse("parameters have different learning rates", rates, "use one rate for all")
    return rates[0]


_SHARED = ("betas", "eps", "momentum", "dampening", "nesterov")  # what a record says once of all parameters


def _rule(optimizer: Any, moving: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What the optimizer does with a gradient; refused where that is not known."""
    names, groups = {id(p): name for name, p in moving.items()}, _groups(optimizer, moving)
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        given, known = type(optimizer), "optim='adamw_torch', 'adamw_torch_fused' or 'sgd'"
        raise _refuse("this optimizer is not recorded", f"{given.__module__}.{given.__name__}", known)
    missing = names.keys() - {id(p) for group in groups for p in group["params"]}
    if missing:
        what = "a parameter that moves is not in the optimizer"
        raise _refuse(what, names[min(missing)], "freeze it: requires_grad_(False)")
    _rate([{"lr": group.get("initial_lr", group["lr"])} for group in groups])
    for name in _SHARED:
        found = {str(np.ravel(group[name]).tolist()) for group in groups if name in group}
        if len(found) > 1:
            what = f"groups of parameters differ in the optimizer's {name}"
            raise _refuse(what, " and ".join(sorted(found)), "give all groups the same; only weight_decay may differ")
    decay = {names[id(p)]: float(group["weight_decay"]) for group in groups for p in group["params"] if id(p) in names}
    if kind == "adam" and any(decay.values()):
        raise _refuse("Adam divides its weight decay by its moments", max(decay.values()), "use AdamW")
    if any(group.get("maximize") for group in groups):
        raise _refuse("the optimizer raises the loss", "maximize=True", "leave it out")
    first = groups[0]
    if kind == "sgd":
        if first["momentum"] >= 1:
            raise _refuse("a momentum of 1 or more never fades", first["momentum"], "use a momentum below 1")
        return {"kind": kind, "momentum": first["momentum"], "dampening": first["dampening"], "decay": decay}
    return {"kind": kind, "betas": list(first["betas"]), "eps": first["eps"], "decay": decay}
