"""Train a BatchTopK sparse autoencoder on harvested residuals; save it as a SAELens JumpReLU folder.

    python train.py --acts acts --block 15 --features 6144 --k 36 --tokens 3200000 --out sae

BatchTopK (arXiv 2412.06410): in each batch of B tokens the k B largest activations stay. At inference
that is a JumpReLU whose threshold is the running mean of the batches' cut, so L0 differs from k.
Gradients are written out: with 0.5% of the activations alive, sparse products cost a small share of
the one dense product that finds them. Features silent for ``dead_after`` tokens are restarted at
tokens that the dictionary explains badly.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

# How often a token of each kind is drawn: user turn of a request, of a question, rest of a chat, user
# turn with a passage, general text, and the last token of the generation prompt (the read-out).
WEIGHT = torch.tensor([8.0, 2.5, 0.4, 0.6, 0.5, 1.0])
TAIL = 6  # tokens from the user's end of turn to the end of the generation prompt


def load(folder: Path, block: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """Residuals float16 [M, D] and kinds int8 [M]; the first shard is held out for the card."""
    files = sorted(folder.glob(f"block{block:02d}-*.npy"))[1:]
    parts, kinds, total = [], [], 0
    for file in files:
        if limit is not None and total >= limit:
            break
        parts.append(torch.from_numpy(np.load(file)))
        kinds.append(torch.from_numpy(np.load(folder / f"kinds-{file.stem[-3:]}.npy")))
        total += len(parts[-1])
    return torch.cat(parts), mark_last(torch.cat(kinds))


def mark_last(kinds: Tensor) -> Tensor:
    """Kind 5 for the last token of each generation prompt: TAIL - 1 after the user turn's end."""
    user = (kinds == 0) | (kinds == 1) | (kinds == 3)
    first = (user[:-1] & (kinds[1:] == 2)).nonzero().flatten() + 1
    last = first + TAIL - 1
    kinds = kinds.clone()
    kinds[last[last < len(kinds)]] = 5
    return kinds


@dataclass
class Sparse:
    """Alive activations of a batch: CSR [B, F] pattern with values."""

    crow: Tensor
    col: Tensor
    row: Tensor
    value: Tensor
    shape: tuple[int, int]

    def csr(self, value: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(self.crow, self.col, value, self.shape)

    def transposed(self, value: Tensor) -> Tensor:
        order = torch.argsort(self.col, stable=True)
        counts = torch.bincount(self.col, minlength=self.shape[1])
        crow = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return torch.sparse_csr_tensor(crow, self.row[order], value[order], (self.shape[1], self.shape[0]))


class Trainer:
    """State of one run: parameters, Adam moments, when each feature was last alive."""

    def __init__(self, x: Tensor, features: int, k: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        dim = x.shape[1]
        sample = x[torch.randperm(len(x), generator=gen)[:20_000]].float()
        self.gen, self.k, self.features = gen, k, features
        self.mean = sample.mean(0)
        self.scale = dim**0.5 / float((sample - self.mean).norm(dim=1).mean())
        dec = torch.randn(features, dim, generator=gen)
        dec /= dec.norm(dim=1, keepdim=True)
        self.p = {"enc": dec.clone() * 0.5, "b_enc": torch.zeros(features), "dec": dec, "b_dec": torch.zeros(dim)}
        self.m = {n: torch.zeros_like(v) for n, v in self.p.items()}
        self.v = {n: torch.zeros_like(v) for n, v in self.p.items()}
        self.last = torch.zeros(features)
        self.step, self.seen, self.cut = 0, 0, 0.0

    def encode(self, x: Tensor) -> Sparse:
        pre = (x - self.p["b_dec"]) @ self.p["enc"].T + self.p["b_enc"]
        some = pre[:: max(1, len(pre) // 512)].flatten().relu()
        count = self.k * len(pre[:: max(1, len(pre) // 512)])
        cut = max(float(torch.topk(some, count).values[-1]), 1e-6)
        self.cut = cut if self.step == 0 else 0.98 * self.cut + 0.02 * cut
        row, col = (pre > cut).nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(x))
        crow = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        return Sparse(crow, col, row, pre[row, col], tuple(pre.shape))

    def train_batch(self, raw: Tensor, lr: float) -> float:
        """One Adam step on mean |x - reconstruction|^2; returns the unexplained share."""
        x = (raw.float() - self.mean) * self.scale
        acts = self.encode(x)
        error = acts.csr(acts.value) @ self.p["dec"] + self.p["b_dec"] - x
        g = 2 * error / len(x)
        d_value = (g[acts.row] * self.p["dec"][acts.col]).sum(1)
        back = acts.transposed(d_value)
        centred = x - self.p["b_dec"]
        d_pre_sum = torch.zeros(self.features).index_add_(0, acts.col, d_value)
        grads = {
            "enc": back @ centred,
            "b_enc": d_pre_sum,
            "dec": acts.transposed(acts.value) @ g,
            "b_dec": g.sum(0) - d_pre_sum @ self.p["enc"],
        }
        dec = self.p["dec"]  # keep rows of unit length: drop the radial part of their gradient
        grads["dec"] -= (grads["dec"] * dec).sum(1, keepdim=True) * dec
        self.adam(grads, lr)
        self.seen += len(x)
        self.last[acts.col] = self.seen
        return float(error.pow(2).sum() / (x - x.mean(0)).pow(2).sum())

    def adam(self, grads: dict[str, Tensor], lr: float, b1: float = 0.9, b2: float = 0.99) -> None:
        self.step += 1
        for name, g in grads.items():
            self.m[name].lerp_(g, 1 - b1)
            self.v[name].mul_(b2).addcmul_(g, g, value=1 - b2)
            update = self.m[name] / (1 - b1**self.step)
            self.p[name] -= lr * update / ((self.v[name] / (1 - b2**self.step)).sqrt() + 1e-8)
        self.p["dec"] /= self.p["dec"].norm(dim=1, keepdim=True)

    def restart_dead(self, raw: Tensor, dead_after: int) -> int:
        """Point features that have been silent at tokens that are explained badly."""
        dead = ((self.seen - self.last) > dead_after).nonzero().flatten()
        if not len(dead):
            return 0
        x = (raw.float() - self.mean) * self.scale
        acts = self.encode(x)
        error = x - (acts.csr(acts.value) @ self.p["dec"] + self.p["b_dec"])
        dead = dead[: len(x) // 4]
        pick = torch.multinomial(error.pow(2).sum(1), len(dead), generator=self.gen)
        direction = error[pick] / error[pick].norm(dim=1, keepdim=True)
        self.p["dec"][dead] = direction
        self.p["enc"][dead] = direction * 0.3 * self.p["enc"].norm(dim=1).mean()
        self.p["b_enc"][dead] = 0
        for moments in (self.m, self.v):
            for name in ("dec", "enc", "b_enc"):
                moments[name][dead] = 0
        self.last[dead] = self.seen
        return len(dead)

    def state(self) -> dict[str, Tensor]:
        """Weights in the units of the model's residual stream, SAELens names."""
        return {
            "W_enc": (self.p["enc"].T * self.scale).contiguous(),
            "b_enc": self.p["b_enc"].clone(),
            "W_dec": self.p["dec"] / self.scale,
            "b_dec": self.p["b_dec"] / self.scale + self.mean,
            "threshold": torch.full((self.features,), self.cut),
        }


def train(
    trainer: Trainer,
    x: Tensor,
    kinds: Tensor,
    *,
    steps: range,
    total: int,
    batch: int,
    lr: float,
    dead_after: int = 150_000,
) -> None:
    """Adam steps ``steps`` of ``total``, on tokens drawn by the weight of their kind."""
    weight = WEIGHT[kinds.long()].double()
    edges = weight.cumsum(0) / weight.sum()
    begun = time.time()
    fvu = 0.0
    for step in steps:
        drawn = torch.rand(batch, generator=trainer.gen, dtype=torch.float64)
        rows = x[torch.searchsorted(edges, drawn).clamp(max=len(x) - 1)]
        warm = min(1.0, (step + 1) / 50)
        decay = min(1.0, (total - step) / (0.25 * total))
        value = trainer.train_batch(rows, lr * warm * decay)
        fvu = value if step == steps.start else 0.95 * fvu + 0.05 * value
        if step % 40 == 39:
            revived = trainer.restart_dead(rows, dead_after) if step < 0.7 * total else 0
            rate = (step + 1 - steps.start) * batch / (time.time() - begun)
            print(f"step {step + 1}/{total} unexplained {fvu:.3f} restarted {revived} {rate:.0f} tokens/s", flush=True)


def save(folder: Path, state: dict[str, Tensor], args: argparse.Namespace, tokens: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: v.half().contiguous() for n, v in state.items()}, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": state["W_enc"].shape[0],
        "d_sae": state["W_enc"].shape[1],
        "dtype": "float16",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "hook_name": f"blocks.{args.block}.hook_resid_post",
            "context_size": 256,
            "prepend_bos": True,
            "dataset_path": "recipes/sae/corpus.py",
            "trained_as": "batchtopk",
            "k": args.k,
            "training_tokens": tokens,
            "seed": args.seed,
            "learning_rate": args.lr,
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=36)
    parser.add_argument("--limit", type=int, help="use only so many harvested tokens")
    parser.add_argument("--tokens", type=int, default=2_600_000, help="tokens drawn for training")
    parser.add_argument(
        "--rounds", type=int, default=4, help="shards are listed anew each round: the harvest may still run"
    )
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    total, trainer, size = args.tokens // args.batch, None, 0
    for part in range(args.rounds):
        x, kinds = load(args.acts, args.block, args.limit)
        size = len(x)
        trainer = trainer or Trainer(x, args.features, args.k, args.seed)
        steps = range(total * part // args.rounds, total * (part + 1) // args.rounds)
        print(f"round {part + 1}: {size} distinct tokens", flush=True)
        train(trainer, x, kinds, steps=steps, total=total, batch=args.batch, lr=args.lr)
        save(args.out, trainer.state(), args, size)


if __name__ == "__main__":
    main()
