"""Random models, prompts, examples and SAEs of a few thousand numbers, in float64, for exact checks.

Attention is "sdpa": the eager one takes its softmax in float32 whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from taught.behaviors.prefixes import Prefixes
from taught.core.example import Dpo, Example, preference, sft
from taught.core.point import Point
from taught.core.problem import Problem
from taught.features.pooling import FeatureMap, read_tokens
from taught.features.sae import SparseAutoencoder
from taught.model.readout import ReadPrompt

VOCAB, WIDTH, BLOCK = 24, 8, 1
POINT = Point(BLOCK)
PAD = 3  # the padding token of the model "padded"; it occurs in prompts and examples, as in ChatML
MODELS = ("tied", "untied", "padded", "gpt2")
ENCODERS = ("standard", "relu", "jumprelu", "topk")


class Norm64(nn.Module):
    """RMS norm in the precision of its input (transformers' own one computes in float32)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def tiny_llama(
    *, tied: bool = True, pad: int | None = None, seed: int = 0, attention: str = "sdpa"
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=pad,
        bos_token_id=0,
        eos_token_id=1,
        attention_bias=True,
        mlp_bias=True,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, Norm64(WIDTH))
    return _randomised(model, seed)


def stretched_llama(*, limit: int) -> LlamaForCausalLM:
    """A model that scales the positions of texts of more than ``limit`` tokens, as Phi-3 does (LongRoPE)."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={**rope, "factor": 8.0, "original_max_position_embeddings": limit},
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


def tiny_gpt2(*, seed: int = 0, attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=3,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation=attention,
    )
    return _randomised(GPT2LMHeadModel(config), seed)


def tiny_model(name: str, **options: Any) -> nn.Module:
    if name == "gpt2":
        return tiny_gpt2(**options)
    return tiny_llama(tied=name != "untied", pad=PAD if name == "padded" else None, **options)


def _randomised(model: Any, seed: int) -> Any:
    """No parameter keeps a special value (norm weights of 1, biases of 0 hide mistakes)."""
    gen = torch.Generator().manual_seed(seed + 1)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + 0.35 * torch.randn(p.shape, generator=gen, dtype=p.dtype))
    return model


# Prompts 0 to 2 share a long beginning, 3 and 4 a short one, 4 is the beginning of 3; 5 is the
# shortest, so that padding is on every side of it in a plain batch. Token 3 is the end of a turn.
PROMPT_IDS = (
    (0, 5, 6, 7, 8, 3, 2),
    (0, 5, 6, 7, 9, 10, 3, 2),
    (0, 5, 6, 11, 3, 2),
    (0, 12, 3, 2, 13, 3, 2),
    (0, 12, 3, 2),
    (14, 3, 2),
)
PREFIXES = ((15, 16, 17), (15, 16, 18), (19,), (15, 20))
PAIRS = (
    ((0, 5, 21, 3, 2, 15, 16, 17, 3), 5),
    ((0, 12, 22, 3, 2, 4, 9, 3), 5),
    ((14, 13, 3, 2, 19, 3), 4),
    ((0, 6, 7, 3, 2, 23, 8, 10, 11, 12, 3), 5),
)


def tiny_prompts(position: str = "last_user") -> list[ReadPrompt]:
    """Prompts of system token, user tokens, end of turn (3), generation prompt (2)."""
    prompts = []
    for number, ids in enumerate(PROMPT_IDS):
        encoded = SimpleNamespace(
            input_ids=ids, end_of_turn=len(ids) - 2, user_span=(max(0, len(ids) - 5), len(ids) - 2)
        )
        prompts.append(ReadPrompt(f"q{number}", ids, tuple(read_tokens(encoded, position)), PREFIXES))
    return prompts


def tiny_behavior() -> Prefixes:
    """Its suffixes are those of the prompts: what a text means is the tokenizer's affair."""
    return Prefixes(("any",))


def tiny_examples() -> list[Example]:
    return [sft(f"z{i}", ids, start) for i, (ids, start) in enumerate(PAIRS)]


def tiny_preferences(beta: float = 0.3, reference: float = -0.7) -> list[Example]:
    """Answers that begin alike, of unlike lengths, one the beginning of the other; the padding token is among them."""
    answered = (
        ((0, 5, 21, 3, 2), (15, 16, 17, 3), (15, 16, 9, 10, 11, 3)),
        ((14, 13, 3, 2), (19, 3), (8,)),
        ((0, 12, 22, 3, 2), (4, 9, 3, 7), (4, 9)),
    )
    found = []
    for name, (prompt, *answers) in zip("abc", answered, strict=True):
        ids = [(*prompt, *answer) for answer in answers]
        places = [range(len(prompt), len(of)) for of in ids]
        plain = preference(name, ids[0], places[0], ids[1], places[1])
        found.append(replace(plain, link=Dpo(beta, reference)))
    return found


def tiny_sae(kind: str = "standard", *, width: int = WIDTH, n: int = 10) -> SparseAutoencoder:
    """An SAE of one architecture; "relu" is the standard one, to be read with that encoder."""
    gen = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return SparseAutoencoder(
        W_enc=draw(width, n),
        b_enc=0.3 * draw(n),
        W_dec=draw(n, width),
        b_dec=0.5 * draw(width),
        threshold=torch.linspace(0.2, 1.2, n).double() if kind == "jumprelu" else None,
        k=4 if kind == "topk" else None,
        architecture={"relu": "standard"}.get(kind, kind),
        apply_b_dec_to_input=True,
        rescale_by_decoder_norm=kind == "topk",
        point=POINT,
        hook="",
    )


def tiny_features(kind: str = "standard", position: str = "last_user") -> FeatureMap:
    encoder = "relu" if kind == "relu" else "sae"
    return FeatureMap(tiny_sae(kind), torch.tensor([0, 2, 3, 5, 9]), encoder, position)


def tiny_problem(model: nn.Module, kind: str = "standard", position: str = "last_user", **options: Any) -> Problem:
    fields = {
        "model": model,
        "prompts": tiny_prompts(position),
        "behavior": tiny_behavior(),
        "point": POINT,
        "features": tiny_features(kind, position),
        "lr": 1e-3,
        "batch_tokens": 24,
        "memory_gb": 1.0,
    }
    return Problem(**{**fields, **options})


# --- independent references: one sequence at a time, no code of the package ---------------------


def plain_read(model: nn.Module, ids: tuple[int, ...], block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """h [T, D] after the block and log-probabilities [T, V] of one sequence, unpadded."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[block + 1][0], torch.log_softmax(out.logits[0], -1)


def plain_logp(model: nn.Module, sequences: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """Log-probabilities [T, V] of each sequence, in a pass of its own: nothing stands beside it."""
    return {
        ids: torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)
        for ids in dict.fromkeys(sequences)
    }


def plain_y(model: nn.Module, ids: tuple[int, ...], prefixes: Any = PREFIXES) -> Tensor:
    found = plain_logp(model, [(*ids, *prefix) for prefix in prefixes])
    terms = []
    for prefix in prefixes:
        logp = found[*ids, *prefix]
        terms.append(sum(logp[len(ids) - 1 + j, token] for j, token in enumerate(prefix)))
    return torch.stack(terms).exp().sum().log()


def plain_loss(model: nn.Module, example: Example) -> Tensor:
    """The loss as supervised fine-tuning takes it: cross-entropy with the prompt labelled -100.

    Not ``model(labels=...)``: that one takes the logits to float32 first.
    """
    ids = torch.tensor([example.ids])
    labels = ids.clone()
    labels[:, : example.start] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)


def plain_gradient(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, params, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, params, grads, strict=True)}


@contextmanager
def moved(model: nn.Module, step: dict[str, Tensor], scale: float = 1.0) -> Iterator[None]:
    """The model at theta + scale * step."""
    copies = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(step[n], alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(copies[n])


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that attribution must leave alone: weights, flags, modes, hooks, gradients."""
    return {
        "weights": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    equal = all(torch.equal(w, after["weights"][n]) for n, w in before["weights"].items())
    return equal and all(before[k] == after[k] for k in ("flags", "grads", "modes", "hooks"))
