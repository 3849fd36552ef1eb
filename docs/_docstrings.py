# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Prepares docstrings in the style of transformers, and the help of config fields, for the API reference."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe


EXAMPLE = re.compile(r"^Example:\n", re.MULTILINE)
FENCE = re.compile(r"^( +)```py\n.*?^\1```$", re.MULTILINE | re.DOTALL)
TYPE = re.compile(r"^( {4}\*{0,2}\w+) \([`*].*?\):", re.MULTILINE)
REFERENCE = re.compile(r"\[(`[\w.]+`)\](?!\()")


class HouseStyle(griffe.Extension):
    """Takes examples out of their indentation, types from signatures, and references as plain names; of a dataclass field
    makes the help its docstring and the default its value."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = EXAMPLE.sub("**Example**\n", obj.docstring.value)
            text = FENCE.sub(lambda found: textwrap.dedent(found[0]), text)
            obj.docstring.value = REFERENCE.sub(r"\1", TYPE.sub(r"\1:", text))

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        call = node.value if isinstance(node, ast.AnnAssign) else None
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("field", "dataclasses.field"):
            return
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        if "metadata" not in arguments:
            return
        attr.docstring = griffe.Docstring(ast.literal_eval(arguments["metadata"])["help"], parent=attr)
        default = arguments.get("default", arguments.get("default_factory"))
        attr.value = None if default is None else ast.unparse(default)
