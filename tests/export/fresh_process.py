# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Loads compressed models of all architectures in a process of its own, and writes their outputs to a file.

python fresh_process.py with|without FOLDER

`with`: this package is imported first; FOLDER/NAME/{saved,sharded,half} are loaded in every way and saved again.
`without`: it never is; FOLDER/NAME/dense has to load, and what becomes of the others is written down.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

if sys.argv[1] == "with":
    import peft_rank

import torch
import transformers
from safetensors.torch import save_file

from tiny_models import TINY_MODELS, TinyModel


@torch.no_grad()
def logits(model: torch.nn.Module, tiny: TinyModel) -> torch.Tensor:
    return model(**tiny.make_batch(4, seed=7)).logits


def with_us(tiny: TinyModel, folder: Path) -> dict[str, torch.Tensor]:
    from compressed_models import AUTO_CLASSES

    auto_class = AUTO_CLASSES[tiny.task_type]
    first = auto_class.from_pretrained(folder / "saved")
    found = {"saved": logits(first, tiny)}
    first.save_pretrained(folder / "second")
    second = auto_class.from_pretrained(folder / "second")
    found["second"] = logits(second, tiny)
    peft_rank.save_compressed(second, folder / "third")
    found["third"] = logits(peft_rank.load_compressed(folder / "third"), tiny)
    found["sharded"] = logits(tiny.model_class.from_pretrained(folder / "sharded"), tiny)
    found["device_map"] = logits(auto_class.from_pretrained(folder / "sharded", device_map="auto"), tiny)
    half = peft_rank.load_compressed(folder / "half")
    if {parameter.dtype for parameter in half.parameters()} != {torch.bfloat16}:
        raise TypeError(f"{folder / 'half'} is not in bfloat16")
    found["half"] = logits(half, tiny)
    return found


def without_us(tiny: TinyModel, folder: Path) -> dict[str, torch.Tensor]:
    told = {}
    for name in ("saved", "sharded", "second"):
        try:
            tiny.model_class.from_pretrained(folder / name)
            told[name] = "loaded"
        except OSError as error:
            told[name] = str(error)
    (folder / "told.json").write_text(json.dumps(told))
    model, info = tiny.model_class.from_pretrained(folder / "dense", output_loading_info=True)
    if any(info.values()):
        raise RuntimeError(f"{folder / 'dense'}: {info}")
    return {"dense": logits(model, tiny)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    load = {"with": with_us, "without": without_us}[sys.argv[1]]
    for tiny in TINY_MODELS.values():
        folder = Path(sys.argv[2], tiny.name)
        save_file(load(tiny, folder), folder / f"{sys.argv[1]}.safetensors")
    if sys.argv[1] == "without" and "peft_rank" in sys.modules:
        raise ImportError("peft_rank was imported")
