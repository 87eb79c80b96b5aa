"""What the product is made of, counted: `python -m tests.support.house` prints a table, tests hold the bounds.

Lines are those of the files. A function's length is from its `def` to its last line. An import is hidden for a circle
where it stands in a function and would close a circle of modules at their top.
"""

import ast
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("edt_core", "jobs", "pipelines")
# Of each package the rooms, lowest floor first: a module imports from its own room and from floors below.
FLOORS: dict[str, tuple[frozenset[str], ...]] = {
    "edt_core": (
        frozenset({"printing", "config", "environment", "precision", "one_cycle", "cpu_units", "memory"}),
        frozenset({"errors", "progress"}),
        frozenset({"network", "files", "child_process"}),
        frozenset({"store", "models"}),
        frozenset({"data"}),
        frozenset({"diffusion", "autoencoders", "evaluation"}),
        frozenset({"sampling"}),
        frozenset({"training", "pipeline"}),
        frozenset({"acceptance"}),
        frozenset({"__init__"}),
    ),
    "jobs": (
        frozenset({"__init__", "runtime"}),
        frozenset({"stages"}),
        frozenset({"models"}),
        frozenset({"commands", "serve"}),
        frozenset({"benchmark"}),
    ),
    "pipelines": (
        frozenset({"__init__", "tracking", "config", "terminal"}),
        frozenset({"registry", "engine", "cluster", "setup"}),
        frozenset({"report", "outcome", "champion", "teacher"}),
        frozenset({"pipeline", "notification"}),
        frozenset({"plan", "schedule", "diff"}),
        frozenset({"reproduce", "retrain", "studies"}),
        frozenset({"commands"}),
        frozenset({"cli"}),
    ),
}
_SHORT, _FEW_USERS = 60, 2


@dataclass(frozen=True)
class Module:
    """One file of the product."""

    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    @property
    def parts(self) -> tuple[str, ...]:
        return self.path.relative_to(ROOT).with_suffix("").parts

    @property
    def name(self) -> str:
        return ".".join(self.parts).removesuffix(".__init__")

    @property
    def package(self) -> str:
        return self.parts[0]

    @property
    def room(self) -> str:
        """The folder below its package, or its own name where it lies in none."""
        return self.parts[1]

    @cached_property
    def lines(self) -> int:
        return len(self.path.read_text().splitlines())

    def imports(self, deep: bool) -> set[str]:
        """Dotted names of what it imports; `deep`: inside functions too. Imports for types alone do not count."""
        found: set[str] = set()
        for node in _walk(self.tree, deep):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return found

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def without_docstring(self) -> list[str]:
        """Public classes and functions at the top of the module that say nothing of themselves."""
        public = (node for node in self.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        return [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]


def _walk(node: ast.AST, deep: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not deep:
            continue
        yield child
        yield from _walk(child, deep)


def modules() -> list[Module]:
    """Every file of the product."""
    return [Module(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _edges(everything: list[Module], deep: bool) -> dict[str, set[str]]:
    """Name of a module -> those of the product that it imports. A package's own __init__ counts where it is named."""
    names = {module.name for module in everything}
    return {module.name: module.imports(deep) & names - {module.name} for module in everything}


def backwards(everything: list[Module]) -> list[str]:
    """Imports that run up: from a floor of a package to a higher one, or between two rooms of one floor."""
    floor = {
        (package, room): number
        for package, floors in FLOORS.items()
        for number, rooms in enumerate(floors)
        for room in rooms
    }
    found = []
    by_name = {module.name: module for module in everything}
    for module in everything:
        own = _floor(floor, module)
        for name in sorted(module.imports(deep=True) & set(by_name)):
            other = by_name[name]
            if other.package == module.package and other.room != module.room and _floor(floor, other) >= own:
                found.append(f"{module.name} -> {name}")
    return found


def _floor(floor: dict[tuple[str, str], int], module: Module) -> int:
    """Files in `jobs` itself only start a stage: they stand on top."""
    is_start = module.package == "jobs" and len(module.parts) == 2 and module.room != "__init__"
    return len(FLOORS["jobs"]) if is_start else floor[module.package, module.room]


def hidden_for_a_circle(everything: list[Module]) -> list[str]:
    """Imports in functions which, at the top of their module, would close a circle."""
    top, deep = _edges(everything, False), _edges(everything, True)
    return sorted(
        f"{name} -> {other}" for name in deep for other in deep[name] - top[name] if name in _reachable(deep, other)
    )


def _reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        for name in edges.get(todo.pop(), set()) - seen:
            seen.add(name)
            todo.append(name)
    return seen


def short_and_alone(everything: list[Module]) -> list[str]:
    """Modules shorter than 60 lines that fewer than two others use: each needs a reason."""
    users: Counter[str] = Counter(name for named in _edges(everything, True).values() for name in named)
    return [
        f"{module.name} ({module.lines} lines, {users[module.name]} users)"
        for module in everything
        if module.path.name != "__init__.py" and module.lines < _SHORT and users[module.name] < _FEW_USERS
    ]


def function_lengths(everything: list[Module]) -> list[int]:
    """Lines of every function, sorted."""
    return sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1 for module in everything for node in module.functions()
    )


def folders(everything: list[Module]) -> dict[str, tuple[int, int]]:
    """Folder -> number of modules, without its __init__, and lines."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for module in everything:
        folder = str(module.path.parent.relative_to(ROOT))
        number, lines = found[folder]
        found[folder] = number + (module.path.name != "__init__.py"), lines + module.lines
    return dict(found)


def main() -> None:
    """Print the table."""
    everything = modules()
    print(f"{'folder':34} modules  lines")
    for folder, (number, lines) in folders(everything).items():
        print(f"{folder:34} {number:7} {lines:6,}")
    lengths = function_lengths(everything)
    p90 = lengths[len(lengths) * 9 // 10]
    print(f"\nproduct: {len(everything)} files, {sum(module.lines for module in everything):,} lines")
    print(f"functions: {len(lengths):,}; lines: median {statistics.median(lengths):g}, p90 {p90}, max {lengths[-1]}")
    for what, rows in {
        "public names without docstring": [f"{m.name}.{name}" for m in everything for name in m.without_docstring()],
        "imports against the floors": backwards(everything),
        "imports hidden in functions for a circle": hidden_for_a_circle(everything),
        "short modules with fewer than two users": short_and_alone(everything),
    }.items():
        print(f"\n{what}: {len(rows)}")
        print(*(f"  {row}" for row in rows), sep="\n")


if __name__ == "__main__":
    main()
