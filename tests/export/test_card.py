# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Model cards, on disk and on the Hub (a stand-in of its client)."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file

import peft_rank
import runs_inrank
import searches
from cards import Hub, run, snippets
from peft_rank import RankAllocationCallback, export_lora, get_rank_pattern, rank_table
from peft_rank.export import card as card_module
from peft_rank.export.lora import export_lora_files
from peft_rank.export.snapshot import read_summary
from peft_rank.export.verify import compare
from peft_rank.tuners.lowrank import LowRankConfig
from runs import adam, adapted, assert_close, config, logits, make_trainer, steps_by_hand
from tiny_models import TinyModel


BASE = "somebody/tiny-model"


def finished(tiny: TinyModel, base: str = BASE, **overrides: Any) -> PeftModel:
    """An adapter at the end of its allocation."""
    model = adapted(tiny, **overrides)
    model.get_base_model().config._name_or_path = model.get_base_model().name_or_path = base
    model.peft_config["default"].base_model_name_or_path = base
    model.base_model.resolve_schedule(20)
    optimizer = adam(model)
    steps_by_hand(model, tiny, 1, 15, optimizer)
    model.base_model.finalize(optimizer)
    return model.eval()


def assert_tells_everything(card: ModelCard, model: PeftModel) -> None:
    assert card.data.library_name == "peft"
    assert card.data.base_model == BASE
    assert {"peft_rank", "adaptive-rank", "salientlora"} <= set(card.data.tags)
    text = card.text
    modules = len(get_rank_pattern(model))
    assert f"`{BASE}`" in text
    assert "SalientLoRA" in text
    assert f"2 a module on average, {2 * modules} in {modules} modules" in text
    assert rank_table(model).markdown() in text
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable:,}" in text
    assert re.search(r"\| size \| [\d.]+ MB \|", text)
    versions = {"peft_rank": importlib.metadata.version("peft-rank"), "peft": peft.__version__}
    versions |= {"transformers": transformers.__version__, "torch": torch.__version__}
    for name, version in versions.items():
        assert f"{name} {version}" in text
    assert snippets(card)[0].startswith("import peft_rank")
    assert len(snippets(card)[0].splitlines()) == 2
    assert "export_lora" in text
    assert "has not finished" not in text


# ---- on disk ----


def test_the_card_tells_everything(deberta: TinyModel, tmp_path: Path) -> None:
    model = finished(deberta, modules_to_save=["pooler"])
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert_tells_everything(card, model)
    size = float(re.search(r"\| size \| ([\d.]+) MB", card.text)[1]) * 1e6
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in file.values()) == pytest.approx(size, rel=0.01)


def test_saving_again_replaces_our_section_only(llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="never ran"):
        model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    card = ModelCard.load(path)
    assert "the allocation has not finished" in card.text
    card.text = card.text.replace("### Direct Use", "### Direct Use\n\nMy own words.")
    card.data.license = "mit"
    card.data.tags.append("mine")
    card.save(path)
    model = finished(llama, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    once = path.read_text()
    model.save_pretrained(tmp_path)
    assert path.read_text() == once
    card = ModelCard(once)
    assert_tells_everything(card, model)
    assert "My own words." in once
    assert card.data.license == "mit"
    assert "mine" in card.data.tags
    assert once.count(card_module.START) == once.count(card_module.END) == 1


def test_the_snippets_load_the_adapter_and_export_it(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.make_model().save_pretrained(tmp_path / "base")
    model = finished(tiny, base=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    load_it, export_it = snippets((tmp_path / "adapter" / "README.md").read_text())
    names: dict[str, Any] = {}
    run(load_it.replace(card_module.HERE, str(tmp_path / "adapter")), names)
    assert_close(logits(names["model"], tiny), logits(model, tiny), 1e-5)
    run(export_it.replace("plain-lora", str(tmp_path / "lora")), names)
    (load_lora,) = snippets((tmp_path / "lora" / "README.md").read_text())
    assert "peft_rank" not in load_lora
    run(load_lora.replace(card_module.HERE, str(tmp_path / "lora")), names)
    assert_close(logits(names["model"], tiny), logits(model, tiny), 1e-5)


def test_the_snippets_name_the_number_of_labels(deberta: TinyModel, tmp_path: Path) -> None:
    deberta.make_model().base_model.save_pretrained(tmp_path / "base")
    base_model = deberta.model_class.from_pretrained(tmp_path / "base", num_labels=3)
    settings = config(deberta, init_r=2, init_weights=False, modules_to_save=["pooler"])
    model = get_peft_model(base_model, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "lora")
    export_lora_files(tmp_path / "adapter", tmp_path / "from-files")
    for folder in ("adapter", "lora", "from-files"):
        load_it = snippets((tmp_path / folder / "README.md").read_text())[0]
        assert f'"{card_module.HERE}", num_labels=3)' in load_it
        names: dict[str, Any] = {}
        run(load_it.replace(card_module.HERE, str(tmp_path / folder)), names)
        assert_close(logits(names["model"], deberta), logits(model, deberta), 1e-5)


def test_the_snippets_name_no_number_of_labels_in_vain(deberta: TinyModel, llama: TinyModel, tmp_path: Path) -> None:
    for tiny in (deberta, llama):
        model = finished(tiny)
        model.save_pretrained(tmp_path / tiny.name)
        export_lora(model, tmp_path / tiny.name / "lora")
        for path in (tmp_path / tiny.name).rglob("README.md"):
            assert "num_labels" not in path.read_text()


def test_every_adapter_of_ours_is_told_of(llama: TinyModel, tmp_path: Path) -> None:
    model = finished(llama)
    model.add_adapter("second", config(llama, init_r=3, target_r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Adapter `default`:" in text
    assert "Adapter `second`:" in text
    assert "fixed ranks" in text


def test_the_card_of_fixed_ranks(tiny: TinyModel, tmp_path: Path) -> None:
    tiny.make_model().save_pretrained(tmp_path / "base")
    base_model = tiny.model_class.from_pretrained(tmp_path / "base")
    targets = list(tiny.target_modules)
    settings = LowRankConfig(ratio=0.7, rank_multiple=1, target_modules=targets, task_type=tiny.task_type)
    model = get_peft_model(base_model, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert {"peft_rank", "low-rank", "lowrank"} <= set(card.data.tags)
    assert "salientlora" not in card.data.tags
    assert "low-rank factors, svd" in card.text
    assert "0.7 of the parameters of the targeted modules, uniform" in card.text
    assert rank_table(model).markdown() in card.text
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in file.values())
    factors = sum(tensor.numel() for key, tensor in file.items() if ".lowrank_" in key)
    assert f"| trainable parameters | {trained:,}, {factors:,} of them in the factors |" in card.text
    load_it, compress_it = snippets(card)
    names: dict[str, Any] = {}
    run(load_it.replace(card_module.HERE, str(tmp_path / "adapter")), names)
    assert_close(logits(names["model"], tiny), logits(model, tiny), 0)
    run(compress_it.replace('"compressed"', f'"{tmp_path / "compressed"}"'), names)
    assert compare(tmp_path / "adapter", tmp_path / "compressed").largest < 1e-5
    summary = read_summary(tmp_path / "adapter")
    assert summary.ranks == get_rank_pattern(model)
    assert (summary.parameters, summary.other_parameters) == (factors, trained - factors)
    assert summary.finished
    with pytest.raises(ValueError, match="type LOWRANK, which replaces weights"):
        export_lora_files(tmp_path / "adapter", tmp_path / "lora")


@pytest.mark.parametrize("saved", ["before", "after a reload"])
def test_the_card_of_a_compression_of_nothing(llama: TinyModel, tmp_path: Path, saved: str) -> None:
    with pytest.warns(UserWarning, match="stay dense"):
        model = get_peft_model(llama.make_model(), LowRankConfig(rank=500, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "adapter")
        if saved == "after a reload":
            PeftModel.from_pretrained(llama.make_model(), tmp_path / "adapter").save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "| total rank | 0, every module stays dense |" in text
    assert read_summary(tmp_path / "adapter").ranks == {}


def told(model: PeftModel, directory: Path) -> tuple[ModelCard, Any]:
    """The card of an adapter without warnings, and its summary by its files, whose size is what the card says."""
    model.save_pretrained(directory)
    card, summary = ModelCard.load(directory / "README.md"), read_summary(directory)
    if summary.finished:
        assert summary.ranks == get_rank_pattern(model)
        assert rank_table(model).markdown() in card.text
        parameters = (
            f"{summary.parameters + summary.other_parameters:,}, {summary.parameters:,} of them in the factors"
        )
        assert f"| trainable parameters | {parameters} |" in card.text
        assert float(re.search(r"\| size \| ([\d.]+) MB", card.text)[1]) * 1e6 == pytest.approx(
            summary.bytes, rel=0.01
        )
    assert ("the allocation has not finished" in card.text) is not summary.finished
    return card, summary


@pytest.mark.parametrize("overrides", [{}, {"train_base": True}, {"from_scratch": True}], ids=str)
def test_the_card_of_growing_ranks(llama: TinyModel, tmp_path: Path, overrides: dict[str, bool]) -> None:
    model = runs_inrank.adapted(llama, **overrides)
    optimizer = runs_inrank.adam(model)
    runs_inrank.steps_by_hand(model, llama, 1, 4, optimizer)
    card, summary = told(model, tmp_path / "growing")
    assert not summary.finished
    assert {"adaptive-rank", "inrank"} <= set(card.data.tags)
    runs_inrank.steps_by_hand(model, llama, 5, 12, optimizer)
    if not overrides:
        model.base_model.finalize(optimizer)
        card, summary = told(model, tmp_path / "grown")
        assert summary.finished
        assert "| method | InRank |" in card.text
        assert "every rank grows until it explains 0.8 of the energy" in card.text
        assert "fixed ranks" not in card.text
        names: dict[str, Any] = {"model": model}
        run(snippets(card)[1].replace('"merged"', f'"{tmp_path / "merged"}"'), names)
        merged = llama.model_class.from_pretrained(tmp_path / "merged")
        assert_close(logits(merged, llama), logits(model, llama), 1e-4)


def test_the_card_of_ranks_that_never_grew(llama: TinyModel, tmp_path: Path) -> None:
    _, summary = told(runs_inrank.adapted(llama, buffer_r=0), tmp_path)
    assert set(summary.ranks.values()) == {1}
    assert summary.budget == "fixed ranks, no allocation"


@pytest.mark.parametrize("method", ["ars", "l2lrc"])
def test_the_card_of_a_search(llama: TinyModel, tmp_path: Path, method: str) -> None:
    model = searches.searched(method, llama, task_type="CAUSAL_LM")
    optimizer = searches.optimizer(model, method)
    searches.search(model, llama, optimizer, 3)
    card, summary = told(model, tmp_path / "searching")
    assert not summary.finished
    model.base_model.finalize(optimizer)
    card, summary = told(model, tmp_path / "found")
    assert summary.finished
    assert {"low-rank", "adaptive-rank", {"ars": "adaptive-rank-svd"}.get(method, method)} <= set(card.data.tags)
    assert "0.7 of the parameters of the targeted modules" in card.text
    reloaded = PeftModel.from_pretrained(llama.make_model(), tmp_path / "found")
    reloaded.save_pretrained(tmp_path / "again")
    assert rank_table(model).markdown() in (tmp_path / "again" / "README.md").read_text()


def test_cards_of_other_methods_stay_as_they_are(llama: TinyModel, tmp_path: Path) -> None:
    get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "peft_rank" not in (tmp_path / "README.md").read_text()


def test_registering_again_changes_nothing(llama: TinyModel, tmp_path: Path) -> None:
    model = finished(llama)
    model.save_pretrained(tmp_path / "once")
    card_module.register_model_card()
    importlib.reload(card_module).register_model_card()
    assert PeftModel._peft_rank_own_card.__module__ == "peft.peft_model"
    model.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "README.md").read_text() == (tmp_path / "once" / "README.md").read_text()


def test_a_card_that_fails_does_not_lose_the_adapter(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise KeyError("surprise")

    model = finished(llama)
    monkeypatch.setattr(card_module, "summarize_model", fails)
    card_module.register_model_card()
    with pytest.warns(UserWarning, match="KeyError: 'surprise'"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "README.md").is_file()


def test_sharded_parameters(llama: TinyModel, tmp_path: Path) -> None:
    """ZeRO-3 leaves empty placeholders that know their full size."""
    model = finished(llama, modules_to_save=["lm_head"])
    model.create_or_update_model_card(str(tmp_path))
    expected = (tmp_path / "README.md").read_text()
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    model.create_or_update_model_card(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == expected


def test_the_card_of_a_trainer(llama: TinyModel, tmp_path: Path) -> None:
    model = finished(llama)
    trainer = make_trainer(model, llama, tmp_path)
    trainer.save_model()
    trainer.create_model_card(tags=["from-trainer"])
    card = ModelCard.load(tmp_path / "README.md")
    assert_tells_everything(card, model)
    assert "from-trainer" in card.data.tags


def test_the_card_of_a_plain_lora_export(llama: TinyModel, tmp_path: Path) -> None:
    model = finished(llama)
    export_lora(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    largest = max(get_rank_pattern(model).values())
    assert card.data.library_name == "peft"
    assert card.data.base_model == BASE
    assert {"lora", "peft_rank"} <= set(card.data.tags)
    assert f"| largest rank | {largest}" in card.text
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank 8" in card.text
    assert rank_table(model).markdown() in card.text


@pytest.mark.parametrize(("r", "expected"), [(1, 8), (8, 8), (9, 16), (16, 16), (33, 64), (300, 320), (512, 512)])
def test_ranks_that_vllm_takes(r: int, expected: int) -> None:
    assert f"--max-lora-rank {expected} " in card_module._serving(LoraConfig(r=r, task_type="CAUSAL_LM"), "there")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "merged model"),
        ({"bias": "lora_only"}, "merged model"),
        ({"r": 513}, "up to 512"),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, "language models only"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "language models only"),
    ],
)
def test_vllm_is_not_promised_what_it_refuses(settings: dict[str, Any], reason: str) -> None:
    text = card_module._serving(LoraConfig(**{"task_type": "CAUSAL_LM", **settings}), "there")
    assert "vllm serve" not in text
    assert reason in text


# ---- the record of a training ----


def test_record_and_picture_go_with_the_adapter(hub: Hub, llama: TinyModel, tmp_path: Path) -> None:
    model = adapted(llama)
    trainer = make_trainer(model, llama, tmp_path / "run", callbacks=[RankAllocationCallback()])
    trainer.train()
    trainer.save_model()
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "lora", pad=True)
    export_lora_files(tmp_path / "adapter", tmp_path / "lora-from-files")
    model.push_to_hub("me/my-adapter")
    record = {name: (tmp_path / "run" / name).read_bytes() for name in ("ranks.jsonl", "ranks.png")}
    for folder in ("run", "adapter", "lora", "lora-from-files"):
        for name, content in record.items():
            assert (tmp_path / folder / name).read_bytes() == content, folder
        assert (tmp_path / folder / "README.md").read_text().count("](ranks.png)") == 1, folder
    assert {name: hub.files[name] for name in record} == record
    assert b"](ranks.png)" in hub.files["README.md"]


def test_without_a_record_there_is_no_picture(llama: TinyModel, tmp_path: Path) -> None:
    finished(llama).save_pretrained(tmp_path)
    assert "ranks.png" not in (tmp_path / "README.md").read_text()


# ---- on the Hub ----


def test_push_to_hub(hub: Hub, deberta: TinyModel) -> None:
    model = finished(deberta)
    model.push_to_hub("me/my-adapter", tags=["mine"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.files)
    card = ModelCard(hub.files["README.md"].decode())
    assert_tells_everything(card, model)
    assert "mine" in card.data.tags
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("me/my-adapter")' in snippets(card)[0]
    factors = {key: value for key, value in load(hub.files["adapter_model.safetensors"]).items() if "_E" in key}
    assert sum(value.numel() for value in factors.values()) == sum(get_rank_pattern(model).values())


def test_push_to_hub_keeps_the_words_of_the_card_there(
    hub: Hub, llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "README.md"
    there.write_text("---\nlicense: mit\n---\n\n# My adapter\n\nMy own words.\n")
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", lambda *args, **kwargs: there)
    model = finished(llama)
    for _ in range(2):
        model.push_to_hub("me/my-adapter")
        there.write_bytes(hub.files["README.md"])
    card = ModelCard(there.read_text())
    assert_tells_everything(card, model)
    assert card.data.license == "mit"
    assert "My own words." in card.text
    assert card.text.count(card_module.START) == 1


def test_a_local_base_model_is_metadata_on_the_disk_only(hub: Hub, llama: TinyModel, tmp_path: Path) -> None:
    """PEFT writes the folder; the Hub refuses a card whose base model is no repository."""
    base = tmp_path / "base"
    llama.make_model().save_pretrained(base)
    model = finished(llama, base=str(base))
    model.save_pretrained(tmp_path / "adapter")
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model == str(base)
    model.push_to_hub("me/my-adapter")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if str(base) in tag]
    assert f"`{base}`" in card.text


def test_push_to_hub_of_an_export(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **kwargs: calls.append(kwargs))
    monkeypatch.chdir(tmp_path)
    llama.make_model().save_pretrained("base")
    model = finished(llama, base="base")
    export_lora(model, "plain", push_to_hub="me/my-lora")
    names = ["adapter_model.safetensors", "adapter_config.json", "README.md"]
    assert calls == [
        (("me/my-lora",), {"exist_ok": True}),
        {"repo_id": "me/my-lora", "folder_path": Path("plain"), "allow_patterns": names},
    ]
    (snippet,) = snippets(Path("plain/README.md").read_text())
    assert '"me/my-lora"' in snippet
    # what the Hub would give to the reader of the card
    (tmp_path / "me").mkdir()
    Path("plain").rename("me/my-lora")
    names = {}
    run(snippet, names)
    assert_close(logits(names["model"], llama), logits(model, llama), 1e-5)


def test_push_to_hub_of_other_methods_stays_as_it_is(hub: Hub, llama: TinyModel) -> None:
    get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"])).push_to_hub("me/lora")
    assert "peft_rank" not in hub.files["README.md"].decode()


def test_the_package_is_named_as_it_is_installed() -> None:
    assert importlib.metadata.version("peft-rank") == peft_rank.SalientLoRAConfig().peft_rank_version
