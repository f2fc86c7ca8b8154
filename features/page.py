"""Pages that are one file each: a frame and a style that all pages share, and what they show.

A page's template extends ``page.html``, which says what it needs, and shows tables and pictures by
the macros of ``parts.html``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An SVG text with what stands above and below it; a map has a row of the page to itself.

    An empty ``svg`` stands for a picture that nothing was recorded for.
    """

    title: str
    caption: str
    svg: str
    is_map: bool = False


def render(template: Path, **content: Any) -> str:
    """Return the page that a template makes of ``content``.

    Args:
        template: it extends ``page.html``, or includes ``page.css``, the style of all pages.
        content: by the names that the template uses; text in it is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**content)
