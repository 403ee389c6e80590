"""What holds for every behavior, against plain, unpadded passes over sequences of one length at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import taught.model.readout as readout
from reference import LR, along, close
from taught.core.passes import settle_passes
from taught.estimators.adjoint import target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.forward import tangents
from taught.model.readout import ReadPrompt, pack, pack_rows, read_prompts, read_prompts_plain
from taught.sketches.fill import example_sketches, prompt_sketches
from taught.sketches.project import Projection
from tiny_models import (
    MODELS,
    POINT,
    moved,
    plain_gradient,
    plain_logp,
    plain_loss,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)

# y of one prompt from the log-probabilities of each suffix's tokens: a list of [length].
Plain = Callable[[list[torch.Tensor]], torch.Tensor]


def scored_prompts(suffixes: Sequence[tuple[tuple[int, ...], ...]]) -> list[ReadPrompt]:
    """The tiny prompts, each with suffixes of its own."""
    return [replace(prompt, suffixes=own) for prompt, own in zip(tiny_prompts(), suffixes, strict=True)]


class PlainY(torch.nn.Module):
    """theta -> y [N]."""

    def __init__(self, model: Any, prompts: Sequence[ReadPrompt], plain: Plain) -> None:
        super().__init__()
        self.model, self.prompts, self.plain = model, prompts, plain

    def forward(self) -> torch.Tensor:
        found = plain_logp(self.model, [(*p.ids, *suffix) for p in self.prompts for suffix in p.suffixes])

        def tokens(ids: tuple[int, ...], suffix: tuple[int, ...]) -> torch.Tensor:
            logp = found[*ids, *suffix]
            return torch.stack([logp[len(ids) - 1 + j, token] for j, token in enumerate(suffix)])

        return torch.stack([self.plain([tokens(p.ids, s) for s in p.suffixes]) for p in self.prompts])


def check_values(behavior: Any, prompts: Sequence[ReadPrompt], plain: Plain, monkeypatch: Any) -> None:
    """y is that of plain passes, whatever the layout, the order, the company and the padding."""
    for name in MODELS:
        model = tiny_model(name)
        with torch.no_grad():
            expected = PlainY(model, prompts, plain)()

        def same(reads: Any, wanted: torch.Tensor = expected) -> None:
            torch.testing.assert_close(reads.y, wanted, rtol=1e-12, atol=1e-12)

        assert expected.std() > 0.1
        same(read_prompts(model, prompts, behavior, POINT))
        bare = [replace(prompt, read=()) for prompt in prompts]
        for nothing in (read_prompts(model, prompts, behavior, None), read_prompts(model, bare, behavior, None)):
            same(nothing)
            assert nothing.h.numel() == 0 and nothing.offsets.tolist() == [0] * (len(prompts) + 1)
        for size in (1, 4, 16):
            same(read_prompts_plain(model, prompts, behavior, None, batch_size=size))
        backwards = read_prompts(model, prompts[::-1], behavior, POINT)
        torch.testing.assert_close(backwards.y.flip(0), expected, rtol=1e-12, atol=1e-12)
        for i, prompt in enumerate(prompts):
            same(read_prompts(model, [prompt], behavior, POINT), expected[i : i + 1])
        for tokens in (1, 12, 30, 10_000):
            with monkeypatch.context() as patch:
                patch.setattr(readout, "pack", lambda p, b, tokens=tokens: pack(p, b, tokens=tokens))
                same(read_prompts(model, prompts, behavior, POINT))
                patch.setattr(readout, "pack", lambda p, b, tokens=tokens: pack_rows(p, b, tokens=tokens))
                same(read_prompts(model, prompts, behavior, POINT))
        assert settle_passes(model, prompts, behavior) < 1e-12


def check_derivatives(behavior: Any, prompts: Sequence[ReadPrompt], plain: Plain) -> None:
    """Adjoint, every prompt's adjoint, forward mode, sketches = jvp and central differences of plain passes."""
    examples = tiny_examples()
    for name in ("tied", "gpt2"):
        model = tiny_model(name)
        y = PlainY(model, prompts, plain)
        steps = [plain_gradient(model, plain_loss(model, example)) for example in examples]
        exact = torch.stack([dy for _, dy in along(y, [{n: -LR * g for n, g in step.items()} for step in steps])])
        close(torch.stack([_difference(model, y, step) for step in steps]), exact)
        for tokens in (24, 1000):
            problem = tiny_problem(model, lr=LR, prompts=prompts, behavior=behavior, batch_tokens=tokens)
            close(prompt_effects(problem, examples), exact)
        close(prompt_effects(replace(problem, memory_gb=1e-7), examples), exact)
        backwards = replace(problem, prompts=prompts[::-1])
        close(prompt_effects(backwards, examples), exact.flip(1))
        n = len(prompts)
        B = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        B[2, : n // 2] = 0  # a target that asks for some prompts only
        effects, _ = target_effects(problem, examples, torch.zeros(3, n, 5, dtype=torch.float64), B)
        close(effects, exact @ B.T)
        close(torch.stack([found.dy for found in tangents(problem, examples)]), exact)
    projection = Projection(model, 1 << 17)
    ours, theirs = (
        _sketched(example_sketches(problem, projection, examples)),
        _sketched(prompt_sketches(problem, projection, prompts)),
    )
    estimate = -LR * ours @ theirs.T
    assert torch.corrcoef(torch.stack([estimate.flatten(), exact.flatten()]))[0, 1] > 0.97


def _difference(model: Any, y: PlainY, step: dict[str, torch.Tensor]) -> torch.Tensor:
    eps = 1e-5 / float(torch.sqrt(sum(g.pow(2).sum() for g in step.values())))
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            with moved(model, step, sign * eps):
                ends.append(y())
    return -LR * (ends[0] - ends[1]) / (2 * eps)


def _sketched(found: Sequence[Any]) -> torch.Tensor:
    """Sketches of examples, or of y, in the caller's order."""
    rows = {i: part.values[n].double() for part in found for n, i in enumerate(part.index) if part.features[n] == -1}
    return torch.stack([rows[i] for i in sorted(rows)])
