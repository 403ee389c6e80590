"""The metric of a step: training by Adam moves the parameters by -lr C^-1 g, not by -lr g.

    C = diag(sqrt(v) + eps)

with v the second moments of the gradients that the optimizer has seen. This is what a batch of one example adds to
training by Adam in a state of long training: one step hardly changes v, bias correction is over, and of the example's
part in the first moment 1 - beta1 moves the parameters at once, the rest in the steps that follow. Small v make long
steps; eps bounds them at g / eps: it damps.

v is read from a file, or estimated at the base model as what it would be in training with batches
of b of the P examples, drawn without replacement: the second moment of a batch's mean gradient,

    v = m^2 + (s - m^2) / b (P - b) / (P - 1)

m the mean gradient of an example, s the mean of its square. In large batches what the examples have in
common outweighs what they differ in, and the entries where they agree get shorter steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taught.core import rules
from taught.core.curvature import Metric
from taught.core.estimator import Work
from taught.core.example import Examples, batch_examples
from taught.core.gradient import by_parameter, example_gradients
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, setting
from taught.errors import UserError, reading
from taught.estimators.cost import Asked, Passes
from taught.model.gradients import Factor, accumulate, find_sites, frozen
from taught.model.parameters import moving_parameters
from taught.progress import Progress, SilentProgress
from taught.run.files import read_tensors

Moments = dict[str, Tensor]

_SUFFIX, _LARGEST = ".exp_avg_sq", ".max_exp_avg_sq"
_CONVERT = (
    "torch.load the file where you trust it, and save_file({f'{name}.exp_avg_sq': v}, "
    "'moments.safetensors'): docs/methods.md, curvature"
)


@CURVATURES.register("adam")
@dataclass(frozen=True)
class Adam:
    """Steps by Adam: each is divided by sqrt(v) + eps."""

    moments: str | None = setting(
        None, rules.optional(rules.path()), "safetensors of v by parameter name; null: estimated from the examples"
    )
    eps: float = setting(1e-8, rules.number(above=0), "Adam's epsilon")
    batch: int = setting(1, rules.whole(1), "examples a step of the training that v is estimated for")

    @property
    def one_place(self) -> bool:
        """Whether it was measured at one set of weights."""
        return self.moments is not None

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """C = diag(sqrt(v) + eps).

        Raises
        ------
        UserError
            A parameter that moves has no moments, or some of another shape, negative or not finite.
        """
        if self.moments is None:
            work.progress.step("second moments of the gradients", len(examples))
            found = estimate_moments(problem, examples, batch=self.batch, progress=work.progress)
        else:
            found = moments_from_optimizer(self.moments)
        return adam_metric(problem, found, self.eps)

    def numbers(self, problem: Problem) -> int:
        """Numbers that the metric holds."""
        return sum(p.numel() for p in moving_parameters(problem.model, problem.parameters).values())

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """Every gradient built once; where prompts are asked for, the output's gradients meet built."""
        it = Passes(problem, examples)
        found = {} if self.moments is not None else {"second moments": 3 * it.examples}
        if asked.every:
            logits = sum(1 + len(prompt.histories) for prompt in problem.prompts)
            found["products of the output"] = 2.0 * len(examples) * logits * it.moving_head
        return found


def adam_metric(problem: Problem, moments: Mapping[str, Tensor], eps: float) -> Metric:
    """The metric of given second moments, by parameter name."""
    scale = {}
    for name, p in moving_parameters(problem.model, problem.parameters).items():
        if name not in moments:
            raise UserError(
                "a parameter that moves has no second moments",
                value=name,
                rule="one tensor for each, under the model's name of the parameter",
                fix="complete the file, or set attribution.parameters",
            )
        v = _numbers(name, moments[name])
        if v.shape != p.shape:
            raise UserError(
                "second moments of another shape than their parameter",
                value=f"{name}: {list(v.shape)}, parameter {list(p.shape)}",
                fix="use the optimizer state of this model",
            )
        if not bool((v >= 0).all() & v.isfinite().all()):
            raise UserError(
                "second moments that are negative or not finite",
                value=name,
                rule="means of squares",
                fix="store exp_avg_sq, not exp_avg",
            )
        scale[name] = (v.to(p.device).sqrt() + eps).reciprocal().to(p.dtype)
        if not scale[name].isfinite().all():
            raise UserError(
                "a step by Adam is not finite",
                value=f"{name}: 1 / (sqrt(v) + {eps:g}) in {p.dtype}",
                rule="finite for every element",
                fix="raise attribution.curvature.eps",
            )
    return Metric(scale)


def estimate_moments(
    problem: Problem, examples: Examples, *, batch: int = 1, progress: Progress | None = None
) -> Moments:
    """Second moments of the mean gradient of a batch, element by element (the module's formula).

    Cost: one forward and backward pass over the examples, and every example's gradient built once, one parameter and
    example at a time. Memory: one number a moving parameter (two for a batch of more than one example), and one batch.
    """
    sites = find_sites(problem.model, problem.parameters)
    b, P = min(batch, len(examples)), len(examples)
    squares = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in moving_parameters(problem.model, problem.parameters).items()
    }
    sums = {name: torch.zeros_like(of) for name, of in squares.items() if b > 1}
    with frozen(problem.model):
        for some in batch_examples(examples, problem.batch_tokens):
            found = example_gradients(problem, sites, some, examples)[1]
            for name, factors in by_parameter(found).items():
                add_squares(factors, squares[name])
                if b > 1:
                    for factor in factors:
                        accumulate(factor, sums[name])
            (progress or SilentProgress()).advance(len(some.index))
    moments = {name: of.detach().div_(P) for name, of in squares.items()}
    for name, total in sums.items():
        common = total.detach().div_(P).square_()
        spread = moments[name].sub_(common).clamp_(min=0)
        moments[name] = spread.mul_((P - b) / (P - 1) / b).add_(common)
    return moments


def add_squares(factors: Sequence[Factor], total: Tensor) -> None:
    """Add each example's squared gradient."""
    gradient = torch.empty_like(total)
    for example in range(len(factors[0].d)):
        gradient.zero_()
        for factor in factors:
            accumulate(factor.examples(slice(example, example + 1)), gradient)
        total.addcmul_(gradient, gradient)


def moments_from_optimizer(state: str | Path | Mapping[str, Any], names: Sequence[str] | None = None) -> Moments:
    """Second moments by parameter name, from the state of a torch optimizer (Adam, AdamW).

    Parameters
    ----------
    state : what ``optimizer.state_dict()`` gives; or a safetensors file with a tensor ``NAME.exp_avg_sq``, or ``NAME``
        alone, for each parameter. Pickles are never opened.
    names : For a ``state_dict``: the parameters' names in the order in which the optimizer was given them, all groups
        in a row. Not needed where the optimizer was given ``named_parameters()``.

    Returns
    -------
    name -> v; of a ``state_dict`` with Adam's bias correction, as Adam itself divides by it.

    Raises
    ------
    UserError
        The file is a pickle, or holds no moments; the names do not fit the state.
    """
    if isinstance(state, Mapping):
        return _from_state(state, names)
    path, fix = Path(state), "correct attribution.curvature.moments"
    with reading("the second moments cannot be read", path, (OSError,), fix=fix):
        try:
            stored = read_tensors(path)
        except ValueError:
            raise UserError(
                "the second moments are not a safetensors file",
                value=str(path),
                rule="a pickle (*.pt, *.bin) runs code when it is opened: it never is",
                fix=_CONVERT,
            ) from None
    moments = {name.removesuffix(_SUFFIX): v for name, v in stored.items() if name.endswith(_SUFFIX)}
    largest = {name.removesuffix(_LARGEST): v for name, v in stored.items() if name.endswith(_LARGEST)}  # of amsgrad
    return {**moments, **largest} or stored


def _from_state(state: Mapping[str, Any], names: Sequence[str] | None) -> Moments:
    try:
        groups = state["param_groups"]
        if names is None:
            names = [name for group in groups for name in group.get("param_names", ())]
        decay = {number: float(group["betas"][1]) for group in groups for number in group["params"]}
        numbers = [number for group in groups for number in group["params"]]
        # With amsgrad Adam divides by the largest that it has seen.
        kept = {number: own.get("max_exp_avg_sq", own["exp_avg_sq"]) for number, own in state["state"].items()}
        steps = {number: float(own["step"]) for number, own in state["state"].items()}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            "this is no state of torch's Adam or AdamW",
            value=repr(error),
            rule="param_groups with betas, and for each parameter step and exp_avg_sq",
            fix="pass optimizer.state_dict()",
        ) from error
    if len(names) != len(numbers):
        raise UserError(
            "the names do not fit the optimizer's parameters",
            value=f"{len(names)} names, {len(numbers)} parameters",
            rule="one name each, in the order the optimizer was given them",
            fix="pass names, or give the optimizer model.named_parameters()",
        )
    return {
        name: _numbers(name, kept[number]) / (1 - decay[number] ** steps[number])
        for name, number in zip(names, numbers, strict=True)
        if number in kept
    }


def _numbers(name: str, v: Tensor) -> Tensor:
    """The moments of a parameter, if they are numbers: optimizers of 8 bits store codes of numbers."""
    if v.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            "second moments that are no floating point numbers",
            value=f"{name}: {v.dtype}",
            rule="float16, bfloat16, float32 or float64; codes of quantised moments say nothing without their scales",
            fix="train with an optimizer that is not quantised, or store the moments as numbers",
        )
    return v
