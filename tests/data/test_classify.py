"""Labels for documents that come without."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from taught.data.classify import load_classifier
from taught.errors import UserError

TEXTS = ["a b c", "c c", "b", "a a a a b", "c b a c b a"]


@pytest.fixture
def mine(monkeypatch) -> ModuleType:
    module = ModuleType("my_classifier")
    monkeypatch.setitem(sys.modules, "my_classifier", module)
    return module


def test_a_function_gets_the_column_and_the_texts(mine) -> None:
    mine.label = lambda column, texts: [f"{column} {len(text)}" for text in texts]
    assert load_classifier("my_classifier:label")("size", TEXTS) == [f"size {len(text)}" for text in TEXTS]


@pytest.mark.parametrize("name", ["no_such_module:label", "my_classifier:nothing", "./nowhere", "my_classifier:x"])
def test_a_classifier_that_is_not_there_is_refused(mine, monkeypatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mine.x = 3
    with pytest.raises(UserError, match="the classifier (cannot be loaded|is not a function)"):
        load_classifier(name)


def test_a_model_labels_as_it_does_one_text_at_a_time(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[PAD]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[PAD]")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(4)
    labels = {0: "art", 1: "law", 2: "sea"}
    config = BertConfig(
        vocab_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=4,
        initializer_range=2.0,
        id2label=labels,
        label2id={name: k for k, name in labels.items()},
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    found = load_classifier(str(tmp_path))("topic", TEXTS)
    with torch.no_grad():
        alone = [model(torch.tensor([tokenizer(text).input_ids[:4]])).logits.argmax().item() for text in TEXTS]
    assert found == [labels[k] for k in alone] and len(set(found)) > 1
