# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""`examples/compress`: perplexity, data, healing, and both scripts from end to end on tiny models without the Hub."""

import importlib
import json
import math
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from peft_rank import LowRankConfig, LowRankLinear, load_compressed
from peft_rank.tuners.lowrank.config import CompressionConfig
from tiny_models import TINY_MODELS


EXAMPLE = Path(__file__).parents[2] / "examples" / "compress"
WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
QUIET = ["--report_to", "none", "--save_strategy", "no", "--device", "cpu", "--use_cpu", "--disable_tqdm", "true"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer tokens than they have input features", "ignore:Ranks were aligned", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's modules. Their names are common, so they are forgotten afterwards."""
    names = ("perplexity", "data", "healing", "searching", "by_name", "compress")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A decoder, an encoder with a head, a text that counts, and labelled sentences."""
    folder = tmp_path_factory.mktemp("files")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIALS, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    for name in ("llama", "bert"):
        TINY_MODELS[name].make_model().eval().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for split, start in {"train": 0, "test": 7}.items():
        lines = [" ".join(WORDS[(start + i + j) % 40] for j in range(13)) for i in range(60)]
        rows = [{"text": line, "label": i % 2} for i, line in enumerate(lines)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return SimpleNamespace(folder=folder, **{f.name.replace(".", "_"): str(f) for f in folder.iterdir()})


def language(files, output: Path, *flags: str) -> list[str]:
    data = ["--model_name_or_path", files.llama, "--train_data", files.train_jsonl, "--eval_data", files.test_jsonl]
    sizes = ["--context", "16", "--calibration_samples", "8", "--ratio", "0.8", "--rank_multiple", "1"]
    return [*data, *sizes, "--output_dir", str(output), *QUIET, *flags]


def classification(files, output: Path, *flags: str) -> list[str]:
    data = ["--model_name_or_path", files.bert, "--train_data", files.train_jsonl, "--eval_data", files.test_jsonl]
    sizes = ["--max_length", "16", "--calibration_samples", "8", "--ratio", "0.8", "--rank_multiple", "1"]
    return ["--task", "classification", *data, *sizes, "--output_dir", str(output), *QUIET, *flags]


# --- perplexity -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def literal_perplexity(model: torch.nn.Module, ids: torch.Tensor, context: int, stride: int) -> float:
    """Token by token: each is predicted within the first window that it is in, unless it comes first there."""
    losses = []
    for at in range(1, len(ids)):
        window = max(0, math.ceil((at - context + 1) / stride))
        start = window * stride
        if start < at:
            logits = model(input_ids=ids[None, start:at]).logits[0, -1]
            losses.append(float(F.cross_entropy(logits, ids[at])))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (100, 100), (5, 5)])
@pytest.mark.parametrize("tokens", [30, 32, 33, 2])
def test_perplexity(example, context: int, stride: int, tokens: int) -> None:
    model = TINY_MODELS["llama"].make_model().eval()
    ids = torch.randint(4, 64, (tokens,))
    expected = literal_perplexity(model, ids, context, stride)
    assert example.perplexity.perplexity(model.train(), ids, context=context, stride=stride) == pytest.approx(expected)
    assert model.training


def test_perplexity_of_a_model_that_knows_nothing(example) -> None:
    model = TINY_MODELS["llama"].make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert example.perplexity.perplexity(model, torch.arange(4, 40), context=7) == pytest.approx(64)
    with pytest.raises(ValueError, match="stride must be between 1 and context=7, but is 8"):
        example.perplexity.perplexity(model, torch.arange(9), context=7, stride=8)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        example.perplexity.perplexity(model, torch.arange(1))


# --- settings, data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((EXAMPLE / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs(example, path: Path, tmp_path: Path) -> None:
    model, data, compression, _, _, training = example.compress.parse(
        [str(path), "--output_dir", str(tmp_path), "--ratio", "0.7"]
    )
    config = compression.config(model.task)
    assert isinstance(config, CompressionConfig)
    assert (config.ratio if isinstance(config, LowRankConfig) else config.target_ratio) == 0.7
    assert data.train_data.endswith(":train")
    assert training.output_dir == str(tmp_path)
    assert path.name in (EXAMPLE / "README.md").read_text(encoding="utf-8")


def test_unknown_settings_are_refused(example, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ration: 0.8\n")
    with pytest.raises(ValueError, match=r"unknown settings \['ration'\]"):
        example.compress.parse([str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("name", "called"),
    {
        "wikitext": (("wikitext", None), "train"),
        "owner/name": (("owner/name", None), "train"),
        "owner/name:validation[:10]": (("owner/name", None), "validation[:10]"),
        "owner/name/config:test": (("owner/name", "config"), "test"),
    }.items(),
)
def test_names_of_data_sets(example, name: str, called: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(example.data, "load_dataset", lambda *args, split: calls.append((args, split)))
    example.data.load_rows(name, "train")
    assert calls == [called]


def test_labels_may_be_names(example, files) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(files.bert)
    rows = datasets.Dataset.from_list([{"text": "w1 w2", "label": "good"}, {"text": "w3", "label": "bad"}])
    args = example.data.DataArguments("a.jsonl", "b.jsonl")
    encoded = example.data.encode(rows, tokenizer, {"bad": 0, "good": 1}, args)
    assert encoded["labels"] == [1, 0]
    assert encoded["input_ids"][0] == [1, 5, 6, 2]
    with pytest.raises(ValueError, match=r"label: 'good' is none of the model's classes \['LABEL_0'\]"):
        example.data.encode(rows, tokenizer, {"LABEL_0": 0}, args)
    args.label_column = "class"
    with pytest.raises(ValueError, match="set --text_columns and --label_column"):
        example.data.encode(rows, tokenizer, {}, args)


def test_blocks(example) -> None:
    blocks = example.data.Blocks(torch.arange(23), 5)
    assert len(blocks) == 4
    assert blocks[3]["input_ids"].tolist() == blocks[3]["labels"].tolist() == [15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="23 tokens, fewer than the 50"):
        example.data.Blocks(torch.arange(23), 50)


# --- healing ----------------------------------------------------------------------------------------------------------


def compressed(name: str):
    tiny = TINY_MODELS[name]
    model = get_peft_model(tiny.make_model(), LowRankConfig(rank=8, target_modules=list(tiny.target_modules)))
    model.base_model.finalize()
    return model.get_base_model()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("heal", ["full", "factors", "lora", "salientlora"])
def test_what_is_trained(example, name: str, heal: str) -> None:
    model = compressed(name)
    parameters, size = {id(p) for p in model.parameters()}, model.num_parameters()
    factors = {id(p) for m in model.modules() if isinstance(m, LowRankLinear) for p in m.parameters()}
    head = {id(p) for p in model.classifier.parameters()} if name == "bert" else set()
    model = example.healing.prepare(model, example.healing.HealingArguments(heal, heal_r=2, heal_init_r=3))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if heal in ("full", "factors"):
        assert trained == (parameters if heal == "full" else factors | head)
    else:
        assert isinstance(model, PeftModel)
        assert not trained & parameters
        assert set(model.base_model.targeted_module_names) == set(example.healing.factor_names(model.get_base_model()))
        linears = [m for m in model.modules() if isinstance(m, LowRankLinear)]
        assert len(model.base_model.targeted_module_names) == 2 * len(linears) > 0
        if head:
            assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it was not trained
        healed = example.healing.finish(model)
    assert healed.num_parameters() == size
    assert all(p.requires_grad for p in healed.parameters())


def test_healing_arguments(example) -> None:
    with pytest.raises(ValueError, match="heal_r must be between 1 and heal_init_r=12, but is 13"):
        example.healing.HealingArguments(heal_r=13)


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heal", ["none", "lora", "salientlora"])
def test_decoder(example, files, heal: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    training = ["--heal", heal, "--max_steps", "10", "--learning_rate", "5e-3", "--heal_r", "2", "--heal_init_r", "3"]
    results = example.compress.main(language(files, tmp_path, "--allocation", "spectral", *training))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    figures, sizes = results["figures"], results["parameters"]
    assert list(figures) == ["dense", "compressed", "healed"][: 2 if heal == "none" else 3]
    assert sizes["compressed"] < sizes["dense"]
    if heal != "none":
        assert figures["healed"]["perplexity"] < figures["compressed"]["perplexity"]
    captured = capsys.readouterr()
    assert "The saved model gives" not in captured.err
    assert re.search(r"^dense +[\d,]+ parameters  perplexity", captured.out, re.MULTILINE)

    # the directory holds what was measured
    model = load_compressed(tmp_path)
    assert model.num_parameters() == sizes["compressed"]
    ids = example.data.token_ids(
        [json.loads(line)["text"] for line in Path(files.test_jsonl).read_text().splitlines()],
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    )
    last = list(figures.values())[-1]["perplexity"]
    assert example.perplexity.perplexity(model, ids, context=16) == pytest.approx(last)
    # the ratio is that of the linears
    linears = [m for n, m in TINY_MODELS["llama"].make_model().named_modules() if n.endswith("_proj")]
    dense = sum(m.weight.numel() for m in linears)
    assert (sizes["compressed"] - sizes["dense"] + dense) / dense == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("decomposition", "heal"), [("fisher", "full"), ("svd", "factors")])
def test_classifier(example, files, decomposition: str, heal: str, tmp_path: Path) -> None:
    flags = ["--decomposition", decomposition, "--heal", heal, "--max_steps", "2"]
    results = example.compress.main(classification(files, tmp_path, *flags))
    assert set(results["figures"]["healed"]) == {"accuracy", "matthews", "f1"}
    model = load_compressed(tmp_path)
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert "bert.encoder.layer.0.intermediate.dense" in ranks
    assert "classifier" not in ranks


@pytest.mark.parametrize(("search", "rate"), [("ars", "3e-2"), ("l2lrc", "0.5")])
def test_learned_ranks(example, files, search: str, rate: str, tmp_path: Path) -> None:
    flags = ["--search", search, "--search_steps", "20", "--search_learning_rate", rate, "--heal", "none"]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a search that is cut short
        results = example.compress.main(language(files, tmp_path, *flags, "--search_settings", '{"tolerance": 0.01}'))
        sizes = results["parameters"]
        linears = [m for n, m in TINY_MODELS["llama"].make_model().named_modules() if n.endswith("_proj")]
        dense = sum(m.weight.numel() for m in linears)
        assert 0.79 < (sizes["compressed"] - sizes["dense"] + dense) / dense <= 0.8
        assert load_compressed(tmp_path).num_parameters() == sizes["compressed"]
        assert "search/ratio" in (tmp_path / "search" / "ranks.jsonl").read_text()
        example.compress.main(classification(files, tmp_path / "bert", *flags))
    ranks = {n: m.rank for n, m in load_compressed(tmp_path / "bert").named_modules() if isinstance(m, LowRankLinear)}
    assert ranks
    assert "classifier" not in ranks


def test_ruined_models_are_not_healed(example, files, tmp_path: Path) -> None:
    flags = ["--heal", "lora", "--max_damage", "1e-3", "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"Perplexity grew from .* --max_damage"):
        example.compress.main(language(files, tmp_path, *flags))
    assert load_compressed(tmp_path) is not None  # compressed all the same


def test_nan_is_not_healed(example) -> None:
    with pytest.raises(ValueError, match="to nan"):
        example.compress.check_worth_healing({"perplexity": 3.0}, {"perplexity": math.nan}, 100.0)
    example.compress.check_worth_healing({"perplexity": 3.0}, {"perplexity": 299.0}, 100.0)
    example.compress.check_worth_healing({"accuracy": 1.0}, {"accuracy": 0.1}, 100.0)


def test_lm_eval(example, files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example.compress, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "peft_rank\[eval\]"'):
        example.compress.parse(language(files, tmp_path, "--lm_eval_tasks", "arc_easy"))

    calls = []

    def simple_evaluate(model, tasks, limit):
        calls.append((model, tasks, limit))
        return {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    harness, huggingface = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    harness.simple_evaluate = simple_evaluate
    huggingface.HFLM = lambda **kwargs: kwargs
    for name, module in {"lm_eval": harness, "lm_eval.models.huggingface": huggingface}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(example.compress, "find_spec", lambda name: name)
    flags = ["--lm_eval_tasks", "arc_easy", "--lm_eval_limit", "3", "--decomposition", "svd"]
    results = example.compress.main(language(files, tmp_path, *flags))
    assert results["figures"]["compressed"]["arc_easy/acc"] == 0.5
    assert calls[0][1:] == (["arc_easy"], 3)
    assert set(calls[0][0]) == {"pretrained", "tokenizer", "batch_size"}


def test_by_name(example, files, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ranks = ["q_proj=8", "o_proj=8", "gate_proj=16"]
    flags = ["--prompts", "w1 w2", "--max_new_tokens", "4", "--device", "cpu", "--output_dir", str(tmp_path)]
    sizes = example.by_name.main(["--model", files.llama, "--ranks", *ranks, *flags])
    # two layers: 32 x 32 at rank 8 twice, and 64 x 32 at rank 16
    assert sizes["before"] - sizes["after"] == 2 * (2 * (32 * 32 - 8 * 64) + 64 * 32 - 16 * 96)
    model = load_compressed(tmp_path)
    assert {n.split(".")[-1]: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)} == {
        "q_proj": 8,
        "o_proj": 8,
        "gate_proj": 16,
    }
    out = capsys.readouterr().out
    assert out.count("before: ") == out.count("after: ") == 1
    assert f"{sizes['before']:,} -> {sizes['after']:,} parameters" in out
