"""The page in a real Chromium: a click finds what numpy finds, and nothing is loaded, logged or unreadable.

`python tests/fixtures/browser/record.py` runs this file and keeps its result and its screenshots.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from modernbert import ColBERT, Session
from modernbert.retrieval.explain import TokenMatch, explain
from modernbert.retrieval.page import explain_page
from modernbert.retrieval.passages import Passage
from modernbert.retrieval.queries import encode_queries
from modernbert.retrieval.store.search import Hit

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
pytestmark = pytest.mark.browser

ASSETS = Path(__file__).parents[2] / "modernbert" / "assets"
QUERY = "how does hail form inside a storm?"
# They hold the five best passages of the whole demo corpus for this query.
ARTICLES = {"Precipitation", "Connecticut"}
LONG = "Donaudampfschifffahrtsgesellschaft" * 12
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser(record_testsuite_property):
    """Chromium of the system, or the one that playwright installed."""
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        paths = [*filter(None, map(shutil.which, names)), driver.chromium.executable_path]
        path = next((path for path in paths if Path(path).is_file()), None)
        if path is None:
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        chromium = driver.chromium.launch(executable_path=path)
        record_testsuite_property("browser", f"{chromium.browser_type.name} {chromium.version}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def colbert() -> ColBERT:
    return ColBERT.default()


@pytest.fixture(scope="module")
def hits(colbert) -> list[tuple[Hit, list[TokenMatch]]]:
    """The five best passages, by MaxSim in numpy, of two articles cut into groups of whole sentences."""
    passages = []
    with gzip.open(ASSETS / "demo" / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line, record in enumerate(map(json.loads, lines), start=1):
            text = record["text"]
            ends = [found.end() for found in re.finditer(r".{400,}?[.!?](?= [A-Z])", text)]
            for start, end in pairwise([0, *ends, len(text)]):
                if record["title"] in ARTICLES:
                    piece = text[start:end].strip()
                    passages.append(Passage("corpus.jsonl", record["_id"], record["title"], piece, start, end, line))
    contents = [passage.content for passage in passages]
    query_QE = colbert.encode_queries([QUERY])[0].numpy()
    scores = [float((query_QE @ x.numpy().T).max(axis=1).sum()) for x in colbert.encode_documents(contents)]
    best = np.argsort(scores)[::-1][:5].tolist()
    session = Session(colbert)
    explained = explain(session, encode_queries(session, [QUERY])[0], [contents[i] for i in best])
    return [
        (Hit(rank, scores[i], passages[i], i), matches)
        for rank, (i, matches) in enumerate(zip(best, explained, strict=True), start=1)
    ]


@pytest.fixture(scope="module")
def file(hits, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(explain_page(QUERY, hits), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser):
    """Opens pages; at the end no page may have logged, asked for, or thrown anything."""
    contexts, wrong = [], []

    def open_page(file: Path, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: request.url != file.as_uri() and wrong.append(f"request: {request.url}"))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def button(page, name: str):
    return page.get_by_role("toolbar").get_by_role("button").filter(has_text=name).first


def told(hits, *tokens: str) -> list[str]:
    """What each hit should say of these tokens of the query."""
    expected = []
    for hit, matches in hits:
        named = {QUERY[slice(*match.query)].strip(): match for match in matches if match.query}
        chosen = [(token, named[token]) for token in tokens]
        words = [
            hit.passage.content[slice(*match.document)].strip() if match.document else "no text" for _, match in chosen
        ]
        expected.append(", ".join(f"{t} → {w} {m.contribution:.3f}" for (t, m), w in zip(chosen, words, strict=True)))
    return expected


def notes(page) -> list[str]:
    """What each hit says of the choice, without the characters that isolate directions."""
    return [text.translate({0x2068: None, 0x2069: None}) for text in page.locator(".note").all_inner_texts()]


def status(page) -> str:
    return page.get_by_role("status").inner_text().translate({0x2068: None, 0x2069: None})


def marked(page) -> list[list[tuple[int, int]]]:
    """For each hit the characters of title, space and text that are marked as chosen."""
    return page.eval_on_selector_all(
        "article",
        """articles => articles.map(article => {
          const title = article.querySelector("h2"), text = article.querySelector(".text");
          return [...article.querySelectorAll("mark.on")].map(mark => {
            const range = document.createRange(), home = title.contains(mark) ? title : text;
            range.setStart(home, 0);
            range.setEndBefore(mark);
            const start = range.toString().length + (home === text ? title.textContent.length + 1 : 0);
            return [start, start + mark.textContent.length];
          });
        })""",
    )


def test_a_click_marks_the_word_that_numpy_finds(visit, colbert, hits, file):
    """Every token of the query, in every hit: the argmax of float64 products is inside the one marked word."""
    page = visit(file)
    query_QE = colbert.encode_queries([QUERY])[0].double().numpy()
    spans = colbert.tokenize_queries([QUERY]).spans[0]
    contents = [hit.passage.content for hit, _ in hits]
    document_SEs = [x.double().numpy() for x in colbert.encode_documents(contents)]
    tokens = [i for i, span in enumerate(spans) if span]
    buttons = page.get_by_role("toolbar").get_by_role("button")
    assert buttons.count() == len(tokens) + 1 == 9
    for i, nth in zip(tokens, range(len(tokens)), strict=True):
        buttons.nth(nth).click()
        expected = []
        for content, document_SE, where in zip(
            contents, document_SEs, colbert.tokenize_documents(contents).spans, strict=True
        ):
            similarities = document_SE @ query_QE[i]
            expected.append((where[int(similarities.argmax())], f"{similarities.max():.3f}", content))
        said = status(page)
        for (span, number, content), places, note in zip(expected, marked(page), notes(page), strict=True):
            assert note.endswith(number)
            assert f"{number} in hit" in said
            if span is None:
                assert places == []
                continue
            ((start, end),) = places
            assert start <= span[1] - len(content[slice(*span)].strip())
            assert span[1] <= end
            assert content[start:end].strip() == content[start:end]
            assert f"“{content[slice(*span)].strip()}”" in said


def test_what_has_no_text_is_one_choice(visit, hits, file):
    """[CLS], the prefix and [SEP] together: all words that they found are marked, and their sum is announced."""
    page = visit(file)
    button(page, "without text").click()
    for (_, matches), places, note in zip(hits, marked(page), notes(page), strict=True):
        others = [match for match in matches if match.query is None]
        assert note.endswith(f"{sum(match.contribution for match in others):.3f}")
        for match in others:
            if match.document:
                assert any(start < match.document[1] and match.document[0] < end for start, end in places)
        assert len(places) <= len(others)


def test_clicks_keep_and_end_a_choice(visit, hits, file):
    """A token, the same again, a word of a passage with all that found it, and Escape."""
    page = visit(file)
    idle = notes(page)
    button(page, "inside").click()
    assert button(page, "inside").get_attribute("aria-pressed") == "true"
    assert notes(page) == told(hits, "inside")
    assert notes(page)[0].startswith("inside → Within 0.3")
    button(page, "inside").click()
    assert button(page, "inside").get_attribute("aria-pressed") == "false"
    page.mouse.move(1, 1)
    assert (marked(page), notes(page), status(page)) == ([[]] * 5, idle, "")
    page.locator("mark").get_by_text("hail", exact=True).first.click()
    pressed = page.locator("[aria-pressed=true] b").all_inner_texts()
    assert pressed == ["h", "ail"]
    assert notes(page)[0] == told(hits, "ail", "h")[0]
    page.mouse.move(1, 1)
    page.keyboard.press("Escape")
    assert (marked(page), notes(page), status(page)) == ([[]] * 5, idle, "")


def test_hovering_is_a_preview(visit, hits, file):
    """It shows what a click would, keeps nothing, says nothing, and gives way to what was chosen."""
    page = visit(file)
    button(page, "storm").click()
    chosen = marked(page)
    button(page, "inside").hover()
    assert notes(page) == told(hits, "inside")
    assert marked(page) != chosen
    assert status(page).startswith("“storm” found “storm” 0.8")
    page.mouse.move(1, 1)
    assert (marked(page), notes(page)) == (chosen, told(hits, "storm"))


def test_keyboard_alone(visit, hits, file):
    """One stop for the whole query, arrows within it, Enter chooses, Escape ends it; tables open with Enter."""
    page = visit(file)

    def focused() -> str:
        return page.evaluate("(document.activeElement.querySelector('b') || document.activeElement).textContent")

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        return focused()

    assert press("Tab") == "how"
    assert press("Tab") == "All 11 tokens of the query"
    assert press("Shift+Tab") == "how"
    assert press("ArrowRight", "ArrowRight") == "h"
    assert press("End") == "3 tokens without text"
    assert press("ArrowRight") == "how"
    assert press("ArrowLeft", "ArrowLeft") == "storm"
    assert press("Home", "ArrowRight") == "does"
    assert marked(page) == [[]] * 5
    press("Enter")
    does = marked(page)
    assert (len(does[0]), notes(page)) == (1, told(hits, "does"))
    assert status(page).startswith("“does” found “has” 0.")
    ring = page.evaluate("(s => [s.outlineStyle, s.outlineWidth])(getComputedStyle(document.activeElement))")
    assert ring == ["solid", "3px"]
    press("Escape")
    assert (marked(page), status(page), focused()) == ([[]] * 5, "", press())
    press("Space")
    assert marked(page) == does
    assert press("Tab") == "All 11 tokens of the query"
    press("Enter")
    assert page.locator("table").first.is_visible()
    assert press("Shift+Tab") == "does"


CONTRASTS = """() => {
  const numbers = (css) => css.match(/[0-9.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(".hidden, script")) continue;
    let ground = element;
    while (numbers(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(numbers);
    const [low, high] = pair.map(luminance).sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.className + ": " + walker.currentNode.data.trim()]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_text_can_be_read(visit, file, scheme, record_property):
    """WCAG's 4.5 for every text on its ground: all five shades, tables open, a token chosen."""
    page = visit(file, color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    button(page, "ail").click()
    contrasts = page.evaluate(CONTRASTS)
    lowest, text = min(contrasts)
    record_property("lowest contrast", f"{lowest:.2f}")
    assert {f"s{i}" for i in range(1, 6)} <= {name.split(":")[0] for _, name in contrasts}
    assert lowest >= 4.5, text
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 253, 249)") == (scheme == "light")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shades_differ_in_lightness_alone(visit, file, scheme):
    """Each level is further from the paper than the one before, for eyes that see no colour and for print."""
    page = visit(file, color_scheme=scheme)
    shades = page.eval_on_selector_all(".legend li", "all => all.map(li => getComputedStyle(li).backgroundColor)")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    grey = [np.dot([float(part) for part in css[4:-1].split(",")], [0.2126, 0.7152, 0.0722]) for css in shades]
    distances = [abs(level - np.mean([float(part) for part in paper[4:-1].split(",")])) for level in grey]
    assert len(distances) == 5
    assert min(np.diff([0, *distances])) > 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing(visit, file, scheme, record_property):
    """Deque's rules for accessible pages, with nothing and with a token chosen."""
    reason = "needs axe: pip install axe-playwright-python"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=reason).Axe()
    page = visit(file, color_scheme=scheme)
    page.locator("summary").first.click()
    for _ in range(2):
        result = axe.run(page).response
        record_property("axe-core", result["testEngine"]["version"])
        assert [(found["id"], [node["html"] for node in found["nodes"]]) for found in result["violations"]] == []
        button(page, "ail").click()


def test_a_telephone_needs_no_sideways_scroll(visit, file, tmp_path):
    """At 320 pixels, tables open: the real page, and one whose title, words and path have no place to break."""
    endless = tmp_path / "endless.html"
    passage = Passage(f"/tmp/{LONG}.md", LONG, LONG, f"{LONG} {LONG}", 0, 0, 1)
    matches = [TokenMatch((0, len(LONG)), (0, len(LONG)), 0.5), TokenMatch(None, (500, 501), 0.5)]
    endless.write_text(explain_page(LONG, [(Hit(1, 1.0, passage, 1), matches)]), encoding="utf-8")
    for each in (file, endless):
        page = visit(each, viewport={"width": 320, "height": 640})
        page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
        page.get_by_role("toolbar").get_by_role("button").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 320, each.name


def test_without_script_the_page_is_whole(visit, hits, file):
    """Heat map, numbers and tables are there; what would do nothing is disabled."""
    page = visit(file, java_script_enabled=False)
    assert page.locator("mark.s5").count() >= 1
    assert page.get_by_role("toolbar").locator("button:enabled").count() == 0
    assert page.locator(".note").first.inner_text().startswith("hail → hail 1.8")
    page.locator("summary").first.click()
    assert page.locator("tfoot").first.inner_text().split() == ["sum", "=", "score", f"{hits[0][0].score:.3f}"]
    assert not page.get_by_text("Choose a token").is_visible()


def test_markup_in_a_passage_is_text(visit, tmp_path):
    """What would run, load or ask if it were not text does none of that."""
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)><iframe src=//example.org>\u202e"
    passage = Passage("<b>.md", "<b>.md", hostile, hostile, 0, 0, 1)
    matches = [TokenMatch((i, i + 1), (i, i + 9), 0.5) for i in range(0, 80, 10)]
    path = tmp_path / "hostile.html"
    path.write_text(explain_page(hostile, [(Hit(1, 4.0, passage, 1), matches)]), encoding="utf-8")
    page = visit(path)
    button(page, "<").click()
    assert page.locator(".text").text_content() == page.locator("h2").text_content() == hostile
    assert page.locator("img, iframe").count() == 0
    assert page.locator("script").count() == 1


def test_the_policy_stops_what_would_slip_through(browser, file, tmp_path):
    """A second lock: were a text ever not escaped, the browser would refuse to run or load what is in it."""
    broken = tmp_path / "broken.html"
    inserted = "<script>document.title = 'ran'</script><img src='file:///x.png' onerror='document.title = 1'>"
    broken.write_text(file.read_text(encoding="utf-8").replace("<main>", f"<main>{inserted}"), encoding="utf-8")
    page, refused, asked = browser.new_page(), [], []
    page.on("console", lambda message: refused.append(message.text))
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto(broken.as_uri())
    assert page.title() == f"{QUERY} · modernbert"
    assert len([text for text in refused if "Content Security Policy" in text]) >= 2
    assert asked == [broken.as_uri()]
    page.close()


def test_right_to_left_text_runs_right_to_left(visit, tmp_path):
    """Query, title and text each by their own letters; the left arrow goes on, not back."""
    query, passage = "كيف يتكون البرد", Passage("a.md", "a.md", "البرد", "يتكون البرد في السحب.", 0, 0, 1)
    matches = [TokenMatch((0, 3), (6, 11), 0.5), TokenMatch((4, 9), (6, 11), 0.25), TokenMatch((10, 15), (0, 5), 0.25)]
    path = tmp_path / "rtl.html"
    path.write_text(explain_page(query, [(Hit(1, 1.0, passage, 1), matches)]), encoding="utf-8")
    page = visit(path)
    for selector in ("[role=toolbar]", "h2", ".text"):
        assert page.locator(selector).evaluate("node => getComputedStyle(node).direction") == "rtl"
    assert page.locator("footer").evaluate("node => getComputedStyle(node).direction") == "ltr"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.querySelector('b').textContent") == "يتكون"


def test_a_page_without_hits_runs_too(visit, tmp_path):
    path = tmp_path / "none.html"
    path.write_text(explain_page(QUERY, []), encoding="utf-8")
    page = visit(path)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert page.get_by_text("No passage was found.").is_visible()
    assert not page.get_by_text("Choose a token").is_visible()


def test_quiet_motion_and_paper(visit, file):
    """No transition where none is wanted; on paper the query does not stick and shades are printed."""
    styles = "['transitionDuration', 'printColorAdjust'].map(name => getComputedStyle(node)[name])"
    page = visit(file)
    assert page.locator("mark").first.evaluate(f"node => {styles}") == ["0.12s, 0.12s", "economy"]
    assert page.locator(".query").evaluate("node => getComputedStyle(node).position") == "sticky"
    page.emulate_media(reduced_motion="reduce", media="print")
    assert page.locator("mark").first.evaluate(f"node => {styles}") == ["0s", "exact"]
    assert page.locator(".query").evaluate("node => getComputedStyle(node).position") == "static"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_screenshots(visit, file, scheme, tmp_path_factory):
    """What the README shows: the page with a token chosen, marks and shades in the pixels."""
    page = visit(file, color_scheme=scheme, viewport={"width": 1100, "height": 760})
    button(page, "inside").click()
    page.mouse.move(1, 1)
    path = tmp_path_factory.getbasetemp() / f"explain-{scheme}.png"
    page.screenshot(path=path, animations="disabled")
    assert 20_000 < path.stat().st_size < 400_000
