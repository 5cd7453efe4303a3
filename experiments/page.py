"""HTML of one self-contained page: everything that is not markup is escaped."""

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from psec_jax.errors import printable

FOLDER = Path(__file__).parent
LONG = 48  # letters of a cell that is wrapped


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


def table(label: str, rows: Sequence[Sequence[Any]], class_: str = "sortable") -> Html:
    """A table that scrolls within its own box.

    Args:
      label: what it is, for those who do not see it.
      rows: of texts, markup or `Cell`; the first one is the head.
      class_: "sortable", by clicks on the heads, or another one of CSS.
    """
    cells = [[x if isinstance(x, Cell) else Cell(x) for x in row] for row in rows[1:]]
    # Numbers are right-aligned with what is missing among them.
    numbers = {
        i for row in cells for i, cell in enumerate(row) if cell.value is not None
    }
    head = []
    for i, text in enumerate(rows[0]):
        inner = el("button", text, type="button") if class_ == "sortable" else text
        head.append(el("th", inner, scope="col", class_=_classes(i in numbers)))
    body = [
        el("tr", *(_cell(cell, i, i in numbers) for i, cell in enumerate(row)))
        for row in cells
    ]
    thead, tbody = el("thead", el("tr", *head)), el("tbody", *body)
    return scrolled(label, el("table", thead, tbody, class_=class_))


def _cell(cell: Cell, column: int, number: bool) -> Html:
    name, scope = ("td", None) if column else ("th", "row")
    long = not isinstance(cell.content, Html) and len(str(cell.content)) > LONG
    return el(
        name,
        cell.content,
        scope=scope,
        data_value=cell.value,
        title=cell.title,
        class_=_classes(number, long, cell.class_),
    )


def _classes(number: bool, long: bool = False, more: str | None = None) -> str | None:
    return " ".join(["number"] * number + ["long"] * long + [more] * bool(more)) or None


def scrolled(label: str, content: Html, class_: str = "") -> Html:
    """A box that scrolls, by keyboard too, where its content is wider than the page."""
    class_ = f"scroll {class_}".rstrip()
    return el(
        "div", content, class_=class_, role="region", aria_label=label, tabindex=0
    )


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
