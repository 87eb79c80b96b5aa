"""What of a source was not used, as lines for a person, from the manifest of its image shards."""

from collections.abc import Mapping, Sequence
from typing import Any

from edt_core.data.sources.files import by_extension

_SHOWN = 3  # examples


def left_out(counts: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """A line for each kind of thing that was not used, with numbers and examples; empty if all was used.

    counts, classes: those of an `images` artifact.
    """
    lines = []
    if others := counts.get("left_out"):
        lines.append(f"{sum(others.values()):,} files that are not images: {by_extension(others)}")
    lines += [f"{number:,} images {reason}" for reason, number in counts.get("skipped", {}).items()]
    if number := counts.get("quarantined", 0):
        examples = [f"{row['path']} ({row['reason']})" for row in counts.get("quarantined_images", ())]
        lines.append(f"{number:,} of {counts['found']:,} images that could not be read: {_few(examples)}")
    per_class = counts.get("class_counts", ())
    if empty := [name for name, images in zip(classes, per_class, strict=False) if not images]:
        lines.append(f"{len(empty):,} of {len(classes):,} classes, which have no images: {_few(empty)}")
    return lines


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
