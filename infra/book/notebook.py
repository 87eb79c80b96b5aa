"""A notebook with its outputs as Markdown of the book: no kernel, and nothing that the notebook imports, is needed."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_STYLE = re.compile(r"<style.*?</style>\s*|(?<=<table)[^>]*", re.DOTALL)  # of pandas: the book has its own for tables


def as_markdown(text: str, name: str) -> tuple[str, dict[str, bytes]]:
    """(page, file name -> bytes of each picture) of a notebook's JSON. Pictures are named after `name` and the cell."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            for number, output in enumerate(cell["outputs"]):
                picture = f"{name}-{cell['id']}-{number}.png"
                if png := output.get("data", {}).get("image/png"):
                    pictures[picture] = base64.b64decode(_joined(png))
                    parts.append(f"![Output of the cell {cell['id']}]({picture})")
                else:
                    parts += _shown(output)
    return "\n\n".join(parts) + "\n", pictures


def _shown(output: Mapping[str, Any]) -> Iterator[str]:
    """An output without a picture: a table, or text."""
    data = output.get("data", {})
    if html := data.get("text/html"):
        yield _STYLE.sub("", _joined(html)).strip()
    elif text := _joined(output.get("text") or data.get("text/plain") or ""):
        yield f"```text\n{text.rstrip()}\n```"


def _joined(value: str | list[str]) -> str:
    """A value of a notebook's JSON, which may be kept in lines."""
    return value if isinstance(value, str) else "".join(value)
