# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`examples/nlg`: metrics, settings, data, targets, and the script from end to end on a tiny BART and a tiny T5."""

import functools
import gzip
import importlib
import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForSeq2SeqLM, get_peft_model
from rouge_score.scoring import BootstrapAggregator, Score
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tiny_models import BOS, EOS, FIRST_WORD, PAD, TINY_MODELS, VOCAB


EXAMPLE = Path(__file__).parents[2] / "examples" / "nlg"
BENCHMARKS = EXAMPLE.parents[1] / "benchmarks"
WORDS = [f"w{i}" for i in range(FIRST_WORD, VOCAB)]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory")


@pytest.fixture(scope="module")
def nlg(tmp_path_factory):
    """The example's modules and the benchmark on it. Their names are common, so they are forgotten afterwards."""
    names = ("data", "metrics", "run_nlg", "g2p", "tables")
    with pytest.MonkeyPatch.context() as patch:
        for folder in (BENCHMARKS, EXAMPLE.parent, EXAMPLE):
            patch.syspath_prepend(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("cache"))
        shared = {"methods": importlib.import_module("common.methods")}
        yield SimpleNamespace(**shared, **{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


def flags(**values) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def tokenizer(vocabulary: list[str], **parts) -> PreTrainedTokenizerFast:
    """`<s> ... </s>` around the tokens of a fixed vocabulary."""
    specials = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3}
    ids = specials | {token: FIRST_WORD + i for i, token in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """Two tiny models with a tokenizer of words, and pairs of texts: the target is the first words of the source."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("bart", "t5"):
        TINY_MODELS[name].make_model().save_pretrained(folder / name)
        tokenizer(WORDS, pre_tokenizer=pre_tokenizers.WhitespaceSplit()).save_pretrained(folder / name)
    generator = np.random.default_rng(0)
    for name, count in {"train": 64, "dev": 12, "test": 8}.items():
        sources = [" ".join(generator.choice(WORDS, 6)) for _ in range(count)]
        rows = [{"number": i, "text": s, "gist": " ".join(s.split()[:3])} for i, s in enumerate(sources)]
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return SimpleNamespace(
        folder=folder, **{name: str(folder / f"{name}.jsonl.gz") for name in ("train", "dev", "test")}
    )


# --- metrics ---------------------------------------------------------------------------------------------------------


def literal_rouge_n(prediction: str, reference: str, n: int) -> float:
    """F-measure of the n-grams that both have, each counted as often as in the text that has fewer of it."""

    def grams(text):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    a, b = grams(prediction), grams(reference)
    return 2 * (a & b).total() / (a.total() + b.total()) if a and b else 0.0


def literal_rouge_l(prediction: str, reference: str) -> float:
    @functools.cache
    def common(a, b):
        if not a or not b:
            return 0
        return 1 + common(a[1:], b[1:]) if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))

    a, b = tuple(prediction.split()), tuple(reference.split())
    return 2 * common(a, b) / (len(a) + len(b))


def test_rouge_equals_its_formula(nlg, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)  # any attempt to reach a host fails
    generator = np.random.default_rng(1)
    predictions, references = ([" ".join(generator.choice(list("abcde"), 9)) for _ in range(20)] for _ in range(2))
    pairs = list(zip(predictions, references, strict=True))
    expected = {f"rouge{n}": [literal_rouge_n(*pair, n) for pair in pairs] for n in (1, 2)}
    expected["rougeL"] = expected["rougeLsum"] = [literal_rouge_l(*pair) for pair in pairs]  # one line each
    texts = {"predictions": predictions, "references": references}
    each = nlg.metrics.Rouge().compute(**texts, use_aggregator=False)
    assert each == {kind: pytest.approx(values) for kind, values in expected.items()}

    # The Hub's metric reports the middle of the bootstrap interval, drawn by numpy with the metric's seed.
    np.random.seed(3)
    aggregator = BootstrapAggregator()
    for i in range(20):
        aggregator.add_scores({kind: Score(0, 0, values[i]) for kind, values in expected.items()})
    middle = {kind: interval.mid.fmeasure for kind, interval in aggregator.aggregate().items()}
    assert nlg.metrics.Rouge(seed=3).compute(**texts) == pytest.approx(middle)
    assert middle == pytest.approx({kind: np.mean(values) for kind, values in expected.items()}, abs=0.01)


def test_rouge_of_several_references_lines_and_stems(nlg):
    rouge = nlg.metrics.Rouge(seed=0)
    # the example of the Hub's page
    found = rouge.compute(
        predictions=["hello there", "general kenobi"],
        references=[["hello", "there"], ["general kenobi", "general yoda"]],
    )
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 0.5, "rougeL": 5 / 6, "rougeLsum": 5 / 6})
    swapped = rouge.compute(predictions=["a b\nc d"], references=["c d\na b"])
    assert swapped["rougeL"] == 0.5 and swapped["rougeLsum"] == 1.0
    stems = {"predictions": ["he walked"], "references": ["he walks"], "rouge_types": ["rouge1"]}
    assert rouge.compute(**stems) == {"rouge1": 0.5}
    assert rouge.compute(**stems, use_stemmer=True) == {"rouge1": 1.0}


def test_sentences_on_lines(nlg):
    text = "It rained. Did it?  It did! 3.5 mm fell.\nThe sun came"
    lines = ["It rained.", "Did it?", "It did!", "3.5 mm fell.", "The sun came"]
    assert nlg.metrics.sentences_on_lines(text).splitlines() == lines


def test_metrics_together(nlg):
    """ROUGE compares stems, and sentences wherever they stand; the others see the texts as they are."""
    metric = nlg.metrics.text_metric(["rouge", "exact_match"])
    found = metric(["he walked. it rained."], ["it rains. he walks."])
    assert found == {
        "rouge1": 1.0,
        "rouge2": pytest.approx(2 / 3),
        "rougeL": 0.5,
        "rougeLsum": 1.0,
        "exact_match": 0.0,
    }
    assert metric(["a. b."], ["a. b."])["exact_match"] == 1.0
    with pytest.raises(ValueError, match="none should be one or more of rouge"):
        nlg.metrics.text_metric([])


@functools.cache
def literal_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    replaced = literal_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, literal_distance(a[1:], b) + 1, literal_distance(a, b[1:]) + 1)


def test_phoneme_error_rate_and_exact_match(nlg):
    generator = np.random.default_rng(2)
    texts = ["".join(generator.choice(list("əɹˈt"), generator.integers(0, 8))) for _ in range(60)]
    predictions, references = texts[:30], texts[30:]
    distances = [literal_distance(*pair) for pair in zip(predictions, references, strict=True)]
    assert [nlg.metrics.edit_distance(*pair) for pair in zip(predictions, references, strict=True)] == distances
    metric = nlg.metrics.text_metric(["exact_match", "phoneme_error_rate"])
    found = metric([*predictions, "ət"], [*references, "ət"])
    assert found["phoneme_error_rate"] == pytest.approx(sum(distances) / (sum(map(len, references)) + 2))
    assert found["exact_match"] == pytest.approx((sum(d == 0 for d in distances) + 1) / 31)


# --- settings --------------------------------------------------------------------------------------------------------

# steps before the allocation, of it, tokens of source and target, beams, batch over all devices, epochs
PAPER = {
    "xsum": (6000, 25000, 768, 64, 8, 8, 25),
    "cnn_dailymail": (5000, 90000, 1024, 160, 4, 32, 15),
}


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("name", ["facebook/bart-large", "google-t5/t5-base"])
def test_yaml_has_the_settings_of_the_paper(nlg, name, task, tmp_path):
    config = EXAMPLE / "configs" / f"{name.partition('/')[2]}-{task}.yaml"
    model, data, method, training = nlg.run_nlg.parse([str(config), "--output_dir", str(tmp_path)])
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    lengths = (data.max_source_length, data.max_target_length, training.generation_num_beams)
    assert (method.allocation_warmup_steps, method.allocation_steps, *lengths, batch) == PAPER[task][:-1]
    assert training.num_train_epochs == PAPER[task][-1]
    assert (model.model_name_or_path, data.task_name, data.metrics) == (name, task, ["rouge"])
    assert data.source_prefix == ("summarize: " if "t5" in name else "")
    assert (method.method, method.init_r, method.target_r, method.lora_alpha) == ("salientlora", 15, 2, 32)
    assert (method.initial_window, method.final_window, method.orth_reg_weight) == (10, 200, 0.1)
    assert (method.correlation_threshold, method.slope_threshold, method.salience_lambda) == (0.8, 2.0, 0.7)
    assert (training.learning_rate, training.warmup_steps, training.seed) == (8e-4, 3000, 9)
    assert training.predict_with_generate and training.generation_max_length == data.max_target_length


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "task_name or dataset_name"),
        (["--task_name", "gigaword"], "gigaword"),
        (["--train_file", "a.csv"], "validation_file"),
        (["--task_name", "xsum", "--test_file", "a.csv"], "do_predict"),
        (["--task_name", "xsum", "--metrics", "bleu"], "bleu"),
        (["--task_name", "xsum", "--respell", "QO"], "QO"),
        (["--task_name", "xsum", "--respell", "Q=O", "R=O"], "twice"),
        (["--task_name", "xsum", "--method", "full", "--export_lora", "x"], "export_lora"),
    ],
)
def test_bad_settings_are_refused(nlg, argv, message):
    with pytest.raises(ValueError, match=message):
        nlg.run_nlg.parse(argv)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "where", "columns"),
    [
        ("xsum", ("EdinburghNLP/xsum", None, "refs/convert/parquet"), ("document", "summary")),
        ("cnn_dailymail", ("abisee/cnn_dailymail", "3.0.0", None), ("article", "highlights")),
    ],
)
def test_data_of_the_hub(nlg, task, where, columns, monkeypatch):
    def hub(name, config, revision):
        assert (name, config, revision) == where
        split = Dataset.from_dict({columns[0]: ["a"] * 4, columns[1]: ["b"] * 4, "id": ["c"] * 4})
        return DatasetDict({"train": split, "validation": split, "test": split})

    monkeypatch.setattr(nlg.data, "load_dataset", hub)
    args = nlg.data.DataArguments(task_name=task, max_train_samples=3, max_eval_samples=2)
    splits = nlg.data.load_splits(args)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 2, "test": 2}
    assert set(nlg.data.load_splits(args, with_test=False)) == {"train", "validation"}
    assert nlg.data.find_columns(args, splits["train"]) == columns


def test_columns_of_files_are_inferred_or_named(nlg, files):
    args = nlg.data.DataArguments(train_file=files.train, validation_file=files.dev)
    train = nlg.data.load_splits(args)["train"]
    assert nlg.data.find_columns(args, train) == ("text", "gist")
    args.source_column = "abstract"
    with pytest.raises(ValueError, match="source_column 'abstract'.*'gist'"):
        nlg.data.find_columns(args, train)
    with pytest.raises(ValueError, match="target_column None"):
        nlg.data.find_columns(
            nlg.data.DataArguments(train_file="a", validation_file="b"), train.select_columns("text")
        )


def test_prefix_and_lengths(nlg):
    words = tokenizer(WORDS, pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    data = Dataset.from_dict({"text": ["w5 w6 w7 w8"], "gist": ["w6 w7 w8 w9"]})
    args = nlg.data.DataArguments(task_name="xsum", source_prefix="w4 ", max_source_length=5, max_target_length=4)
    rows = [nlg.data.encode(data, ("text", "gist"), (words, words), args, cut)[0] for cut in (True, False)]
    assert rows[0]["input_ids"] == [BOS, 4, 5, 6, EOS]
    assert rows[0]["labels"] == [BOS, 6, 7, EOS]
    assert rows[1]["labels"] == [BOS, 6, 7, 8, 9, EOS], "references must not be cut"


def test_respelled_targets_are_read_back(nlg):
    letters = tokenizer(list("abcO"), pre_tokenizer=pre_tokenizers.Split(Regex("."), "isolated"))
    letters.backend_tokenizer.decoder = decoders.Fuse()
    args = nlg.data.DataArguments(task_name="xsum", respell=["Q=O", "a=b", "b=a"])
    data = Dataset.from_dict({"text": ["c"], "gist": ["Qabc"]})
    row = nlg.data.encode(data, ("text", "gist"), (letters, letters), args, cut_targets=False)[0]
    assert row["labels"] == [BOS, 7, 5, 4, 6, EOS]
    padded = np.array([[*row["labels"], -100]])
    assert nlg.run_nlg.read_back(padded, letters, args) == ["Qabc"]
    with pytest.raises(ValueError, match="Q=O.*cannot be read back"):
        nlg.data.encode(data.map(lambda _: {"gist": "QO"}), ("text", "gist"), (letters, letters), args, False)


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bart", "t5", "gated t5"])
def test_every_linear_of_every_block_is_adapted(nlg, name):
    config = {"feed_forward_proj": "gated-gelu"} if name == "gated t5" else {}
    model = TINY_MODELS[name.removeprefix("gated ")].make_model(**config)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    args = nlg.methods.MethodArguments(method="lora")
    targets = nlg.run_nlg.TARGETS[model.config.model_type]
    adapted = get_peft_model(model, nlg.methods.adapter_config(args, "SEQ_2_SEQ_LM", targets))
    assert set(nlg.methods.final_ranks(args, adapted)) == linears
    assert len(linears) == 2 * (6 + 10) + (4 if config else 0)
    cross = "encoder_attn" if name == "bart" else "EncDecAttention"
    assert sum(cross in linear for linear in linears) == 8


# --- the script ------------------------------------------------------------------------------------------------------


def flags_for(model: str, files: SimpleNamespace, output: Path, **values) -> list[str]:
    paths = {"train_file": files.train, "validation_file": files.dev, "test_file": files.test, "output_dir": output}
    quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    ranks = {"init_r": 4, "target_r": 2, "lora_alpha": 16}
    generation = {"max_target_length": 6, "generation_num_beams": 2}
    common = {"model_name_or_path": files.folder / model, "learning_rate": 2e-3, "seed": 3}
    return flags(**{**common, **paths, **quiet, **ranks, **generation, **values})


def generated(model, folder: Path, files: SimpleNamespace) -> list[str]:
    """What a loaded model generates for the test file, by the way that the script generates."""
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    with gzip.open(files.test, "rt") as file:
        batch = words([json.loads(line)["text"] for line in file], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    return words.batch_decode(model.eval().generate(**batch, max_length=6, num_beams=2), skip_special_tokens=True)


STOCK = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
for base, adapter in zip(sys.argv[2::2], sys.argv[3::2]):
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), adapter).eval()
    words = PreTrainedTokenizerFast.from_pretrained(base)
    batch = words(json.loads(sys.argv[1]), return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, max_length=6, num_beams=2)
    print(json.dumps(words.batch_decode(ids, skip_special_tokens=True)))
assert "peft_rank" not in sys.modules
"""


@pytest.mark.slow
def test_best_model_is_generated_with_saved_and_loaded_by_stock_peft(nlg, files, tmp_path, monkeypatch):
    """Both families: generation in every evaluation, the best checkpoint loaded, three ways to load what is left."""
    written, arguments = [], []
    for name in ("bart", "t5"):
        output, exported = tmp_path / name, tmp_path / f"{name}-lora"
        schedule = {"max_steps": 48, "learning_rate": 1e-2, "allocation_warmup_steps": 2, "allocation_steps": 8}
        windows = {"initial_window": 3, "final_window": 20}
        often = {"eval_strategy": "steps", "eval_steps": 16, "save_strategy": "steps", "save_steps": 16}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "rouge1", "greater_is_better": True}
        options = schedule | windows | often | best | {"export_lora": exported}
        nlg.run_nlg.main(flags_for(name, files, output, **options))
        (run,) = json.loads((output / "results.json").read_text())["runs"]
        measured = {"loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "generated_tokens"}
        assert set(run["metrics"]) == set(run["test"]) == measured
        assert run["allocation"] == [2, 10] and run["total_rank"] == 2 * len(run["ranks"]) == 64
        best = max(one["rouge1"] for one in run["history"] if one["step"] > 10)
        assert run["metrics"]["rouge1"] == pytest.approx(best), "not the best model after the allocation"
        assert run["history"][2]["loss"] < run["history"][0]["loss"], "nothing was learnt"
        assert run["metrics"]["generated_tokens"] > 1

        rows = [json.loads(line) for line in (output / "predictions_test.jsonl").read_text().splitlines()]
        predictions = [row["prediction"] for row in rows]
        assert len(set(predictions)) > 1 and set(" ".join(predictions).split()) <= set(WORDS)
        with gzip.open(files.test, "rt") as file:
            assert [row["reference"] for row in rows] == [json.loads(line)["gist"] for line in file]
        again = generated(AutoPeftModelForSeq2SeqLM.from_pretrained(output), files.folder / name, files)
        assert again == predictions
        last = json.loads((output / "ranks.jsonl").read_text().splitlines()[-1])
        assert last["ranks"] == run["ranks"]
        written.append(predictions)
        arguments += [str(files.folder / name), str(exported)]

    with gzip.open(files.test, "rt") as file:
        sources = json.dumps([json.loads(line)["text"] for line in file])
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, sources, *arguments], check=False, capture_output=True, text=True, timeout=300
    )
    assert stock.returncode == 0, stock.stderr[-3000:]
    assert [json.loads(line) for line in stock.stdout.splitlines()] == written


@pytest.mark.parametrize(("method", "model"), [("lora", "t5"), ("adalora", "bart"), ("full", "t5")])
def test_other_methods_run(nlg, method, model, files, tmp_path, capsys):
    options = {"method": method, "max_steps": 4, "allocation_warmup_steps": 1, "seeds": 2, "length_penalty": 2.0}
    nlg.run_nlg.main(flags_for(model, files, tmp_path, **options))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [3, 4]
    totals = [run["total_rank"] for run in results["runs"]]
    assert totals == [0, 0] if method == "full" else totals == [64, 64]
    losses = [run["metrics"]["loss"] for run in results["runs"]]
    assert results["summary"]["loss"]["mean"] == pytest.approx(np.mean(losses))
    assert "rougeLsum" in capsys.readouterr().out
    if method == "full":
        again = generated(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "seed-3"), files.folder / model, files)
        lines = (tmp_path / "seed-3" / "predictions_test.jsonl").read_text().splitlines()
        assert again == [json.loads(line)["prediction"] for line in lines]


# --- pronunciation ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pronunciation_study(nlg, tmp_path, monkeypatch):
    """The benchmark on letters that are copied, with a tokenizer for either side and a British letter that has no token."""
    letters, model = list("abcdeO"), tmp_path / "model"
    TINY_MODELS["bart"].make_model(max_position_embeddings=64).save_pretrained(model)
    for where, vocabulary in ((model, [*letters, "Q"]), (model / "phoneme_tokenizer", letters[::-1])):
        split = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer(vocabulary, pre_tokenizer=split, decoder=decoders.Fuse()).save_pretrained(where)
    generator = np.random.default_rng(0)
    for name, count in {"train": 640, "validation": 8, "test": 8}.items():
        words = ["".join(generator.choice(list("bcdeQ"), 5)) for _ in range(count)]
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"word": word, "phonemes": word}) + "\n" for word in words)

    output = tmp_path / "g2p.json"
    paths = ["--model", str(model), "--data", str(tmp_path), "--output", str(output)]
    nlg.g2p.main([*paths, "--rates", "1e-2", "--seeds", "1", "2"])
    result = json.loads(output.read_text())
    runs = [(row["method"], row["learning_rate"], row["seed"]) for row in result["rows"]]
    trainings = [(method, 1e-2, seed) for seed in (1, 2) for method in nlg.g2p.METHODS]
    assert runs == [("none", 0.0, 1), *trainings]
    monkeypatch.setattr(nlg.g2p, "run", None)  # a resumed study that is complete trains nothing
    nlg.g2p.main([*paths, "--rates", "1e-2", "--seeds", "1", "2", "--resume"])
    assert json.loads(output.read_text())["rows"] == result["rows"]
    ranks = {row["method"]: row["total_rank"] for row in result["rows"]}
    assert ranks == {"none": 0, "full": 0, "lora": 4 * 32, "salientlora": 4 * 32}
    errors = {(row["method"], row["seed"]): row["test"]["phoneme_error_rate"] for row in result["rows"]}
    assert errors["full", 1] < errors["none", 1]
    table = nlg.tables.pronunciation(result)
    assert f"{100 * errors['none', 1]:.2f}" in table
    assert f"{50 * (errors['salientlora', 1] + errors['salientlora', 2]):.2f} ±" in table


def test_best_rate_is_that_of_the_validation_split(nlg):
    rows = [
        {"method": method, "learning_rate": rate, "validation": {"phoneme_error_rate": error}, "test": None}
        for method, rate, error in [("lora", 1.0, 0.3), ("lora", 2.0, 0.2), ("lora", 3.0, 0.4), ("full", 4.0, 0.1)]
    ]
    assert nlg.g2p.best_rate(rows, "lora") == 2.0
