"""A griffe extension: the tables of our docstrings become tables on the page.

    strong, base  [batch, vocab]          log-probabilities, float32 or wider
    experts       [expert, batch, vocab]  same token ids
    raises        MemberMismatch when there is no expert

Each entry starts at the left; what is indented goes on with the entry above. A paragraph that is indented as a whole is
a formula or code, and stays as it is.
"""

import inspect
import re
from typing import Any

import griffe

ENTRY = re.compile(
    r"(?P<names>[\w*.]+(?:, [\w*.]+)*)(?=  )(?: {2,}(?P<shape>\[[^\]]*\])(?=  |$))?(?: {2,}(?P<words>\S.*))?"
)


class TablesOfDocstrings(griffe.Extension):
    """Rewrites the docstring of each object as Markdown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The docstring with each of its tables in Markdown."""
    return "\n\n".join(_paragraph(text) for text in re.split(r"\n\s*\n", inspect.cleandoc(docstring)))


def _paragraph(text: str) -> str:
    rows: list[list[str]] = []
    for line in text.split("\n"):
        found = ENTRY.fullmatch(line)
        if found:
            rows.append([found["names"], found["shape"] or "", found["words"] or ""])
        elif rows and line.startswith(" "):
            rows[-1][2] += " " + line.strip()
        else:
            return text
    has_shapes = any(shape for _, shape, _ in rows)
    lines = ["| | shape | |" if has_shapes else "| | |", "|---|---|---|" if has_shapes else "|---|---|"]
    for names, shape, words in rows:
        cells = [_code(names), *([f"`{shape}`" if shape else ""] if has_shapes else []), words.replace("|", "\\|")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _code(names: str) -> str:
    words = {"returns", "raises", "warns", "source"}
    return ", ".join(name if name in words else f"`{name}`" for name in names.split(", "))
