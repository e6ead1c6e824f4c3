"""Web pages and PDFs to text: against another markdown parser, and files whose text is known."""

from __future__ import annotations

import html
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lxml import etree
from markdown_it import MarkdownIt
from pypdf import PdfWriter

from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.documents.html import read_html
from modernbert.retrieval.documents.readers import read_pdf
from modernbert.retrieval.passages import sections

FIXTURES = Path(__file__).parents[1] / "fixtures" / "documents"
PATHS = {"PYTHONPATH": os.pathsep.join(sys.path)}


EMPTY = "a page without text; if a script writes its text, save it from a browser"


def markdown(page: str | bytes) -> str:
    return read_page(page)[1]


def read_page(page: str | bytes) -> tuple[str, str]:
    """Title and text. A page without text is noted, and nothing else."""
    notes: list[str] = []
    found = read_html(page if isinstance(page, bytes) else page.encode(), notes.append)
    assert notes == [EMPTY] * (not found[1])
    return found


PAGE = """\
<!doctype html>
<html><head><meta charset="utf-8"><title>Owls &mdash; a guide</title>
<style>p { color: red }</style><script>var x = "<p>no text</p>";</script></head>
<body>
<nav><a href="/">Home</a> <a href="/owls">Owls</a></nav>
<header>Wikis of the night</header>
<main>
<h1><a href="#owls">§</a>Owls <a href="#">C#</a><a class="headerlink" href="#owls">¶</a></h1>
<p>Owls hunt
   at <b>night</b>, <em>silent</em>ly; see <a href="/mice">mice</a>.<br>A second line.</p>
<div hidden>Not shown</div><p style="display:none">nor this</p><span aria-hidden="true">*</span>
<h2>Kinds &amp; <code>Strix</code></h2>
<ul><li>Barn owl<li><p>Tawny owl</p><ul><li>grey</li><li>brown</li></ul></li></ul>
<ol start="3"><li>third</li><li>fourth</li></ol>
<div class="highlight"><table><tr><td class="linenos"><pre>1
2</pre></td><td class="code"><pre><span class="c"># no heading</span>
def <b>owl</b>():
    return "```"
</pre></td></tr></table></div>
<h3>Sizes</h3>
<table><thead><tr><th>owl</th><th>cm</th></tr></thead>
<tbody><tr><td><p>Barn</p></td><td><p>36</p></td></tr><tr><td></td><td>20</td></tr></tbody></table>
<dl><dt>pellet</dt><dd>what is left of a mouse</dd></dl>
<img src="owl.png" alt="An owl on a branch"><img src="2.png" alt="DSC 17.JPG">
<h2>C#</h2>
<p># no heading either</p>
<p>---</p>
</main>
<footer>Imprint</footer><template>t</template><noscript>n</noscript>
</body></html>
"""

EXPECTED = """\
# Owls C# #

Owls hunt at night, silently; see mice.
A second line.

## Kinds & Strix
- Barn owl
- Tawny owl
  - grey
  - brown
3. third
4. fourth

````
# no heading
def owl():
    return "```"
````

### Sizes
owl | cm
Barn | 36
20

pellet
what is left of a mouse

An owl on a branch

## C# #

\\# no heading either

\\---"""


def test_a_page_becomes_markdown():
    assert markdown(PAGE) == EXPECTED


def test_headings_of_a_page_title_its_sections(tmp_path):
    (tmp_path / "page.HTML").write_text(PAGE)
    (document,) = read_file(tmp_path / "page.HTML")
    titles = [section.title for section in sections(document)]
    assert titles == [f"Owls C#{part}" for part in ("", ": Kinds & Strix", ": Kinds & Strix > Sizes", ": C#")]


def test_the_main_part_of_a_page_is_all_of_it_if_it_is_marked():
    page = (
        "<title>T</title><h1>Wiki</h1><nav>n</nav>Hi <{0}><h1>Owl</h1>is <b>a</b> bird<nav>m</nav></{1}> bye<h1>Z</h1>"
    )
    assert markdown(page.format("p", "p")).split() == [
        "#",
        "Wiki",
        "Hi",
        "#",
        "Owl",
        "is",
        "a",
        "bird",
        "bye",
        "#",
        "Z",
    ]
    for start, end in (("main", "main"), ("div role='main'", "div"), ("section role=main", "section")):
        assert read_html(page.format(start, end).encode(), pytest.fail) == ("", "# Owl\n\nis a bird")
    assert markdown("<main>one</main>two<div><main><p>three</div>four").split() == ["one", "three"]
    assert markdown("<main><nav>n</nav></main>two") == "two"


def test_breaks_are_line_ends_except_in_headings():
    assert markdown("<p>a<br>b<br/>c") == "a\nb\nc"
    assert markdown("<h2>Kinds<br>of owls</h2>") == "## Kinds of owls"
    assert markdown("<pre>a<br>b<div>c</div>d<p>e</pre>") == "```\na\nb\nc\nd\ne\n```"


def test_a_link_that_is_only_a_mark_is_no_text():
    assert markdown('w <b>o</b> <a href="#"><p>x</p>§</a> <a href="#">¶</a><a href="#"> # </a>§ 5') == "w o\n\nx\n\n§ 5"


def test_navigation_is_left_out_unless_there_is_nothing_else():
    for noise in ("<nav>x</nav>", "<div role=navigation>x</div>", "<footer>x</footer>", "<p hidden>x</p>"):
        assert markdown(f"<p>text{noise}") == "text"
        assert markdown(noise) == "x"
    assert markdown("<script>x</script><style>y</style>") == ""


def test_the_title_of_a_page_counts_unless_it_has_one_first_level_heading():
    def title(page):
        return read_page(f"<title>\n Night &amp;\n owls</title>{page}")[0]

    assert title("<p>x") == title("<h1>A</h1><h1>B</h1>") == title("<h1> <img></h1>") == "Night & owls"
    assert title("<h1>A</h1><h2>B</h2>") == title("<nav><h1>N</h1></nav><h1><div>A</div></h1>") == ""
    assert title("<svg><title>circle</title></svg><title>second</title>") == "Night & owls"


TEXT = st.text(alphabet="ab1 \n\t\"'<>&;#`~-=*_[]()\\é猫\xa0\u2028", max_size=12)
BLOCK = st.tuples(st.sampled_from(["h1", "h2", "h3", "h6", "p", "div", "pre", "custom-tag"]), TEXT)


@settings(deadline=None)
@given(st.lists(BLOCK, max_size=8))
@example([("p", "# a"), ("h1", "a #"), ("h2", "###"), ("pre", "```\n~~~\n````")])
@example([("p", "a"), ("div", "==="), ("p", "---"), ("p", "~~~"), ("h1", "C# #")])
@example([("pre", "\n a\n\n b"), ("pre", "# x")])
def test_blocks_of_a_page_are_those_of_another_markdown_parser(blocks):
    """Headings, paragraphs and code come out of markdown-it as they went into the page, whatever they hold.

    Of lists, quotations and the like the passages know nothing, and so this parser shall not.
    """
    page = "".join(f"<{tag}>{html.escape(text)}</{tag}><hr>" for tag, text in blocks)
    parser = MarkdownIt("commonmark").disable(["list", "blockquote", "html_block", "code", "reference", "hr"])
    found = []
    tokens = parser.parse(markdown(page))
    for opening, content in zip(tokens, tokens[1:] + tokens[:1], strict=True):
        if opening.type in ("heading_open", "paragraph_open"):
            found.append((opening.tag, content.content.removeprefix("\\") if opening.tag == "p" else content.content))
        elif opening.type == "fence":
            found.append(("pre", opening.content))
    expected = []
    for tag, text in blocks:
        if tag == "pre" and text.strip():
            expected.append(("pre", text.rstrip().removeprefix("\n") + "\n"))
        elif tag != "pre" and text.split():
            text = " ".join(text.split())
            expected.append((tag, text) if tag[1:].isdigit() else ("p", text.removeprefix("\\")))
    assert found == expected


TAGS = ["p", "nav", "div", "b", "ul", "li", "table", "tr", "td", "h1", "pre", "br", "img", "script", "select"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["<", "</"]), st.sampled_from(TAGS)), max_size=30))
def test_words_survive_any_soup_of_tags(tags):
    """Each comes once and in order, as in the tree of the parser. If there is only noise, it is kept."""
    page = "w0w" + "".join(f"{mark}{tag}>w{i}w" for i, (mark, tag) in enumerate(tags, start=1))

    def words(noise):
        found = []
        for text in etree.HTML(page).xpath("//text()"):
            parent = text.getparent().getparent() if text.is_tail else text.getparent()
            if not noise & {parent.tag, *(above.tag for above in parent.iterancestors())}:
                found += re.findall(r"w\d+w", text)
        return found

    expected = words({"nav", "select", "script"}) or words({"script"})
    assert re.findall(r"w\d+w", markdown(page)) == expected


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ('<meta charset="utf-8">', "utf-8"),
        ("<meta charset=ISO-8859-1>", "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=windows-1251">', "cp1251"),
        ("<META CHARSET='Shift_JIS'>", "cp932"),
        ("<meta charset=gb2312>", "gb18030"),
        ("<meta charset=euc-kr>", "cp949"),
        ('<?xml version="1.0" encoding="iso-8859-2"?>', "iso8859-2"),
        ("", "utf-8"),
        ("", "cp1252"),
        ("", "utf-16"),
        ("<meta charset=latin1>", "utf-8-sig"),  # the byte order mark wins
        ("<meta charset=utf-16>", "utf-8"),  # the declaration was read as ASCII, so it is wrong
        ("<meta charset=rot13>", "utf-8"),
        ("<meta charset=unicode_escape>", "utf-8"),
        ("<meta charset=nonsense>", "cp1252"),
    ],
)
def test_the_encoding_of_a_page_is_the_one_it_declares(head, encoding):
    words = {"cp1251": "сова", "cp932": "梟①", "gb18030": "猫头鹰镕", "cp949": "올빼미똠", "iso8859-2": "sówa"}
    text = words.get(encoding, "“hibou” café €")
    assert markdown(f"<html>{head}<p>{text}".encode(encoding)) == text


def test_what_a_page_cannot_say_is_noted():
    notes = []
    assert read_html(b"<meta charset=utf-8><p>caf\xe9 \0", notes.append)[1] == "caf\ufffd \ufffd"
    assert notes == ["not UTF-8 throughout, 2 broken places were replaced by U+FFFD"]


OWLS = (
    "Owls at night\nAn owl turns its head far and hears a mouse un-\nder the snow."
    "\n\fНочью сова охотится. Η κουκουβάγια. Naïve café.\n\f\n\fLast page"
)


@pytest.mark.parametrize(
    "page",
    [
        "<title>Owls</title><div id=root></div><noscript>Enable JavaScript.</noscript><script>owl()</script>",
        "<html><frameset><frame src=a.html></frameset><noframes><body>Use frames.</body></noframes></html>",
        "<html></html>",
        "<!-- owls -->",
    ],
)
def test_a_page_without_text_is_noted(page):
    notes = []
    assert read_html(page.encode(), notes.append)[1] == ""
    assert notes == [EMPTY]


def test_what_is_deleted_or_said_twice_is_read_once():
    """As in Office files; a formula has its source in an annotation."""
    formula = "<math><mi>E</mi><mo>=</mo><mi>m</mi><annotation encoding='application/x-tex'>E=m</annotation></math>"
    page = f"<p>The <del>old</del><ins>new</ins> law: {formula}"
    assert read_html(page.encode(), pytest.fail)[1] == "The new law: E=m"
    assert read_html(b"<p><del>all of it</del>", pytest.fail)[1] == "all of it"


def test_the_text_of_a_pdf_is_the_one_it_was_made_of():
    assert read_pdf((FIXTURES / "owls.pdf").read_bytes(), pytest.fail) == ("Owls at night", OWLS)


def pdf(*pages: str, title: str = "", xref: bool = True) -> bytes:
    """A PDF as the standard describes it, by hand."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Resources << /Font << /F1 3 0 R >> >>"
            f" /Contents {5 + 2 * i} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    if xref:
        table = "".join(f"{place:010d} 00000 n \n" for place in places)
        size = len(objects) + 1
        trailer = f"trailer\n<< /Size {size} /Root 1 0 R /Info {len(objects)} 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
        out += f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()
    return out


def test_the_title_of_a_pdf_counts_if_the_first_page_has_it():
    assert read_pdf(pdf("The owls of Europe", "x", title="OWLS of europe"), pytest.fail)[0] == "OWLS of europe"
    assert read_pdf(pdf("The owls of Europe", title="Microsoft Word - draft7.doc"), pytest.fail)[0] == ""
    assert read_pdf(pdf("x", "The owls of Europe", title="The owls of Europe"), pytest.fail)[0] == ""


def test_a_pdf_without_text_says_what_helps():
    notes = []
    assert read_pdf(pdf("", ""), notes.append) == ("", "")
    assert notes == ["a PDF without text; if its pages are scanned, add text by OCR, for example with ocrmypdf"]


def test_a_pdf_with_errors_is_read_as_well_as_they_allow(tmp_path):
    """The note has what pypdf would log to stderr, and its logger is unchanged."""
    notes, handlers = [], list(logging.getLogger("pypdf").handlers)
    raw = pdf("An owl").replace(b"startxref\n", b"startxref\n1")
    assert read_pdf(raw, notes.append) == ("", "An owl")
    assert len(notes) == 1
    assert notes[0].startswith("a PDF with errors, read as far as possible: incorrect startxref")
    assert logging.getLogger("pypdf").handlers == handlers
    (tmp_path / "a.pdf").write_bytes(raw)
    read = f"list(read_file({str(tmp_path / 'a.pdf')!r}, on_note=print))"
    code = f"from modernbert.retrieval.documents.find import read_file; {read}"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | PATHS, check=True
    )
    assert (run.stdout.count("incorrect startxref"), run.stderr) == (1, "")


def test_a_page_that_cannot_be_read_does_not_take_the_others_with_it():
    stream, notes = b">>\nstream\nBT /F1 12 Tf 20 100 Td (A mouse)", []
    raw = pdf("An owl", "A mouse", "A cat").replace(stream, b"/Filter /Nonsense " + stream)
    assert read_pdf(raw, notes.append) == ("", "An owl\n\f\n\fA cat")
    assert notes == ["1 of 3 pages could not be read: 2 (NotImplementedError: Unsupported filter /Nonsense)"]
    with pytest.raises(ValueError, match="a broken PDF: no page could be read, beginning with 1"):
        read_pdf(pdf("A mouse").replace(stream, b"/Filter /Nonsense " + stream), pytest.fail)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"%PDF-1.4\n", "a broken PDF .PdfReadError|PdfStreamError"),
        (b"no PDF at all" * 100, "a broken PDF"),
        (pdf("An owl", xref=False), "a broken PDF"),
        (pdf("An owl").replace(b"/Pages 2 0 R", b"/Pages 9 0 R"), "a broken PDF"),
        ((FIXTURES / "owls.pdf").read_bytes()[:9000], "a broken PDF"),
    ],
)
def test_a_broken_pdf_is_called_so(raw, message):
    with pytest.raises(ValueError, match=message):
        read_pdf(raw, pytest.fail)


def encrypted(user: str, owner: str | None, algorithm: str = "RC4-128") -> bytes:
    writer = PdfWriter(clone_from=io.BytesIO(pdf("A secret owl")))
    writer.encrypt(user, owner, algorithm=algorithm)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"])
def test_an_encrypted_pdf_is_read_if_no_password_is_asked_for(algorithm):
    if algorithm.startswith("AES"):
        pytest.importorskip("cryptography")
    for owner in ("owner", "", None):
        assert read_pdf(encrypted("", owner, algorithm), pytest.fail)[1] == "A secret owl"
    for owner in ("owner", "", None):
        with pytest.raises(ValueError, match="an encrypted PDF; save it without its password first"):
            read_pdf(encrypted("user", owner, algorithm), pytest.fail)


def test_an_encryption_that_takes_another_package_says_which():
    raw = (FIXTURES / "no-printing.pdf").read_bytes()
    try:
        import cryptography
    except ImportError:
        with pytest.raises(ValueError, match=r"an encrypted PDF; to read it: pip install 'modernbert\[retrieval\]'"):
            read_pdf(raw, pytest.fail)
    else:
        assert cryptography
        assert read_pdf(raw, pytest.fail)[1] == "Nobody may print this."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"/Filter /Standard", b"/Filter /Adobe.PubSec", "a PDF of a kind that pypdf does not read .*; print it"),
        (b"/V 2", b"/V 9", "a PDF of a kind that pypdf does not read .*V=9"),
        (b"/U <", b"/X <", "a broken PDF .*/U entry"),
        (b"/Encrypt ", b"/Encrypt 99", "a broken PDF .*/Encrypt entry"),
    ],
)
def test_a_damaged_encryption_is_an_error(old, new, message):
    raw = encrypted("", "owner")
    assert old in raw
    with pytest.raises(ValueError, match=message):
        read_pdf(raw.replace(old, new), pytest.fail)


@pytest.mark.parametrize(("name", "module"), [("a.html", "lxml"), ("a.pdf", "pypdf")])
def test_a_missing_library_is_named_with_what_brings_it(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"<p>x")
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    with pytest.raises(ValueError, match=rf"{name}: .*{module}.*pip install 'modernbert\[retrieval\]'"):
        list(read_file(tmp_path / name))
