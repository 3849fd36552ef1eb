# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Loads exports with PEFT and transformers alone, and writes their outputs to a file.

python load_without_us.py OUTPUTS.safetensors FOLDER/NAME...
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import PeftModel
from safetensors.torch import save_file

from tiny_models import TINY_MODELS, TinyModel


def outputs(tiny: TinyModel, folder: Path) -> dict[str, torch.Tensor]:
    """Outputs for the batch of `runs.logits`, by the way that the adapter was loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(tiny.make_model(), str(folder))
    native = tiny.make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        info = native.load_adapter(str(folder))
    assert info is None or not (info.missing_keys or info.unexpected_keys), info
    batch = tiny.make_batch(4, seed=7)
    with torch.no_grad():
        return {
            "peft": loaded.eval()(**batch).logits,
            "transformers": native.eval()(**batch).logits,
            "merged": loaded.merge_and_unload().eval()(**batch).logits,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for folder in map(Path, sys.argv[2:]):
        tiny = TINY_MODELS[folder.name]
        for form in ("lora", "padded"):
            found.update({f"{folder.name}/{form}/{way}": value for way, value in outputs(tiny, folder / form).items()})
    assert "peft_rank" not in sys.modules
    save_file(found, sys.argv[1])
