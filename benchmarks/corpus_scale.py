"""How fast a large corpus goes through reading, sketches and means by bin, and whether memory grows with it.

    python -m benchmarks.corpus_scale --documents 5000 20000      # minutes; peak memory should be the same
    python -m benchmarks.corpus_scale                             # a million documents

Shards of short made-up documents (20 to 30 words of a topic) are written, then read as a study reads them, sampled over
bins, tokenised and sketched with a tiny model, and asked: the sketches against those of two groups of prompts, a mean
for each bin. Sketches are kept on the disk, and 10 bytes a document in memory. Each size is a process of its own, so
that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.common import Clock, Results, Row
from taught.data.corpus import Corpus, open_corpus, sample_documents
from taught.data.documents import encode_document
from taught.data.subset import Spread
from taught.environment import peak_memory_gb
from taught.run.files import row_groups

TOPICS, FORMATS = 24, 4
WORDS = 12  # of a topic, beside as many that all share
SHARD, CHUNK = 50_000, 4096  # documents of a file, and of a step of sketching
DIM = 256  # numbers of a sketch
COLUMNS = {
    "documents": lambda row: f"{row['documents']:,}",
    "step": lambda row: row["step"],
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "documents a second": lambda row: f"{row['documents'] / row['seconds']:,.0f}",
    "peak memory, GB": lambda row: f"{row['peak_memory_gb']:.2f}",
}
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "topic", "format")])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A corpus of very many short documents.")
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--folder", type=Path, help="where corpus and sketches lie meanwhile (default: temporary)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    """Run each size in a process of its own and write the result."""
    results = Results("corpus_scale", {"bins": TOPICS * FORMATS, "dim": DIM, "parameters": count()}, args.out)
    with common.kept(results, COLUMNS):
        for documents in args.documents:
            with ProcessPoolExecutor(1, get_context("spawn")) as one:
                for row in one.submit(one_size, documents, args.folder).result():
                    results.add(row)


def one_size(documents: int, folder: Path | None) -> list[Row]:
    """Every step on so many documents, with its time."""
    rows: list[Row] = []

    def timed(step: str, clock: Clock) -> None:
        rows.append(
            {"documents": documents, "step": step, "seconds": clock.seconds, "peak_memory_gb": peak_memory_gb()}
        )

    with tempfile.TemporaryDirectory(dir=folder) as place:
        shards, store = Path(place) / "corpus", Path(place) / "sketches"
        with Clock() as clock:
            write_corpus(shards, documents)
        timed("write", clock)
        corpus = open_corpus(shards)
        with Clock() as clock:
            assert sum(1 for _ in corpus) == documents
        timed("read", clock)
        with Clock() as clock:
            sample_documents(corpus, Spread(4000, ("topic", "format"), even=True))
        timed("sample 4,000", clock)
        tokenizer, problem = subject()
        with Clock() as clock:
            bins = fill(store, problem, tokenizer, corpus)
        timed("sketch", clock)
        with Clock() as clock:
            means, counts = ask(store, problem, bins)
        timed("means by bin", clock)
        assert counts.sum() == documents and np.isfinite(means[:, counts > 0]).all()
    return rows


def vocabulary(topic: int) -> list[str]:
    """Words of a topic; -1: those that all topics share."""
    return [f"t{topic}w{i}" for i in range(WORDS)] if topic >= 0 else [f"w{i}" for i in range(WORDS)]


def write_corpus(folder: Path, documents: int) -> None:
    """Shards of made-up documents; the same for the same number."""
    folder.mkdir()
    draw, common_words = random.Random(0), vocabulary(-1)
    words = [[*common_words, *vocabulary(topic)] for topic in range(TOPICS)]
    for start in range(0, documents, SHARD):
        with (
            open(folder / f"{start // SHARD:05}.parquet", "wb") as file,
            row_groups(file, SCHEMA, ("id", "text")) as write,
        ):
            for part in batched(range(start, min(start + SHARD, documents)), CHUNK):
                topics = [draw.randrange(TOPICS) for _ in part]
                texts = [" ".join(draw.choices(words[topic], k=draw.randint(20, 30))) for topic in topics]
                columns = {
                    "id": [f"d{number}" for number in part],
                    "text": texts,
                    "topic": [str(topic) for topic in topics],
                    "format": [str(draw.randrange(FORMATS)) for _ in part],
                }
                write(pa.table(columns, schema=SCHEMA))


def count() -> int:
    """Parameters of the tiny model."""
    _, problem = subject()
    return sum(p.numel() for p in problem.model.parameters())


def subject() -> tuple[Any, Any]:
    """Tokenizer of words, and the problem of a tiny model on prompts of two topics."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from taught.behaviors.loss import Loss
    from taught.core.problem import Problem
    from taught.model.readout import ReadPrompt

    known = ["[UNK]", *(word for topic in range(-1, TOPICS) for word in vocabulary(topic))]
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(1)
    prompts = []
    for topic in (0, 1):
        first = known.index(vocabulary(topic)[0])
        for number in range(20):
            ids = tuple(torch.randint(first, first + WORDS, (24,), generator=draw).tolist())
            prompts.append(ReadPrompt(f"{topic}-{number}", ids[:1], suffixes=(ids[1:],)))
    problem = Problem(model=model, prompts=prompts, behavior=Loss("text"), lr=1e-4, batch_tokens=4096)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]"), problem


def fill(folder: Path, problem: Any, tokenizer: Any, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Sketch every document, chunk by chunk; hashes of the ids and the bin of each, sorted by hash."""
    import torch

    from taught.sketches.fill import example_row, example_sketches
    from taught.sketches.project import Projection
    from taught.sketches.store import SketchStore

    projection = Projection(problem.model, DIM)
    store = SketchStore(folder, projection.record())
    keys, bins = [], []
    for chunk in batched(corpus, CHUNK):
        encoded = [window for record in chunk for window in encode_document(tokenizer, record, 64)]
        examples = [window.example() for window in encoded]
        found = example_sketches(problem, projection, examples)
        order = [i for part in found for i in part.index]
        values = torch.cat([part.values for part in found]).float().numpy()
        store.save("examples", [example_row(examples[i]) for i in order], values)
        keys.append(hashed(window.id for window in encoded))
        own = {r.id: int(r.category) * FORMATS + int(r.flags["format"]) for r in chunk}
        bins.append(np.array([own[window.document] for window in encoded], np.uint16))
    every = np.concatenate(keys)
    order = np.argsort(every)
    return every[order], np.concatenate(bins)[order]


def ask(folder: Path, problem: Any, bins: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean effect [2, bins] of the documents of each bin on the loss of two groups, and the documents of each bin."""
    import torch

    from taught.sketches.fill import prompt_sketches
    from taught.sketches.project import Projection
    from taught.sketches.store import SketchStore

    found = prompt_sketches(problem, Projection(problem.model, DIM), problem.prompts)
    order = np.argsort([i for part in found for i in part.index])
    queries = torch.cat([part.values for part in found]).numpy()[order].reshape(2, -1, DIM).mean(1)
    keys, of = bins
    sums, counts = np.zeros((2, TOPICS * FORMATS)), np.zeros(TOPICS * FORMATS, np.int64)
    for shard, values in SketchStore(folder).read("examples"):
        effects = -problem.lr * queries @ values.T
        own = of[np.searchsorted(keys, hashed(row.id for row in shard.rows))]
        counts += np.bincount(own, minlength=len(counts))
        for group, effect in enumerate(effects):
            sums[group] += np.bincount(own, effect, minlength=len(counts))
    return sums / np.maximum(counts, 1), counts


def batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """The items, so many at a time; as ``itertools`` has it from Python 3.12 on."""
    rest = iter(items)
    while part := tuple(islice(rest, size)):
        yield part


def hashed(ids: Iterable[str]) -> np.ndarray:
    """64-bit hashes of ids."""
    return np.array([int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) for id in ids], np.uint64)


if __name__ == "__main__":
    main()
