"""Hooks of MkDocs for `mkdocs.yml`: pages from outside docs/, the API reference, and Markdown as forges read it."""

from pathlib import Path
from typing import Any

from forge import with_links, with_lists
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings as forges do, and list the pages of a folder that the navigation names (`decisions/`)."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    config.nav = _listed(config.nav, Path(config.docs_dir))
    return config


def _listed(entry: Any, docs: Path) -> Any:
    """A part of the navigation with the pages of each folder in place of the folder's name."""
    if isinstance(entry, dict):
        return {title: _listed(below, docs) for title, below in entry.items()}
    if not isinstance(entry, list):
        return entry
    found: list[Any] = []
    for below in entry:
        if isinstance(below, str) and below.endswith("/"):
            found += [str(page.relative_to(docs)) for page in sorted((docs / below).glob("*.md"))]
        else:
            found.append(_listed(below, docs))
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/ and one page of the API reference for each package."""
    for path, place in config.extra["pages"].items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text()))
    for package, entry in config.extra["api"].items():
        files.append(File.generated(config, f"api/{package}.md", content=_reference(package, entry)))
    return files


def _reference(package: str, entry: dict[str, Any]) -> str:
    """The page of a package: what it is for, and its public names."""
    lines = [f"# {package}", "", entry["about"], ""]
    for name in entry["names"]:
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page in the generator's dialect, its links within the book. Pages of the API reference have none."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    docs = Path(config.docs_dir).relative_to(ROOT).as_posix()
    outside = {place: path for path, place in config.extra["pages"].items()}
    paths = {outside.get(file.src_uri, f"{docs}/{file.src_uri}"): file.src_uri for file in files}
    own = outside.get(page.file.src_uri, f"{docs}/{page.file.src_uri}")
    repository = f"{config.repo_url.rstrip('/')}/blob/main" if config.repo_url else None
    return with_lists(with_links(markdown, own, paths, ROOT, repository))
