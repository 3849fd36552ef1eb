# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""The documentation tells the truth: quoted messages exist, the reference is complete, every page is in the site, and the
notebook runs. `test_readme.py` runs the blocks of the pages and follows their links."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml

import peft_rank


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def _messages() -> list[str]:
    """Every text in the sources, with a NUL where a value is inserted."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _quoted(page: Path) -> list[str]:
    """The first cells of the tables, up to the part on other packages."""
    text = page.read_text(encoding="utf-8").partition("## Messages of other packages")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


MESSAGES = _messages()
QUOTED = _quoted(DOCS / "troubleshooting.md")


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_exist(quoted: str) -> None:
    pattern = re.compile("[^\0]*\0[^\0]*".join(map(re.escape, quoted.split("..."))))
    assert [message for message in MESSAGES if pattern.search(message)]


def test_there_are_quoted_messages() -> None:
    assert len(QUOTED) > 30
    # what does not exist is not found
    with pytest.raises(AssertionError):
        test_quoted_messages_exist("The allocation of adapter ... has run away")


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: peft_rank\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(peft_rank.__all__)


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = re.findall(r"\w+\.md", json.dumps(site["nav"]))
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md"))
    assert len(set(pages)) == len(pages)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "outputs are not committed"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (counted,) = (output.text for output in notebook.cells[-2].outputs if output.output_type == "stream")
    assert json.loads(counted) == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert (tmp_path / "adapter" / "ranks.png").is_file()
