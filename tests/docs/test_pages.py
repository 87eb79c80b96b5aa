"""Pages lead where they say, the index has all of them, and figures that are counted are those of the code."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.pages import DECISIONS, HISTORY, ROOT, blocks, failures, pages

EVERY = [*pages(), *(ROOT / name for name in HISTORY)]
IMAGENET = (ROOT / "docs" / "imagenet.md").read_text()


def anchors(path: Path) -> set[str]:
    """Names of the headings of a page, as forges make them."""
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_links_lead_somewhere() -> None:
    assert not (wrong := failures(EVERY, check_links)), wrong


def check_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            name, _, part = target.partition("#")
            there = (page.parent / name).resolve() if name else page
            assert there.exists(), f"{page.name} links to {target}, which is not there"
            assert not part or part in anchors(there), f"{page.name} links to {target}; there are {anchors(there)}"


def test_the_index_has_every_page_and_the_readme_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert missing == []
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


def test_the_index_of_decisions_has_one_line_for_each_record() -> None:
    expected = []
    for page in DECISIONS.glob("*.md"):
        for record in page.read_text().split("\n## ")[1:]:
            heading, _, text = record.partition("\n")
            dates = re.findall(r"^\*\*(\d{4}-\d\d-\d\d)\.\*\* ", text, re.MULTILINE)
            assert dates, f"{page.name}: {heading} has no date"
            expected.append(f"- {', '.join(dates)}: [{heading}](decisions/{page.name}#{anchor(heading)})")
    lines = (ROOT / "docs" / "decisions.md").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("- ")) == sorted(expected)


def test_the_picture_is_whole_and_says_what_it_shows() -> None:
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    texts = {"".join(node.itertext()) for node in picture.iter() if node.tag.endswith(("text", "title", "desc"))}
    assert {"preprocess", "encode", "train", "sample", "evaluate", "promote"} <= texts
    assert all(package in texts for package in ("pipelines", "jobs", "edt_core"))
    assert "Architecture of edt-pipeline" in texts


@pytest.mark.parametrize(("name", "gflops"), [("EDT-S", "32.0"), ("EDT-B", "122.6"), ("EDT-XL", "641.3")])
def test_figures_of_imagenet_are_those_that_are_counted(name: str, gflops: str) -> None:
    from edt_core.models import count_parameters, model_config, shadow, training_flops

    config = model_config(f"{name}/2", 256)
    flops = training_flops(config, masked=True)
    assert f"{flops / 1e9:.1f}" == gflops
    row = next(line for line in IMAGENET.splitlines() if line.startswith(f"| {name} | {gflops} G |"))
    assert float(row.split("|")[3]) == pytest.approx(flops * 400_000 * 256, rel=0.05)
    assert f"| {name} | {count_parameters(shadow(config)) / 1e6:.1f} M |" in IMAGENET


def test_the_disk_of_imagenet_is_that_of_its_images() -> None:
    images, latents = 1_281_167, 4 * 2 * 2 * 4 * 32 * 32  # bytes: float32, two sides, mean and std, 4 x 32 x 32
    assert f"{images:,} training images" in IMAGENET
    assert f"| {latents // 1024} kB; {4 * latents // 1024} kB at 512 px |" in IMAGENET
    assert abs(images * 64e3 / 1e9 - 82) < 1


def test_python_in_the_pages_is_python() -> None:
    found = 0
    for page in pages():
        for block in blocks(page):
            if block.language == "python" or (not block.language and block.lines[0].startswith(("import ", "from "))):
                ast.parse("\n".join(block.lines), f"{page.name}:{block.line}")
                found += 1
    assert found >= 5


def test_the_license_and_the_citation_are_whole() -> None:
    import yaml

    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["url"].endswith("2410.23788")
    assert citation["preferred-citation"]["authors"][0] == {"given-names": "Xinwang", "family-names": "Chen"}


def test_a_benchmark_that_the_pages_run_as_a_file_imports_nothing_of_the_tests() -> None:
    """Python finds `tests` only with `python -m`, from the root of the clone."""
    named = {match for page in pages() for match in re.findall(r"`python (tests/\S+\.py)", page.read_text())}
    assert named
    importing = [name for name in named if re.search(r"^(from|import) tests\b", (ROOT / name).read_text(), re.M)]
    assert importing == []
