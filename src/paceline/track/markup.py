"""HTML and SVG built from elements, so that no text can become markup by accident.

Every child and every attribute value is escaped, except what ``element`` itself returned.
"""

import html
import re

_VOID = {"meta"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """The text as HTML that shows it; control characters become visible signs, half surrogates the replacement sign."""
    if isinstance(text, Markup):
        return text
    text = _CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 32 else "\u2421", text)
    return Markup(html.escape(_SURROGATE.sub("\ufffd", text)))


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """``<tag ...>children</tag>``; ``class_`` is ``class``, ``text_anchor`` is ``text-anchor``, None adds none."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """The children one after the other, each escaped unless it is markup."""
    return Markup("".join(escape(child) for child in children))


def _plain(value: str | float) -> str:
    """A coordinate with one decimal at most, or the text itself."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
