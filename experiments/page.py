"""HTML of one self-contained page: everything that is not markup is escaped."""

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from psec_jax.errors import printable

FOLDER = Path(__file__).parent


class Html(str):
    """Markup; any other text is escaped where it is put into some."""


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
      content: text or markup.
      value: what it is sorted by, where that is a number.
      title: shown beside the pointer.
      class_: of CSS.
    """

    content: object
    value: float | None = None
    title: str | None = None
    class_: str | None = None


def escaped(value: object) -> Html:
    """Text as markup; control characters are shown as Python writes them."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(str(value))))


def el(name: str, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
      name: of its tag.
      *children: text or markup.
      **attributes: `class_` is class, `aria_label` is aria-label; None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: object) -> Html:
    """Markup of several texts and elements, one after another."""
    return Html("".join(map(escaped, children)))


def table(
    label: str,
    rows: Sequence[Sequence[Any]],
    *,
    sortable: bool = False,
    class_: str | None = None,
) -> Html:
    """A table that scrolls within its own box.

    Args:
      label: what it is, for those who do not see it.
      rows: of texts, markup or `Cell`; the first one is the head.
      sortable: by clicks on the heads.
      class_: of CSS.
    """
    head = [
        el("th", el("button", text, type="button") if sortable else text, scope="col")
        for text in rows[0]
    ]
    body = [
        el("tr", *(_cell(cell, i) for i, cell in enumerate(row))) for row in rows[1:]
    ]
    inner = el(
        "table",
        el("thead", el("tr", *head)),
        el("tbody", *body),
        class_=" ".join(filter(None, ["sortable" if sortable else "", class_])) or None,
    )
    return scrolled(label, inner)


def scrolled(label: str, content: Html, class_: str = "") -> Html:
    """A box that scrolls, by keyboard too, where its content is wider than the page."""
    class_ = f"scroll {class_}".rstrip()
    return el(
        "div", content, class_=class_, role="region", aria_label=label, tabindex=0
    )


def _cell(cell: Any, column: int) -> Html:
    content, value, title, class_ = cell if isinstance(cell, Cell) else Cell(cell)
    name, scope = ("td", None) if column else ("th", "row")
    return el(name, content, scope=scope, data_value=value, title=title, class_=class_)


def page(title: str, body: Html, style: str = "") -> str:
    """The whole page, which loads nothing and runs its own script alone.

    Args:
      title: of the window.
      body: its content.
      style: CSS after that of report.css.
    """
    style = (FOLDER / "report.css").read_text() + style
    script = (FOLDER / "report.js").read_text()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{el('title', title)}\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
