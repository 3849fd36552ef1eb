# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`examples/glue`: metrics, settings, data, heads, and the script from end to end on a tiny model without the Hub."""

import csv
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

import peft_rank  # noqa: F401 - registers the adapter type, for loading


EXAMPLE = Path(__file__).parents[2] / "examples" / "glue"
MODULES = 12  # linear layers in the two blocks of the tiny DeBERTa
WORDS = ["good", "fine", "great", "nice", "bad", "poor", "weak", "dull", "the", "a", "film", "plot", "cast", "None"]

# learning rate, steps before the allocation, steps of it
PAPER = {
    "cola": (1e-3, 800, 2000),
    "mnli": (5e-4, 8000, 35000),
    "mrpc": (5e-4, 600, 1000),
    "qnli": (8e-4, 2000, 8500),
    "qqp": (3e-4, 8000, 25000),
    "rte": (8e-4, 600, 1500),
    "sst2": (8e-5, 6000, 20000),
    "stsb": (8e-4, 800, 2500),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """The example's modules. Their names are common, so they are forgotten afterwards."""
    names = ("data", "heads", "metrics", "run_glue")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE.parent)
        patch.syspath_prepend(EXAMPLE)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", cache)
        shared = {name: importlib.import_module(f"common.{name}") for name in ("methods", "runs")}
        yield SimpleNamespace(**shared, **{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A folder with a tiny DeBERTa-v2 without any head, and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(specials + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    DebertaV2Model(tiny(DebertaV2Config, pooler_hidden_size=32, type_vocab_size=0)).save_pretrained(folder)
    return str(folder)


def tiny(config_class, **kwargs):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return config_class(vocab_size=24, max_position_embeddings=40, pad_token_id=0, **sizes, **kwargs)


def examples(count: int, seed: int) -> list[dict]:
    """Pairs of sentences with a class and a score: how many words of praise the first has."""
    generator = np.random.default_rng(seed)
    texts = [[" ".join(generator.choice(WORDS, 6)) for _ in range(2)] for _ in range(count)]
    scores = [sum(word in WORDS[:4] for word in first.split()) for first, _ in texts]
    return [
        {"sentence1": a, "sentence2": b, "label": "praise" if s > 1 else "other", "score": s + 0.5}
        for (a, b), s in zip(texts, scores, strict=True)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """Training and validation files: classes in json lines, scores in csv."""
    folder = tmp_path_factory.mktemp("files")
    for name, rows in {"train": examples(64, 0), "dev": examples(16, 1)}.items():
        classes = [{key: row[key] for key in ("sentence1", "label")} for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, classes)))
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence1", "sentence2", "score"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return SimpleNamespace(folder=folder, **{f.name.replace(".", "_"): str(f) for f in folder.iterdir()})


# --- metrics ---------------------------------------------------------------------------------------------------------


def literal_f1(x, y):
    hits = ((x == 1) & (y == 1)).sum()
    return 2 * hits / ((x == 1).sum() + (y == 1).sum())


def literal_matthews(x, y):
    tp, tn = ((x == 1) & (y == 1)).sum(), ((x == 0) & (y == 0)).sum()
    fp, fn = ((x == 1) & (y == 0)).sum(), ((x == 0) & (y == 1)).sum()
    return (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def literal_pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def literal_spearman(x, y):
    def ranks(v):  # ties share the mean of their ranks
        return np.array([(v < a).sum() + ((v == a).sum() - 1) / 2 for a in v])

    return literal_pearson(ranks(x), ranks(y))


OFFICIAL = {
    "cola": {"matthews_correlation": literal_matthews},
    "sst2": {"accuracy": lambda x, y: (x == y).mean()},
    "mrpc": {"accuracy": lambda x, y: (x == y).mean(), "f1": literal_f1},
    "stsb": {"pearson": literal_pearson, "spearmanr": literal_spearman},
    "qqp": {"accuracy": lambda x, y: (x == y).mean(), "f1": literal_f1},
    "mnli": {"accuracy": lambda x, y: (x == y).mean()},
    "qnli": {"accuracy": lambda x, y: (x == y).mean()},
    "rte": {"accuracy": lambda x, y: (x == y).mean()},
}


@pytest.mark.parametrize("task", OFFICIAL)
def test_metric_equals_its_formula(glue, task, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)  # any attempt to reach a host fails
    generator = np.random.default_rng(0)
    if task == "stsb":
        references = generator.integers(0, 6, 100) * 1.0  # ties
        predictions = np.round(references + generator.normal(size=100), 1)
    else:
        references = generator.integers(0, 3 if task == "mnli" else 2, 100)
        predictions = np.where(generator.random(100) < 0.7, references, 0)
    found = glue.metrics.glue_metric(task).compute(predictions=predictions, references=references)
    assert found == pytest.approx({key: f(predictions, references) for key, f in OFFICIAL[task].items()}, abs=1e-12)


def test_metric_of_constant_predictions(glue):
    constant = {"predictions": [1, 1, 1, 1], "references": [0, 1, 0, 1]}
    assert glue.metrics.glue_metric("cola").compute(**constant) == {"matthews_correlation": 0.0}
    with pytest.warns(RuntimeWarning, match="constant"):
        values = glue.metrics.glue_metric("stsb").compute(**constant)
    assert glue.runs.finite(values) == {"pearson": None, "spearmanr": None}


def test_metric_of_other_tasks(glue):
    assert glue.metrics.glue_metric(None).compute(predictions=[0, 2], references=[1, 2]) == {"accuracy": 0.5}
    scores = glue.metrics.glue_metric(None, is_regression=True).compute(predictions=[0, 1, 3], references=[1, 2, 4])
    assert scores == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PAPER)
def test_yaml_has_the_settings_of_the_paper(glue, task, tmp_path):
    argv = [str(EXAMPLE / "configs" / f"{task}.yaml"), "--output_dir", str(tmp_path)]
    model, data, method, training = glue.run_glue.parse(argv)
    assert (training.learning_rate, method.allocation_warmup_steps, method.allocation_steps) == PAPER[task]
    assert (data.task_name, data.max_length) == (task, 64)
    assert (model.model_name_or_path, model.classifier_dropout) == ("microsoft/deberta-v3-base", 0.1)
    assert (method.method, method.init_r, method.target_r, method.lora_alpha) == ("salientlora", 15, 2, 32)
    assert (method.initial_window, method.final_window) == (10, 200)
    assert (method.correlation_threshold, method.slope_threshold, method.salience_lambda) == (0.9, 2.0, 0.7)
    assert method.orth_reg_weight == 0.5
    assert (training.per_device_train_batch_size, training.num_train_epochs, training.seed) == (8, 25, 6)
    assert (training.warmup_steps, training.weight_decay) == (100, 0.0)
    assert training.output_dir == str(tmp_path)


def test_flags_override_the_yaml(glue, tmp_path):
    argv = [str(EXAMPLE / "configs" / "rte.yaml"), "--output_dir", str(tmp_path), "--method", "lora", "--seed", "1"]
    _, data, method, training = glue.run_glue.parse(argv + ["--learning_rate", "1e-5"])
    assert (data.task_name, method.method, training.seed, training.learning_rate) == ("rte", "lora", 1, 1e-5)


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"method": "salientlora"}, 0.01),
        ({"method": "salientlora", "init_weights": "gaussian"}, 0.1),
        ({"method": "salientlora", "orth_reg_weight": 0.3}, 0.3),
        ({"method": "adalora"}, 0.5),
    ],
)
def test_the_regularizer_goes_with_the_start(glue, settings, weight):
    config = glue.methods.adapter_config(glue.methods.MethodArguments(**settings), "SEQ_CLS", ["query"])
    assert config.orth_reg_weight == weight


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "task_name"),
        (["--task_name", "wnli"], "wnli"),
        (["--train_file", "a.csv"], "validation_file"),
        (["--task_name", "rte", "--target_r", "16"], "target_r"),
        (["--task_name", "rte", "--allocation_steps", "10.5"], "allocation_steps"),
        (["--task_name", "rte", "--method", "lora", "--export_lora", "x"], "export_lora"),
    ],
)
def test_bad_settings_are_refused(glue, flags, message):
    with pytest.raises(ValueError, match=message):
        glue.run_glue.parse(flags)


def test_unknown_setting_in_yaml_is_refused(glue, tmp_path):
    (tmp_path / "wrong.yaml").write_text("task_name: rte\nlearning_rat: 1.0e-3\n")
    with pytest.raises(ValueError, match="learning_rat"):
        glue.run_glue.parse([str(tmp_path / "wrong.yaml")])


# --- data ------------------------------------------------------------------------------------------------------------


def test_columns_and_classes_are_inferred(glue, files):
    args = glue.data.DataArguments(train_file=files.train_jsonl, validation_file=files.dev_jsonl)
    task = glue.data.find_task(args, glue.data.load_splits(args)["train"])
    assert (task.columns, task.labels, task.is_regression) == (("sentence1",), ("other", "praise"), False)


def test_words_that_look_like_missing_values_stay_words(glue, files):
    args = glue.data.DataArguments(
        train_file=files.train_csv, validation_file=files.dev_csv, label_column="score", max_train_samples=8
    )
    train = glue.data.load_splits(args)["train"]
    task = glue.data.find_task(args, train)
    assert (len(train), task.columns, task.is_regression) == (8, ("sentence1", "sentence2"), True)
    (files.folder / "none.csv").write_text("sentence1,label\nNone,0\nNA,1\n")
    args = glue.data.DataArguments(train_file=str(files.folder / "none.csv"), validation_file=files.dev_csv)
    assert glue.data.load_splits(args)["train"]["sentence1"][:] == ["None", "NA"]


def test_numbers_of_glue_classes_are_kept_and_names_understood(glue):
    args = glue.data.DataArguments(task_name="rte")
    rows = {"sentence1": ["a", "b", "c"], "sentence2": ["a", "b", "c"]}
    for labels in ([1, 0, 1], ["not_entailment", "entailment", "not_entailment"]):
        data = Dataset.from_dict(rows | {"label": labels})
        task = glue.data.find_task(args, data)
        encoded = glue.data.encode(data, task, lambda *texts, **_: {"input_ids": [[1]] * 3}, args)
        assert encoded["labels"][:] == [1, 0, 1]


def test_unknown_class_and_column_are_named(glue):
    args = glue.data.DataArguments(task_name="rte")
    data = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [7]})
    with pytest.raises(ValueError, match=r"\[7\]"):
        glue.data.encode(data, glue.data.TASKS["rte"], None, args)
    with pytest.raises(ValueError, match="text_columns"):
        glue.data.find_task(args, data.rename_column("sentence1", "text"))


# --- heads and targets -----------------------------------------------------------------------------------------------

HEADS = [
    (DebertaV2Config, {"pooler_hidden_size": 32}, ["pooler", "classifier"]),
    (BertConfig, {}, ["classifier", "bert.pooler"]),
    (RobertaConfig, {}, ["classifier"]),
    (ElectraConfig, {"embedding_size": 32}, ["classifier"]),
    (DistilBertConfig, {}, ["pre_classifier", "classifier"]),
    (ModernBertConfig, {}, ["head", "classifier"]),
]


@pytest.mark.parametrize(("config_class", "kwargs", "head"), HEADS, ids=[row[0].__name__ for row in HEADS])
def test_head_is_trained_whole_and_every_block_is_adapted(glue, config_class, kwargs, head):
    config = tiny(config_class, **kwargs)
    setattr(config, glue.heads.family_of(config).dropout, 0.25)
    model = AutoModelForSequenceClassification.from_config(config)
    assert 0.25 in [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert glue.heads.head_modules(model) == head
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    new_weights = [name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix + ".")]
    args = glue.methods.MethodArguments(method="lora")
    adapted = get_peft_model(model, glue.heads.adapter_config(args, model))
    assert set(glue.methods.final_ranks(args, adapted)) == {name for name in linears if ".layer" in name}
    glue.heads.check_new_weights_are_kept(adapted, new_weights)


def test_random_pooler_that_would_be_lost_is_refused(glue):
    model = AutoModelForSequenceClassification.from_config(tiny(DebertaV2Config, pooler_hidden_size=32))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"]))
    with pytest.raises(ValueError, match=r"pooler.dense.weight.*modules_to_save"):
        glue.heads.check_new_weights_are_kept(model, ["classifier.weight", "pooler.dense.weight"])


# --- the script ------------------------------------------------------------------------------------------------------


def run_script(flags: list[str], home: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLE / "run_glue.py"), *flags]
    done = subprocess.run(command, check=False, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def flags_for(encoder: str, files: SimpleNamespace, output: Path) -> list[str]:
    return (
        f"--model_name_or_path {encoder} --train_file {files.train_csv} --validation_file {files.dev_csv} "
        f"--test_file {files.dev_csv} --label_column score --output_dir {output} --max_steps 14 --learning_rate 1e-2 "
        "--allocation_warmup_steps 2 --allocation_steps 0.5 --initial_window 3 --final_window 4 "
        "--disable_tqdm true --report_to none"
    ).split()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "salientlora"])
def test_script_trains_saves_and_reloads(method, encoder, files, tmp_path):
    output, exported, rank = tmp_path / "out", tmp_path / "lora", 2
    flags = flags_for(encoder, files, output) + ["--method", method]
    if method == "salientlora":
        flags += ["--export_lora", str(exported)]
    run_script([str(EXAMPLE / "configs" / "stsb.yaml"), *flags], tmp_path)

    results = json.loads((output / "results.json").read_text())
    (run,) = results["runs"]
    assert set(run["metrics"]) == {"loss", "pearson", "spearmanr", "score"}
    assert (results["task"], results["method"], run["steps"], run["seed"]) == ("stsb", method, 14, 6)
    assert len(run["ranks"]) == MODULES and run["total_rank"] == rank * MODULES
    assert run["allocation"] == (None if method == "lora" else [2, 9])

    state = load_file(output / "adapter_model.safetensors")
    assert sum(tensor.shape[0] for name, tensor in state.items() if "lora_A" in name) == rank * MODULES
    for name in ("pooler.dense.weight", "classifier.weight"):
        assert any(key.endswith(name) for key in state), f"{name} is not saved"
    assert reloaded_scores(output, encoder, files) == pytest.approx(written_scores(output), abs=1e-5)

    parameters = run["trainable_parameters"]
    if method == "salientlora":
        assert reloaded_scores(exported, encoder, files) == pytest.approx(written_scores(output), abs=1e-5)
        assert parameters["end"] < parameters["start"]
        last = json.loads((output / "ranks.jsonl").read_text().splitlines()[-1])
        assert last["ranks"] == run["ranks"]
    else:
        assert parameters["end"] == parameters["start"]


def written_scores(output: Path) -> list[float]:
    lines = (output / "predictions_test.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    return [float(line.split("\t")[1]) for line in lines[1:]]


def reloaded_scores(output: Path, encoder: str, files: SimpleNamespace) -> list[float]:
    model = AutoPeftModelForSequenceClassification.from_pretrained(output, num_labels=1).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    with open(files.dev_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer(
        [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**batch).logits.squeeze(-1).tolist()


def test_seeds_are_averaged_and_names_of_classes_written(glue, encoder, files, tmp_path, capsys):
    flags = (
        f"--model_name_or_path {encoder} --train_file {files.train_jsonl} --validation_file {files.dev_jsonl} "
        f"--test_file {files.dev_jsonl} --output_dir {tmp_path} --max_steps 2 --seeds 2 --seed 3 --method rslora --r 4 "
        "--disable_tqdm true --report_to none --use_cpu true"
    )
    glue.run_glue.main(flags.split())
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [3, 4]
    losses = [run["metrics"]["loss"] for run in results["runs"]]
    assert losses[0] != losses[1]
    assert results["summary"]["loss"] == pytest.approx({"mean": np.mean(losses), "std": np.std(losses, ddof=1)})
    assert [run["total_rank"] for run in results["runs"]] == [4 * MODULES] * 2
    lines = (tmp_path / "seed-3" / "predictions_test.tsv").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} <= {"praise", "other"}
    assert "accuracy" in capsys.readouterr().out


def test_both_validation_splits_of_mnli_are_evaluated(glue, encoder, tmp_path, monkeypatch):
    def hub(name, config, revision):
        assert (name, config, revision) == ("nyu-mll/glue", "mnli", None)
        texts = {"premise": ["good film"] * 8, "hypothesis": ["bad plot", "a cast"] * 4}
        split = Dataset.from_dict(texts | {"label": [0, 1, 2, 1] * 2})
        test = Dataset.from_dict(texts | {"label": [-1] * 8})
        validation = {"validation_matched": split, "validation_mismatched": split}
        return DatasetDict({"train": split, "test_matched": test, "test_mismatched": test} | validation)

    monkeypatch.setattr(glue.data, "load_dataset", hub)
    flags = (
        f"--task_name mnli --model_name_or_path {encoder} --output_dir {tmp_path} --max_steps 1 --method lora "
        "--do_predict true --max_eval_samples 4 --disable_tqdm true --report_to none --use_cpu true"
    )
    glue.run_glue.main(flags.split())
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    kinds = ("loss", "accuracy", "score")
    assert set(run["metrics"]) == {f"{split}_{kind}" for split in ("matched", "mismatched") for kind in kinds}
    lines = (tmp_path / "predictions_test_mismatched.tsv").read_text().splitlines()
    assert len(lines) == 5 and lines[1].split("\t")[1] in ("entailment", "neutral", "contradiction")
