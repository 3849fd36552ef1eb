# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Quality at equal rank on an encoder-decoder: a small BART learns to pronounce English as the British do.

    python benchmarks/g2p.py --model DIR --data DIR      # DIR/{train,validation,test}.jsonl.gz with word and phonemes

The model turns words into American phonemes; it is adapted by `examples/nlg/run_nlg.py` with the settings of
`configs/bart-g2p.yaml`. SalientLoRA, LoRA and full fine-tuning get the same learning rates with the first seed; the rate
with the lowest phoneme error rate on the validation split is run with the other seeds. LoRA's rank is the one that
SalientLoRA ends with on average. Every row holds the figures of both splits; the test split chooses nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from _common import argument_parser, store


sys.path.append(str(Path(__file__).parents[1] / "examples" / "nlg"))

from run_nlg import parse, run


CONFIG = Path(__file__).parents[1] / "examples" / "nlg" / "configs" / "bart-g2p.yaml"
METHODS = ("salientlora", "lora", "full")
KEPT = ("steps", "allocation", "trainable_parameters", "total_rank", "seconds")


def flags(args: Namespace, output_dir: str, **settings: Any) -> list[str]:
    """What is added to the YAML file."""
    files = {f"{split}_file": args.data / f"{split}.jsonl.gz" for split in ("train", "validation", "test")}
    limits = {"max_train_samples": args.max_train_samples, "max_eval_samples": args.max_eval_samples}
    quiet = {"report_to": "none", "disable_tqdm": True}
    values = {"model_name_or_path": args.model, "output_dir": output_dir, **files, **quiet, **limits, **settings}
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def measure(args: Namespace, method: str, rate: float, seed: int) -> dict[str, Any]:
    """One training; none is the model as it is, after a step of length 0."""
    chosen = {"method": method, "learning_rate": rate, "seed": seed}
    trained = chosen | ({"method": "full", "max_steps": 1} if method == "none" else {})
    with tempfile.TemporaryDirectory() as folder:
        report = run(parse([str(CONFIG), *flags(args, folder, **trained)]))
    return chosen | {"validation": report["metrics"], "test": report["test"]} | {key: report[key] for key in KEPT}


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    found = [row for row in rows if row["method"] == method]
    return min(found, key=lambda row: row["validation"]["phoneme_error_rate"])["learning_rate"]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, "g2p")
    parser.add_argument("--model", required=True, help="the American model, its phoneme tokenizer in a folder of it")
    parser.add_argument("--data", type=Path, required=True, help="folder with the British words")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file and measure the rest")
    parser.add_argument("--max-train-samples", type=int, help="for a try-out")
    parser.add_argument("--max-eval-samples", type=int, help="for a try-out")
    args = parser.parse_args(argv)

    _, _, method_args, training_args = parse([str(CONFIG), *flags(args, "unused")])
    settings = {
        "model": Path(args.model).name,
        "data": args.data.name,
        "rates": args.rates,
        "seeds": args.seeds,
        "init_r": method_args.init_r,
        "target_r": method_args.target_r,
        "orth_reg_weight": method_args.orth_reg_weight,
        "batch": training_args.per_device_train_batch_size,
        "epochs": training_args.num_train_epochs,
    }
    rows = json.loads(args.output.read_text())["rows"] if args.resume else []
    store(args.output, rows, **settings)

    def add(method: str, rate: float, seed: int) -> None:
        if any((row["method"], row["learning_rate"], row["seed"]) == (method, rate, seed) for row in rows):
            return
        rows.append(measure(args, method, rate, seed))
        store(args.output, rows, **settings)
        errors = [rows[-1][split]["phoneme_error_rate"] for split in ("validation", "test")]
        print(method, rate, seed, *errors, flush=True)

    add("none", 0.0, args.seeds[0])
    for rate in args.rates:
        for method in METHODS:
            add(method, rate, args.seeds[0])
    for seed in args.seeds[1:]:
        for method in METHODS:
            add(method, best_rate(rows, method), seed)


if __name__ == "__main__":
    main()
