# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Shows the fields of configs in the API reference as their users know them: with their default, and with the help that
stands in `field(metadata={"help": ...})`."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class HelpOfFields(griffe.Extension):
    """Makes the help of a dataclass field its docstring, and its default its value."""

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
