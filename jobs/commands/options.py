"""Configuration from the command line: fields as options, `--set key=value`, YAML files, and error messages."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from edt_core.config import Section
from edt_core.errors import UserError
from edt_core.files.small_files import MAX_CONFIG_BYTES, read_text
from edt_core.files.yaml_text import parse_yaml

_EXAMPLES = "examples:"
_LONGEST = 200  # characters of a value that are shown
_ALIKE = 0.75  # of `difflib`: least similarity of a suggested name
_MAX_SUGGESTIONS = 3


def add_fields(parser: Any, schema: type[Section], leave_out: Sequence[str] = ()) -> None:
    """An option `--field-name VALUE` for each field of a section; values are read as YAML."""
    for name, info in schema.model_fields.items():
        if name not in leave_out:
            choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
            metavar = "|".join(map(str, choices)) or name.split("_")[-1].upper()
            option = f"--{name.replace('_', '-')}"
            if info.annotation is bool:
                parser.add_argument(
                    option, dest=name, metavar="true|false", nargs="?", const="true", type=_switch, help=_help(info)
                )
            else:
                parser.add_argument(option, dest=name, metavar=metavar, help=_help(info))


def _switch(text: str) -> str:
    """The value of a switch. Raises ArgumentTypeError for other text, which may be an input that follows the switch."""
    try:
        TypeAdapter(bool).validate_python(parse_assignment(f"switch={text}")[1])
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false; put a switch after the inputs") from None
    return text


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter, except that it does not wrap the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json` of a command that prints a table."""
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON instead of a table")


def parser_of(prog: str, description: str, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser whose help ends with these examples, each of them the arguments after the program's name."""
    lines = "\n".join([_EXAMPLES, *(f"  {prog} {example}" for example in examples)])
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=lines if examples else None, formatter_class=_HelpFormatter
    )


def _help(info: FieldInfo) -> str:
    shown = str(info.default).lower() if isinstance(info.default, bool) else info.default
    shown = None if shown == () else shown
    default = "" if shown is None else f"  [default: {shown}]"
    return f"{info.description or ''}{default}".strip().replace("%", "%%")


def given_fields(options: argparse.Namespace, schema: type[Section]) -> dict[str, Any]:
    """The fields of a section that are set by options."""
    texts = {name: getattr(options, name, None) for name in schema.model_fields}
    return {name: _value(schema, name, value) for name, value in texts.items() if value is not None}


def _value(schema: type[Section], name: str, text: str) -> Any:
    """The value of an option. Text fields keep the text: as YAML, 010 would be 8, and a path would end at ` #`."""
    if schema.model_fields[name].annotation in (str, str | None, tuple[str, ...]) and text != "null":
        return text
    value = parse_assignment(f"{name}={text}")[1]
    return parse_yaml(f"[{text}]") if _is_bare_list(schema.model_fields[name].annotation, value) else value


def _is_bare_list(annotation: Any, value: Any) -> bool:
    """Whether an option, such as `7,10` or `fid`, is a list without its brackets."""
    if get_origin(annotation) is dict:
        return False
    kinds = get_args(annotation) or (annotation,)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    listed = any(get_origin(kind) is tuple for kind in (annotation, *kinds))
    plain = any(isinstance(kind, type) and isinstance(value, kind) for kind in kinds if get_origin(kind) is None)
    return listed and not isinstance(value, list) and not plain and value is not None and value not in words


def parse_assignment(text: str, option: str = "--set", example: str = "train.max_steps=50") -> tuple[str, Any]:
    """`key=value` with the value as YAML. Raises UserError, which names the option."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"{option} takes key=value, such as {example}; got {text!r}")
    if value.startswith(("/", "./", "../", "~/")):
        return key.strip(), value  # a path: as YAML, `/data/my: set` would be a mapping
    if " #" in value and not value.lstrip().startswith(('"', "'", "[", "{")):
        return key.strip(), value.strip()  # a path with a number sign, not YAML with a comment
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"{option} {key}: {value!r} is not a YAML value; quote it as in {option} '{key}=\"text\"'"
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError."""
    try:
        values = parse_yaml(read_text(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a configuration: expected a mapping of fields")
    return values


def validated(schema: type[Section], fields: Mapping[str, Any]) -> Any:
    """The validated section. Raises UserError with one line per problem, and what an unknown key may mean."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise UserError("\n".join(_problem(schema, problem) for problem in error.errors())) from error


def _problem(schema: type[Section], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or schema.__name__
    if problem["type"] == "extra_forbidden":
        if meant := meant_by(where, schema):
            return f"unknown configuration key {where!r}; did you mean {' or '.join(meant)}?"
        return f"unknown configuration key {where!r}; known keys here: {', '.join(_known_keys(schema, problem['loc']))}"
    message = problem["msg"].removeprefix("Value error, ")
    value = repr(problem["input"])
    value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    return f"configuration {where!r}: {message} (got {value})" if problem["loc"] else message


def _known_keys(schema: type[Section], path: Sequence[Any]) -> list[str]:
    for part in path[:-1]:
        field = schema.model_fields.get(str(part))
        if field is None or not is_section(field.annotation):
            break
        schema = field.annotation
    return sorted(schema.model_fields)


def field_names(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted name of every field and section of a schema."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        if is_section(section := field.annotation):
            yield from field_names(section, f"{prefix}{name}.")


def meant_by(field: str, schema: type[Section]) -> tuple[str, ...]:
    """Suggestions for an unknown field: the most similar one of its section, or fields of that name elsewhere."""
    names = list(field_names(schema))
    section, _, last = field.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == section]
    elsewhere = [name for name in names if name.rpartition(".")[2] == last]
    near = get_close_matches(field, siblings, 1, _ALIKE) or elsewhere[:_MAX_SUGGESTIONS]
    return tuple(near or get_close_matches(field, names, 1, _ALIKE))


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether the annotation of a field is a section of a configuration."""
    return isinstance(annotation, type) and issubclass(annotation, Section)
