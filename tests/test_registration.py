# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Tuner types of this package inside of PEFT's enum and tables."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path

import pytest
from peft import LoraConfig, LoraModel, PeftConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_rank import SalientLoRAConfig, SalientLoRAModel
from peft_rank.registration import PeftTypeConflictError, add_peft_type, register_tuner_type
from runs import adapted
from tiny_models import TinyModel


NAME = "SALIENTLORA"
TABLES = (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
)


def test_the_member_is_a_member_like_any_other() -> None:
    member = PeftType.SALIENTLORA
    assert member is PeftType[NAME] is PeftType(NAME) and isinstance(member, PeftType) and isinstance(member, str)
    assert member == NAME and member.name == member.value == NAME and hash(member) == hash(NAME)
    assert member in PeftType and member in list(PeftType)
    assert list(PeftType).count(member) == 1 and len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert PeftType.__members__[NAME] is member
    assert repr(member) == repr(PeftType.LORA).replace("LORA", NAME)
    assert str(member) == str(PeftType.LORA).replace("LORA", NAME)
    assert f"{member}" == f"{PeftType.LORA}".replace("LORA", NAME)
    assert {member: 1}[NAME] == 1


def test_the_member_is_copied_and_pickled_as_itself() -> None:
    member = PeftType.SALIENTLORA
    assert copy.copy(member) is copy.deepcopy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert json.dumps(member) == f'"{NAME}"'


def test_the_members_of_peft_are_as_they_were() -> None:
    own = PeftType.LORA
    assert own is PeftType("LORA") and list(PeftType).index(own) < list(PeftType).index(PeftType.SALIENTLORA)
    with pytest.raises(ValueError, match="NOBODY"):
        PeftType("NOBODY")
    with pytest.raises(AttributeError):
        PeftType.LORA = "x"
    assert issubclass(PeftType, Enum)


def test_peft_knows_the_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is SalientLoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[NAME] is PEFT_TYPE_TO_MIXED_MODEL_MAPPING[NAME] is SalientLoRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[NAME] == SalientLoRAModel.prefix == "salientlora_"


def test_registering_again_changes_nothing() -> None:
    before = [dict(table) for table in TABLES], list(PeftType)
    for _ in range(3):
        assert register_tuner_type("salientlora", SalientLoRAConfig, SalientLoRAModel) is PeftType.SALIENTLORA
        assert add_peft_type(NAME) is PeftType.SALIENTLORA
    assert ([dict(table) for table in TABLES], list(PeftType)) == before


@pytest.mark.parametrize("name", ["lora", "salientlora"])
def test_a_name_of_somebody_else_is_refused(name: str) -> None:
    class Foreign(PeftConfig):
        pass

    before = [dict(table) for table in TABLES], list(PeftType)
    with pytest.raises(PeftTypeConflictError, match=f"{name.upper()}.*belongs to.*Foreign.*not registered"):
        register_tuner_type(name, Foreign, LoraModel)
    assert ([dict(table) for table in TABLES], list(PeftType)) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig


def test_lora_works_beside(llama: TinyModel) -> None:
    model = get_peft_model(llama.make_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(model.base_model) is LoraModel
    assert adapted(llama).get_model_status().peft_types == {"default": NAME}


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_importing_and_reloading_changes_nothing_of_peft(tmp_path: Path) -> None:
    result = run_python(f"""
        import importlib, sys, pickle
        import peft, torch
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as C, PEFT_TYPE_TO_TUNER_MAPPING as T
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as P, PEFT_TYPE_TO_MIXED_MODEL_MAPPING as M
        before = [list(peft.PeftType), *map(dict, (C, T, P, M))]
        import peft_rank
        member = peft.PeftType.SALIENTLORA
        ours = [peft.PeftType(n) for n in ("SALIENTLORA", "LOWRANK", "ADAPTIVE_RANK_SVD", "L2LRC", "INRANK")]

        def check():
            types = list(peft.PeftType)
            assert types[: len(before[0])] == before[0]
            assert set(types[len(before[0]) :]) == set(ours)
            for old, new in zip(before[1:], (C, T, P, M)):
                assert all(new[key] is value for key, value in old.items())
                assert set(new) - set(old) <= set(ours) and member in new
            assert all(key in mapping for key in ours for mapping in (C, T, P))
            module = sys.modules["peft_rank.tuners.salientlora"]
            assert C[member] is module.SalientLoRAConfig and T[member] is module.SalientLoRAModel
            for mixed in (False, True):
                base = torch.nn.Sequential(torch.nn.Linear(4, 4))
                config = module.SalientLoRAConfig(init_r=2, target_r=2, target_modules=["0"], init_weights=False)
                model = peft.get_peft_model(base, config, mixed=mixed)
                model(torch.ones(1, 4))
            plain = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
            plain.save_pretrained({str(tmp_path)!r})
            loaded = peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(4, 4)), {str(tmp_path)!r})
            assert type(loaded.peft_config["default"]) is module.SalientLoRAConfig

        check()
        package = "peft_rank.tuners.salientlora"
        names = [package + part for part in (".config", ".functional", ".layer", ".training", ".model", "")]
        for name in (*names, *names, "peft_rank", "peft_rank"):
            importlib.reload(sys.modules[name])
            if name in (package, "peft_rank"):
                check()
        for name in [name for name in sys.modules if name.startswith("peft_rank")]:
            del sys.modules[name]
        import peft_rank
        check()
    """)
    assert result.returncode == 0, result.stderr


def test_loading_without_the_package_names_the_type(llama: TinyModel, tmp_path: Path) -> None:
    adapted(llama, target_r=4).save_pretrained(tmp_path)
    result = run_python(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert result.returncode != 0 and NAME in result.stderr.splitlines()[-1]
