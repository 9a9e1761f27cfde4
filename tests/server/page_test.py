"""The page in a real browser: needs Chromium, and playwright to drive it."""

import contextlib
import shutil

import pytest

pytest.importorskip("starlette")
sync_api = pytest.importorskip("playwright.sync_api")

from tests.server.fake_engine import serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, url, **options):
    """A page on which any script error, message or dialog fails the test."""
    page, problems = browser.new_page(**options), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(url)
    page.wait_for_selector("#passages option", state="attached")
    yield page
    page.close()
    assert not problems


def ask(page, question="red thing"):
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:not([hidden])")


def titles(page, column):
    return page.locator(f"#{column} .title").all_text_contents()


def test_an_answer_shows_both_orders_scores_and_what_was_read(browser):
    with serving() as url, opened(browser, url) as page:
        ask(page)
        assert page.text_content("#answer") == "RED THING"
        assert titles(page, "retriever") == list(reversed(titles(page, "reranker")))
        assert page.locator("#reranker li.kept").count() == 2
        assert page.locator("#reranker .score").all_text_contents() == ["1.00", "0.00", "-1.00"]
        assert "decoding 4.0 ms" in page.get_attribute("#stack", "aria-label")


def test_texts_of_the_corpus_run_no_script(browser):
    with serving() as url, opened(browser, url) as page:
        ask(page, "<img src=x onerror=alert(1)>")
        page.locator("#reranker summary").first.click()
        assert page.locator("#result img, #result script").count() == 0
        assert "<script>alert(1)</script>" in titles(page, "reranker")
        assert "onerror=alert(1)" in page.locator("#reranker .text").first.text_content()


def test_words_of_the_answer_are_highlighted_in_opened_passages(browser):
    with serving() as url, opened(browser, url) as page:
        ask(page)
        page.locator("#reranker summary").nth(1).click()
        assert page.locator("#reranker li:nth-child(2) mark").all_text_contents() == ["thing"]


def test_settings_are_sent_and_an_error_is_announced(browser):
    with serving() as url, opened(browser, url) as page:
        ask(page)
        with page.expect_response("**/v1/answers") as answered:
            page.select_option("#kept", "1")
        assert answered.value.request.post_data_json["num_kept"] == 1
        page.locator("#reranker li.kept").nth(1).wait_for(state="detached")
        assert page.locator("#reranker li.kept").count() == 1
        with page.expect_response("**/v1/answers") as answered:
            page.uncheck("#rerank")
        assert answered.value.request.post_data_json["rerank"] is False
        page.fill("#candidates", "yes | no")
        with page.expect_response("**/v1/answers") as answered:
            page.click("#ask")
        assert answered.value.request.post_data_json["candidates"] == ["yes", "no"]


def test_a_fault_is_announced(browser):
    with serving() as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#passages option", state="attached")
        page.fill("#question", "withdrawn")
        page.click("#ask")
        page.wait_for_selector("#error:not([hidden])")
        assert page.get_attribute("#error", "role") == "alert"
        assert "withdrawn" in page.text_content("#error")
        assert page.is_hidden("#result") and page.is_enabled("#ask")
        page.close()


def test_a_token_can_be_typed(browser):
    with serving("secret") as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#token-row:not([hidden])")
        page.fill("#token", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#passages option", state="attached")
        ask(page)
        assert page.text_content("#answer") == "RED THING"
        page.close()


def test_the_page_works_with_only_the_keyboard(browser):
    with serving() as url, opened(browser, url) as page:
        page.keyboard.press("Tab")
        page.keyboard.type("red thing")
        page.keyboard.press("Enter")
        page.wait_for_selector("#result:not([hidden])")
        page.locator("#reranker summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("#reranker details").first.get_attribute("open") is not None
        unnamed = "input:not([aria-label]):not([hidden])"
        for box in page.locator(unnamed).all():
            assert box.evaluate("e => e.labels.length") == 1


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_nothing_overflows(browser, width):
    with (
        serving() as url,
        opened(browser, url, viewport={"width": width, "height": 800}) as page,
    ):
        ask(page)
        page.locator("#reranker summary").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("#question", "#candidates", "#ask", "#stack"):
            box = page.locator(selector).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, selector


def test_light_and_dark_differ(browser):
    colours = set()
    for scheme in ("light", "dark"):
        with serving() as url, opened(browser, url, color_scheme=scheme) as page:
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
