"""Two threads beside a busy core: what it costs when OpenMP's threads spin while they wait.

    python -m benchmarks.wait_policy

A model of SmolLM2's width runs forward and backward passes on two threads, in processes of its own: with the
OpenMP library's own waiting (`spin`: threads spin for a while), with a shorter while (`briefly`:
``GOMP_SPINCOUNT=10000``), and with ``OMP_WAIT_POLICY=PASSIVE`` (`sleep`, which the command ``taught`` chooses where
nothing is set). Each on a quiet machine and beside a process that keeps one core busy, in turns. Wall clock and
processor time, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.common import Row

WORK = """
import json, os, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
config = LlamaConfig(vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=6,
                     num_attention_heads=9, num_key_value_heads=3)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 4096, (1, 512))
def once():
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
once()
start, cpu = time.monotonic(), time.process_time()
for _ in range(int(sys.argv[2])):
    once()
print(json.dumps([time.monotonic() - start, time.process_time() - cpu]))
"""
BUSY = "import time\nn = 0\nwhile True:\n    n += sum(range(1000))\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="OpenMP's waiting beside a busy core.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    found: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(args.rounds):
        for machine in ("quiet", "one core busy"):
            for policy in ("spin", "briefly", "sleep"):
                found.setdefault((machine, policy), []).append(_one(args, machine, policy))
    rows: list[Row] = []
    for (machine, policy), times in found.items():
        wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
        rows.append({"machine": machine, "waiting": policy, "seconds": round(wall, 2), "cpu seconds": round(cpu, 2)})
    for row in rows:
        print(
            f"{row['machine']:<16}{row['waiting']:<8}{row['seconds']:>8.2f} s{row['cpu seconds']:>10.2f} s of processor"
        )
    common.record("wait_policy", rows, {"threads": args.threads, "passes": args.passes}, folder=args.out)


def _one(args: argparse.Namespace, machine: str, policy: str) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if policy == "sleep":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    elif policy == "briefly":
        environment["GOMP_SPINCOUNT"] = "10000"
    other = None if machine == "quiet" else subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        command = [sys.executable, "-c", WORK, str(args.threads), str(args.passes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


if __name__ == "__main__":
    main()
