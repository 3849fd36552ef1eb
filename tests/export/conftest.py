# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What tests of artifacts share."""

from __future__ import annotations

import pytest
import transformers.utils.hub

from cards import Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: stand_in)
    return stand_in
