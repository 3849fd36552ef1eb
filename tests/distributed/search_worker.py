# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Searches for the ranks of tiny LLaMAs through the HF Trainer, on one or several processes.

    python search_worker.py FOLDER                              one process
    torchrun --nproc_per_node 2 search_worker.py FOLDER         several

Writes `<method>-<process>.pt` with what the process saw, and the finished adapter in `<method>`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer

from peft_rank import RankAllocationCallback, get_rank_pattern
from searches import METHODS, masks, searched
from tiny_models import TINY_MODELS, training_arguments


torch.set_num_threads(1)
GLOBAL_BATCH = 4


def run(folder: Path, method: str) -> None:
    llama, processes = TINY_MODELS["llama"], int(os.environ.get("WORLD_SIZE", "1"))
    args = training_arguments(
        folder / method,
        max_steps=6,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        learning_rate=METHODS[method][2],
        ddp_find_unused_parameters=False,  # DDP raises if a parameter has no gradient
    )
    model = searched(method, llama)
    trainer = Trainer(model, args, train_dataset=llama.dataset(), callbacks=[RankAllocationCallback()])
    finalize, seen = model.base_model.finalize, {}

    def watched(*arguments, **settings) -> None:
        seen["masks"] = masks(model)
        seen["noise"] = model.base_model._draw("default", model.base_model.mask_logits("default")).hard.detach()
        finalize(*arguments, **settings)

    model.base_model.finalize = watched
    trainer.train()
    trainer.save_model(str(folder / method))
    seen |= {"engine": type(trainer.model_wrapped).__name__, "pattern": get_rank_pattern(model)}
    batch = llama.make_batch(4, seed=7)
    with torch.no_grad():
        seen["logits"] = model.eval()(**batch).logits
    torch.save(seen, folder / f"{method}-{args.process_index}.pt")


if __name__ == "__main__":
    for name in ("ars", "l2lrc"):
        run(Path(sys.argv[1]), name)
