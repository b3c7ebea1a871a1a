from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from paceline.track.markup import Markup, element, escape, join


class Reader(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text())
def test_any_text_is_shown_and_never_becomes_markup(text: str) -> None:
    page = Reader(element("p", text, title=text))
    assert [tag for tag, _ in page.tags] == ["p"]
    assert page.text == page.tags[0][1]["title"]
    assert len(page.text) == len(text)
    for shown, meant in zip(page.text, text, strict=True):
        assert shown == meant or (
            (not meant.isprintable() and shown in "\u2421\ufffd") or 0x2400 <= ord(shown) < 0x2420
        )


def test_elements_nest_and_attributes_are_named_as_in_html() -> None:
    inner = element("text", "a<b", class_="tick", text_anchor="end", x=1.0, y=2.26, role=None)
    assert element("g", inner, "&") == ('<g><text class="tick" text-anchor="end" x="1" y="2.3">a&lt;b</text>&amp;</g>')
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_control_characters_are_shown_as_signs() -> None:
    assert escape("a\x00\x1b\x7f\x85\ud800\tb\n") == "a\u2400\u241b\u2421\u2421\ufffd\tb\n"
