# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The command `peft-rank`: look at a saved adapter, turn it into plain LoRA, check that two artifacts agree."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

import safetensors
import transformers

from .export.lora import export_lora_files
from .export.snapshot import read_directory
from .export.verify import compare
from .reporting import rank_grid


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
        warnings.showwarning = _show_warning
        try:
            return arguments.run(arguments)
        except (ValueError, TypeError, RuntimeError, OSError, safetensors.SafetensorError) as error:
            print(f"peft-rank: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-rank", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        command.add_argument("dir", metavar="DIR", help="directory of an adapter that was trained with peft_rank")
        return command

    add("inspect", _inspect, "show method, budget, state and ranks of a saved adapter")
    export = add("export", _export, "write a saved adapter as plain LoRA; needs its files only")
    verify = add("verify", _verify, "compare a saved adapter with its plain LoRA export or its merged model")
    export.add_argument("out", metavar="OUT", help="directory to write the plain LoRA adapter to")
    export.add_argument("--pad", action="store_true", help="zero-pad every module to the largest rank")
    export.add_argument("--base", metavar="MODEL", help="base model to name in the export, if not the recorded one")
    verify.add_argument("other", metavar="OTHER", help="directory of a plain LoRA adapter or of a merged model")
    verify.add_argument("--base", metavar="MODEL", help="base model to load, if not the recorded one")
    verify.add_argument(
        "--num-labels", type=int, metavar="N", help="labels of the classifier, if not those of the saved one"
    )
    verify.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference, relative to outputs above 1 (%(default)s)"
    )
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    summary = read_directory(arguments.dir).summary
    config = summary.config
    state = "finished" if summary.finished else "in the middle of the allocation, the training can be resumed"
    if config.allocation_state is None and not summary.finished:
        state = "above the budget, and nothing to resume from: the allocation never ran or was given up"
    lines = {
        "method": f"{config.peft_type.value}, peft_rank {config.peft_rank_version}",
        "base model": config.base_model_name_or_path or "not recorded",
        "budget": f"{config.target_r} a module, {summary.target_total} in all" if config.allocates else "fixed ranks",
        "state": state,
        "parameters": f"{summary.parameters:,} in the factors, {summary.other_parameters:,} beside them",
        "size": f"{summary.bytes / 1e6:.3g} MB",
    }
    for name, value in lines.items():
        print(f"{name:<11} {value}")
    print(f"\n{rank_grid(summary.ranks)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    directory = export_lora_files(arguments.dir, arguments.out, pad=arguments.pad, base_model=arguments.base)
    print(f"Plain LoRA written to {directory}.")
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
