# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Writes docs/benchmarks.md from the files in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _common import RESULTS, STEP_OPTIONS
from _engine_tables import ENGINES
from _pretraining_tables import sections
from _quality_tables import best, epochs, grid, read_study


PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
SECTIONS = {
    "methods": "All seven linears, 32 layers, rank 16 (AdaLoRA and SalientLoRA: 16 to 8)",
    "compiled": "The same, compiled block by block",
    "ranks": "Against the initial rank (4 x 512 tokens)",
    "shrinking": "SalientLoRA before the first and after the last decision (64 ranks to 8)",
    "modes": "Other modes",
}
COMPRESSION = {
    "svd": "SVD",
    "activation": "activation (ASVD)",
    "fisher": "Fisher (FWSVD)",
    "fisher_two_sided": "Fisher, two-sided",
    "importance": "importance (IWSVD)",
    "em": "EM",
    "nesterov": "Nesterov",
    "anderson": "Anderson",
    "whitening": "whitening (SVD-LLM)",
}


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def origin(result: dict[str, Any]) -> str:
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "peft"))
    measured = f"Measured {environment['date']} on {environment['device'].strip()}, {versions}."
    return " ".join([measured, *([environment["note"]] if "note" in environment else [])]) + "\n"


def training_step(result: dict[str, Any], section: str) -> str:
    rows = [row for row in result["rows"] if row["section"] == section and "error" not in row]
    lines, floors = [], {}
    for row in rows:
        options = ", ".join(name if row[name] is True else str(row[name]) for name in STEP_OPTIONS if name in row)
        key = (row["shape"], options if row["method"] == "floor" or section in ("modes", "compiled") else "")
        floors |= {key: row["ms"]} if row["method"] == "floor" else {}
        ratio = f"{row['ms'] / floors[key]:.2f}" if key in floors else ""
        setting = (
            options or row.get("phase", "") or (f"rank {row['rank']}" if section == "ranks" and "rank" in row else "")
        )
        cells = [row["method"], row["shape"], setting, f"{row['ms']} ({row['ms_iqr']})", ratio]
        cells += [row.get("kernels_ms", ""), row.get("host_ms", ""), row["peak_gib"]]
        extra = [row.get("parameters", ""), row.get("optimizer_mib", "")] if section == "shrinking" else []
        lines.append([*cells, *extra])
    header = ["method", "tokens", "setting", "ms (interquartile range)", "over the floor"]
    header += ["kernels, ms", "host, ms", "peak GiB"]
    return table(header + (["parameters", "optimizer MiB"] if section == "shrinking" else []), lines)


def decisions(result: dict[str, Any]) -> str:
    columns = ["n", "window", "kind", "graph_scope", "seconds", "extra_gib"]
    return table(columns, [[row.get(column, "") for column in columns] for row in result["rows"]])


def compressed_memory(result: dict[str, Any]) -> str:
    rows = {row["model"]: row for row in result["rows"] if row["part"] == "memory"}
    dense, lines = rows["dense"], []
    for row in rows.values():
        parts = (row["parameters"] / dense["parameters"], row["mib"] / dense["mib"])
        ranks = ", ".join(f"{rank} {name}" for name, rank in row["ranks"].items() if rank is not None)
        lines.append([row["model"], row["parameters"], f"{parts[0]:.4f}", row["mib"], f"{parts[1]:.4f}", ranks])
    return table(["model", "parameters", "of dense", "MiB", "of dense", "ranks in every layer"], lines)


def compressed_speed(result: dict[str, Any]) -> str:
    """A line for each case and variant: ms, and how many times as fast as dense."""
    rows = [row for row in result["rows"] if row["part"] == "speed"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    times = {(row["case"], row["variant"], row["model"]): row["ms"] for row in rows if "ms" in row}
    lines = []
    for case, variant in dict.fromkeys((row["case"], row["variant"]) for row in rows):
        dense = times.get((case, variant, "dense"))
        cells = []
        for model in models:
            ms = times.get((case, variant, model))
            faster = f" ({dense / ms:.2f})" if ms and dense and model != "dense" else ""
            cells.append("" if ms is None else f"{ms:.2f}{faster}")
        lines.append([case, variant, *cells])
    cases = list(dict.fromkeys(line[0] for line in lines))
    return table(["case", "variant", *models], sorted(lines, key=lambda line: cases.index(line[0])))


def decomposition_time(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["part"] == "decomposition" and row["layers"]]
    names = list(rows[0]["seconds_by_linear"])
    lines = []
    for row in rows:
        # threads wait for each other: what each of them took says nothing
        alone = row["workers"] == 1
        by_linear = [f"{row['seconds_by_linear'][name] / row['layers']:.3f}" if alone else "" for name in names]
        lines.append([COMPRESSION[row["method"]], row["workers"], row["layers"], f"{row['seconds']:.1f}", *by_linear])
    return table(["method", "at a time", "layers", "seconds", *(f"{name}, s each" for name in names)], lines)


SPENT = {"uniform": "uniform", "relative": "parts", "absolute": "amounts"}


def compression_quality(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["decomposition"] != "dense"]
    columns = list(dict.fromkeys((row["allocation"], row["ratio"]) for row in rows))
    found = {(row["decomposition"], row["allocation"], row["ratio"]): row.get("perplexity") for row in rows}
    lines = [
        [label, *(_number(found.get((method, *column))) for column in columns)]
        for method, label in COMPRESSION.items()
        if any((method, *column) in found for column in columns)
    ]
    return table(["decomposition", *(f"{SPENT[allocation]}, {ratio}" for allocation, ratio in columns)], lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def glue_by_rank(result: dict[str, Any], task: str) -> str:
    """Means over the seeds, before and after training again."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for row in result["rows"]:
        for stage in ("before", "after"):
            if row["task"] == task and stage in row:
                found.setdefault((row["method"], row["fifths"], stage), []).append(row[stage])
    means = {key: sum(values) / len(values) for key, values in found.items()}
    columns = [(fifths, stage) for stage in ("before", "after") for fifths in (1, 2, 3, 4)]
    lines = [
        [label, *(_number(means.get((method, *column))) for column in columns)]
        for method, label in COMPRESSION.items()
        if any((method, *column) in means for column in columns)
    ]
    return table(["decomposition", *(f"{fifths}/5 {stage}" for fifths, stage in columns)], lines)


def quality() -> list[str]:
    """The studies of quality at equal budget, as far as they have been run."""
    parts = []
    for name, title, unit, sign, digits in (
        ("glue_quality", "Quality: GLUE, MiniLM-L6 (22.7 M)", "Points, higher is better", 1, 1),
        ("instruct_quality", "Quality: instructions, SmolLM2-135M", "Validation loss, lower is better", -1, 4),
    ):
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            study, runs, tasks = read_study(path)
            note = (
                f"{unit}. Every method at the best of the same grid of learning rates. Parameters: trained at the start, "
                "and left at the end."
            )
            if fields := study["arguments"]["overrides"]:
                told = ", ".join(f"`{name}={value!r}`" for name, value in fields.items())
                note += f" SalientLoRA not at its defaults but with {told}. {study.get('note', '')}"
            parts += [f"## {title}\n", note + "\n", origin(study)]
            head, *lines = best(runs, tasks, sign, digits)
            parts += [table(head, lines), "### The grid\n"]
            head, *lines = grid(runs, digits)
            parts += [table(head, lines)]
    path = RESULTS / "instruct_run.json"
    if path.exists():
        result = json.loads(path.read_text())
        head, *lines = epochs(result)
        note = f"`examples/instruct`, `configs/smollm2-135m.yaml`, once, {result['runs'][0]['seconds']:.0f} s.\n"
        parts += ["### The example's own run\n", note, origin(result), table(head, lines)]
    return parts


def compression() -> list[str]:
    """The parts about compressed models, as far as they have been measured."""
    found = {}
    for name in ("compressed_speed", "compression_quality", "fwsvd_glue"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    parts = []
    if "compressed_speed" in found:
        result = found["compressed_speed"]
        made = {row["part"] for row in result["rows"]}
        note = (
            f"LLaMA-7B shape, {result['settings']['layers']} layers, bfloat16. A model's name is its ratio over the "
            "linears / what its ranks are multiples of. Times in ms of a prefill or a decoding step; in brackets how "
            "many times as fast as dense.\n"
        )
        parts += ["## Compressed models: speed and memory\n", note, origin(result)]
        parts += [compressed_speed(result)] if "speed" in made else []
        parts += [compressed_memory(result)] if "memory" in made else []
        parts += ["### Time to decompose\n", decomposition_time(result)] if "decomposition" in made else []
    if "compression_quality" in found:
        result = found["compression_quality"]
        settings = result["settings"]
        note = (
            f"{settings['model']}, WikiText-2, the first {settings['test_tokens']:,} tokens of the test text, context "
            f"{settings['context']}: {result['rows'][0]['perplexity']} dense. Calibrated on "
            f"{settings['calibration_tokens']:,} tokens of the training text, not trained. Columns: how the budget "
            "is spent and its ratio over the decoder's linears. Parts and amounts are what `spectral_loss` sums up; parts "
            "are the default of `allocation='spectral'` for svd, activation and whitening, amounts for the others.\n"
        )
        parts += ["## Compressed models: perplexity\n", note, origin(result), compression_quality(result)]
    if "fwsvd_glue" in found:
        result = found["fwsvd_glue"]
        settings = result["settings"]
        note = (
            f"{settings['model']}, all linears of the encoder at the same part of the full rank, before and after "
            f"training again (epochs: {settings['epochs']}; seeds: {len({row['seed'] for row in result['rows']})}).\n"
        )
        picture = "![Metric against rank](fwsvd_glue.png)\n"
        parts += ["## Compressed models: GLUE by rank\n", note, picture, origin(result)]
        for task in dict.fromkeys(row["task"] for row in result["rows"]):
            dense = [row["before"] for row in result["rows"] if row["task"] == task and row["method"] == "dense"]
            parts += [f"### {task}: {sum(dense) / len(dense):.1f} dense\n", glue_by_rank(result, task)]
    return parts


RANKS = {"uniform": "uniform", "spectral": "spectral", "ars": "ARS", "l2lrc": "L2LRC"}


def learned_ranks(result: dict[str, Any], ratio: float) -> str:
    """Means and deviations over the seeds, before and after healing."""
    tasks = list(result["rows"][0]["accuracy"])
    lines = []
    for method, label in {"dense": "dense", **RANKS}.items():
        wanted = (method, None if method == "dense" else ratio)
        rows = [row for row in result["rows"] if (row["method"], row.get("ratio")) == wanted and "perplexity" in row]
        if rows:
            line = [label, f"{mean(row.get('kept', 1.0) for row in rows):.4f}"]
            for found in (rows, [row["healed"] for row in rows if "healed" in row]):
                line.append(_spread([row["perplexity"] for row in found]) if found else "")
                line += [_spread([row["accuracy"][task] for row in found]) if found else "" for task in tasks]
            lines.append([*line, _spread([row["seconds"] for row in rows]) if method != "dense" else ""])
    healed = [f"healed: {name}" for name in ("perplexity", *tasks)]
    return table(["ranks", "kept", "perplexity", *tasks, *healed, "seconds"], lines)


def learned_ranks_encoder(result: dict[str, Any], ratio: float) -> str:
    """Means and deviations over the seeds of each task, before and after training again."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    rows = [row for row in result["rows"] if row["ratio"] in (ratio, 1.0) and "before" in row]
    lines = []
    for decomposition, ranks in dict.fromkeys((row["decomposition"], row["ranks"]) for row in rows):
        found = [row for row in rows if (row["decomposition"], row["ranks"]) == (decomposition, ranks)]
        line = [COMPRESSION.get(decomposition, decomposition), RANKS.get(ranks, "")]
        for stage in ("before", "after"):
            for task in tasks:
                values = [row[stage] for row in found if row["task"] == task and stage in row]
                line.append(_spread(values) if values else "")
        lines.append(line)
    stages = [f"{task}, {stage}" for stage in ("before", "after") for task in tasks]
    return table(["decomposition", "ranks", *stages], lines)


def learned() -> list[str]:
    """The parts about learned ranks, as far as they have been measured."""
    parts = []
    names = ("learned_ranks", "learned_ranks_fisher", "learned_ranks_encoder", "learned_ranks_encoder_spectral")
    for name in names:
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            settings = result["settings"]
            make, title = learned_ranks, "perplexity and accuracy"
            if "search_steps" in settings:
                start = {"full": "all ranks", "spectral": "the budget by spectra"}[settings["start"]]
                make, title = learned_ranks_encoder, f"GLUE, searched from {start}"
                what = f"all linears of the encoder, searched for {settings['search_steps']} steps, before and after training again"
            else:
                what = f"the decoder's linears, {COMPRESSION[settings['decomposition']]}, WikiText-2; searched, calibrated "
                what += "and healed on the same text"
            note = f"{settings['model']}, {what}. Mean and standard deviation over {len(settings['seeds'])} seed(s).\n"
            parts += [f"## Learned ranks: {title}\n", note, origin(result)]
            for ratio in settings["ratios"]:
                parts += [f"### Ratio {ratio}\n", make(result, ratio)]
    for path in (RESULTS / "search_step.json", RESULTS / "search_step_8192.json"):
        if path.exists():
            result = json.loads(path.read_text())
            settings = result["settings"]
            tokens = f"{settings['batch']} x {settings['tokens']} tokens"
            columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
            lines = [[row.get(column, "") for column in columns] for row in result["rows"]]
            note = f"LLaMA-7B shape, {settings['layers']} layers, bfloat16.\n"
            parts += [f"## A step of a search, {tokens}\n", note, origin(result), table(columns, lines)]
    return parts


METHODS = {"none": "as it is", "salientlora": "SalientLoRA", "lora": "LoRA", "full": "full fine-tuning"}
ERRORS = "phoneme_error_rate"


def pronunciation(result: dict[str, Any]) -> str:
    """The learning rates with the first seed, then each method at its best one: mean and deviation over the seeds."""
    settings, rows = result["settings"], result["rows"]
    first = {(row["method"], row["learning_rate"]): row for row in rows if row["seed"] == settings["seeds"][0]}
    grid, final = [], []
    for method, label in METHODS.items():
        tried = {rate: row["validation"][ERRORS] for (name, rate), row in first.items() if name == method}
        if method != "none":
            grid.append([label, *(f"{100 * tried[rate]:.2f}" if rate in tried else "" for rate in settings["rates"])])
        best = min(tried, key=tried.get)
        found = [row for row in rows if row["method"] == method and row["learning_rate"] == best]
        metrics = [(split, name) for split in ("validation", "test") for name in (ERRORS, "exact_match")]
        cells = [_spread([100 * row[split][name] for row in found]) for split, name in metrics]
        trained = "" if method == "none" else f"{found[0]['trainable_parameters']['end']:,}"
        rate = "" if method == "none" else f"{best:g}"
        final.append([label, rate, len(found), found[0]["total_rank"] or "", trained, *cells])
    columns = ["learning rate", "seeds", "total rank", "trained at the end"]
    figures = [f"{name}, {split}" for split in ("validation", "test") for name in ("phoneme errors", "exact")]
    rates = table(["method", *(f"{rate:g}" for rate in settings["rates"])], grid)
    return (
        f"Phoneme error rate on the validation split in % by learning rate, seed {settings['seeds'][0]}:\n\n{rates}\n"
        f"At the best of these, in %, mean and standard deviation over the seeds:\n\n"
        + table(["method", *columns, *figures], final)
    )


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def adaptation() -> list[str]:
    path = RESULTS / "g2p.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    settings = result["settings"]
    note = (
        "A BART of 0.75 million weights that turns words into American phonemes, adapted to British ones "
        f"({settings['epochs']:g} epoch(s) of 40,000 words in batches of {settings['batch']}; 2,000 words each to choose "
        f"the learning rate and to test). SalientLoRA goes from rank {settings['init_r']} to {settings['target_r']} on "
        f"average with a regularizer of {settings['orth_reg_weight']:g}, LoRA has rank {settings['target_r']}.\n"
    )
    return ["## Encoder-decoder: American to British pronunciation\n", note, origin(result), pronunciation(result)]


def engines() -> list[str]:
    """The parts about several GPUs and quantized bases, as far as they have been measured."""
    parts = []
    for name, (title, note, make) in ENGINES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            parts += [f"## {title}\n", note.format(**result["settings"]) + "\n", origin(result), table(*make(result))]
    return parts


def pretraining() -> list[str]:
    """The parts about pre-training, as far as they have been measured."""
    parts = []
    for title, note, result, cells in sections(RESULTS, PAGE.parent):
        parts += [f"## {title}\n", note + "\n", origin(result), table(*cells)]
    return parts


def main() -> None:
    parts = [
        "# Benchmarks\n",
        "Made by `benchmarks/tables.py` from the files in `benchmarks/results`; see its README.\n",
    ]
    parts.append("## Training step\n\nLLaMA-7B shape, bfloat16, fused AdamW, SalientLoRA with everything on.\n")
    for name in ("training_step", "training_step_modes", "training_step_ranks"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        parts.append(origin(result))
        for section in dict.fromkeys(row["section"] for row in result["rows"]):
            parts += [f"### {SECTIONS[section]}\n", training_step(result, section)]
    parts.append("## One decision\n")
    for path in sorted(RESULTS.glob("decision_*.json")):
        result = json.loads(path.read_text())
        parts += [origin(result), decisions(result)]
    parts += quality()
    parts += compression()
    parts += learned()
    parts += adaptation()
    parts += engines()
    parts += pretraining()
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
