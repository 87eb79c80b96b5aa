"""The contrast of two colours by WCAG 2."""

import re

TEXT, OTHER = 4.5, 3.0  # least ratios of level AA: for text (1.4.3), and for what else has to be seen (1.4.11)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two opaque colours, written rgb(r, g, b) or #rrggbb."""
    lights = sorted(map(_luminance, (one, other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: str) -> float:
    """The relative luminance, 0..1."""
    if colour.startswith("#"):
        levels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    else:
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)]
    assert len(levels) == 3, colour
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
