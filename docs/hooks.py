"""Hooks of the documentation site: pages and pictures that live outside docs/, and the links between them.

README.md is the site's first page, CONTRIBUTING.md and CHANGELOG.md are pages of it. On a code host their links, and
those of docs/ to them, lead through the repository; on the site they lead from page to page.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# A file of the repository -> the page that it becomes.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = "bench/results"
REMOTE = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that lie outside docs/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_site_links(text, name)))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites links that lead out of docs/."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return with_site_links(markdown, f"docs/{page.file.src_uri}")


def on_post_page(output: str, page: Any, config: Any) -> None:
    """Fails the build if a page would load anything from the network."""
    from mkdocs.exceptions import PluginError

    found = remote_parts(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from the network: {found[0]}")


def remote_parts(html: str) -> list[str]:
    """Scripts, pictures, styles and frames that a browser would fetch from elsewhere when it shows a page."""
    return REMOTE.findall(html)


def with_site_links(text: str, source: str) -> str:
    """The text with each link to a file of the repository replaced by the link to its page on the site.

    source    where the text lies in the repository, such as docs/serving.md
    """

    def rewritten(found: re.Match[str]) -> str:
        return found[1] + site_link(found[2], source) + found[3]

    return LINK.sub(rewritten, text)


def site_link(link: str, source: str) -> str:
    """Where a link leads on the site; links to the web stay as they are."""
    if ":" in link:
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    here = site_path(source) or source
    page = site_path(target)
    return link if page is None else posixpath.relpath(page, posixpath.dirname(here) or ".")


def site_path(path: str) -> str | None:
    """The place on the site of a file of the repository; None for a file that the site does not have."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.startswith(f"{PICTURES}/") else None
