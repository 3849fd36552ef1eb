# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The command `peft-rank`: compress a model, look at what was saved, export it for readers without this package, and check
that two artifacts agree."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .calibration import CalibrationStatistics, calibrate
from .calibration.statistics import statistic_for
from .calibration.texts import read_texts, sentence_batches, text_batches
from .decomposition import STATISTIC
from .export.compressed import add_picture, densify, load_compressed, save_compressed
from .export.directory import is_compressed, read_compressed
from .export.lora import export_lora_files
from .export.snapshot import read_summary
from .export.verify import compare
from .reporting import rank_grid
from .reporting.compression import compressed_table, finish_compression
from .tuners.lowrank import LowRankConfig


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments, by default those of the process.

    Returns:
        `int`: The exit code: 0, 1 if `verify` found a difference, 2 if something could not be read or written.
    """
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what libraries tell developers
        warnings.showwarning = _show_warning
        try:
            return arguments.run(arguments)
        except (ValueError, TypeError, RuntimeError, OSError, safetensors.SafetensorError) as error:
            print(f"peft-rank: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-rank", description=" ".join(__doc__.partition(": ")[2].split()))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    _add_compress(add("compress", _compress, "replace the weights of a model by factors of low rank"))
    inspect = add("inspect", _inspect, "show method, ranks, errors and sizes of a saved adapter or compressed model")
    export = add(
        "export",
        _export,
        "write a saved adapter as plain LoRA (needs its files only), a compressed model as a dense one",
    )
    verify = add("verify", _verify, "compare a saved adapter or compressed model with another form of it")
    for command in (inspect, export, verify):
        command.add_argument(
            "dir", metavar="DIR", help="directory of an adapter, or of a compressed model, of peft_rank"
        )
    export.add_argument("out", metavar="OUT", help="directory to write to")
    export.add_argument("--pad", action="store_true", help="plain LoRA: zero-pad every module to the largest rank")
    export.add_argument(
        "--base", metavar="MODEL", help="plain LoRA: base model to name in it, if not the recorded one"
    )
    verify.add_argument(
        "other", metavar="OTHER", help="directory of a plain LoRA adapter, or of a merged, compressed or dense model"
    )
    verify.add_argument("--base", metavar="MODEL", help="base model to load, if not the recorded one")
    verify.add_argument(
        "--num-labels", type=int, metavar="N", help="labels of the classifier, if not those of the saved one"
    )
    verify.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference, relative to outputs above 1 (%(default)s)"
    )
    return parser


# --- compress ---------------------------------------------------------------------------------------------------------


def _add_compress(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="directory or Hub name of a transformers model")
    add("out", metavar="OUT", help="directory to write the compressed model to")
    size = command.add_argument_group("size, one of")
    size.add_argument("--ratio", type=float, help="kept parameters / dense parameters of the targeted modules")
    size.add_argument("--rank", type=int, help="the same rank for every targeted module")
    size.add_argument(
        "--rank-pattern", nargs="+", type=_named_rank, metavar="NAME=RANK", help="ranks by module name, as q_proj=384"
    )
    how = command.add_argument_group("how")
    how.add_argument("--decomposition", choices=STATISTIC, default="svd", help="(%(default)s)")
    how.add_argument("--alpha", type=float, default=0.5, help="power of the statistic (%(default)s)")
    how.add_argument("--allocation", choices=("uniform", "spectral"), default="uniform", help="(%(default)s)")
    how.add_argument("--ratio-scope", choices=("targets", "model"), default="targets", help="(%(default)s)")
    how.add_argument("--rank-multiple", type=int, help="ranks are multiples of this, by default fit for the hardware")
    how.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="names, or one regular expression (all linears)"
    )
    how.add_argument("--exclude-modules", nargs="+", metavar="NAME")
    data = command.add_argument_group("calibration, for all decompositions but svd")
    data.add_argument("--text", metavar="FILE", help="a .txt or .jsonl file, may be .gz")
    data.add_argument(
        "--text-column", default="text", metavar="KEY", help="of the text in a line of JSON (%(default)s)"
    )
    data.add_argument("--samples", type=int, default=256, help="(%(default)s)")
    data.add_argument("--length", type=int, help="tokens of a sample, by default 2048 or what the model takes")
    data.add_argument("--batch-size", type=int, default=1, help="(%(default)s)")
    data.add_argument(
        "--max-bytes", type=int, help="memory for statistics; several runs over the text if it is little"
    )
    data.add_argument("--statistics", metavar="FILE", help="use these instead of a text")
    data.add_argument("--save-statistics", metavar="FILE", help="keep them for another compression of this model")
    load = command.add_argument_group("loading")
    load.add_argument("--revision", default="main", help="(%(default)s)")
    load.add_argument("--dtype", default="auto", help="(%(default)s: as stored)")
    load.add_argument("--device", help="by default cuda where there is one; 'auto' spreads the model over all devices")


def _named_rank(text: str) -> tuple[str, int]:
    name, _, rank = text.rpartition("=")
    if not name or not rank.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=RANK, such as q_proj=384")
    return name, int(rank)


def _compress(arguments: argparse.Namespace) -> int:
    config = LowRankConfig(
        rank=arguments.rank,
        ratio=arguments.ratio,
        rank_pattern=dict(arguments.rank_pattern or ()),
        decomposition=arguments.decomposition,
        alpha=arguments.alpha,
        allocation=arguments.allocation,
        ratio_scope=arguments.ratio_scope,
        rank_multiple=arguments.rank_multiple,
        target_modules=_targets(arguments.target_modules) or (None if arguments.rank_pattern else "all-linear"),
        exclude_modules=_targets(arguments.exclude_modules),
    )
    _check_out(arguments.out, arguments.model)
    if statistic_for(config.decomposition) is not None and arguments.text is None and arguments.statistics is None:
        raise ValueError(
            f"--decomposition {config.decomposition} weighs by statistics: give a text to calibrate on, --text FILE, or what "
            "was saved of one, --statistics FILE."
        )
    model, tokenizer = _load(arguments)
    if type(model).__name__.endswith("ForSequenceClassification"):
        config.task_type = "SEQ_CLS"  # 'all-linear' leaves the classifier out
    dense_parameters = model.num_parameters()
    config.statistics = _statistics(arguments, config, model, tokenizer)
    model = finish_compression(get_peft_model(model, config))
    save_compressed(model, arguments.out, tokenizer=tokenizer)
    with suppress(ImportError):  # pictures are an extra
        add_picture(arguments.out)
    print(compressed_table(arguments.out))
    kept = model.num_parameters()
    print(f"{dense_parameters:,} -> {kept:,} parameters ({kept / dense_parameters:.1%}) in {arguments.out}")
    return 0


def _check_out(out: str, model: str) -> None:
    """Before anything takes long."""
    if os.path.realpath(out) == os.path.realpath(model):
        raise ValueError(f"{out} is the model itself. Name another directory.")
    if os.path.isfile(out):
        raise ValueError(f"{out} is a file. Name another directory.")


def _targets(names: list[str] | None) -> list[str] | str | None:
    """One name that is none is a regular expression, or 'all-linear'."""
    if names is None or len(names) > 1 or names[0].replace(".", "").replace("_", "").isalnum():
        return names
    return names[0]


def _load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.revision)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{arguments.model} is of class {name}, which transformers does not have.")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model_class.from_pretrained(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device_map=device
    )
    try:
        return model, AutoTokenizer.from_pretrained(arguments.model, revision=arguments.revision)
    except (OSError, ValueError):
        if arguments.text is not None:
            raise
        return model, None


def _statistics(
    arguments: argparse.Namespace, config: LowRankConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationStatistics | None:
    needed = statistic_for(config.decomposition)
    if needed is None:
        return None
    if arguments.statistics is not None:
        return CalibrationStatistics.load(arguments.statistics)
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not causal and (needed in ("fisher", "importance") or model.config.is_encoder_decoder):
        raise ValueError(
            f"--decomposition {config.decomposition} of {type(model).__name__} needs more than a text: call "
            "`peft_rank.calibrate` with batches that have labels."
        )
    longest = vars(model.config.get_text_config()).get("max_position_embeddings") or 2048
    statistics = calibrate(
        model,
        (text_batches if causal else sentence_batches)(
            read_texts(arguments.text, arguments.text_column),
            tokenizer,
            samples=arguments.samples,
            length=arguments.length or min(2048, longest),
            batch_size=arguments.batch_size,
        ),
        config=config,
        max_bytes=arguments.max_bytes,
    )
    if arguments.save_statistics is not None:
        statistics.save(arguments.save_statistics)
    return statistics


# --- inspect, export, verify ------------------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    return _inspect_compressed(arguments.dir) if is_compressed(arguments.dir) else _inspect_adapter(arguments.dir)


def _inspect_compressed(directory: str) -> int:
    summary = read_compressed(directory)
    method = ", ".join(
        str(summary.facts[key]) for key in ("method", "decomposition") if summary.facts.get(key) is not None
    )
    _print_lines(
        {
            "model": f"{summary.architecture}, compressed with peft_rank {summary.facts.get('peft_rank_version')}",
            "base model": summary.base_model or "not recorded",
            "method": method or "not recorded",
            "parameters": f"{summary.parameters:,} of {summary.dense_parameters:,} ({summary.ratio:.1%})",
            "size": f"{summary.bytes / 1e6:.3g} MB",
        }
    )
    print(f"\n{compressed_table(directory)}\n\n{rank_grid(summary.ranks)}")
    return 0


def _inspect_adapter(directory: str) -> int:
    summary = read_summary(directory)
    config = summary.config
    state = "finished" if summary.finished else "in the middle of the allocation, the training can be resumed"
    if config.allocation_state is None and not summary.finished:
        state = "above the budget, and nothing to resume from: the allocation never ran or was given up"
    _print_lines(
        {
            "method": f"{config.peft_type.value}, peft_rank {config.peft_rank_version}",
            "base model": config.base_model_name_or_path or "not recorded",
            "budget": summary.budget,
            "state": state,
            "parameters": f"{summary.parameters:,} in the factors, {summary.other_parameters:,} beside them",
            "size": f"{summary.bytes / 1e6:.3g} MB",
        }
    )
    print(f"\n{rank_grid(summary.ranks)}")
    return 0


def _print_lines(lines: dict[str, str]) -> None:
    for name, value in lines.items():
        print(f"{name:<11} {value}")


def _export(arguments: argparse.Namespace) -> int:
    if not is_compressed(arguments.dir):
        directory = export_lora_files(arguments.dir, arguments.out, pad=arguments.pad, base_model=arguments.base)
        print(f"Plain LoRA written to {directory}.")
        return 0
    if arguments.pad or arguments.base:
        raise ValueError("--pad and --base are for adapters; a compressed model is written as a dense one.")
    _check_out(arguments.out, arguments.dir)
    densify(load_compressed(arguments.dir)).save_pretrained(arguments.out)
    try:
        AutoTokenizer.from_pretrained(arguments.dir).save_pretrained(arguments.out)
    except (OSError, ValueError):
        pass  # none was saved with the model
    print(f"Dense model written to {Path(arguments.out)}.")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    transformers.utils.logging.disable_progress_bar()
    difference = compare(arguments.dir, arguments.other, base_model=arguments.base, num_labels=arguments.num_labels)
    same = difference.within(arguments.tolerance)
    print(
        f"largest difference {difference.largest:.3g} of outputs up to {difference.scale:.3g}: "
        f"{'the same model' if same else f'NOT the same model (tolerance {arguments.tolerance:g})'}"
    )
    return 0 if same else 1


def _show_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
    print(f"peft-rank: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
