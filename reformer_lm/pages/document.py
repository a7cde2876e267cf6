"""The frame of a page: one file with its styles in it, which the browser is forbidden to add anything to.

Everything that comes from outside, texts above all, goes through `escaped`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from reformer_lm.pages.style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def escaped(value: Any) -> str:
    """Any value as text of a page, or of an attribute in quotation marks."""
    # A lone surrogate, of which UTF-8 knows none, would make the page unwritable.
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def section(title: str, content: str, kind: str = "") -> str:
    """A part of the page under a heading; "" without content.

    Args:
        title: Not yet escaped.
        content: HTML.
        kind: Class of the section in the style sheet.
    """
    if not content:
        return ""
    return f'<section class="{kind}">\n<h2>{escaped(title)}</h2>\n{content}\n</section>'


def document(title: str, parts: Iterable[str], *, style: str = "", language: str = "en") -> str:
    """A whole page.

    Args:
        title: Of the browser's window; not yet escaped.
        parts: HTML; empty ones are left out.
        style: Rules of this page besides those of all pages.
        language: Of the page's own words.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )
