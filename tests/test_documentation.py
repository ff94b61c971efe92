"""The pages: short paragraphs, links and anchors that resolve, a site that names every page, an API that exists."""

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from trimtab.cli.parser import command_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
LONGEST = 400  # characters of a paragraph or a list's item
SCREEN = 45  # lines of the README that show what it is
FENCE = re.compile(r"^\s*```.*?^\s*```\s*$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return FENCE.sub("\n", text)


def paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, each on one line; tables, code, headings, pictures and comments left out."""
    lines = []
    for line in without_code(text).splitlines():
        is_other = not line.strip() or line.lstrip().startswith(("|", "#", "<!--", "!["))
        starts_item = re.match(r"\s*([-*]|\d+\.)\s", line)
        lines.append(f"\0{line.strip()}" if starts_item else "\0" if is_other else line.strip())
    return [block.strip() for block in " ".join(lines).split("\0") if block.strip()]


def test_paragraphs_are_told_apart() -> None:
    text = "one\ntwo\n\n- three\n  four\n- five\n\n```\ncode\n```\n| table |\n![picture](x)\nsix"
    assert paragraphs(text) == ["one two", "- three four", "- five", "six"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_paragraph_is_long(page: Path) -> None:
    long = [block for block in paragraphs(page.read_text(encoding="utf-8")) if len(block) > LONGEST]
    assert not long, f"{name_of(page)}: {len(long[0])} characters: {long[0]}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    heads = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}"


PRESENT = [page for page in PAGES if page.name not in ("research-log.md", "CHANGELOG.md")]  # those tell of what was


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_modules_that_are_named_exist(page: Path) -> None:
    for file in re.findall(
        r"`((?:batch|core|logits|measure|models|serving|studies|zoo)/[\w/]+\.py)`", page.read_text()
    ):
        assert (ROOT / "src" / "trimtab" / file).is_file(), f"{name_of(page)}: {file}"


def commands(text: str) -> list[str]:
    """Lines of code that call trimtab."""
    return re.findall(r"^trimtab (\S.*)$", "\n".join(FENCE.findall(text)), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_printed_commands_are_understood(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        name, *words = shlex.split(line, comments=True)
        command_parser(name).parse_all(words)


def test_the_readme_prints_commands() -> None:
    names = {line.split()[0] for line in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"fuse", "generate", "chat", "explain", "serve", "batch"} <= names


def entries(nav: object) -> list[str]:
    """Files of a navigation, in their order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [file for part in parts for file in entries(part)]  # type: ignore[attr-defined]


@pytest.fixture
def from_docs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module that the site is built with."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


def test_the_site_names_every_page_once(from_docs: Callable[[str], ModuleType]) -> None:
    hooks = from_docs("hooks")
    own = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    named = entries(SITE["nav"])
    assert sorted(named) == sorted([*own, *hooks.PAGES.values()])
    # A link of the repository becomes the link between the same pages of the site.
    assert hooks.site_link("docs/serving.md", "README.md") == "serving.md"
    assert hooks.site_link("../CONTRIBUTING.md", "docs/architecture.md") == "contributing.md"
    assert hooks.site_link("../bench/results/decode.png", "docs/performance-points.md") == "bench/results/decode.png"
    assert hooks.site_link("../strategies.md", "docs/api/strategies.md") == "../strategies.md"
    assert hooks.site_link("https://docs.vllm.ai", "docs/serving.md") == "https://docs.vllm.ai"


def test_tables_of_docstrings_become_tables(from_docs: Callable[[str], ModuleType]) -> None:
    as_markdown = from_docs("docstring_tables").as_markdown
    text = """The promise.

        strong, base  [batch, vocab]  log-probabilities,
                                      float32 | wider
        experts       [expert, batch, vocab]
        raises        BadSetting

        One more
        sentence."""
    assert as_markdown(text).split("\n\n") == [
        "The promise.",
        "| | shape | |\n|---|---|---|\n"
        "| `strong`, `base` | `[batch, vocab]` | log-probabilities, float32 \\| wider |\n"
        "| `experts` | `[expert, batch, vocab]` |  |\n"
        "| raises |  | BadSetting |",
        "One more\nsentence.",
    ]


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=name_of)
def test_the_reference_names_what_exists(page: Path) -> None:
    names = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            assert importlib.import_module(name).__doc__
        except ModuleNotFoundError:
            assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_readme_opens_with_commands_picture_and_a_small_table() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = "\n".join(lines[:SCREEN])
    assert all(word in first for word in ("make demo", "make test", "![", "<!-- results:end -->"))
    table = first.split("<!-- results:start -->")[1].split("<!-- results:end -->")[0].strip().splitlines()
    assert 4 <= len(table) - 2 <= 6  # without heads and rule


def test_a_page_that_loads_from_the_network_is_seen(from_docs: Callable[[str], ModuleType]) -> None:
    remote_parts = from_docs("hooks").remote_parts
    assert remote_parts('<script src="https://unpkg.com/shim"></script><link href="//fonts.example">') == [
        '<script src="https://unpkg.com/shim">',
        '<link href="//fonts.example">',
    ]
    assert remote_parts('<a href="https://docs.vllm.ai">vLLM</a><img src="results.png"><script src=../a.js>') == []
