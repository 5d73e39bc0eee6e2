"""What the tests of pages share: reading a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Seen(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rows_of(text: str) -> list[str]:
    return re.findall(r"<tr role=\"row\".*?</tr>", text.partition("<tbody")[2], re.DOTALL)


def sids_of(text: str) -> list[str]:
    return [str(each["value"]) for each in Seen(text).all("button") if each.get("name") == "sid"]
