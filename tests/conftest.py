# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What holds for every test: offline, one thread a process, seeded."""

from __future__ import annotations

import os


# Read by the libraries when they are imported, hence before the imports below; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
import torch
import transformers

from tiny_models import TINY_MODELS, TinyModel


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever tests its process ran before."""
    transformers.set_seed(0)


@pytest.fixture(params=TINY_MODELS.values(), ids=TINY_MODELS.keys())
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    """Each tiny architecture in turn."""
    return request.param


@pytest.fixture
def llama() -> TinyModel:
    """The decoder for tests that need just one architecture."""
    return TINY_MODELS["llama"]


@pytest.fixture
def deberta() -> TinyModel:
    """The encoder of the paper's GLUE experiments, for tests that need just one architecture."""
    return TINY_MODELS["deberta-v3"]
