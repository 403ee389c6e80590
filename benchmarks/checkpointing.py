"""What checkpointing saves: memory and time of one long example's gradient, with and without it.

A model of SmolLM2-135M's shape with random weights and a small vocabulary. Each measurement is a
process of its own (Linux: the peak of its memory is set back before the example's turn comes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, Clock, Results, Row, kept, run
from taught.core.point import Point
from taught.environment import keep_freed_memory, peak_memory_gb

TOKENS = (256, 512, 1024, 2048)


def measure(args: argparse.Namespace) -> None:
    """Score one example of each length twice, write the result."""
    results = Results(
        "checkpointing", {"model": "random Llama, 30 blocks, width 576", "dtype": "float32", "targets": 1}, args.out
    )
    with kept(results, _COLUMNS):
        for tokens in args.tokens:
            for checkpointing in (False, True):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.checkpointing",
                    "--one",
                    str(tokens),
                    "--threads",
                    str(args.threads),
                ]
                command += ["--checkpointing"] if checkpointing else []
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
                )
                results.add(json.loads(done.stdout))


def one(tokens: int, checkpointing: bool) -> Row:
    """Peak memory above what the model and the query need, and seconds, of one example."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.flat_cost import _problem
    from taught.core.example import sft
    from taught.core.problem import Problem
    from taught.core.query import build_queries
    from taught.estimators.adjoint import contract_examples
    from taught.model.gradients import find_sites, frozen

    keep_freed_memory()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    ).eval()
    like = _problem(model, 2, width=576)
    problem = Problem(
        model,
        like.prompts,
        like.behavior,
        1e-4,
        Point(15),
        like.features,
        batch_tokens=tokens,
        checkpointing=checkpointing,
    )
    draw = np.random.default_rng(0)
    example = sft("z", tuple(draw.integers(10, 2000, tokens).tolist()), 16)
    sites = find_sites(model)
    with frozen(model):
        queries = build_queries(problem, sites, torch.zeros(1, 2, 64).double(), torch.ones(1, 2).double(), None)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory_gb() or 0.0
        with Clock() as clock:
            contract_examples(problem, sites, [example], queries, 1, None)
    return {
        "tokens": tokens,
        "checkpointing": checkpointing,
        "seconds": clock.seconds,
        "memory_gb": (peak_memory_gb() or 0.0) - before,
    }


_COLUMNS = {
    "tokens of the example": lambda row: f"{row['tokens']:,}",
    "checkpointing": lambda row: "yes" if row["checkpointing"] else "no",
    "memory of the example, GB": lambda row: f"{row['memory_gb']:.2f}",
    "seconds": lambda row: f"{row['seconds']:.2f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--one", type=int, help=argparse.SUPPRESS)
    flags.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("--out", default=RESULTS, type=Path)
    args = flags.parse_args()
    if args.one is None:
        run(measure, args)
        return
    import torch

    torch.set_num_threads(args.threads)
    print(json.dumps(one(args.one, args.checkpointing)))


if __name__ == "__main__":
    main()
