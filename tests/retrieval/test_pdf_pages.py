"""Pages of PDFs: their numbers, their forms, and the lines that they repeat (issue 15, 13)."""

from __future__ import annotations

import io

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import (
    ArrayObject,
    DecodedStreamObject,
    DictionaryObject,
    NameObject,
    NullObject,
    NumberObject,
    TextStringObject,
)

from modernbert import ColBERT
from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.documents.pdf_pages import without_running_heads
from modernbert.retrieval.documents.readers import read_pdf
from modernbert.retrieval.windows import windows

SENTENCE = "The keeper of the old lighthouse lit the lamp. "


def pdf(*pages: str, fields: tuple[dict[str, str], ...] = ()) -> bytes:
    """A PDF with a line for each line of a page, and form fields on its first page."""
    writer = PdfWriter()
    font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")})
    font[NameObject("/BaseFont")] = NameObject("/Helvetica")
    resources = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F"): font})})
    for text in pages:
        page = writer.add_blank_page(600, 800)
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in text.split("\n"))
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F 9 Tf 20 700 Td {shown} ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
        page[NameObject("/Resources")] = resources
    widgets = ArrayObject()
    for field in fields:
        widget = DictionaryObject({NameObject("/Subtype"): NameObject("/Widget")})
        for key, value in field.items():
            widget[NameObject(f"/{key}")] = NameObject(value) if value.startswith("/") else TextStringObject(value)
        widgets.append(writer._add_object(widget))
    writer.pages[0][NameObject("/Annots")] = widgets
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def test_a_hit_in_a_pdf_has_its_page(tmp_path):
    """Also after a page without text, and where a passage begins in the middle of a page."""
    (tmp_path / "owls.pdf").write_bytes(pdf("Owls.", "", SENTENCE * 60, "Mice sleep."))
    (document,) = read_file(tmp_path / "owls.pdf")
    found = [window.passage for window in windows(ColBERT.default(), [document])]
    pages = [passage.page for passage in found]
    assert pages == sorted(pages, key=lambda page: page or 0)
    assert (pages[0], pages[-1]) == (1, 3)
    for passage in found:
        assert passage.text == document.text[passage.start : passage.end]
        assert passage.page == 1 + document.text.count("\f", 0, passage.start)
        assert (passage.line, passage.place) == (None, f", page {passage.page}")
    assert "Mice sleep." in found[-1].text


def test_the_values_of_a_form_are_read_with_their_labels():
    raw = pdf(
        "Order form",
        fields=(
            {"T": "name", "V": "Ada Lovelace"},
            {"T": "f17", "TU": "Date of birth", "V": "1815"},
            {"T": "owls", "V": "/Yes"},
            {"T": "mice", "V": "/Off"},
            {"T": "empty", "V": " "},
            {"T": "no value"},
        ),
    )
    assert read_pdf(raw, pytest.fail)[1] == "Order form\nname: Ada Lovelace\nDate of birth: 1815\nowls: Yes"


def test_a_field_inherits_from_the_fields_above_it_and_a_circle_ends():
    writer = PdfWriter(clone_from=io.BytesIO(pdf("Form", fields=({"T": "kid"},))))
    widget = writer.pages[0]["/Annots"][0].get_object()
    above = {
        "/TU": TextStringObject("Colour"),
        "/V": ArrayObject([TextStringObject("grey"), TextStringObject("brown")]),
    }
    parent = writer._add_object(DictionaryObject({NameObject(key): value for key, value in above.items()}))
    parent.get_object()[NameObject("/Parent")] = parent
    widget[NameObject("/Parent")] = parent
    file = io.BytesIO()
    writer.write(file)
    assert read_pdf(file.getvalue(), pytest.fail)[1] == "Form\nColour: grey, brown"


def annotated(*annotations: DictionaryObject, page: str = "Form") -> bytes:
    """A PDF with one page and these annotations."""
    writer = PdfWriter(clone_from=io.BytesIO(pdf(page)))
    writer.pages[0][NameObject("/Annots")] = ArrayObject([writer._add_object(one) for one in annotations])
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def entries(**values: object) -> DictionaryObject:
    """A dictionary of a PDF; texts that begin with a slash are names."""
    found = DictionaryObject()
    for key, value in values.items():
        text = TextStringObject(value) if isinstance(value, str) else value
        found[NameObject(f"/{key}")] = NameObject(text) if isinstance(text, str) and text.startswith("/") else text
    return found


def listed(*texts: object) -> ArrayObject:
    return ArrayObject([TextStringObject(text) if isinstance(text, str) else text for text in texts])


def test_a_chosen_option_is_read_as_it_is_shown():
    """The value is the name of an option, or its number."""
    options = listed(listed("DE", "Germany"), listed("FR", "France"), "Spain")
    for kind, value, shown in (
        ("/Ch", "DE", "Germany"),
        ("/Ch", listed("FR", "DE"), "France, Germany"),
        ("/Ch", "Spain", "Spain"),
        ("/Ch", "elsewhere", "elsewhere"),
        ("/Btn", "/2", "Spain"),
    ):
        raw = annotated(entries(Subtype="/Widget", FT=kind, T="country", V=value, Opt=options))
        assert read_pdf(raw, pytest.fail)[1] == f"Form\ncountry: {shown}"


def test_a_long_value_may_be_a_stream():
    stream = DecodedStreamObject()
    stream.set_data(b"Owls hunt\rat night.")
    writer = PdfWriter(clone_from=io.BytesIO(annotated(entries(Subtype="/Widget", T="notes"))))
    writer.pages[0]["/Annots"][0].get_object()[NameObject("/V")] = writer._add_object(stream)
    file = io.BytesIO()
    writer.write(file)
    assert read_pdf(file.getvalue(), pytest.fail)[1] == "Form\nnotes: Owls hunt\nat night."


def test_comments_are_read_like_those_of_office_files():
    raw = annotated(
        entries(Subtype="/FreeText", Contents="typed on the page"),
        entries(Subtype="/Text", Contents="a note"),
        entries(Subtype="/Highlight", Contents=" "),
        entries(Subtype="/Link", Contents="an address"),
        entries(Subtype="/Popup", Contents="a note"),
        NullObject(),
    )
    assert read_pdf(raw, pytest.fail)[1] == "Form\ntyped on the page\na note"


def test_a_page_with_nothing_for_annotations_is_read():
    writer = PdfWriter(clone_from=io.BytesIO(pdf("Owls")))
    writer.pages[0][NameObject("/Annots")] = NullObject()
    file = io.BytesIO()
    writer.write(file)
    assert read_pdf(file.getvalue(), pytest.fail)[1] == "Owls"


def test_glyphs_are_read_by_their_letters():
    """pypdf knows ligatures by one name each, and no small capitals: o/f_f_ice, /a.sc, /one.oldstyle."""
    names = ("f_f_i", "f_j", "T_h", "a.sc", "one.oldstyle", "f_f.alt", ".notdef", "fi", "uni0041")
    writer = PdfWriter(clone_from=io.BytesIO(pdf("x")))
    page = writer.pages[0]
    font = entries(Type="/Font", Subtype="/Type1", BaseFont="/ABCDEF+TeXGyreTermes")
    names = [NumberObject(1), *(NameObject(f"/{name}") for name in names)]
    font[NameObject("/Encoding")] = entries(Differences=ArrayObject(names))
    page["/Resources"]["/Font"][NameObject("/G")] = font
    stream = DecodedStreamObject()
    stream.set_data(b"BT /G 9 Tf 20 700 Td (o\x01ce \x02ord \x03e \x04 \x05 o\x06 \x08n \x09) Tj ET")
    page[NameObject("/Contents")] = writer._add_object(stream)
    file = io.BytesIO()
    writer.write(file)
    for _ in range(2):
        assert read_pdf(file.getvalue(), pytest.fail)[1] == "office fjord The a 1 off ﬁn A"


def test_a_form_that_is_broken_does_not_take_the_page_with_it():
    writer = PdfWriter(clone_from=io.BytesIO(pdf("Owls", "Mice")))
    writer.pages[0][NameObject("/Annots")] = ArrayObject([TextStringObject("no field")])
    file, notes = io.BytesIO(), []
    writer.write(file)
    assert read_pdf(file.getvalue(), notes.append)[1].split() == ["Owls", "Mice"]
    assert notes[0].startswith("1 of 2 pages could not be read: 1 (")
    assert len(PdfReader(file).pages) == 2


def test_a_line_that_pages_repeat_at_their_edges_is_read_once():
    pages = [
        f"Owls of Europe {at}\nPage text {chr(97 + at)} is here.\nMore of {chr(97 + at)}.\n{at}" for at in range(1, 6)
    ]
    assert without_running_heads(pages) == [
        "Owls of Europe 1\nPage text b is here.\nMore of b.",
        *(f"Page text {chr(97 + at)} is here.\nMore of {chr(97 + at)}." for at in range(2, 6)),
    ]


@pytest.mark.parametrize(
    "head",
    [
        "{even}",
        "- {page} -",
        "Page {page} of 12",
        "{page} CHAPTER 2. OWLS",
        "2.1 Owls at night {page}",
    ],
)
def test_running_heads_of_many_kinds(head):
    pages = []
    for at in range(12):
        line = head.format(page=at + 7, even="Owls of Europe" if at % 2 else "A. Author")
        pages.append(f"{line}\nText {chr(97 + at)}.\nMore of {chr(97 + at)}.\nThe end of {chr(97 + at)}.")
    found = without_running_heads(pages)
    assert [page.split("\n")[-3:] for page in found] == [page.split("\n")[1:] for page in pages]
    assert sum(page.count("\n") == 3 for page in found) <= 2


def test_what_only_looks_like_a_running_head_stays():
    table = [f"{1990 + 7 * at} {at * at}\n{1991 + 7 * at} {at * 3}\n{1992 + 7 * at} 5" for at in range(9)]
    assert without_running_heads(table) == table
    alone = ["owls"] * 9
    assert without_running_heads(alone) == alone
    twice = ["Owls\na\nb\nc\nd", "Owls\ne\nf\ng\nh"]
    assert without_running_heads(twice) == twice
    inside = [f"{chr(97 + at)}1\n{chr(97 + at)}2\nOwls\n{chr(97 + at)}3\n{chr(97 + at)}4" for at in range(7)]
    assert without_running_heads(inside) == inside


def with_font(name: str) -> bytes:
    """A page of which the middle is code 0 of another font."""
    writer = PdfWriter(clone_from=io.BytesIO(pdf("x")))
    page = writer.pages[0]
    fonts = page["/Resources"]["/Font"]
    fonts[NameObject("/S")] = DictionaryObject({**fonts["/F"], NameObject("/BaseFont"): NameObject(name)})
    stream = DecodedStreamObject()
    stream.set_data(b"BT 20 700 Td /F 9 Tf (x) Tj /S 9 Tf <00> Tj /F 9 Tf (1) Tj /F 9 Tf <00> Tj ET")
    page[NameObject("/Contents")] = writer._add_object(stream)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["/ABCDEF+CMSY10", "/CMSY7", "/XYZABC+CMBSY10", "/LMMathSymbols10-Regular"])
def test_a_minus_sign_of_tex_is_one(name):
    """It is code 0 in these fonts. A NUL of another font is a broken place."""
    assert read_pdf(with_font(name), pytest.fail)[1] == "x\u22121\ufffd"


@pytest.mark.parametrize("name", ["/ABCDEF+CMR10", "/Helvetica", "/ABCDEF+CMEX10", "/MyCMSY"])
def test_a_nul_of_another_font_is_no_minus_sign(name):
    assert read_pdf(with_font(name), pytest.fail)[1] == "x\ufffd1\ufffd"
