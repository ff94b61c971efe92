"""A griffe extension for the site: the tables of our docstrings become tables on the page."""

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.append(str(Path(__file__).parent))  # griffe loads this file by its path, outside any package
from docstring_tables import as_markdown


class TablesOfDocstrings(griffe.Extension):  # type: ignore[misc]
    """Rewrites the docstring of each object as Markdown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = as_markdown(obj.docstring.value)
