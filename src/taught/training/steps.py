"""Training as a sequence of exact steps: it can be gone through again, and backward.

A step t = 1 .. T is made of the gradient of its batch's loss, in which example i has the weight w_i (1),

    g = sum over the batch of w_i grad l_i / n        n: examples of the batch, whatever their weights
    c = min(1, c0 / (|g| + 1e-6)),  g^ = c g          where gradients are clipped

and of an optimizer's rule. The rules are those of ``torch.optim`` (AdamW with decoupled decay, SGD with momentum and
decay), with ``eps_root`` under the root of AdamW, which torch does not have (0).

Backward, from L = dF/d theta' and the derivatives Lm, Lv of F in the optimizer's state behind the step (MAGIC, Ilyas
and Engstrom, arXiv 2504.16430), elementwise, with the state behind the step primed:

    AdamW   r = sqrt(v'/(1 - b2^t) + eps_root),  D = 1/(r + eps)
            Lm' = Lm - lr D L/(1 - b1^t);   Lv' = Lv + lr m'/(1 - b1^t) D^2 L/(2 r (1 - b2^t))
            Lg^ = (1 - b1) Lm' + 2 (1 - b2) g^ Lv';   L <- (1 - lr decay) L;   Lm <- b1 Lm';   Lv <- b2 Lv'
    SGD     Lb' = Lb - lr L;   Lg^ = Lb';   L <- L + decay Lb';   Lb <- momentum Lb'
    clip    Lg = c Lg^ - c (g . Lg^) g / (|g| (|g| + 1e-6))       where it is active, else Lg = Lg^
    loss    dF/dw_i += grad l_i . Lg / n;   L <- L + H Lg         H: of the batch's loss

The gradient that training is given leaves out look-ups of an embedding's padding row, which the loss depends on all the
same: H holds the derivative of that gradient in the padding row, too.

Where v' is 0 the gradient has been 0 at every step so far; the root has no derivative there and Lv' is left as it is.

Where v is 0, at the first step above all, AdamW's step has the size of its rate and the sign of the gradient,

    -lr a g / (c |g| + eps),    a = (1 - b1) / (1 - b1^t),  c = sqrt((1 - b2) / (1 - b2^t))

an example acts by the signs that it turns, and the derivative, -lr a eps / (c |g| + eps)^2, sees that only in the few
weights whose |g| is about eps. Its sum over many weights has the right mean and a large variance: float32's rounding
alone changes it. ``sign_width`` puts -lr a / (c h) where |g| < h, and 0 elsewhere, in its place: as much over all g,
but seen in many weights. h is ``sign_width`` times rms(g) / sqrt(examples of the batch), the size of an example's part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taught.core.example import ExampleBatch, Examples, batch_indices, make_batch
from taught.core.gradient import padding_rows_held, token_derivatives
from taught.errors import UserError
from taught.model.directional import along, refused
from taught.model.gradients import embedding_options, evaluating
from taught.model.parameters import moving_parameters
from taught.progress import Progress, SilentProgress
from taught.run import files
from taught.training.loop import check_inputs, diverged, learning_rates, only_moving, plan
from taught.training.recipe import Recipe

Tensors = dict[str, Tensor]
Gradient = tuple[Tensor | None, ...]
BETAS, EPS = (0.9, 0.999), 1e-8
_CLIP_EPS = 1e-6


@dataclass(eq=False)
class State:
    """What a step begins with: weights and the optimizer's state, by parameter.

    Attributes
    ----------
    step : steps made so far
    parts : ``weights``; ``first`` (AdamW's m, SGD's buffer); ``second`` (AdamW's v; none for SGD); where the state was
        kept by a step, ``gradient`` of that step's loss, not clipped
    """

    step: int
    parts: dict[str, Tensors]

    def copy(self) -> State:
        """The same state in memory of its own."""
        return State(self.step, {part: {n: t.clone() for n, t in of.items()} for part, of in self.parts.items()})

    def tensors(self) -> Tensors:
        """All tensors under one name each."""
        return named(self.parts)

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def named(parts: Mapping[str, Tensors]) -> Tensors:
    """Tensors of the parts of a state under one name each."""
    return {f"{part} {name}": tensor for part, of in parts.items() for name, tensor in of.items()}


class States:
    """States by step, in memory or in a folder.

    Parameters
    ----------
    folder : where they are written; None: they are kept in memory
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._kept = folder, dict[int, State]()
        self._names: dict[int, list[str]] = {}  # of the tensors of a state, in their order in its file

    def __contains__(self, step: int) -> bool:
        return step in self._kept or (self._folder is not None and self._file(step).is_file())

    def save(self, state: State) -> None:
        """Keep a copy."""
        if self._folder is None:
            self._kept[state.step] = state.copy()
            return
        files.make_folder(self._folder)
        path, tensors = self._file(state.step), state.tensors()
        self._names[state.step] = list(tensors)
        try:
            with open(path, "wb") as file:  # one array behind another: no second copy of a state in memory
                for tensor in tensors.values():
                    np.save(file, tensor.cpu().numpy(), allow_pickle=False)
        except OSError as error:
            raise files.write_error(path, error, needed=state.bytes) from error

    def load(self, step: int) -> State:
        """A state that was kept, in memory of its own."""
        if step in self._kept:
            return self._kept[step].copy()
        found = State(step, {"weights": {}, "first": {}, "second": {}})
        with open(self._file(step), "rb") as file:
            for name in self._names[step]:
                part, _, own = name.partition(" ")
                found.parts.setdefault(part, {})[own] = torch.from_numpy(np.load(file, allow_pickle=False))
        return found

    def drop(self, step: int) -> None:
        """Forget a state."""
        self._kept.pop(step, None)
        if self._folder is not None:
            self._file(step).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"step-{step}"


@dataclass(frozen=True, eq=False)
class Micro:
    """Some examples of a step's batch, gone through the model together.

    Attributes
    ----------
    terms : [B, J], what each scored token adds to its example's sum
    losses : [B]
    slopes : [B], how a loss changes with the example's sum
    weights : [B], of the losses in that of the step
    """

    terms: Tensor
    losses: Tensor
    slopes: Tensor
    weights: Tensor

    @property
    def loss(self) -> Tensor:
        """Their part of the step's loss."""
        return (self.losses * self.weights).sum()

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Zeros e [B, J], and sum_ij e_ij f'(s_i) l_ij: its derivative in e is the part of a token in its loss."""
        each = torch.zeros_like(self.terms, requires_grad=True)
        return each, (each * self.slopes[:, None] * self.terms).sum()


@dataclass(eq=False)
class Back:
    """Derivatives of one functional in a state: of the weights, and of the optimizer's parts."""

    parts: dict[str, Tensors]


@dataclass(eq=False)
class Training:
    """One training run of a model on examples, step by step.

    Attributes
    ----------
    model : its moving parameters are the weights of the run; changed in place
    inputs : the examples, in the order of their ids
    recipe : how to train, by the plain loop
    parameters : patterns of the parameters that move
    batch_tokens : padded tokens of a micro-batch
    eps_root : under the root of AdamW
    sign_width : over how much of an example's part in the gradient the derivative of its sign is averaged, going back
        through AdamW where v is 0; 0: not; and not where ``eps_root`` makes the step smooth
    weights : float64 [P], w of every example of ``inputs``; None for ones
    starts : where the scored tokens of each example begin among all of them, and where the last ones end
    """

    model: nn.Module
    inputs: Examples
    recipe: Recipe
    parameters: Sequence[str] | None = None
    batch_tokens: int = 512
    eps_root: float = 0.0
    sign_width: float = 0.0
    weights: Tensor | None = None
    moving: dict[str, nn.Parameter] = field(init=False)
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        refuse_other_trainers(self.recipe)
        self.inputs = sorted(self.inputs, key=lambda example: example.id)
        self.moving = moving_parameters(self.model, self.parameters)
        check_inputs(self.inputs, self.moving)
        self.ids = [example.id for example in self.inputs]
        self.starts = list(accumulate((example.n_scored for example in self.inputs), initial=0))
        self.plan = plan(self.ids, self.recipe)
        self.lrs = learning_rates(self.recipe, len(self.plan))

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def moving_bytes(self) -> int:
        """Memory of the weights that move."""
        return sum(p.numel() * p.element_size() for p in self.moving.values())

    def shares(self) -> dict[str, float]:
        """Share of each example in the loss of a step, on the mean over the run; of a short batch it is larger."""
        found = dict.fromkeys(self.ids, 0.0)
        for index in self.plan:
            for i in index:
                found[self.ids[i]] += 1 / len(index)
        return {name: share / len(self) for name, share in found.items()}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Gradients of the moving parameters, no dropout, attention that has second derivatives."""
        with evaluating(self.model), only_moving(self.model, self.moving), sdpa_kernel(SDPBackend.MATH):
            yield

    def begin(self) -> State:
        """The state before the first step, at the model's weights."""
        weights: Tensors = {name: p.detach() for name, p in self.moving.items()}
        parts = {"weights": weights, "first": {n: torch.zeros_like(w) for n, w in weights.items()}, "second": {}}
        if self.recipe.optimizer == "adamw":
            parts["second"] = {n: torch.zeros_like(w) for n, w in weights.items()}
        return State(0, parts)

    @torch.no_grad()
    def enter(self, state: State) -> State:
        """Put the weights of a state into the model; the state then shares their memory."""
        for name, p in self.moving.items():
            p.copy_(state.parts["weights"][name])
        return State(state.step, {**state.parts, "weights": {n: p.detach() for n, p in self.moving.items()}})

    def advance(self, state: State, states: States | None = None) -> float:
        """Make one step, in place; what its gradient was scaled down by (1 where it was not clipped).

        The state before it is kept in ``states``, with the gradient.
        """
        gradient = self._gradient(state.step)
        if states is not None:
            states.save(State(state.step, {**state.parts, "gradient": gradient}))
        _, share = self._clip(gradient)
        self._move(state, _scaled(gradient, share))
        return share

    def train(self, states: States | None = None, every: int = 1, progress: Progress | None = None) -> State:
        """All steps from the model's weights to the state behind them; every ``every``-th is kept, and the last."""
        state = self.begin()
        for step in range(len(self)):
            self.advance(state, states if step % every == 0 else None)
            (progress or SilentProgress()).advance(1)
        self.check_finite()
        if states is not None:
            states.save(state)
        return state

    def check_finite(self) -> None:
        """Raise a UserError where the weights behind the last step are not numbers."""
        if not all(bool(p.isfinite().all()) for p in self.moving.values()):
            raise diverged("weights are not finite", len(self), [self.ids[i] for i in self.plan[-1]])

    def step_back(self, state: State, backs: Sequence[Back], *, hessian: str = "exact") -> list[Tensor]:
        """Go back over the step that begins with ``state``; ``backs`` are changed in place.

        Parameters
        ----------
        state : before the step, kept by it, entered; unchanged
        backs : K functionals behind the step
        hessian : what H is: ``exact``, the Hessian of the batch's loss; ``gauss-newton``, (1/n) sum J_z' B_z J_z,
            without second derivatives of the model (:meth:`taught.core.example.ExampleBatch.bent` has B);
            ``empirical-fisher``, (1/n) sum g_z g_z' (AdamW-influence, arXiv 2605.18814); ``none``, 0: later
            gradients stay as they were

        Returns
        -------
        For each example of the batch float64 [scored tokens, K]: what each token adds to the example's dF/dw by this
        step alone, in the order of ``Example.scored``.
        """
        number, index, gradient = state.step, self.plan[state.step], state.parts["gradient"]
        clipped, ups = _scaled(gradient, self._clip(gradient)[1]), []
        for back in backs:
            ups.append(self._through_rule(back, state, clipped))
            self._through_clip(ups[-1], gradient)
        shape = (len(index), max(self.inputs[i].n_scored for i in index), len(backs))
        found = torch.zeros(shape, dtype=torch.float64)
        with padding_rows(self.moving, self.model) as padding:
            for batch, places in self._batches(number):
                if hessian == "none":
                    columns: Iterable[Tensor] = (token_derivatives(self.model, batch, up) for up in ups)
                elif hessian == "empirical-fisher":
                    columns = self._through_squares(self._micro(number, batch, places), batch, ups, backs)
                elif hessian == "gauss-newton":
                    weights = self._weights(number, places)
                    columns = self._through_outputs(batch, weights, padding, ups, backs)
                else:
                    columns = self._through_loss(self._micro(number, batch, places), padding, ups, backs)
                for k, shares in enumerate(columns):
                    found[places, : shares.shape[1], k] = shares.double().cpu() / len(index)
        return [own[: self.inputs[i].n_scored] for i, own in zip(index, found, strict=True)]

    # The pieces of a step

    def _batches(self, number: int) -> Iterator[tuple[ExampleBatch, list[int]]]:
        """A step's examples in parts that go through the model together, and their places in its batch."""
        examples = [self.inputs[i] for i in self.plan[number]]
        for places in batch_indices(examples, self.batch_tokens):
            yield make_batch(examples, places), places

    def _micro(self, number: int, batch: ExampleBatch, places: Sequence[int]) -> Micro:
        terms = batch.terms(self.model)
        sums = terms.sum(1)
        losses = batch.linked(sums)
        if not bool(losses.isfinite().all()):
            ids = [self.ids[self.plan[number][i]] for i in places]
            raise diverged("a loss is not finite", number + 1, ids)
        return Micro(terms, losses, batch.slopes(sums), self._weights(number, places).to(losses))

    def _weights(self, number: int, places: Sequence[int]) -> Tensor:
        """Of some losses of a step's batch in its loss, float64."""
        index = [self.plan[number][i] for i in places]
        weights = torch.ones(len(index), dtype=torch.float64) if self.weights is None else self.weights[index]
        return weights / len(self.plan[number])

    def _slope(self, loss: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None) -> Gradient:
        """Derivative in the moving parameters."""
        moving = list(self.moving.values())
        return torch.autograd.grad(
            loss, moving, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )

    def _sum(self, parts: Iterable[Gradient]) -> Tensors:
        """The sum of some gradients, without their graphs; a single one stays where it is."""
        total: Tensors = {}
        for own in parts:
            for name, g in zip(self.moving, own, strict=True):
                if g is not None:
                    total[name] = total[name] + g.detach() if name in total else g.detach()
        return {name: total[name] if name in total else torch.zeros_like(p) for name, p in self.moving.items()}

    def _gradient(self, number: int) -> Tensors:
        return self._sum(self._slope(self._micro(number, *some).loss) for some in self._batches(number))

    def _clip(self, gradient: Tensors) -> tuple[float, float]:
        """Norm of a gradient, where gradients are clipped, and what it is multiplied by."""
        most = self.recipe.max_grad_norm
        if most is None:
            return math.nan, 1.0
        norm = float(torch.nn.utils.get_total_norm(gradient.values()))
        return norm, min(1.0, most / (norm + _CLIP_EPS))

    @torch.no_grad()
    def _move(self, state: State, gradient: Tensors) -> None:
        """The optimizer's rule, in place."""
        lr, decay, t = self.lrs[state.step], self.recipe.weight_decay, state.step + 1
        state.step = t
        for name, g in gradient.items():
            weight, first = state.parts["weights"][name], state.parts["first"][name]
            if self.recipe.optimizer == "sgd":
                first.mul_(self.recipe.momentum).add_(g).add_(weight, alpha=decay)
                weight.sub_(first, alpha=lr)
                continue
            second = state.parts["second"][name]
            first.lerp_(g, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            root = (second / (1 - BETAS[1] ** t) + self.eps_root).sqrt_()
            weight.mul_(1 - lr * decay).addcdiv_(first, root.add_(EPS), value=-lr / (1 - BETAS[0] ** t))

    @torch.no_grad()
    def _through_rule(self, back: Back, state: State, clipped: Tensors) -> Tensors:
        """Lg^, and the derivatives in the state before the step but for the loss's part."""
        t, lr, decay, up = state.step + 1, self.lrs[state.step], self.recipe.weight_decay, {}
        for name, g in clipped.items():
            L, Lm = back.parts["weights"][name], back.parts["first"][name]
            if self.recipe.optimizer == "sgd":
                Lm.sub_(L, alpha=lr)
                up[name] = Lm.clone()
                L.add_(Lm, alpha=decay)
                Lm.mul_(self.recipe.momentum)
                continue
            Lv = back.parts["second"][name]
            first = state.parts["first"][name].lerp(g, 1 - BETAS[0])  # m and v behind the step
            second = (BETAS[1] * state.parts["second"][name]).addcmul_(g, g, value=1 - BETAS[1])
            bias = 1 - BETAS[0] ** t, 1 - BETAS[1] ** t
            root = (second / bias[1] + self.eps_root).sqrt_()
            D = (root + EPS).reciprocal_()
            Lm.sub_(D * L, alpha=lr / bias[0])
            slope = first * D.square() * L / (2 * root * bias[1]) * (lr / bias[0])
            Lv.add_(torch.where(root > 0, slope, 0.0))
            up[name] = (1 - BETAS[0]) * Lm + 2 * (1 - BETAS[1]) * g * Lv
            if self.sign_width and not self.eps_root and bool((fresh := state.parts["second"][name] == 0).any()):
                a, c, size = (1 - BETAS[0]) / bias[0], math.sqrt((1 - BETAS[1]) / bias[1]), g.abs()
                rms = float(g[fresh].square().mean(dtype=torch.float64).sqrt())
                h = self.sign_width * rms / math.sqrt(len(self.plan[state.step]))
                at_point = EPS / (c * size + EPS).square()
                averaged = (size < h) / (c * h) if h else torch.zeros_like(g)
                up[name].add_(L * torch.where(fresh, at_point - averaged, 0.0), alpha=lr * a)
            L.mul_(1 - lr * decay)
            Lm.mul_(BETAS[0])
            Lv.mul_(BETAS[1])
        return up

    @torch.no_grad()
    def _through_clip(self, up: Tensors, gradient: Tensors) -> None:
        norm, share = self._clip(gradient)
        if share == 1.0:
            return
        along = math.fsum(float((gradient[name] * one).sum(dtype=torch.float64)) for name, one in up.items())
        for name, one in up.items():
            one.mul_(share).sub_(gradient[name], alpha=share * along / (norm * (norm + _CLIP_EPS)))

    def _through_loss(
        self, micro: Micro, padding: Sequence[PaddingRow], ups: Sequence[Tensors], backs: Sequence[Back]
    ) -> Iterator[Tensor]:
        """Add H Lg to each L; for each, what a token has in grad l . Lg, [B, J]."""
        each, by_token = micro.by_token()
        gradient = self._slope(micro.loss + by_token, create_graph=True)
        inputs = [each, *self.moving.values(), *(row.leaf for row in padding)]
        for up, back in zip(ups, backs, strict=True):
            L = back.parts["weights"]
            parts = [(g * one).sum() for g, one in zip(gradient, up.values(), strict=True) if g is not None]
            product = torch.stack([part.to(parts[0].device) for part in parts]).sum()
            shares, *second = torch.autograd.grad(product, inputs, retain_graph=up is not ups[-1], allow_unused=True)
            _add([*L.values(), *(L[row.name][row.index] for row in padding)], second)
            yield shares

    def _through_outputs(
        self,
        batch: ExampleBatch,
        weights: Tensor,
        padding: Sequence[PaddingRow],
        ups: Sequence[Tensors],
        backs: Sequence[Back],
    ) -> Iterator[Tensor]:
        """The same, with J' B J for H: forward mode along Lg, B, and a backward pass."""
        terms, outputs = batch.outputs(self.model)
        slopes = batch.slopes(terms.sum(1))[:, None]
        inputs = [*self.moving.values(), *(row.leaf for row in padding)]
        for up, back in zip(ups, backs, strict=True):
            L = back.parts["weights"]
            with padding_rows_held(self.model, up):
                try:
                    _, (shares, moved) = along(self.model, up, batch.outputs, self.model)
                except (RuntimeError, NotImplementedError) as error:
                    raise refused(self.model, error, "use --set attribution.trajectory.hessian=exact") from error
            pull = batch.bent(outputs.detach(), moved) * weights.to(moved)[:, None, None]
            last = up is ups[-1]
            found = torch.autograd.grad(outputs, inputs, pull, retain_graph=not last, allow_unused=True)
            _add([*L.values(), *(L[row.name][row.index] for row in padding)], found)
            yield shares * slopes

    def _through_squares(
        self, micro: Micro, batch: ExampleBatch, ups: Sequence[Tensors], backs: Sequence[Back]
    ) -> Iterator[Tensor]:
        """The same, with (1/n) sum g_z g_z' for H."""
        for up, back in zip(ups, backs, strict=True):
            L = back.parts["weights"]
            shares = token_derivatives(self.model, batch, up)
            products = shares.sum(1) * micro.weights
            _add(L.values(), self._slope((micro.losses * products).sum(), retain_graph=up is not ups[-1]))
            yield shares


def refuse_other_trainers(recipe: Recipe) -> None:
    """Refuse a recipe whose optimizer's state is not known at every step."""
    if recipe.trainer != "loop":
        value, rule = f"validation.trainer: {recipe.trainer}", "the optimizer's state is known at every step"
        what, fix = "a run is followed step by step in the plain loop", "use --set validation.trainer=loop"
        raise UserError(what, value=value, rule=rule, fix=fix)


def _scaled(gradient: Tensors, share: float) -> Tensors:
    return gradient if share == 1.0 else {name: share * g for name, g in gradient.items()}


@torch.no_grad()
def _add(totals: Iterable[Tensor], found: Iterable[Tensor | None]) -> None:
    """Add what autograd found, where it found something."""
    for total, one in zip(totals, found, strict=True):
        if one is not None:
            total.add_(one)


@dataclass(frozen=True, eq=False)
class PaddingRow:
    """The padding row of an embedding that moves, as a variable of its own: what is added to its look-ups, 0.

    Attributes
    ----------
    name : of the embedding's weight
    index : of the row
    leaf : [D]
    """

    name: str
    index: int
    leaf: Tensor


@contextmanager
def padding_rows(moving: Mapping[str, nn.Parameter], model: nn.Module) -> Iterator[list[PaddingRow]]:
    """Derivatives in the padding rows of embeddings, which torch leaves out; look-ups and gradients stay the same."""
    names = {id(p): name for name, p in moving.items()}
    rows, handles = [], []
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None or id(module.weight) not in names:
            continue
        leaf = torch.zeros_like(module.weight[0]).requires_grad_()
        rows.append(PaddingRow(names[id(module.weight)], module.padding_idx, leaf))
        added = partial(_add_at, module.padding_idx, leaf, embedding_options(module)[0])
        handles.append(module.register_forward_hook(added))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _add_at(row: int, leaf: Tensor, scale: float, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return torch.where((args[0] == row)[..., None], out + scale * leaf, out)


def room_on_disk(folder: Path, needed: int, rule: str) -> None:
    """Refuse a run whose states do not fit, before it begins; the rule says which states are kept."""
    free = files.free_bytes(folder)
    if needed > free:
        raise UserError(
            "the states of the training run do not fit on the disk",
            value=f"{needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB free",
            rule=rule,
            fix="make room, or let fewer parameters move: --set validation.method=lora",
        )


def same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that differs; None where all are the same."""
    return next((name for name, tensor in expected.items() if not torch.equal(found[name], tensor)), None)
