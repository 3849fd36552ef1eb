# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""From texts to calibration batches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_rank.calibration.texts import read_texts, sentence_batches, text_batches


WORDS = [f"w{i}" for i in range(1000)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, wI -> I + 3; [CLS] and [SEP] around a text where special tokens are wanted."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def test_stretches_are_spread_and_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(WORDS[i : i + 10]) for i in range(0, 1000, 10)]
    batches = text_batches(texts, tokenizer, samples=10, length=20, batch_size=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    starts = ids[:, 1]  # the first word may be cut
    assert ids.shape == (10, 20)
    assert bool((ids[:, 2:] == ids[:, 1:-1] + 1).all())
    assert bool((starts.diff() >= 20).all())
    assert int(starts[-1]) > 800
    for batch in batches:
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert bool((batch["attention_mask"] == 1).all())


def test_short_texts_are_used_once(tokenizer: PreTrainedTokenizerFast) -> None:
    (batch,) = text_batches([" ".join(WORDS[:105])], tokenizer, samples=256, length=20, batch_size=256)
    assert torch.equal(batch["input_ids"].flatten(), torch.arange(3, 103))
    # fewer characters than samples
    (batch,) = text_batches(["w1 w2 w3"], tokenizer, samples=256, length=2)
    assert batch["input_ids"].tolist() == [[4, 5]]
    with pytest.raises(ValueError, match="The text has 105 tokens, fewer than the 200 of one sample"):
        text_batches([" ".join(WORDS[:105])], tokenizer, samples=4, length=200)
    with pytest.raises(ValueError, match="The text has 0 tokens"):
        text_batches([], tokenizer)


def test_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["", *(f"w{i} w{i + 1} w{i + 2}" for i in range(8)), "  "]
    batches = sentence_batches(texts, tokenizer, samples=4, length=4)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, i + 3, i + 4, 2]] for i in (0, 2, 4, 6)]
    (batch,) = sentence_batches(["w1", "w1 w2"], tokenizer, batch_size=2)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert "labels" not in batch
    with pytest.raises(ValueError, match="All texts are empty"):
        sentence_batches(["", " "], tokenizer)


def test_files(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two\n\nthree", "ü"))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for ending in ("", ".gz"):
        assert read_texts(tmp_path / f"a.jsonl{ending}") == ["one", "two\n\nthree", "ü"]
        assert read_texts(tmp_path / f"a.txt{ending}") == ["one\n\ntwo"]
    with pytest.raises(ValueError, match="must be a JSON object with a text in 'story'"):
        read_texts(tmp_path / "a.jsonl", "story")
    with pytest.raises(ValueError, match=r"ends in \.txt or \.jsonl"):
        read_texts(tmp_path / "a.csv")
