"""Float32 products on this CPU: torch's own against oneDNN, side by side.

    python -m benchmarks.kernels

The shapes are those of SmolLM2-135M: 512 tokens through each kind of matrix (forward, gradient of
the input, gradient of the weight), and the products of built gradients. Each number is the median
of alternating repetitions, in 10^9 multiplications and additions a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.common import Clock, Row

TOKENS = 512
MATRICES = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Float32 products on this CPU.")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch chooses)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    import torch
    from torch.nn.functional import linear

    from taught.model.kernels import outer_products, product, products_by

    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for name, (out, width) in MATRICES.items():
        x, W, d = torch.randn(TOKENS, width), torch.randn(out, width), torch.randn(TOKENS, out)
        work = 2 * TOKENS * out * width
        rows += [
            _row(f"{name}: forward", work, args, linear, product, x, W),
            _row(f"{name}: gradient of x", work, args, linear, product, d, W.T),
            _row(f"{name}: gradient of W", work, args, linear, product, d.T, x.T),
        ]
    d, a, built = torch.randn(20, 60, 1536), torch.randn(20, 60, 576), torch.empty(20, 1536, 576)
    work = 2 * 20 * 60 * 1536 * 576
    rows.append(_row("build 20 gradients", work, args, _bmm, outer_products, d, a, built))
    G, H = torch.randn(200, 1536 * 576), torch.randn(64, 1536 * 576)
    work = 2 * 200 * 64 * 1536 * 576
    rows.append(_row("200 x 64 inner products", work, args, linear, product, G, H))
    common.record("kernels", rows, {"tokens": TOKENS, "fast": products_by()}, folder=args.out)


def _bmm(d: Any, a: Any, out: Any) -> None:
    import torch

    torch.bmm(d.mT, a, out=out)


def _row(
    name: str, work: int, args: argparse.Namespace, plain: Callable[..., Any], fast: Callable[..., Any], *inputs: Any
) -> Row:
    times: dict[str, list[float]] = {"torch": [], "fast": []}
    for turn in range(args.repeat + 2):
        for which, function in (("torch", plain), ("fast", fast)):
            with Clock() as clock:
                function(*inputs)
            if turn >= 2:
                times[which].append(clock.seconds)
    speed = {which: work / statistics.median(t) / 1e9 for which, t in times.items()}
    return {
        "product": name,
        "torch GFLOP/s": round(speed["torch"]),
        "fast GFLOP/s": round(speed["fast"]),
        "ratio": round(speed["fast"] / speed["torch"], 2),
    }


if __name__ == "__main__":
    main()
