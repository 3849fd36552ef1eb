# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Every Python block of the README and of the pages in `docs/` runs, page by page and block after block, offline.

Models that a page names are tiny random ones here, saved in a folder of that name, which transformers prefers to a hub.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizer

from tiny_models import ENCODER, TINY_MODELS, VOCAB


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _save_models(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = BertTokenizer(vocab=vocabulary, pad_token="[PAD]", eos_token="[SEP]")
    encoder = {key: value for key, value in ENCODER.items() if key != "num_labels"} | {"max_position_embeddings": 64}
    models = {
        "sentence-transformers/all-MiniLM-L6-v2": BertModel(BertConfig(vocab_size=VOCAB, **encoder)),
        "HuggingFaceTB/SmolLM2-135M": TINY_MODELS["llama"].make_model(max_position_embeddings=64),
        "microsoft/deberta-v3-base": TINY_MODELS["deberta-v3"].make_model(max_position_embeddings=64),
        "facebook/bart-base": TINY_MODELS["bart"].make_model(max_position_embeddings=64),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL about transformers, which are not ours to change
@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))], ids=lambda p: p.name
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    _save_models(tmp_path)
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        # as many empty lines before it as the page has, so that a traceback names the page's line
        exec(compile("\n" * line + block[1], page, "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
