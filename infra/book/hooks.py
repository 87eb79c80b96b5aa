"""Hooks of MkDocs for `mkdocs.yml`: pages from outside docs/, the API reference, and Markdown as forges read it."""

import re
from pathlib import Path
from typing import Any

from forge import title_of, with_focus, with_links, with_lists
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebook import as_markdown
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
# What a browser loads with a page. The address of a page itself (rel="canonical") is not loaded.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|link(?![^>]*\brel=["']?canonical))\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
_titles: dict[str, str] = {}  # path in the repository -> title of the page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings as forges do, and list the pages of each folder that the navigation names."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    docs = Path(config.docs_dir)
    pages = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    config.nav = listed(config.nav, [*pages, *(_place(package) for package in config.extra["api"])])
    return config


def listed(entry: Any, pages: list[str]) -> Any:
    """A part of the navigation with the pages of each folder in place of the folder's name."""
    if isinstance(entry, dict):
        return {title: listed(below, pages) for title, below in entry.items()}
    if not isinstance(entry, list):
        return entry
    found: list[Any] = []
    for below in entry:
        is_folder = isinstance(below, str) and below.endswith("/")
        found += [page for page in pages if page.startswith(below)] if is_folder else [listed(below, pages)]
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/ and one page of the API reference for each package."""
    for path, place in config.extra["pages"].items():
        for name, content in _contents(ROOT / path, place).items():
            files.append(File.generated(config, name, content=content))
    for package, entry in config.extra["api"].items():
        files.append(File.generated(config, _place(package), content=_reference(package, entry)))
    paths = _paths(files, config)
    _titles.clear()
    _titles.update({paths[file.src_uri]: title_of(file.content_string) for file in files.documentation_pages()})
    return files


def _contents(path: Path, place: str) -> dict[str, str | bytes]:
    """Path in the book -> content, of a file from outside docs/: of a notebook the page and its pictures."""
    if path.suffix != ".ipynb":
        return {place: path.read_text() if path.suffix == ".md" else path.read_bytes()}
    page, pictures = as_markdown(path.read_text(), path.stem)
    folder = Path(place).parent
    return {place: page, **{(folder / name).as_posix(): content for name, content in pictures.items()}}


def _paths(files: Files, config: MkDocsConfig) -> dict[str, str]:
    """Path in the book -> path in the repository, of each file of the book."""
    docs = Path(config.docs_dir).relative_to(ROOT).as_posix()
    outside = {place: path for path, place in config.extra["pages"].items()}
    return {file.src_uri: outside.get(file.src_uri, f"{docs}/{file.src_uri}") for file in files}


def _place(package: str) -> str:
    return f"api/{package}.md"


def _reference(package: str, entry: dict[str, Any]) -> str:
    """The page of a package: what it is for, and its public names. The search ranks it after the written pages."""
    lines = ["---", "search: {boost: 0.5}", "---", f"# {package}", "", entry["about"], ""]
    for name in entry["names"]:
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page in the generator's dialect, with links within the book. A page of the API reference is in it already."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    paths = _paths(files, config)
    book = {path: place for place, path in paths.items()}
    repository = f"{config.repo_url.rstrip('/')}/blob/main" if config.repo_url else None
    return with_lists(with_links(markdown, paths[page.file.src_uri], book, _titles, ROOT, repository))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The finished page. One that loads a script, style, font or image from a server is refused."""
    if loaded := _LOADED.findall(output):
        raise PluginError(f"{page.file.src_uri} loads {', '.join(loaded)}; keep the file in the book instead")
    return with_focus(output)
