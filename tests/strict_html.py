"""HTML to a tree, insisting on what a browser would repair: every element is closed where it should be."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input"}


class Node:
    def __init__(self, tag: str, attributes: dict[str, str | None], parent: Node | None) -> None:
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []
        if parent:
            parent.children.append(self)

    def all(self, tag: str, **attributes: str) -> list[Node]:
        nodes = [node for node in self.children if isinstance(node, Node)]
        inner = [found for node in nodes for found in (node, *node.all("*"))]
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [n for n in inner if tag in ("*", n.tag) and wanted.items() <= n.attributes.items()]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Strict(HTMLParser):
    """A tree of a document in which every element is closed where it should be, as no browser would insist on."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Node("", {}, None)

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        node = Node(tag, dict(attrs), self.at)
        self.at = self.at if tag in VOID else node

    def handle_startendtag(self, tag, attrs):
        Node(tag, dict(attrs), self.at)

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def parse(page: str) -> Node:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.at is parser.root, f"<{parser.at.tag}> is never closed"
    return parser.root
