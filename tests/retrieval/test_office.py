"""Office files: as Word, PowerPoint, Excel and LibreOffice write them, broken ones and hostile ones."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Mapping

import pytest

from modernbert import ColBERT
from modernbert.retrieval.documents import archive
from modernbert.retrieval.documents.find import find_files, read_file
from modernbert.retrieval.documents.readers import READERS
from modernbert.retrieval.windows import windows

TYPES = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def zipped(parts: Mapping[str, str | bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as written:
        for name, content in parts.items():
            written.writestr(name, content)
    return file.getvalue()


def references(*kinds_and_targets: tuple[str, str]) -> str:
    rows = (
        f'<Relationship Id="rId{number}" Type="{TYPES}/{kind}" Target="{target}"/>'
        for number, (kind, target) in enumerate(kinds_and_targets, start=1)
    )
    return f"<Relationships>{''.join(rows)}</Relationships>"


def paragraph(text: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t xml:space='preserve'>{text}</w:t></w:r></w:p>"


def style(name: str) -> str:
    return f'<w:pStyle w:val="{name}"/>'


STYLES = """<w:styles>
<w:style w:styleId="Titel"><w:name w:val="Title"/></w:style>
<w:style w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>
<w:style w:styleId="Own"><w:name w:val="My own"/><w:basedOn w:val="berschrift1"/></w:style>
<w:style w:styleId="Level"><w:name w:val="Chapter"/><w:pPr><w:outlineLvl w:val="1"/></w:pPr></w:style>
<w:style w:styleId="Bullet"><w:name w:val="List Bullet"/><w:pPr><w:numPr/></w:pPr></w:style>
<w:style w:styleId="Circle"><w:name w:val="x"/><w:basedOn w:val="Circle"/></w:style>
<w:style w:styleId="Verzeichnis1"><w:name w:val="toc 1"/></w:style>
</w:styles>"""


def word(body: str, **parts: str) -> bytes:
    beside = [(kind, f"{kind}.xml") for kind in parts]
    return zipped(
        {
            "_rels/.rels": references(("officeDocument", "word/document.xml")),
            "word/document.xml": f'<w:document xmlns:w="w"><w:body>{body}</w:body></w:document>',
            "word/_rels/document.xml.rels": references(("styles", "styles.xml"), *beside),
            "word/styles.xml": STYLES,
            **{f"word/{kind}.xml": content for kind, content in parts.items()},
        }
    )


def slides(*shapes: str, **notes: str) -> bytes:
    """Slides in an order that is not that of their names."""
    count = len(shapes)
    parts = {
        "_rels/.rels": references(("officeDocument", "ppt/presentation.xml")),
        "ppt/presentation.xml": "<p:presentation><p:sldIdLst>"
        + "".join(f'<p:sldId id="{256 + at}" r:id="rId{at}"/>' for at in range(1, count + 1))
        + "</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": references(
            *(("slide", f"slides/slide{count - at}.xml") for at in range(count))
        ),
    }
    for at, content in enumerate(shapes):
        parts[f"ppt/slides/slide{count - at}.xml"] = f"<p:sld><p:spTree>{content}</p:spTree></p:sld>"
    for name, content in notes.items():
        parts[f"ppt/slides/_rels/{name}.xml.rels"] = references(("notesSlide", f"../notesSlides/{name}.xml"))
        parts[f"ppt/notesSlides/{name}.xml"] = f"<p:notes>{content}</p:notes>"
    return zipped(parts)


def shape(*texts: str, kind: str = "body") -> str:
    rows = "".join(f"<a:p><a:r><a:t>{text}</a:t></a:r></a:p>" for text in texts)
    return f'<p:sp><p:nvSpPr><p:nvPr><p:ph type="{kind}"/></p:nvPr></p:nvSpPr><p:txBody>{rows}</p:txBody></p:sp>'


def sheets(strings: str = "", styles: str = "", workbook: str = "", **rows: str) -> bytes:
    listed = "".join(f'<sheet name="{name}" r:id="rId{at}"/>' for at, name in enumerate(rows, start=1))
    beside = (("sharedStrings", "sharedStrings.xml"), ("styles", "styles.xml"))
    return zipped(
        {
            "_rels/.rels": references(("officeDocument", "xl/workbook.xml")),
            "xl/workbook.xml": f"<workbook>{workbook}<sheets>{listed}</sheets></workbook>",
            "xl/_rels/workbook.xml.rels": references(*(("worksheet", f"{name}.xml") for name in rows), *beside),
            "xl/sharedStrings.xml": f"<sst>{strings}</sst>",
            "xl/styles.xml": f"<styleSheet>{styles}</styleSheet>",
            **{f"xl/{name}.xml": f"<worksheet><sheetData>{row}</sheetData></worksheet>" for name, row in rows.items()},
        }
    )


def opened(content: str) -> bytes:
    return zipped({"mimetype": "", "content.xml": f"<office:document-content>{content}</office:document-content>"})


def read(suffix: str, raw: bytes) -> tuple[str, str]:
    return READERS[suffix](raw, pytest.fail)


def text(suffix: str, raw: bytes) -> str:
    return read(suffix, raw)[1]


def test_a_document_of_word_is_markdown():
    """Styles are found by their names, which are English in every language, and through those they are based on."""
    cell = "<w:tc>{}</w:tc>"
    row = "<w:tr>" + cell * 3 + "</w:tr>"
    body = (
        paragraph("Owls of Europe", style("Titel"))
        + paragraph("Kinds 3", style("Verzeichnis1"))
        + paragraph("Kinds", style("berschrift1"))
        + paragraph("An owl hunts.")
        + paragraph("By size", style("Level"))
        + paragraph("Barn owl", style("Bullet"))
        + paragraph("white", '<w:numPr><w:ilvl w:val="1"/><w:numId w:val="2"/></w:numPr>')
        + paragraph("Night", style("Own"))
        + f"<w:tbl>{row.format(paragraph('owl'), paragraph('cm') + paragraph('long'), '')}"
        + f"{row.format(paragraph('Barn'), paragraph('36'), paragraph(' '))}</w:tbl>"
        + paragraph("# no heading", style("Circle"))
        + paragraph("---")
    )
    assert read(".docx", word(body)) == (
        "Owls of Europe",
        "# Owls of Europe\n\n# Kinds\n\nAn owl hunts.\n\n## By size\n\n- Barn owl\n  - white\n\n# Night\n\n"
        "owl | cm long\nBarn | 36\n\n\\# no heading\n\n\\---",
    )


def test_what_word_shows_is_read_once_and_nothing_else():
    run = "<w:r><w:t>{}</w:t></w:r>"
    box = "<w:txbxContent>" + paragraph("in a box") + "</w:txbxContent>"
    twice = f"<mc:AlternateContent><mc:Choice>{box}</mc:Choice><mc:Fallback>{box}</mc:Fallback></mc:AlternateContent>"
    body = (
        f"<w:p>{run.format('be')}{run.format('fore')}<w:r>{twice}</w:r></w:p>"
        f"<w:p><w:del><w:r><w:delText>gone</w:delText></w:r></w:del><w:moveFrom>{run.format('away')}</w:moveFrom>"
        f"<w:ins>{run.format('new')}</w:ins><w:r><w:tab/><w:t>a</w:t><w:noBreakHyphen/><w:t>b</w:t><w:br/><w:t>c</w:t>"
        f"<w:instrText>PAGE</w:instrText></w:r></w:p>"
        f"<w:sdt><w:sdtContent>{paragraph('controlled')}</w:sdtContent></w:sdt>"
        f"<w:p><m:oMath><m:r><m:t>E=mc</m:t></m:r></m:oMath><w:hyperlink>{run.format(' linked')}</w:hyperlink></w:p>"
        f"<w:tbl><w:tr><w:tc>{paragraph('one')}{paragraph('cell', style('Bullet'))}</w:tc></w:tr></w:tbl>"
        f"<w:p><w:pPr>{style('Bullet')}<w:pPrChange><w:pPr>{style('Titel')}</w:pPr></w:pPrChange></w:pPr>"
        f"{run.format('changed')}</w:p>"
    )
    raw = word(body, footnotes=paragraph("a note"), comments=paragraph("a comment"), header1=paragraph("each page"))
    assert read(".docx", raw) == (
        "",
        "in a box\n\nbefore\n\nnew a-b\nc\n\ncontrolled\n\nE=mc linked\n\none\n\n- cell\n- changed\n\na note\n\n"
        "a comment",
    )


TALK = "A talk about owls for people who walk through the woods of Europe at night."


def test_the_slides_of_a_presentation_are_its_pages(tmp_path):
    raw = slides(
        shape("Owls", kind="ctrTitle") + shape(TALK, kind="subTitle") + shape("7", kind="sldNum"),
        "",
        shape("Food", kind="title")
        + shape("Mice and voles and shrews and beetles are what most owls catch in a summer night.")
        + "<p:graphicFrame><a:tbl><a:tr><a:tc><a:txBody><a:p><a:r><a:t>mouse</a:t></a:r></a:p></a:txBody></a:tc>"
        "<a:tc><a:txBody><a:p><a:fld type='slidenum'><a:t>3</a:t></a:fld><a:r><a:t>20 g</a:t></a:r></a:p></a:txBody>"
        "</a:tc></a:tr></a:tbl></p:graphicFrame>",
        slide1=shape("Show the film.") + shape("3", kind="sldNum"),
    )
    assert read(".pptx", raw) == (
        "Owls",
        f"# Owls\n\n{TALK}\n\f\n\f# Food\n\nMice and voles and shrews and beetles are what most owls catch in a summer "
        "night.\n\nmouse | 20 g\n\nShow the film.",
    )
    (tmp_path / "talk.PPTX").write_bytes(raw)
    (document,) = read_file(tmp_path / "talk.PPTX", on_note=pytest.fail)
    found = [window.passage for window in windows(ColBERT.default(), [document])]
    assert [(passage.title, passage.page, passage.line, passage.place) for passage in found] == [
        ("Owls", 1, None, ", slide 1"),
        ("Owls: Food", 3, None, ", slide 3"),
    ]


def test_the_sheets_of_a_workbook_are_its_pages(tmp_path):
    """Strings that are shared, formulas with their results, and numbers as Excel shows them."""
    strings = "<si><t>owl</t></si><si><r><t>barn </t></r><r><t>owl</t></r><rPh><t>x</t></rPh></si>"
    styles = (
        '<numFmts><numFmt numFmtId="164" formatCode="[Red]dd\\.mm&quot;h&quot;yy"/>'
        '<numFmt numFmtId="165" formatCode="[h]:mm"/><numFmt numFmtId="166" formatCode="0.0&quot;days&quot;"/>'
        "</numFmts>"
        '<cellStyleXfs><xf numFmtId="14"/></cellStyleXfs>'
        '<cellXfs><xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="164"/><xf numFmtId="165"/><xf numFmtId="166"/>'
        '<xf numFmtId="20"/></cellXfs>'
    )
    kinds = (
        '<row><c t="s"><v>0</v></c><c/><c t="s"><v>1</v></c><c t="s"><v>9</v></c></row><row><c><v></v></c></row>'
        '<row><c t="inlineStr"><is><t>in</t><t>line</t></is></c><c t="str"><f>A1</f><v>made</v></c>'
        '<c t="b"><v>1</v></c><c t="e"><v>#N/A</v></c></row>'
        "<row><c><v>0.30000000000000004</v></c><c><v>20231231123456789</v></c><c><v>1e999</v></c></row>"
        '<row><c s="1"><v>45291</v></c><c s="2"><v>45291.5</v></c><c s="3"><v>1.5</v></c><c s="4"><v>2</v></c>'
        '<c s="5"><v>0.75</v></c><c s="1"><v>9e99</v></c><c s="77"><v>5</v></c></row>'
        '<row><c t="inlineStr"><is><t>#</t></is></c><c><v>1</v></c></row>'
    )
    raw = sheets(strings, styles, Kinds=kinds, Empty="", More='<row><c t="s"><v>0</v></c></row>')
    expected = (
        "## Kinds\n\nowl | barn owl\ninline | made | TRUE | #N/A\n0.3 | 20231231123456789 | 1e999\n"
        "2023-12-31 | 2023-12-31 12:00 | 1.5 | 2 | 18:00 | 9e99 | 5\n\\# | 1\n\f\n\f## More\n\nowl"
    )
    assert read(".xlsx", raw) == ("", expected)
    old = sheets("", styles, '<workbookPr date1904="1"/>', A='<row><c s="1"><v>1</v></c></row>')
    assert text(".xlsm", old) == "## A\n\n1904-01-02"
    (tmp_path / "a.xlsx").write_bytes(sheets(A="", B="<row><c><v>7</v></c></row>"))
    (document,) = read_file(tmp_path / "a.xlsx")
    (found,) = windows(ColBERT.default(), [document])
    assert (found.passage.title, found.passage.place) == ("a: B", ", sheet 2")


def test_opendocument():
    body = (
        "<office:automatic-styles><style:style style:name='P1' style:parent-style-name='Title'/>"
        "</office:automatic-styles><office:body><office:text>"
        "<text:tracked-changes><text:p>gone</text:p></text:tracked-changes>"
        "<text:table-of-content><text:p>Kinds 3</text:p></text:table-of-content>"
        "<text:p text:style-name='P1'>Owls</text:p><text:h text:outline-level='2'>Kinds</text:h>"
        "<text:p>An<text:s text:c='3'/>owl<text:tab/>is <text:span>a</text:span><text:line-break/>bird"
        "<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>a note</text:p></text:note-body>"
        "</text:note><office:annotation><dc:creator>Ann</dc:creator><dc:date>2020</dc:date><text:p>a comment</text:p>"
        "</office:annotation>.</text:p><text:list><text:list-item><text:p>barn</text:p><text:list><text:list-item>"
        "<text:p>white</text:p></text:list-item></text:list></text:list-item></text:list>"
        "<table:table table:name='T'><table:table-row table:number-rows-repeated='1000000'><table:table-cell>"
        "<text:p>a</text:p></table:table-cell><table:table-cell table:number-columns-repeated='16000'><text:p>b"
        "</text:p></table:table-cell></table:table-row></table:table></office:text></office:body>"
    )
    assert read(".odt", opened(body)) == (
        "Owls",
        "# Owls\n\n## Kinds\n\na note\n\na comment\n\nAn owl is a\nbird.\n\n- barn\n  - white\n\na | b",
    )
    page = (
        "<draw:page><draw:frame presentation:class='{}'><draw:text-box><text:p>{}</text:p></draw:text-box></draw:frame>"
        "</draw:page>"
    )
    talk = page.format("title", "Owls") + page.format("page-number", "2") + page.format("outline", "Mice")
    assert read(".odp", opened(f"<office:presentation>{talk}</office:presentation>")) == ("Owls", "# Owls\n\f\n\fMice")
    table = (
        "<table:table table:name='{}'><table:table-row><table:table-cell><text:p>{}</text:p></table:table-cell>"
        "</table:table-row></table:table>"
    )
    book = table.format("One", "1 €") + table.format("Two", "2 €")
    assert text(".ods", opened(f"<office:spreadsheet>{book}</office:spreadsheet>")) == (
        "## One\n\n1 €\n\f## Two\n\n2 €"
    )


def test_alternative_texts_of_pictures_are_read_as_on_web_pages():
    """Once, although files repeat them, and not the names of files, which programs put there."""
    picture = "<w:p><w:r><w:drawing><wp:docPr id='1' descr='{0}'/><pic:cNvPr descr='{0}'/></w:drawing></w:r></w:p>"
    old = "<w:p><w:r><w:pict><v:shape alt='A mouse&#10;asleep'/></w:pict></w:r></w:p>"
    body = picture.format("A red owl") + picture.format("C:\\pictures\\owl 3.JPG ") + paragraph("Owls hunt.") + old
    assert text(".docx", word(body)) == "A red owl\n\nOwls hunt.\n\nA mouse asleep"
    inline = "<w:p><w:r><w:t>see</w:t><w:drawing><wp:docPr descr='# an owl'/></w:drawing><w:t>here</w:t></w:r></w:p>"
    assert text(".docx", word(inline)) == "see # an owl here"
    drawn = "<p:pic><p:nvPicPr><p:cNvPr id='2' name='Picture 1' descr='# A red owl'/></p:nvPicPr></p:pic>"
    assert text(".pptx", slides(shape("Owls", kind="title") + drawn)) == "# Owls\n\n\\# A red owl"
    described = "<svg:title>A red owl</svg:title><svg:desc>It hunts.</svg:desc>"
    frame = f"<draw:frame draw:style-name='g'><draw:image/>{described}</draw:frame>"
    for content, found in (
        (f"<office:text><text:p>See{frame}</text:p></office:text>", "A red owl\n\nIt hunts.\n\nSee"),
        (f"<office:presentation><draw:page>{frame}</draw:page></office:presentation>", "A red owl\n\nIt hunts."),
        ("<office:text><text:p>On <text:title>Owls</text:title>.</text:p></office:text>", "On Owls."),
    ):
        assert text(".odt", opened(content)) == found


def test_office_files_are_found_in_folders_without_the_locks_of_open_ones(tmp_path):
    for name in ("a.docx", "b.PPTX", "c.xlsx", "d.odt", "~$a.docx", ".~lock.d.odt#", "e.doc"):
        (tmp_path / name).write_bytes(b"")
    found = [path.name for path in find_files([tmp_path], on_note=lambda note: None)]
    assert found == ["a.docx", "b.PPTX", "c.xlsx", "d.odt"]


def test_parts_are_found_however_a_program_names_them():
    body = f"<w:document>{paragraph('owl')}</w:document>"
    for target, name in (
        ("/word/document2.xml", "word/document2.xml"),
        ("Word/Document.XML", "word/document.xml"),
        ("../x/./d.xml", "x\\d.xml"),
    ):
        assert text(".docx", zipped({"_rels/.rels": references(("officeDocument", target)), name: body})) == "owl"
    assert text(".docx", zipped({"word/document.xml": body})) == "owl"
    strict = references(("officeDocument", "d.xml")).replace(
        TYPES, "http://purl.oclc.org/ooxml/officeDocument/relationships"
    )
    assert text(".docx", zipped({"_rels/.rels": strict, "d.xml": body})) == "owl"
    assert text(".docx", zipped({"word/document.xml": body.encode("utf-16")})) == "owl"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"no Office file", "a broken Office file .BadZipFile"),
        (word(paragraph("owl"))[:700], "a broken Office file .BadZipFile"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, "an encrypted file, or one of Office before 2007"),
        (zipped({"a.txt": "owl"}), "a broken Office file: word/document.xml .KeyError"),
        (zipped({"word/document.xml": "owl"}), "a broken Office file: word/document.xml .ExpatError"),
    ],
)
def test_what_is_not_an_office_file_is_called_so(tmp_path, raw, message):
    (tmp_path / "a.docx").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"a\.docx: {message}"):
        list(read_file(tmp_path / "a.docx"))


def test_a_broken_part_does_not_take_the_others_with_it():
    """And a part that breaks off is read up to there, in a cell of a table, too."""
    notes = []
    cut = word(
        "<w:tbl><w:tr><w:tc>" + paragraph("owl") + "</w:tc><w:tc>" + paragraph("mouse") + "<w:p><w:r><w:t>la",
        footnotes="<",
    )
    assert READERS[".docx"](cut, notes.append)[1] == "owl | mouse la"
    assert notes[0].startswith("an Office file with 2 broken parts, read up to there: word/document.xml (ExpatError")
    deck = slides(shape("one"), "<broken", shape("three"))
    assert READERS[".pptx"](deck, notes.append)[1] == "one\n\f\n\fthree"
    assert "ppt/slides/slide2.xml" in notes[1]


@pytest.mark.parametrize("suffix", [".docx", ".pptx", ".xlsx"])
@pytest.mark.parametrize("raw", [word(""), slides(""), sheets(A="")], ids=["word", "slides", "sheets"])
def test_a_file_without_text_or_of_another_kind_is_noted(suffix, raw):
    notes = []
    assert READERS[suffix](raw, notes.append) == ("", "")
    assert notes == ["an Office file without text, or of another kind than its name says"]


ENTITIES = '<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;"><!ENTITY x SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("entity", ["a", "b", "x", "nothing"])
@pytest.mark.parametrize("part", ["word/document.xml", "word/styles.xml", "_rels/.rels"])
def test_entities_are_refused(entity, part):
    raw = zipped({"word/document.xml": "<d/>", part: f"{ENTITIES}<d>&{entity};</d>"})
    parts = zipfile.ZipFile(io.BytesIO(word("")))
    whole = {name: parts.read(name) for name in parts.namelist()} | {part: f"{ENTITIES}<d>&{entity};</d>"}
    for hostile in (zipped(whole), raw):
        if part in ("word/styles.xml",) and hostile is raw:
            continue
        with pytest.raises(ValueError, match="it declares entities"):
            read(".docx", hostile)


def nested(tag: str, depth: int, inner: str) -> str:
    first = tag.split("><")
    return f"<{tag}>" * depth + inner + "".join(f"</{name}>" for name in reversed(first)) * depth


@pytest.mark.parametrize(
    ("suffix", "raw"),
    [
        (".docx", word(nested("w:sdt", 50_000, paragraph("owl")))),
        (".docx", word(nested("w:tbl><w:tr><w:tc", 30_000, paragraph("owl")))),
        (".docx", word(nested("w:p", 50_000, "<w:r><w:t>owl</w:t></w:r>"))),
        (".docx", word('<w:tc><w:tcPr><w:gridSpan w:val="2000000000"/></w:tcPr>' + paragraph("owl") + "</w:tc>")),
        (".pptx", slides(nested("p:grpSp", 50_000, shape("owl")))),
        (".xlsx", sheets(A='<row r="1048576"><c r="XFD1048576" t="str"><v>owl</v></c></row>')),
        (".odt", opened(nested("text:list><text:list-item", 30_000, "<text:p>owl</text:p>"))),
        (
            ".ods",
            opened("<table:table-row table:number-rows-repeated='99999999'><text:p>owl</text:p></table:table-row>"),
        ),
    ],
    ids=["controls", "tables", "paragraphs", "span", "groups", "corner", "lists", "repeated"],
)
def test_depth_and_size_that_is_only_said_cost_nothing(suffix, raw):
    assert "owl" in text(suffix, raw)


def bombs() -> dict[str, tuple[str, bytes]]:
    size = archive.ROOM * 3
    cells = '<row><c t="s"><v>0</v></c></row>' * 400
    table = nested("w:tbl><w:tr><w:tc", 1000, paragraph("owl " * 40_000)).replace(
        "</w:tc>", paragraph("x") + "</w:tc><w:tc>" + paragraph("y") + "</w:tc>"
    )
    return {
        "spaces": (".docx", word(" " * size)),
        "paragraphs": (".docx", word(paragraph("owl") * (size // 60))),
        "attribute": (".docx", word(f'<w:p w:val="{"x" * size}"/>')),
        "styles": (".docx", zipped({"_rels/.rels": " " * size, "word/document.xml": "<d/>"})),
        "bzip2": (".docx", zipped({"word/document.xml": "<d>" + " " * size}, zipfile.ZIP_BZIP2)),
        "lzma": (".docx", zipped({"word/document.xml": "<d>" + " " * size}, zipfile.ZIP_LZMA)),
        "strings": (".xlsx", sheets(f"<si><t>{'owl ' * 25_000}</t></si>", A=cells)),
        "nested tables": (".docx", word(table)),
    }


@pytest.mark.parametrize(("suffix", "raw"), bombs().values(), ids=bombs())
def test_a_file_that_unpacks_to_far_more_than_it_holds_is_refused(suffix, raw):
    with pytest.raises(ValueError, match="its parts unpack to far more than an Office file of this size holds"):
        read(suffix, raw)


def test_a_slide_that_is_listed_100000_times_is_read_once():
    parts = zipfile.ZipFile(io.BytesIO(slides(shape("owl"))))
    whole = {name: parts.read(name) for name in parts.namelist()}
    whole["ppt/presentation.xml"] = "<p>" + '<p:sldId r:id="rId1"/>' * 100_000 + "</p>"
    assert text(".pptx", zipped(whole)) == "owl"


def test_office_files_with_random_damage_are_read_or_refused():
    """No reader raises anything but ValueError, and what it reads can be stored."""
    chance = random.Random(0)
    whole = {
        ".docx": word(paragraph("owl " * 50, style("Titel")) * 3),
        ".pptx": slides(shape("owl"), shape("mouse")),
        ".xlsx": sheets("<si><t>owl</t></si>", A='<row><c t="s"><v>0</v></c></row>' * 9),
        ".odt": opened("<text:p>owl</text:p>" * 30),
    }
    outcomes = set()
    for _ in range(400):
        suffix = chance.choice(list(whole))
        damaged = bytearray(whole[suffix])
        for _ in range(chance.choice([1, 3, 20])):
            place = chance.randrange(len(damaged))
            damaged[place : place + chance.choice([0, 1, 9])] = chance.randbytes(chance.choice([0, 1, 9]))
        try:
            READERS[suffix](bytes(damaged), lambda note: note.encode())[1].encode()
            outcomes.add("read")
        except ValueError as error:
            outcomes.add(str(error)[:10])
    assert {"read", "a broken O"} <= outcomes
