"""Residuals of the corpus after a block, as float16 shards on disk.

    python harvest.py --out acts --block 15 --tokens 1300000 --threads 1
    python harvest.py --out acts --block 15 --tokens 1000000 --threads 1 --reverse

The two commands take the shuffled pools from either end and can run side by side (two one-thread
processes are steadier than one process with two threads). Chat examples share the chat template's
beginning, so they run as token trees; the forward pass stops after the block. ``kinds`` says where a
token stands: 0 user turn of a request, 1 user turn of a question, 2 rest of a chat (end of turn,
generation prompt, answer), 3 user turn with a passage, 4 general text. The first token of a general
text, an attention sink, and the template's system turn are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from torch import Tensor

from taught.core.point import Point
from taught.model.forward import forward
from taught.model.load import load_model
from taught.model.tokens import build_tree, stack

PRESET = Path(__file__).parents[2] / "src" / "taught" / "presets" / "refusal-smollm2"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
USER_KIND = {"requests": 0, "questions": 1, "reading": 3}
# Relative odds that the next example comes from a pool.
ODDS = {"requests": 0.03 / 20, "questions": 0.52 / 20, "reading": 0.22 / 100, "texts": 0.23 / 100}
SHARD = 50_000

Example = tuple[list[int], list[int]]


class Source:
    """Examples of one pool as (token ids, kind of each token, or -1 for 'do not keep')."""

    def __init__(self, name: str, pool: list, tokenizer) -> None:
        self.name, self.pool, self.tok, self.next = name, pool, tokenizer, 0
        probe = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\x01"}], tokenize=False, add_generation_prompt=True
        )
        self.head, self.tail = (self.ids(part) for part in probe.split("\x01"))

    def ids(self, text: str) -> list[int]:
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def example(self) -> Example | None:
        if self.next >= len(self.pool):
            return None
        item = self.pool[self.next]
        self.next += 1
        if self.name == "texts":
            ids = self.ids(item)[:255]
            return [self.tok.bos_token_id, *ids], [-1, *[4] * len(ids)]
        user, answer = self.ids(item[0])[:160], self.ids(item[1])[:96]
        ids = [*self.head, *user, *self.tail, *answer]
        kinds = [-1] * len(self.head) + [USER_KIND[self.name]] * len(user)
        return ids, kinds + [2] * (len(self.tail) + len(answer))


def draw(sources: dict[str, Source], rng: random.Random, tokens: int = 480) -> list[Example]:
    """Examples for one forward pass; a pool that has run dry is dropped."""
    batch: list[Example] = []
    size = 0
    while size < tokens and sources:
        name = rng.choices(list(sources), [ODDS[n] for n in sources])[0]
        example = sources[name].example()
        if example is None:
            del sources[name]
            continue
        batch.append(example)
        size += sum(k >= 0 for k in example[1])
    return batch


def run(examples: list[Example], model: torch.nn.Module, block: int) -> tuple[Tensor, Tensor]:
    """Residuals (float16) and kinds at the kept tokens of some examples, as one token tree."""
    tree, nodes = build_tree([ids for ids, _ in examples])
    h, _ = forward(model, stack([tree]), point=Point(block), stop_at_point=True)
    where = [n for (_, ks), ns in zip(examples, nodes, strict=True) for k, n in zip(ks, ns, strict=True) if k >= 0]
    kinds = torch.tensor([k for _, ks in examples for k in ks if k >= 0], dtype=torch.int8)
    return h[0, where].half(), kinds


def shard(
    sources: dict[str, Source], model: torch.nn.Module, block: int, rng: random.Random
) -> tuple[Tensor, Tensor] | None:
    parts: list[tuple[Tensor, Tensor]] = []
    while sum(len(k) for _, k in parts) < SHARD:
        batch = draw(sources, rng)
        if not batch:
            break
        parts.append(run(batch, model, block))
    if not parts:
        return None
    return torch.cat([h for h, _ in parts]), torch.cat([k for _, k in parts])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2_100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reverse", action="store_true", help="take the pools from their end")
    parser.add_argument("--skip", type=int, default=0, help="tokens harvested before: continue")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = [json.loads(x)["text"] for x in (PRESET / "prompts.jsonl").read_text().splitlines()]
    pools = corpus.build({corpus.normal(text) for text in prompts})
    loaded = load_model(MODEL)
    sources = {
        name: Source(name, pool[::-1] if args.reverse else pool, loaded.tokenizer) for name, pool in pools.items()
    }
    rng, total, begun = random.Random(int(args.reverse)), 0, time.time()
    while total < args.skip:
        total += sum(k >= 0 for _, kinds in draw(sources, rng) for k in kinds)
    number = round(total / SHARD)
    while total < args.tokens:
        piece = shard(sources, loaded.model, args.block, rng)
        if piece is None:
            break
        tag = f"{number + 500 * args.reverse:03d}"
        np.save(args.out / f"block{args.block:02d}-{tag}.npy", piece[0].numpy())
        np.save(args.out / f"kinds-{tag}.npy", piece[1].numpy())
        total, number = total + len(piece[1]), number + 1
        print(f"{total} tokens, {(total - args.skip) / (time.time() - begun):.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
