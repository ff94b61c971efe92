"""The tables of our docstrings as Markdown.

    strong, base  [batch, vocab]          log-probabilities, float32 or wider
    experts       [expert, batch, vocab]  same token ids
    raises        MemberMismatch when there is no expert

Each entry starts at the left; an indented line continues the entry above. A paragraph that is indented as a whole is a
formula or code, and stays as it is.
"""

import inspect
import re

ENTRY = re.compile(
    r"(?P<names>[\w*.]+(?:, [\w*.]+)*)(?=  )(?: {2,}(?P<shape>\[[^\]]*\])(?=  |$))?(?: {2,}(?P<words>\S.*))?"
)


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
