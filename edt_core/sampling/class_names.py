"""Class names: those of ImageNet's 1,000 classes, and labels by name.

A class may have several names. Upper and lower case do not count.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from edt_core.errors import UserError

Names = tuple[str, ...]  # of one class; the first is the one to show

_FILE = Path(__file__).parents[1] / "data" / "imagenet_classes.txt"  # a class a line, its names divided by commas
_WNID = re.compile(r"n\d{8}")
_MOST_SHOWN = 5


@cache
def imagenet_names() -> tuple[Names, ...]:
    """Names of the 1,000 classes of ILSVRC 2012, in the order of their sorted WordNet ids."""
    return tuple(tuple(line.split(", ")) for line in _FILE.read_text(encoding="utf-8").splitlines())


def class_names(own: Sequence[str], num_classes: int) -> tuple[Names, ...]:
    """The names of a model's classes: its own, and ImageNet's where it has 1,000 classes named by WordNet ids or not
    at all. Classes of which nothing is known are called by their indices.
    """
    if num_classes == len(imagenet_names()):
        if not own:
            return imagenet_names()
        if list(own) == sorted(own) and all(_WNID.fullmatch(name) for name in own):
            return tuple((*names, wnid) for names, wnid in zip(imagenet_names(), own, strict=True))
    return tuple((name,) for name in own) if own else tuple((str(label),) for label in range(num_classes))


def class_labels(texts: Sequence[str], names: Sequence[Names]) -> list[int]:
    """Labels by index or name; the beginning of a name is enough where only one class has it.

    A name that looks like an index, as those of digits do, is taken as the name.
    Raises UserError saying which classes a text may have meant.
    """
    if not texts:
        raise UserError(f"no classes were given; name some of the {len(names)}, by index or name")
    return [_label(text.strip(), names) for text in texts]


def _label(text: str, names: Sequence[Names]) -> int:
    wanted = text.casefold()
    is_index = re.fullmatch(r"-?\d+", wanted) is not None
    found = _matching(names, wanted, whole=True)
    if not found and is_index:
        if not 0 <= int(wanted) < len(names):
            raise UserError(f"class {text}: the model has 0..{len(names) - 1}")
        return int(wanted)
    found = found or _matching(names, wanted, whole=False)
    if not found:
        raise UserError(f"no class is called {text!r}; {_suggestion(wanted, names)}")
    if len(found) > 1:
        raise UserError(f"class {text!r} may be {_listed(found, names)}; give the index")
    return found[0]


def _matching(names: Sequence[Names], wanted: str, whole: bool) -> list[int]:
    """Labels of the classes with this name, or with one that begins so."""

    def fits(name: str) -> bool:
        return name.casefold() == wanted if whole else name.casefold().startswith(wanted)

    return [label for label, known in enumerate(names) if wanted and any(map(fits, known))]


def _suggestion(wanted: str, names: Sequence[Names]) -> str:
    """What somebody who mistyped a name may have meant."""
    labels = {name.casefold(): label for label, name in _each(names)}
    close = [labels[name] for name in get_close_matches(wanted, labels, 3)]
    close += [label for name, label in labels.items() if wanted and wanted in name]
    if close:
        return f"did you mean {_listed(list(dict.fromkeys(close)), names)}?"
    return f"the model has {len(names)}, as {_listed(range(min(3, len(names))), names)}"


def _each(names: Sequence[Names]) -> Iterator[tuple[int, str]]:
    for label, known in enumerate(names):
        for name in known:
            yield label, name


def _listed(labels: Sequence[int], names: Sequence[Names]) -> str:
    shown = [f"{label} ({', '.join(names[label])})" for label in labels[:_MOST_SHOWN]]
    more = f" and {len(labels) - len(shown)} more" if len(labels) > len(shown) else ""
    return " or ".join(shown) + more
