"""The text of a page wins over menus, asides, teasers, empty headings and link targets (issue 15, 12)."""

from __future__ import annotations

import pytest

from modernbert.retrieval.documents.html import read_html
from modernbert.retrieval.passages import Document, Section, merged_sections, sections

PROSE = "Owls hunt mice at night, and hear them under the snow. " * 6
ARTICLE = f"<h1>Owls</h1><p>{PROSE}</p><p>{PROSE}</p>"
MENU = "<ul><li><a href=/>Home</a><li><a href=/owls>All owls</a><li><a href=/mice>All mice</a></ul>"


def markdown(page: str) -> str:
    return read_html(page.encode(), pytest.fail)[1]


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(
    "around",
    [
        MENU,
        f"<div class='site-menu'>{MENU}<p>Choose a bird</div>",
        "<aside><p>Read more about mice</p></aside>",
        "<div id=sidebar><h2>Popular</h2><p>Ten facts about mice</div>",
        "<div class='cookie-banner'><p>We use cookies.</p><button>OK</button></div>",
        "<div role=complementary>Weather: snow</div>",
        "<div class=share-buttons>Share this page</div>",
        "<a href=/1><h3>Mice</h3><p>A teaser about mice</p></a><a href=/2><h3>Snow</h3></a>",
    ],
)
def test_what_is_around_the_text_is_left_out(around):
    expected = words(markdown(ARTICLE))
    assert words(markdown(f"{around}{ARTICLE}")) == words(markdown(f"{ARTICLE}{around}")) == expected


def test_an_article_is_the_main_part_if_it_is_most_of_the_text():
    teasers = "<p>Mice sleep. </p>" * 9
    assert words(markdown(f"{teasers}<article>{ARTICLE}</article>{teasers}")) == words(markdown(ARTICLE))
    assert "Mice sleep." in markdown(f"<article>{ARTICLE}</article>" + teasers * 9)
    assert "Mice sleep." in markdown(f"<article>Owls.</article>{teasers}")


@pytest.mark.parametrize("around", [MENU, "<aside>Mice.</aside>", "<div class=sidebar>Mice.</div>"])
def test_nothing_is_left_out_of_a_page_that_has_little_else(around):
    assert words(markdown(f"<p>Owls.</p>{around}")) == ["Owls.", *words(markdown(around))]
    assert words(markdown(around))


def test_a_page_inside_of_an_element_with_the_name_of_an_aside_is_read():
    for name in ("has-sidebar", "social-page", "menu-open"):
        assert words(markdown(f"<div class={name}>{ARTICLE}</div><p>Imprint")) == [*words(markdown(ARTICLE)), "Imprint"]


def test_links_in_the_text_and_in_tables_are_text():
    linked = "<p>See <a href=/x>the snowy owl</a>.</p><p><a href=/y>A link alone</a></p>"
    rows = "<tr><td><a href=/a>Barn owl</a><td><a href=/b>Tyto</a></tr>" * 3
    text = markdown(f"{ARTICLE}{linked}<table>{rows}</table>")
    assert text.count("Barn owl | Tyto") == 3
    assert "See the snowy owl." in text
    assert "A link alone" in text


def page(text: str, name: str = "/owls.md") -> Document:
    return Document(name, name, "", text)


def merged(text: str, name: str = "/owls.md", fewest: int = 6) -> list[tuple[str, str]]:
    return [(title, text[start:end]) for title, start, end in merged_sections(page(text, name), fewest)]


LONG = "Owls hunt mice at night in the snow."


def test_a_section_of_a_few_words_is_merged_with_its_neighbour():
    text = f"# Birds\n\n## Empty\n\n## Owls\n\n{LONG}\n\n## See also\n\nMice.\n\n## Snow\n\n{LONG}\n\n## End\n\nBye."
    assert merged(text) == [
        ("Birds: Owls", f"## Empty\n\n## Owls\n\n{LONG}"),
        ("Birds: Snow", f"## See also\n\nMice.\n\n## Snow\n\n{LONG}\n\n## End\n\nBye."),
    ]


def test_small_sections_in_a_row_have_the_title_that_they_share():
    text = "# Changes\n\n" + "".join(f"## 1.{number}\n\n### Mended\n\n- One thing.\n\n" for number in range(6))
    found = merged(text, fewest=12)
    assert {title for title, _ in found} == {"Changes"}
    assert "".join("".join(text.split()) for _, text in found) == "".join(text.split()).removeprefix("#Changes")
    assert len(found) == 2


def test_a_small_document_is_one_section_and_a_record_is_never_merged():
    assert merged("# Owls\n\nNight.") == [("Owls", "Night.")]
    record = Document("/a.jsonl", "1", "Owls", "Night.", line=1)
    assert list(merged_sections(record, 12)) == [Section("Owls", 0, 6)]


def test_a_text_without_spaces_is_not_small():
    text = "# 鳥\n\n## 猫\n\n" + "猫は夜に狩りをする。" * 12 + "\n\n## 梟\n\n" + "梟は夜に狩りをする。" * 12
    assert [title for title, _ in merged(text)] == ["鳥: 猫", "鳥: 梟"]


RST = f"""\
.. _top:

Owls
====

{LONG}

.. _night: https://example.org/night
.. |badge| image:: owl.svg

Snow
----

.. note:: Text.

__ https://example.org/snow

.. _end:
"""


def test_link_targets_are_not_text():
    found = [RST[start:end] for _, start, end in sections(page(RST, "/owls.rst"))]
    assert found == [LONG, ".. note:: Text."]
    text = f"# Owls\n\n{LONG} [1][]\n\n[1]: https://example.org/a_b 'Night'\n[two]: /x\n\n## Notes\n\n[^1]: A note.\n"
    found = [text[start:end] for _, start, end in sections(page(text))]
    assert found == [f"{LONG} [1][]", "[^1]: A note."]
    # In other files such lines are text.
    assert [text[start:end] for _, start, end in sections(page(text, "/owls.txt"))] == [text.strip()]
