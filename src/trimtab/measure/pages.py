"""Self-contained HTML pages: templates filled once, everything escaped, nothing fetched from anywhere."""

import html
import json
import math
import re
from importlib.resources import files
from typing import Any

# A rudder with its trim tab turned against it.
LOGO = (
    '<svg viewBox="0 0 24 24" aria-hidden="true">'
    '<path d="M5 2.5h6a2 2 0 0 1 2 2v15a2 2 0 0 1-2 2H8.5A3.5 3.5 0 0 1 5 18z" fill="var(--accent)" opacity=".35"/>'
    '<path d="M13.6 11.2l6.9 3.1-2.2 6.6-4.7-.9z" fill="var(--accent)"/></svg>'
)


def template(name: str) -> str:
    """The text of a template file."""
    return (files("trimtab.measure") / "templates" / name).read_text(encoding="utf-8")


def fill(name: str, **parts: str) -> str:
    """A template with every {{part}} replaced in one pass, so that nothing inside a part is replaced again."""
    values = {"style": template("style.css"), "logo": LOGO, **parts}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found.group(1)], template(name))


def text(value: Any) -> str:
    """Anything as text for HTML, in elements and in quoted attributes."""
    return html.escape(str(value), quote=True)


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for a reader: a dash for none, the sign for infinity."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def json_script(content: Any) -> str:
    """JSON that may stand inside a <script> element, whatever texts are in it; infinities become null."""
    dumped = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return "".join(escapes.get(character, character) for character in dumped)


def finite(content: Any) -> Any:
    """The same nested lists and dicts with every infinite or undefined number replaced by None, as JSON has no word."""
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
