"""Unlearning: make a model forget some examples while it keeps the others (NGDiff, arXiv 2410.22086).

Each step takes a batch of examples to forget (loss L_F) and one of those to retain (L_R), and goes up on the first
and down on the second, each by its direction alone:

    g = grad L_R / |grad L_R| - grad L_F / |grad L_F|,    theta <- theta - eta g

To first order no step raises L_R: g . grad L_R = |grad L_R| (1 - cos of the two gradients) >= 0.

**The rate.** Every 10 steps eta is fitted. Along the step the retain loss of its batch is taken to be quadratic,

    L_R(theta - t eta g) = L_0 - t s + t^2 c / 2,    s = (L_+ - L_-) / 2,  c = L_+ + L_- - 2 L_0,
    L_+- = L_R(theta +- eta g)

with its minimum at t = s / c, so that eta becomes eta s / c = eta (L_+ - L_-) / (2 (L_+ + L_- - 2 L_0)). It is kept
where the curvature c is not positive, or no larger than what rounding makes of losses. One fit changes it by at most a
factor of 10, because a parabola says little about what lies far outside of its three points. The weights are shifted by
eta g itself, not by an optimizer, whose moments such a try would move.

**The guard.** Every 10 steps, and at the end, a number that should stay as it is, such as the accuracy on other
questions, is measured. Where it has left what is allowed, or a loss is no number, the run stops and goes back to the
weights that were right last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.example import Examples, batch_indices, make_batch
from taught.errors import UserError, refuse
from taught.model.gradients import evaluating
from taught.model.parameters import moving_parameters
from taught.model.readout import ReadPrompt, pack, read_y
from taught.progress import Progress, SilentProgress
from taught.training.loop import check_inputs, in_training, only_moving, plan
from taught.training.recipe import Recipe

EVERY = 10  # steps between two fits of the rate, and between two looks at the guard
CLIP = 10.0  # one fit multiplies or divides the rate by at most this
GUARDED = 64  # retained examples whose loss is looked at, where no prompts are named
ROUNDING = 8.0  # so many units of rounding of a loss are no curvature


@dataclass(frozen=True)
class Guard:
    """A number that must hold while a model forgets.

    Attributes
    ----------
    about : what it is, in words
    measure : of the model as it stands
    keep : share of its first value that must be left: a number that should be large stays above ``keep`` times it, a
        loss below (2 - ``keep``) times it
    rises : whether larger is better
    chance : what guessing would give; a number that is no better at the start guards nothing
    """

    about: str
    measure: Callable[[nn.Module], float]
    keep: float = 0.9
    rises: bool = True
    chance: float = 0.0

    def holds(self, start: float, now: float) -> bool:
        """Whether a value is allowed; one that is no number never is."""
        return now >= self.keep * start if self.rises else now <= (2 - self.keep) * start

    def check(self, start: float) -> None:
        """Refuse to begin where the value guards nothing."""
        if not math.isfinite(start) or (self.rises and start <= self.chance):
            raise UserError(
                "the guard is below its limit before anything is forgotten",
                value=f"{self.about}: {start:.3g}",
                rule=f"better than guessing, {self.chance:.3g}" if self.rises else "a finite number",
                fix="set validation.guard to prompts that the model answers, or to null: the loss of what is retained",
            )


def loss_guard(examples: Examples, batch_tokens: int, keep: float) -> Guard:
    """The mean loss of some examples must not rise."""

    def measure(model: nn.Module) -> float:
        with evaluating(model):
            return _mean_loss(model, examples, batch_tokens)

    return Guard(f"the loss of {len(examples)} retained examples", measure, keep, rises=False)


def prompt_guard(prompts: Sequence[ReadPrompt], behavior: Any, keep: float) -> Guard:
    """What the model does on some prompts must stay.

    Of a behavior with a right answer (``margin``) the accuracy, of one that is worse the larger it is (``worse_above``)
    its mean, of any other its mean degree.
    """
    known, worse = hasattr(behavior, "margin"), getattr(behavior, "worse_above", False)
    about = "the accuracy" if known else "the mean behavior" if worse else "the mean degree of the behavior"

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        read: Any = _Right(behavior) if known else behavior
        with evaluating(model):
            y = torch.cat([read_y(model, packed, read).double().cpu() for packed in pack(prompts, behavior)]).numpy()
        return float((y if known or worse else behavior.degree(y)).mean())

    chance = sum(1 / len(prompt.suffixes) for prompt in prompts) / len(prompts) if known else 0.0
    return Guard(f"{about} on {len(prompts)} prompts", measure, keep, rises=not worse, chance=chance)


@dataclass(frozen=True)
class _Right:
    """A behavior read as right (1) or wrong (0)."""

    behavior: Any

    def value(self, *given: Any) -> Tensor:
        margin: Tensor = self.behavior.margin(*given)
        return (margin > 0).to(margin.dtype)


@dataclass(frozen=True)
class Forgetting:
    """What a run did, step by step.

    Attributes
    ----------
    forget, retain : ids of the examples of each step, in the order seen
    forget_losses, retain_losses : of each step before it is made, natural logarithm
    lrs : eta of each step
    forget_norms, retain_norms : |grad L_F| and |grad L_R| of each step
    guard : (steps made, value) of each look at the guard
    kept : steps behind which the weights are those that were kept
    stopped : why the run stopped before its end; "" where it did not
    """

    forget: tuple[tuple[str, ...], ...]
    retain: tuple[tuple[str, ...], ...]
    forget_losses: tuple[float, ...]
    retain_losses: tuple[float, ...]
    lrs: tuple[float, ...]
    forget_norms: tuple[float, ...]
    retain_norms: tuple[float, ...]
    guard: tuple[tuple[int, float], ...]
    kept: int
    stopped: str


@contextmanager
def unlearned(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    recipe: Recipe,
    steps: int,
    guard: Guard,
    *,
    parameters: Sequence[str] | None = None,
    batch_tokens: int = 512,
    progress: Progress | None = None,
) -> Iterator[Forgetting]:
    """The model with some examples forgotten, inside only; weights are the same bits again on exit, always.

    Same inputs, same bits, on a CPU; the order of the examples does not matter. Dropout is off.
    Cost: forward and backward of two batches a step, three forward passes over a batch and one over what the guard
    reads every 10 steps; four copies of what moves.

    Parameters
    ----------
    recipe : of it the method (full, or fresh LoRA layers of its rank), ``lr`` (the first eta), ``batch`` (examples of
        each of the two batches) and ``seed`` (of both orders and of the LoRA's first weights)
    steps : at most so many
    parameters : patterns of the parameters that move (``moving_parameters``); None for all
    batch_tokens : padded tokens of a micro-batch

    Raises
    ------
    UserError
        No example to forget or none to retain, one that is both; parameters in half precision; a guard that is no
        number at the start, or no better than chance.
    """
    both = sorted({z.id for z in forget} & {z.id for z in retain})
    refuse(both, "an example is to be forgotten and to be retained", rule="one of the two")
    if not forget or not retain:
        what = "nothing is left to retain" if forget else "there is nothing to forget"
        value = f"{len(forget)} to forget, {len(retain)} to retain"
        rule = "at least one example to forget, and one to retain"
        raise UserError(what, value=value, rule=rule, fix="forget fewer")
    with in_training(model, recipe, parameters) as patterns:
        moving = moving_parameters(model, patterns)
        check_inputs([*forget, *retain], moving)
        run = _Run(model, moving, guard, batch_tokens, recipe.lr)
        with evaluating(model), only_moving(model, moving):
            away, stay = (_batches(some, recipe, steps) for some in (forget, retain))
            log = run.through(away, stay, progress or SilentProgress())
        yield log


def fitted_rate(lr: float, here: float, up: float, down: float, rounding: float = 0.0) -> float:
    """The rate at which a quadratic retain loss is least along the step (module docstring).

    Parameters
    ----------
    lr : the rate so far, eta
    here, up, down : the retain loss at theta, theta + eta g and theta - eta g
    rounding : curvatures up to so many times the loss are taken for rounding
    """
    bend = up + down - 2 * here
    if not math.isfinite(bend) or bend <= rounding * abs(here):
        return lr
    return lr * min(max((up - down) / (2 * bend), 1 / CLIP), CLIP)


@dataclass(eq=False)
class _Run:
    """The weights on their way: the last ones that held, the rate, the steps and looks at the guard so far."""

    model: nn.Module
    moving: dict[str, nn.Parameter]
    guard: Guard
    batch_tokens: int
    lr: float
    good: dict[str, Tensor] = field(default_factory=dict)
    kept: int = 0
    looks: list[tuple[int, float]] = field(default_factory=list)
    steps: list[tuple[Any, ...]] = field(default_factory=list)

    def through(self, forget: Sequence[Examples], retain: Sequence[Examples], progress: Progress) -> Forgetting:
        """All steps, or those before the guard or a loss stops them."""
        stopped = self._stopped_at(0)
        for made, (away, stay) in enumerate(zip(forget, retain, strict=True), 1):
            stopped = stopped or self._step(away, stay, made)
            if not stopped and (made % EVERY == 0 or made == len(forget)):
                stopped = self._stopped_at(made)
            if stopped:
                self._back()
                stopped += f"; the weights after {self.kept} steps are kept"
                break
            progress.advance(len(away))
        away, stay, L_F, L_R, lrs, norm_F, norm_R = zip(*self.steps, strict=True) if self.steps else ((),) * 7
        return Forgetting(away, stay, L_F, L_R, lrs, norm_F, norm_R, tuple(self.looks), self.kept, stopped)

    def _stopped_at(self, made: int) -> str:
        """Look at the guard and keep the weights; why not, where it does not hold."""
        self.looks.append((made, value := self.guard.measure(self.model)))
        start = self.looks[0][1]
        if made == 0:
            self.guard.check(start)
        elif not self.guard.holds(start, value):
            return f"step {made}: {self.guard.about} went from {start:.4g} to {value:.4g}"
        self.good = {name: p.detach().clone() for name, p in self.moving.items()}
        self.kept = made
        return ""

    def _step(self, away: Examples, stay: Examples, number: int) -> str:
        """One step; why there is none, where a loss or its gradient is no number."""
        (L_F, g_F), (L_R, g_R) = self._gradient(away), self._gradient(stay)
        norm_F, norm_R = _norm(g_F), _norm(g_R)
        if not all(map(math.isfinite, (L_F, L_R, norm_F, norm_R))):
            return f"step {number}: a loss or its gradient is not finite"
        g = {name: _unit(g_R[name], norm_R) - _unit(g_F[name], norm_F) for name in self.moving}
        if number % EVERY == 1:  # the weights, which are those that were just kept, come back to the bit
            losses = []
            for sign in (1, -1):
                self._shift(g, sign * self.lr)
                losses.append(_mean_loss(self.model, stay, self.batch_tokens))
                self._back()
            dtype = next(iter(self.moving.values())).dtype
            self.lr = fitted_rate(self.lr, L_R, losses[0], losses[1], ROUNDING * torch.finfo(dtype).eps)
        self._shift(g, -self.lr)
        self.steps.append((tuple(z.id for z in away), tuple(z.id for z in stay), L_F, L_R, self.lr, norm_F, norm_R))
        return ""

    @torch.no_grad()
    def _back(self) -> None:
        for name, p in self.moving.items():
            p.copy_(self.good[name])

    @torch.no_grad()
    def _shift(self, g: Mapping[str, Tensor], by: float) -> None:
        for name, p in self.moving.items():
            p.add_(g[name], alpha=by)

    def _gradient(self, batch: Examples) -> tuple[float, dict[str, Tensor]]:
        """Mean loss of the examples and its gradient."""
        total, loss = {name: torch.zeros_like(p) for name, p in self.moving.items()}, 0.0
        for index in batch_indices(batch, self.batch_tokens):
            losses = make_batch(batch, index).losses(self.model)
            loss += float(losses.detach().double().sum()) / len(batch)
            mean = losses.sum() / len(batch)
            found = torch.autograd.grad(mean, list(self.moving.values()), allow_unused=True)
            for name, part in zip(self.moving, found, strict=True):
                if part is not None:
                    total[name] += part
        return loss, total


@torch.no_grad()
def _mean_loss(model: nn.Module, examples: Examples, batch_tokens: int) -> float:
    """Mean loss, in float64; no number where one of them is none."""
    batches = (make_batch(examples, index) for index in batch_indices(examples, batch_tokens))
    return sum(float(batch.losses(model).double().sum()) for batch in batches) / len(examples)


def _norm(g: Mapping[str, Tensor]) -> float:
    return math.sqrt(math.fsum(float(part.double().square().sum()) for part in g.values()))


def _unit(part: Tensor, norm: float) -> Tensor:
    """A part of the direction of a gradient; a gradient of length 0 has none."""
    return part / norm if norm > 0 else part


def _batches(examples: Examples, recipe: Recipe, steps: int) -> list[Examples]:
    """The batches of so many steps, in as many epochs as they take, ordered as training orders them."""
    known = {example.id: example for example in examples}
    ids = sorted(known)
    epochs = math.ceil(steps / math.ceil(len(ids) / recipe.batch))
    return [[known[ids[i]] for i in index] for index in plan(ids, replace(recipe, epochs=epochs))[:steps]]
