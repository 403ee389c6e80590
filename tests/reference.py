"""Independent routes to what the estimators compute, over plain, unpadded passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from taught.core.readings import Readings
from taught.policy.ridge import Policy, fit_policy
from tiny_models import (
    BLOCK,
    PREFIXES,
    PROMPT_IDS,
    moved,
    plain_gradient,
    plain_loss,
    tiny_examples,
    tiny_features,
    tiny_model,
    tiny_prompts,
    tiny_sae,
)

LR = 1e-3
GROUPS = ["a", "b", "a", "b", "b", "a"]


class Readouts(torch.nn.Module):
    """theta -> (h of every token of every prompt, y), by plain passes over sequences of one length, unpadded."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self):
        sequences = [(*ids, *prefix) for ids in PROMPT_IDS for prefix in ((), *PREFIXES)]
        found = {}
        for length in sorted(set(map(len, sequences))):
            rows = [ids for ids in sequences if len(ids) == length]
            out = self.model(input_ids=torch.tensor(rows), output_hidden_states=True, use_cache=False)
            logp = torch.log_softmax(out.logits, -1)
            found |= dict(zip(rows, zip(out.hidden_states[BLOCK + 1], logp, strict=True), strict=True))
        h, y = [found[ids][0] for ids in PROMPT_IDS], []
        for ids in PROMPT_IDS:
            terms = []
            for prefix in PREFIXES:
                logp = found[*ids, *prefix][1]
                terms.append(sum(logp[len(ids) - 1 + j, token] for j, token in enumerate(prefix)))
            y.append(torch.logsumexp(torch.stack(terms), 0))
        return torch.cat(h), torch.stack(y)


@cache
def model_of(name: str):
    return tiny_model(name)


def along(reads: torch.nn.Module, steps: list[dict[str, torch.Tensor]]) -> list[tuple[Any, Any]]:
    """What ``reads`` gives and its tangents along each step of the parameters of its model: torch.func.jvp.

    The steps go through one pass side by side: a pass in forward mode takes ten times as long as another.
    """
    params = {f"model.{n}": reads.model.get_parameter(n).detach() for n in steps[0]}
    together = {f"model.{n}": torch.stack([step[n] for step in steps]) for n in steps[0]}

    def read(p: dict[str, torch.Tensor]) -> Any:
        return torch.func.functional_call(reads, p, ())

    def one(step: dict[str, torch.Tensor]) -> Any:
        return torch.func.jvp(read, (params,), (step,))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        values, moves = torch.func.vmap(one, out_dims=(None, 0))(together)
    return [(values, tree_map(lambda t, i=i: t[i].detach(), moves)) for i in range(len(steps))]


@cache
def _forward_modes(name: str) -> list[tuple[Any, Any]]:
    model = model_of(name)
    grads = [plain_gradient(model, plain_loss(model, example)) for example in tiny_examples()]
    return along(Readouts(model), [{n: -LR * g for n, g in grad.items()} for grad in grads])


def forward_mode(name: str, number: int):
    """(h, y) and their tangents along the SGD step on one example."""
    return _forward_modes(name)[number]


@cache
def differences(name: str, number: int):
    """(h, y) at the base and their central differences along the same step."""
    model = model_of(name)
    grads = plain_gradient(model, plain_loss(model, tiny_examples()[number]))
    norm = torch.sqrt(sum(g.pow(2).sum() for g in grads.values()))
    eps = 1e-5 / float(norm)
    out = []
    with torch.no_grad():
        for sign in (1, -1):
            with moved(model, grads, sign * eps):
                out.append(Readouts(model)())
        base = Readouts(model)()
    (h1, y1), (h0, y0) = out
    return base, (-LR * (h1 - h0) / (2 * eps), -LR * (y1 - y0) / (2 * eps))


def naive_X(h, kind: str, position: str, dh=None):
    """X [N, d], or dX [N, d] for a change dh: gate by gate, token by token."""
    sae, ids, rows, start = tiny_sae(kind), tiny_features().ids, [], 0
    for prompt in tiny_prompts(position):
        tokens = [_encode(sae, h[start + t], kind) for t in prompt.read]
        values = torch.stack([pre * gate for pre, gate in tokens])[:, ids]
        if dh is None:
            changed = values
        else:
            scale = sae.W_dec.norm(dim=1) if kind == "topk" else 1.0
            changed = torch.stack(
                [gate * scale * (dh[start + t] @ sae.W_enc) for (_, gate), t in zip(tokens, prompt.read, strict=True)]
            )[:, ids]
        if position == "max_user":
            best = values.argmax(0)
            rows.append(changed[best, torch.arange(len(ids))])
        else:
            rows.append(changed.mean(0))
        start += len(prompt.ids)
    return torch.stack(rows)


def _encode(sae, x, kind: str):
    if kind == "relu":
        pre = x @ sae.W_enc + sae.b_enc
        return pre, (pre > 0).double()
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if kind == "topk":
        pre = pre * sae.W_dec.norm(dim=1)
        kept = sorted(range(len(pre)), key=lambda j: -float(pre[j]))[: sae.k]
        return pre, torch.tensor([float(j in kept and pre[j] > 0) for j in range(len(pre))]).double()
    if kind == "jumprelu":
        return pre, (pre > sae.threshold).double()
    return pre, (pre > 0).double()


def policy_of(name: str, kind: str, position: str, intercept: bool) -> Policy:
    h, y = forward_mode(name, 0)[0]
    return fit_policy(
        naive_X(h, kind, position).numpy(),
        y.numpy(),
        prompt_ids=[p.id for p in tiny_prompts()],
        feature_ids=tiny_features().ids.tolist(),
        alpha=0.5,
        fit_intercept=intercept,
    )


def readings_of(policy: Policy, groups: list[str] = GROUPS) -> Readings:
    """The policy's prompts with their groups."""
    named = {g: [i for i, own in zip(policy.prompt_ids, groups, strict=True) if own == g] for g in sorted(set(groups))}
    columns = tuple(policy.feature_ids.tolist())
    return Readings(policy.prompt_ids, policy.y, named, {}, policy.X, columns, policy)


def close(ours, reference, relative: float = 1e-6) -> None:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(ours, reference, rtol=relative, atol=relative * np.abs(reference).max())
