"""Names that a user may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches

_MOST_SIMILAR, _MOST_LISTED = 3, 20


def suggestions(name: str, existing: Iterable[str], what: str) -> str:
    """The existing names that are similar to a mistyped one, or else all of them. `what`: what the names are of."""
    names = sorted(existing)
    if close := get_close_matches(name, names, _MOST_SIMILAR):
        return f"did you mean {' or '.join(close)}?"
    more = ", ..." if len(names) > _MOST_LISTED else ""
    return f"there are no {what}" if not names else f"{what} are {', '.join(names[:_MOST_LISTED])}{more}"
