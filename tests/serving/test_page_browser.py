"""The page of a server in a real Chromium: a question is asked in its form, and answered with the reasons."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from stores import corpus, write_corpus

pytest.importorskip("fastapi", reason='needs pip install "modernbert[serve]"')
pytest.importorskip("prometheus_client")

from modernbert.retrieval import index
from modernbert.serving.app import create_app
from modernbert.serving.start import bind, serve_models

uvicorn = pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
pytestmark = pytest.mark.browser


@pytest.fixture
def address(tmp_path):
    """A server with a store, in a thread."""
    write_corpus(tmp_path / "corpus.jsonl", corpus(12))
    index([tmp_path / "corpus.jsonl"], tmp_path / "store")
    server = uvicorn.Server(uvicorn.Config(create_app(*serve_models([], tmp_path / "store")), log_level="warning"))
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def test_a_question_is_asked_and_answered(address):
    with playwright.sync_playwright() as driver:
        paths = [*filter(None, map(shutil.which, ("chromium", "google-chrome"))), driver.chromium.executable_path]
        path = next((path for path in paths if Path(path).is_file()), None)
        if path is None:
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=path)
        page, faults = browser.new_page(), []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        assert page.locator("article").count() == 0
        page.get_by_label("Question").fill("owl & mouse")
        page.get_by_role("button", name="Search").click()
        page.wait_for_selector("article")
        assert page.locator("article").count() == 10
        assert page.get_by_label("Question").input_value() == "owl & mouse"
        page.get_by_role("toolbar").get_by_role("button", name="mouse").click()
        assert "found “mouse”" in page.locator("[role=status]").inner_text().replace("\u2068", "").replace("\u2069", "")
        # The icon of a site is asked for by the browser alone.
        assert [fault for fault in faults if "404" not in fault] == []
        browser.close()
