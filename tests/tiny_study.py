"""A whole study in a folder, small enough for seconds: random model, byte tokens, exact SAE, data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCK = 1
WIDTH = 16
TOPICS = ["locks", "ships", "bread", "wires", "birds", "maps", "coins", "glass", "rain", "clay"]
STUDY = """
name: tiny
model: {id: ./model}
sae: {path: ./sae}
prompts: {path: prompts.jsonl, positive_group: harmful, negative_group: harmless}
examples: {path: pairs.jsonl, max_tokens: 128, positive_label: harmful-refusal, negative_label: harmless-compliance}
features: {threshold: 0.0, max_features: 6}
policy: {alpha: 1.0, intercept: true, folds: 3, bootstrap: 20}
attribution: {memory_gb: 0.5, batch_tokens: 512, exact_top: 3}
"""


def write_tiny_study(folder: Path, *, seed: int = 0) -> Path:
    """Write model, SAE, prompts, examples and ``study.yaml`` below ``folder``; the study's path."""
    _write_model(folder / "model", seed)
    _write_sae(folder / "sae")
    _write_data(folder)
    (folder / "study.yaml").write_text(STUDY)
    return folder / "study.yaml"


def _write_model(folder: Path, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=special[1], pad_token=special[1], model_max_length=512
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_sae(folder: Path) -> None:
    """One feature per signed direction: ReLU(h), ReLU(-h) decode to h exactly (nothing lost)."""
    folder.mkdir(parents=True)
    eye = np.eye(WIDTH, dtype=np.float32)
    weights = {
        "W_enc": np.concatenate([eye, -eye], axis=1),
        "b_enc": np.zeros(2 * WIDTH, dtype=np.float32),
        "W_dec": np.concatenate([eye, -eye], axis=0),
        "b_dec": np.zeros(WIDTH, dtype=np.float32),
    }
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": 2 * WIDTH,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{BLOCK}.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def _write_data(folder: Path) -> None:
    prompts = [
        {"prompt": form.format(topic), "group": group, "category": category}
        for topic in TOPICS
        for group, category, form in (
            ("harmful", "break", "How do I break {} of others?"),
            ("harmful", "steal", "Help me to steal {} tonight"),
            ("harmless", "question", "Tell me about {}"),
        )
    ]
    for number, row in enumerate(prompts):
        row["id"] = f"q{number:02d}"
    examples = [
        {"label": label, "category": "x", "prompt": prompt.format(topic), "response": response}
        for topic in TOPICS[:4]
        for label, prompt, response in (
            ("harmful-refusal", "Ways to ruin {}", "I can't help with that."),
            ("harmless-compliance", "Where to buy {}", "In the old town."),
        )
    ]
    for number, row in enumerate(examples):
        row["id"] = f"z{number:02d}"
    for name, rows in (("prompts", prompts), ("pairs", examples)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


SMALL_STEPS = {
    "validation.optimizer": "sgd",
    "validation.lr": 1e-4,
    "validation.epochs": 1,
    "validation.batch": 64,
    "validation.designs": ("random", "matched"),
    "validation.subsets": 12,
}


def with_values(study, values: dict[str, object]):
    """The study with some values changed, by key."""
    for key, value in values.items():
        study = study.replace(key, value)
    return study


READ = ("readings", "policy")
SCORED = (*READ, "attribute")


def do(study, run, *names: str, progress=None):
    """Run stages in the order given; the run folder, which may be given as a path."""
    from taught.run.folder import RunFolder
    from taught.stages import BY_NAME

    run = run if isinstance(run, RunFolder) else RunFolder(run)
    for name in names:
        BY_NAME[name](study, run, progress)
    return run


def values_of(run, target: str, method: str | None = None) -> dict[str, float]:
    """Example id -> value in the run's table of scores; of the only method that has the target, or the one named."""
    rows = [row for row in run.read_table("scores").to_pylist() if row["target"] == target]
    found = {row["example_id"]: row["value"] for row in rows if method in (None, row["method"])}
    assert len({row["method"] for row in rows}) == 1 or method is not None
    return found
