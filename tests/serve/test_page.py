"""The page in Chromium: upload, progress, a question, a second one; nothing in the console."""

import shutil

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")
playwright = pytest.importorskip("playwright.sync_api", reason="make serve-check installs it")

from helpers.server import make_place, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt install chromium)")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = started.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture(params=[400, 1000])
def page(browser, request):
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    page.set_default_timeout(120_000)  # an answer has 256 tokens, and a busy machine is slow
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
    yield page
    page.close()


def ask(page, question):
    before = page.locator(".assistant").count()
    page.fill("#question", question)
    page.click("#send")
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#send").wait_for(state="visible")
    assert page.locator(".assistant").count() == before + 1, page.locator("#problem").inner_text()
    return page.locator(".assistant").last.inner_text()


def fits(page):
    width = "document.documentElement"
    return page.evaluate(f"{width}.scrollWidth <= {width}.clientWidth")


def test_upload_progress_two_questions(page, place, tmp_path):
    with serving(place, "--store", tmp_path / "store") as (url, _):
        seen = []
        page.expose_function("seen", lambda text: seen.append(text))
        page.goto(url)
        page.evaluate(
            """new MutationObserver(() => {
                for (const item of document.querySelectorAll('#memories li'))
                    seen(item.dataset.status + ': ' + item.innerText);
            }).observe(document.getElementById('memories'), {childList: true})"""
        )
        page.set_input_files("#file", place / "clip.mp4")
        page.locator("li[data-status=ready]").wait_for()
        assert seen[0].startswith("uploading")
        assert any(text.startswith(("watching", "queued")) for text in seen)
        assert "frames" in page.locator("#memories").inner_text()
        ask(page, "What happens in this video, in a few words?")
        ask(page, "And after that?")
        assert page.locator(".user").all_inner_texts()[1] == "And after that?"
        assert fits(page)
        page.reload()  # the memory is still there, the conversation is not
        page.locator("li[data-status=ready] .name").click()
        ask(page, "Again?")
        page.get_by_text("Delete").click()
        page.locator("#chat").wait_for(state="hidden")
        assert not page.locator("#memories li").count()
        assert page.problems == []


def test_a_wrong_file_is_told(page, place, tmp_path):
    (tmp_path / "words.mp4").write_text("words")
    with serving(place, "--store", tmp_path / "store") as (url, _):
        page.goto(url)
        page.set_input_files("#file", tmp_path / "words.mp4")
        page.get_by_text("expected a video").wait_for()
        assert fits(page)


def test_a_key_is_asked_for(page, place, tmp_path):
    (tmp_path / "keys").write_text("mine\n")
    with serving(place, "--store", tmp_path / "store", "--api-keys", tmp_path / "keys") as (url, _):
        page.goto(url)
        page.fill("#key", "mine")
        page.click("#login button")
        page.locator("#login").wait_for(state="hidden")
        page.set_input_files("#file", place / "clip.mp4")
        page.locator("li[data-status=ready]").wait_for()
