"""Pages that are one file each: a template and the style that all pages share."""

from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **content: Any) -> str:
    """Return the page that a template makes of ``content``.

    Args:
        template: it may include ``page.css``, the style of all pages.
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
