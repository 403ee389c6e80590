"""What an example costs when there are more prompts, and what memory when there are more examples.

A random Llama of 5 million parameters with random tokens: only time and memory are measured. Once
the query gradients exist, the prompts are gone from the calculation; examples come in batches.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, Clock, Results, console, kept, run
from taught.core.point import Point
from taught.progress import RichProgress

LENGTH, RESPONSE = 64, 32


def measure(args: argparse.Namespace) -> None:
    """Time examples against queries of few and many prompts, then few and many examples."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    model = _model()
    results = Results(
        "flat_cost",
        {
            "model": "random Llama",
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_a_prompt": 24,
            "tokens_a_example": LENGTH,
            "targets": 3,
            "repeats": args.repeats,
        },
        args.out,
    )
    with RichProgress(console) as progress, kept(results, _COLUMNS):
        few = _examples(args.examples[0])
        problem = _problem(model, args.prompts[0])
        built, seconds = [], []
        for count in args.prompts:
            progress.step(f"queries of {count} prompts")
            with Clock() as clock:
                built.append(_queries(_problem(model, count)))
            seconds.append(clock.seconds)
        progress.step(f"{len(few)} examples against each", args.repeats)
        times = []
        for _ in range(args.repeats):  # in turns: what else the machine does meets all of them
            times.append([_contracted(problem, few, queries) for queries in built])
            progress.advance(1)
        by_prompts = np.median(times, 0).tolist()
        for row in zip(args.prompts, seconds, by_prompts, strict=True):
            results.add(
                {
                    "prompts": row[0],
                    "examples": len(few),
                    "seconds_queries": row[1],
                    "ms_a_example": row[2],
                    "memory_gb": _resident_gb(),
                }
            )
        for count in args.examples[1:]:
            progress.step(f"{count} examples")
            cost = _contracted(problem, _examples(count), built[-1])
            results.add(
                {
                    "prompts": args.prompts[-1],
                    "examples": count,
                    "seconds_queries": None,
                    "ms_a_example": cost,
                    "memory_gb": _resident_gb(),
                }
            )
        memory = [row["memory_gb"] for row in results.rows]
        results.summary = {
            "ms_a_example_most_over_fewest_prompts": by_prompts[-1] / by_prompts[0],
            "ms_a_example_largest_over_smallest": max(by_prompts) / min(by_prompts),
            "memory_gb_growth_from_fewest_to_most_examples": memory[-1] - memory[len(args.prompts) - 1],
        }


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _problem(model: Any, count: int, width: int = 256) -> Any:
    import torch

    from taught.behaviors.prefixes import Prefixes
    from taught.core.problem import Problem
    from taught.features.pooling import FeatureMap
    from taught.features.sae import SparseAutoencoder
    from taught.model.readout import ReadPrompt

    draw = np.random.default_rng(count)
    scored = ((5, 6), (7, 8))
    prompts = [
        ReadPrompt(f"q{i}", (0, 1, *draw.integers(10, 2000, 20).tolist(), 2, 3), (22,), scored) for i in range(count)
    ]
    gen = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(
        W_enc=torch.randn(width, 64, generator=gen),
        b_enc=torch.zeros(64),
        W_dec=torch.randn(64, width, generator=gen),
        b_dec=torch.zeros(width),
        threshold=None,
        k=None,
        architecture="standard",
        apply_b_dec_to_input=False,
        rescale_by_decoder_norm=False,
        point=Point(3),
        hook="",
    )
    features = FeatureMap(sae, torch.arange(64), "sae", "last_user")
    return Problem(model, prompts, Prefixes(), 1e-4, Point(3), features, batch_tokens=2048)


def _examples(count: int) -> list[Any]:
    from taught.core.example import sft

    draw = np.random.default_rng(1)
    return [sft(f"z{i}", tuple(draw.integers(10, 2000, LENGTH).tolist()), LENGTH - RESPONSE) for i in range(count)]


def _queries(problem: Any) -> Any:
    """Query gradients of three targets: one of X, one of y, one of both."""
    import torch

    from taught.core.query import build_queries
    from taught.model.gradients import find_sites, frozen

    n, d = len(problem.prompts), 64
    gen = torch.Generator().manual_seed(1)
    A = torch.randn(3, n, d, generator=gen, dtype=torch.float64)
    B = torch.randn(3, n, generator=gen, dtype=torch.float64)
    A[1], B[0] = 0, 0
    with frozen(problem.model):
        return build_queries(problem, find_sites(problem.model), A, B, None)


def _contracted(problem: Any, examples: list[Any], queries: Any) -> float:
    """Milliseconds an example. The problem's prompts play no part: they are in the queries."""
    from taught.estimators.adjoint import contract_examples
    from taught.model.gradients import find_sites, frozen

    with Clock() as clock, frozen(problem.model):
        contract_examples(problem, find_sites(problem.model), examples, queries, 3, None)
    return 1000 * clock.seconds / len(examples)


def _resident_gb() -> float:
    """Memory of this process now (Linux), in 10^9 bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


_COLUMNS = {
    "prompts": lambda row: f"{row['prompts']:,}",
    "examples": lambda row: f"{row['examples']:,}",
    "queries, s": lambda row: "" if row["seconds_queries"] is None else f"{row['seconds_queries']:.1f}",
    "ms an example": lambda row: f"{row['ms_a_example']:.2f}",
    "memory, GB": lambda row: f"{row['memory_gb']:.2f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--prompts", type=int, nargs="+", default=[100, 1000, 10000])
    flags.add_argument("--examples", type=int, nargs="+", default=[200, 2000, 10000])
    flags.add_argument("--repeats", type=int, default=15)
    flags.add_argument("--threads", type=int)
    flags.add_argument("--out", default=RESULTS, type=type(RESULTS))
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
