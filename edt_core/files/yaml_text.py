"""YAML of configurations and options: only plain values, in bounded number.

PyYAML's safe loader runs no code. This module also rejects what that loader accepts: aliases that repeat aliases (nine
lines of them can expand to a billion values), unbounded nesting, whole numbers of thousands of digits, and repeated
keys in a mapping.
"""

from typing import Any

import yaml

_MAX_VALUES = 100_000  # an alias counts as all values that it repeats; ImageNet-21k has 21,841 class names
_MAX_DEPTH = 50
_MAX_INTEGER = 1 << 64


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, with the line, for invalid or rejected YAML."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of a YAML text, with their lines. Raises yaml.YAMLError as `parse_yaml`."""
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._counts: dict[int, int] = {}  # number of values of each complete node, by identity
        self._open: list[int] = [0]  # number of values so far of each node in progress

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        if self._depth >= _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {_MAX_DEPTH} levels deep", mark)
        self._depth += 1
        self._open.append(1)
        node = super().compose_node(parent, index)
        count = self._open.pop()
        self._depth -= 1
        if alias:
            if id(node) not in self._counts:
                raise yaml.composer.ComposerError(None, None, "an alias is inside the value that it repeats", mark)
            count = self._counts[id(node)]
        self._counts[id(node)] = count
        self._open[-1] += count
        if self._open[-1] > _MAX_VALUES:
            what = "its aliases repeat" if alias else "it has"
            raise yaml.composer.ComposerError(None, None, f"{what} more than {_MAX_VALUES:,} values", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        _refuse_repeated_keys(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except ValueError as error:  # 2024-13-01, or a number with more digits than Python reads
            raise _refused(str(error), node.start_mark) from error
        if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
            raise _refused("a whole number has more than 64 bits", node.start_mark)
        return value


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Raise yaml.YAMLError for a repeated key of a mapping: Python would keep only the last. `<<` may be repeated."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (name := (key.tag, key.value)) in lines:
            raise _refused(f"the key {key.value!r} occurs twice, first in line {lines[name]}", key.start_mark)
        lines[name] = key.start_mark.line + 1


def _refused(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
