"""Self-contained HTML pages: jinja2 templates with autoescape, nothing fetched from anywhere; and parts of Markdown."""

import base64
import json
import math
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

TEMPLATES = Path(str(files("trimtab.measure"))) / "templates"


@cache
def _environment(folder: Path) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        autoescape=True,
        loader=FileSystemLoader([folder, TEMPLATES]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "image": image}
    return made


def render(name: str, folder: Path = TEMPLATES, /, **parts: Any) -> str:
    """A template filled; every part is escaped, in elements and in quoted attributes.

    folder    of the template and of those it extends, before the ones that all pages share
    """
    rendered: str = _environment(folder).get_template(name).render(parts)
    return rendered


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for a reader: a dash for none, the sign for infinity."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def image(file: Path) -> str:
    """A PNG as the address of an <img>."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def json_script(content: Any) -> Any:
    """JSON that may stand inside a <script> element, whatever texts are in it; infinities become null."""
    from markupsafe import Markup

    dumped = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return Markup("".join(escapes.get(character, character) for character in dumped))


def finite(content: Any) -> Any:
    """The same nested lists and dicts with every infinite or undefined number replaced by None, as JSON has no word."""
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def replace_between_markers(text: str, content: str, start: str, end: str) -> str:
    """The text with `content` between two markers; raises ValueError where they are not there once each."""
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"expected {start} and then {end}, once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
