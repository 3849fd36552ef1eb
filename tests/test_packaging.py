# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The package as a whole: its metadata, what its sources may contain, and which floor may import which."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from peft import PeftConfig

import peft_rank


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft_rank"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = [
    ROOT / "setup.py",
    *SOURCES,
    *(path for folder in ("tests", "examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))),
]
HEADER = "# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0."

# The design's house: a module imports from its own floor and from below, never from above.
FLOORS = {
    "allocation": 0,
    "decomposition": 0,
    "orthogonality": 0,
    "registration": 1,
    "calibration": 1,
    "tuners": 2,
    "ranks": 3,
    "callbacks": 3,
    "export": 3,
    "reporting": 3,
    "cli": 4,
    "__init__": 5,
}
GROUND_FLOOR_MAY_IMPORT = {"torch", "peft_rank", *sys.stdlib_module_names}

EXTRAS = {"examples", "deepspeed", "quantized", "tracking", "plot", "eval", "test", "docs", "demo"}
RUNTIME = {"torch", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub", "tqdm"}


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, those inside functions and for type checkers included."""
    package = path.relative_to(ROOT / "src").parent.parts if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires("peft-rank") or []]


# --- metadata ---------------------------------------------------------------------------------------------------------


def _version_in_setup() -> str:
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
            return ast.literal_eval(node.value)
    raise LookupError("setup.py has no VERSION")


def test_version_is_the_same_everywhere() -> None:
    installed = metadata.version("peft-rank")
    assert installed == _version_in_setup(), "reinstall the package: pip install -e ."
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == installed


def test_requirements_and_extras() -> None:
    described = metadata.metadata("peft-rank")
    assert described["Requires-Python"] == ">=3.11"
    assert set(described.get_all("Provides-Extra")) == EXTRAS
    runtime = {canonicalize_name(item.name): item for item in _requirements() if item.marker is None}
    assert set(runtime) == RUNTIME
    assert not runtime["peft"].specifier.contains("0.20.9")
    assert runtime["peft"].specifier.contains("0.21.2")
    assert not runtime["peft"].specifier.contains("0.22.0")
    assert not runtime["transformers"].specifier.contains("4.57.0")


def test_constraints_pin_what_the_commands_install() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    for item in _requirements():
        if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in ("test", "demo", "docs")):
            assert canonicalize_name(item.name) in pins, f"{item} is not pinned"
            assert item.specifier.contains(pins[canonicalize_name(item.name)], prereleases=True), item


def test_one_ruff() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["required-version"]
    assert [str(item.specifier) for item in _requirements() if item.name == "ruff"] == [wanted]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["rev"] for repo in hooks] == ["v" + wanted.removeprefix("~=")]


def test_console_script() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="peft-rank")
    assert script.value == "peft_rank.cli:main"
    if find_spec("peft_rank.cli") is None:
        pytest.skip("the command line comes with compression")
    assert callable(script.load())


def test_wheel_and_sdist_are_complete(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    without = shutil.ignore_patterns("*.egg-info", "__pycache__", ".*", "build", "dist")
    shutil.copytree(ROOT, tree, ignore=without)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT / "src").as_posix() for path in SOURCES} | {"peft_rank/py.typed"}
    assert expected <= packed
    assert all(name.startswith("peft_rank/") for name in packed)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CITATION.cff", "constraints.txt", "Makefile", "tests/tiny_models.py"} <= names


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PYTHON_FILES, ids=_id)
def test_header_and_length(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert HEADER in lines[:2]  # below a shebang at most
    # a test file is a list of cases, which may be long
    assert len(lines) < 400 or path.is_relative_to(ROOT / "tests")


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_nothing_that_has_no_place_in_the_package(path: Path) -> None:
    found = [f"{line}: import {name}" for line, name in _imports(path) if name.split(".")[0] in ("pickle", "dill")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert is for tests, raise an error that says what to do")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            found.append(f"{node.lineno}: torch.load, where safetensors would do")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            found.append(f"{node.lineno}: trust_remote_code")
    assert not found, found


def _part(module: str) -> str:
    """The inhabitant of `FLOORS` that a module of the package belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_floors(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in FLOORS, f"give {part} a floor in FLOORS"
    for line, name in _imports(path):
        top = name.split(".")[0]
        if FLOORS[part] == 0:
            assert top in GROUND_FLOOR_MAY_IMPORT, f"line {line}: the ground floor knows torch only, not {name}"
        if top == "peft_rank":
            assert FLOORS[_part(name)] <= FLOORS[part], f"line {line}: {name} lives above {part}"


# --- configs ----------------------------------------------------------------------------------------------------------


CONFIGS = [item for item in vars(peft_rank).values() if isinstance(item, type) and issubclass(item, PeftConfig)]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_config_field_has_help(config_class: type[PeftConfig]) -> None:
    ours = [base for base in config_class.__mro__ if base.__module__.partition(".")[0] == "peft_rank"]
    names = {name for base in ours for name in vars(base).get("__annotations__", {})}
    silent = [f.name for f in dataclasses.fields(config_class) if f.name in names and not f.metadata.get("help")]
    assert not silent, f"{config_class.__name__}: no help for {silent}"
