"""Class names: those of ImageNet's 1,000 classes, and labels by name.

A class may have several names. They are compared without regard to case.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from edt_core.errors import UserError

Names = tuple[str, ...]  # of one class; the first one is shown

_FILE = Path(__file__).parents[1] / "data" / "imagenet_classes.txt"  # one class per line, names separated by commas
_WNID = re.compile(r"n\d{8}")
_MOST_SHOWN = 5


@cache
def imagenet_names() -> tuple[Names, ...]:
    """Names of the 1,000 classes of ILSVRC 2012, in the order of their sorted WordNet ids."""
    return tuple(tuple(line.split(", ")) for line in _FILE.read_text(encoding="utf-8").splitlines())


def class_names(own: Sequence[str], num_classes: int) -> tuple[Names, ...]:
    """The names of a model's classes: its own, else their indices.

    ImageNet's names are used for 1,000 classes that are named by WordNet ids or not at all.
    """
    if num_classes == len(imagenet_names()):
        if not own:
            return imagenet_names()
        if list(own) == sorted(own) and all(_WNID.fullmatch(name) for name in own):
            return tuple((*names, wnid) for names, wnid in zip(imagenet_names(), own, strict=True))
    return tuple((name,) for name in own) if own else tuple((str(label),) for label in range(num_classes))


def class_labels(texts: Sequence[str], names: Sequence[Names]) -> list[int]:
    """Labels by index or name. The beginning of a name is enough if only one class matches.

    A text that is both a name and an index, such as the names of digits, is treated as a name.
    Raises UserError with the classes that a text may mean.
    """
    if not texts:
        raise UserError(f"the list of classes is empty; specify some of the {len(names)} classes, by index or name")
    return [_label(text.strip(), names) for text in texts]


def _label(text: str, names: Sequence[Names]) -> int:
    query = text.casefold()
    is_index = re.fullmatch(r"-?\d+", query) is not None
    labels = _matching(names, query, whole=True)
    if not labels and is_index:
        if not 0 <= int(query) < len(names):
            raise UserError(f"class {text} does not exist; the model has 0..{len(names) - 1}")
        return int(query)
    labels = labels or _matching(names, query, whole=False)
    if not labels:
        raise UserError(f"no class is called {text!r}; {_suggestion(query, names)}")
    if len(labels) > 1:
        raise UserError(f"class {text!r} may be {_list(labels, names)}; use the index")
    return labels[0]


def _matching(names: Sequence[Names], query: str, whole: bool) -> list[int]:
    """Labels of the classes with a name equal to the query (`whole`), or starting with it."""

    def fits(name: str) -> bool:
        return name.casefold() == query if whole else name.casefold().startswith(query)

    return [label for label, of_class in enumerate(names) if query and any(map(fits, of_class))]


def _suggestion(query: str, names: Sequence[Names]) -> str:
    """The classes that a mistyped name may mean, for a message."""
    labels = {name.casefold(): label for label, name in _each(names)}
    close = [labels[name] for name in get_close_matches(query, labels, 3)]
    close += [label for name, label in labels.items() if query and query in name]
    if close:
        return f"did you mean {_list(list(dict.fromkeys(close)), names)}?"
    return f"the model has {len(names)} classes, such as {_list(range(min(3, len(names))), names)}"


def _each(names: Sequence[Names]) -> Iterator[tuple[int, str]]:
    for label, of_class in enumerate(names):
        for name in of_class:
            yield label, name


def _list(labels: Sequence[int], names: Sequence[Names]) -> str:
    shown = [f"{label} ({', '.join(names[label])})" for label in labels[:_MOST_SHOWN]]
    more = f" and {len(labels) - len(shown)} more" if len(labels) > len(shown) else ""
    return " or ".join(shown) + more
