"""A message that names an option names one that exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command

from edt_core.config import Section
from pipelines.cli import app
from pipelines.config.schema import PipelineConfig

ROOT = Path(__file__).parents[2]
SOURCES = {
    path: ast.parse(path.read_text())
    for part in ("edt_core", "jobs", "pipelines")
    for path in (ROOT / part).rglob("*.py")
}
OTHERS = {"--hard-dereference", "--dereference", "--sparse", "--include", "--local-dir"}  # of tar and hf


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of each error's message; what is put in at run time is cut out."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error") and node.args:
                parts = [
                    p.value for p in ast.walk(node.args[0]) if isinstance(p, ast.Constant) and isinstance(p.value, str)
                ]
                yield f"{path.relative_to(ROOT)}:{node.lineno}", "\0".join(parts)


def names() -> set[str]:
    """All arguments of functions, fields of classes, and options of the command lines, as Python spells them."""
    found: set[str] = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                found.add(node.value[2:].replace("-", "_"))
    commands = [get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        found |= {option.lstrip("-").replace("-", "_") for p in command.params for option in p.opts}
    return found


def test_options_and_arguments_that_messages_name_exist() -> None:
    known, seen = names(), 0
    for place, text in messages():
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - OTHERS:
            assert flag[2:].replace("-", "_") in known, f"{place} names {flag}"
            seen += 1
        for name in re.findall(r"(?<![\w.])([a-z_]+)=(?:true|false|null|True|False|None)\b", text):
            assert name in known, f"{place} names {name}"
            seen += 1
    assert seen > 50
    assert "learn_sigma" not in known


def test_configuration_fields_that_messages_name_exist() -> None:
    sections = {name: field.annotation for name, field in PipelineConfig.model_fields.items()}
    fields = {
        name: set(made.model_fields)
        for name, made in sections.items()
        if isinstance(made, type) and issubclass(made, Section)
    }
    seen = 0
    for place, text in messages():
        for section, field in re.findall(rf"(?<![\w./])({'|'.join(fields)})\.([a-z_][a-z0-9_]*)", text):
            assert field in fields[section], f"{place} names {section}.{field}"
            seen += 1
    assert seen > 15
