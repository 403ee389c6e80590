"""Tiny random models of every family of causal language models, texts for them, and references by plain transformers.

Texts are longer than any window, chunk or convolution, of different lengths, and share beginnings. References call the
model on one text at a time, with nothing but its tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from taught.core.example import Example, sft
from taught.model.readout import ReadPrompt

VOCAB, LR, WINDOW = 29, 1e-3, 5

SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.4,
}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 12}
SLIDING = {"sliding_window": WINDOW}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **SLIDING}
LATENT = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 6,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
STATES = {"state_size": 4, "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 4}

# Its class, how its model differs from SIZE, whether it is run on token trees or in plain passes, and whether gradients
# are to be had of one example alone.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "trees"),
    "mistral": ("Mistral", SLIDING, "trees"),
    "ministral": ("Ministral", MIXED, "trees"),
    "mixtral": ("Mixtral", EXPERTS | SLIDING, "trees, alone"),
    "qwen2": ("Qwen2", {}, "trees"),
    "qwen2 with a window": ("Qwen2", MIXED | {"use_sliding_window": True, "max_window_layers": 1}, "trees"),
    "qwen2-moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 12}, "trees, alone"),
    "qwen3": ("Qwen3", {}, "trees"),
    "qwen3-moe": ("Qwen3Moe", EXPERTS, "trees, alone"),
    "gemma": ("Gemma", {}, "trees"),
    "gemma2": ("Gemma2", MIXED | {"query_pre_attn_scalar": 8}, "trees"),
    "gemma3": ("Gemma3Text", MIXED | {"query_pre_attn_scalar": 8}, "trees"),
    "phi": ("Phi", {"num_key_value_heads": 2}, "trees"),
    "phi3": ("Phi3", SLIDING, "trees"),
    "gpt2": ("GPT2", {}, "trees"),
    "gpt-neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}, "plain"),
    "gpt-neox": ("GPTNeoX", {}, "trees"),
    "gpt-j": ("GPTJ", {"rotary_dim": 4}, "trees"),
    "codegen": ("CodeGen", {"rotary_dim": 4, "num_attention_heads": 4}, "trees"),
    "gpt-bigcode": ("GPTBigCode", {}, "trees"),
    "bloom": ("Bloom", {}, "plain"),
    "mpt": ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}, "plain"),
    "falcon": ("Falcon", {"head_dim": None, "new_decoder_architecture": False}, "trees"),
    "falcon with alibi": ("Falcon", {"head_dim": None, "alibi": True, "new_decoder_architecture": False}, "plain"),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}, "trees, alone"),
    "stablelm": ("StableLm", {}, "trees"),
    "starcoder2": ("Starcoder2", SLIDING, "trees"),
    "cohere": ("Cohere", {}, "trees"),
    "cohere2": ("Cohere2", MIXED, "trees"),
    "olmo": ("Olmo", {}, "trees"),
    "olmo2": ("Olmo2", {}, "trees"),
    "olmo3": ("Olmo3", MIXED, "trees"),
    "olmoe": ("Olmoe", EXPERTS, "trees, alone"),
    "granite": ("Granite", {}, "trees"),
    "granite-moe": ("GraniteMoe", EXPERTS, "trees, alone"),
    "smollm3": ("SmolLM3", {}, "trees"),
    "gpt-oss": ("GptOss", EXPERTS | MIXED, "trees, alone"),
    "llama4": (
        "Llama4Text",
        EXPERTS
        | {
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 24,
            "no_rope_layers": [1, 0],
        },
        "trees, alone",
    ),
    "deepseek-v2": ("DeepseekV2", LATENT, "trees, alone"),
    "deepseek-v3": ("DeepseekV3", LATENT, "trees, alone"),
    "mamba": ("Mamba", STATES, "plain, alone"),
    "mamba2": (
        "Mamba2",
        {"state_size": 4, "num_heads": 4, "head_dim": 8, "chunk_size": 4, "n_groups": 1},
        "plain, alone",
    ),
    "rwkv": ("Rwkv", {"attention_hidden_size": 16}, "plain, alone"),
    "jamba": (
        "Jamba",
        EXPERTS | STATES | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "plain, alone",
    ),
    "bamba": ("Bamba", STATES | {"attn_layer_indices": [1]}, "plain, alone"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "plain, alone"),
    "recurrentgemma": (
        "RecurrentGemma",
        {"lru_width": 16, "attention_window_size": WINDOW, "num_hidden_layers": 3},
        "plain, alone",
    ),
}


def model_of(family: str, *, fresh: bool = False) -> nn.Module:
    """A tiny model of a family with random weights, none of them at a special value; a fresh one is yours to change."""
    return _made.__wrapped__(family) if fresh else _made(family)


@cache
def _made(family: str) -> nn.Module:
    name, changes, _ = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    given = SIZE | changes
    config = kind(**{key: value for key, value in given.items() if key != "head_dim" or value is not None})
    config._experts_implementation = "eager"  # products in groups know no float64
    of = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM", "Llama4Text": "Llama4ForCausalLM"}
    model = getattr(transformers, of.get(name, f"{name}ForCausalLM"))(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def text(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())


LONG = text(0, 21)
PREFIXES = ((4, 5, 6), (4, 7), (8,))
PROMPTS = [
    ReadPrompt("short", (*LONG[:4], 9), (4,), PREFIXES),
    ReadPrompt("long", LONG, (20,), PREFIXES),
    ReadPrompt("branch", (*LONG[:9], *text(1, 3)), (11,), PREFIXES),
]
EXAMPLES = [sft("brief", text(2, 4), 2), sft("lengthy", text(3, 19), 6), sft("middle", (*LONG[:6], *text(4, 5)), 8)]


def log_probabilities(model: nn.Module, ids: tuple[int, ...]) -> Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double(), -1)


def y_alone(model: nn.Module, prompt: ReadPrompt) -> Tensor:
    terms = []
    for suffix in prompt.suffixes:
        logp = log_probabilities(model, (*prompt.ids, *suffix))
        terms.append(sum(logp[len(prompt.ids) - 1 + j, token] for j, token in enumerate(suffix)))
    return torch.stack(terms).exp().sum().log()


def loss_alone(model: nn.Module, example: Example) -> Tensor:
    logp = log_probabilities(model, example.ids)
    return -sum(logp[t - 1, example.ids[t]] for t in range(example.start, len(example.ids))) / example.n_scored


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    """By plain autograd, all parameters in a row."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )
