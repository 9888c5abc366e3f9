"""The page of `textgen serve` in a real browser, used as a person would."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from tests.serving.servers import Running, running

expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_run, tmp_path_factory.mktemp("serve") / "log", "--max_tokens", "3000") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium (apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """Yield the page at three temperatures; nothing may be wrong in its console in the end."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": 1100, "height": 760})
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Failed to load" not in said.text else None)
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.locator("#min_p").fill("0")
    yield page
    page.close()
    assert wrong == []


def texts(page: Page) -> list[str]:
    """Wait for the end and return what stands in each column."""
    expect(page.locator("#status")).to_have_text("done")
    return [text.text_content() or "" for text in page.locator(".text").all()]


def tokens(page: Page, column: int = 0) -> Locator:
    """Return the tokens of a column that do not belong to the prompt."""
    return page.locator("section").nth(column).locator(".token:not(.prompt)")


def prompt_tokens(page: Page, column: int = 0) -> Locator:
    return page.locator("section").nth(column).locator(".token.prompt")


def menu(page: Page) -> Locator:
    """Return the alternatives that can be chosen."""
    return page.get_by_role("menu").get_by_role("menuitem")


def wanted(server: Running, prompt: str, temperature: float, **asked: float) -> str:
    settings = {"seed": 42, "max_tokens": 120} | asked
    return prompt + str(server.complete(prompt=prompt, temperature=temperature, **settings)["choices"][0]["text"])


def test_typing_and_generating_shows_the_texts_of_three_temperatures(page: Page, server: Running) -> None:
    page.locator("#prompt").fill("Ça va 🙂 The plot")
    page.get_by_role("button", name="Generate").click()
    assert texts(page) == [wanted(server, "Ça va 🙂 The plot", temperature) for temperature in (0.5, 0.8, 1.1)]


def test_sliders_and_seed_change_the_text(page: Page, server: Running) -> None:
    page.locator("#prompt").fill("The")
    page.locator(".temperature").first.fill("1.5")
    for name, value in (("top_k", "20"), ("top_p", "0.9"), ("min_p", "0.1"), ("max_tokens", "30"), ("seed", "7")):
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Generate").click()
    asked = {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "max_tokens": 30, "seed": 7}
    first = texts(page)[0]
    assert first == wanted(server, "The", 1.5, **asked)
    page.get_by_role("button", name="New seed").click()
    expect(page.locator(".text").first).not_to_have_text(first)
    assert page.locator("#seed").input_value() != "7"


def test_stop_ends_the_streams_and_frees_their_places(page: Page, server: Running) -> None:
    for slider in page.locator(".temperature").all():
        slider.fill("0")  # which never ends
    page.locator("#max_tokens").fill("3000")
    page.get_by_role("button", name="Generate").click()
    expect(tokens(page).nth(20)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    server.wait_until("samples_running", 0)
    assert tokens(page).count() < 3000
    expect(page.locator("#error")).to_be_hidden()


def test_a_token_tells_its_probability_and_the_alternatives(page: Page) -> None:
    page.locator("#prompt").fill("The plot")
    page.get_by_role("button", name="Generate").click()
    texts(page)
    told = page.locator("#alternatives")
    expect(told).to_be_hidden()
    seen = [token for token in tokens(page, 2).all()[:20] if token.text_content()]
    seen[2].hover()
    rows = told.locator("div")
    expect(rows).to_have_count(6)
    shares = [float(row.split()[-2]) for row in rows.all_inner_texts()]
    assert shares[1:] == sorted(shares[1:], reverse=True)
    assert 0 < sum(shares[1:]) <= 100.5
    assert json.dumps(seen[2].text_content(), ensure_ascii=False) in (rows.first.text_content() or "")
    page.mouse.move(0, 0)
    expect(told).to_be_hidden()
    tokens(page).first.focus()  # and by keyboard, from one to the next
    first = rows.first.text_content()
    page.keyboard.press("ArrowRight")
    expect(told).to_be_visible()
    assert page.evaluate("() => document.activeElement.previousElementSibling.className") == "token"
    assert rows.first.text_content() != first


def test_the_tokens_of_the_prompt_tell_their_rank(page: Page, server: Running) -> None:
    prompt = "Ça va 🙂 The plot"
    page.locator("#prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    texts(page)
    asked = {"prompt": f"</s>{prompt}", "echo": True, "max_tokens": 0, "logprobs": 5}
    scored = server.complete(**asked)["choices"][0]["logprobs"]
    for column in (0, 2):
        shown = prompt_tokens(page, column)
        assert "".join(shown.all_text_contents()) == prompt
        assert shown.count() == len(scored["tokens"]) - 1
    rows = page.locator("#alternatives div")
    for place in (0, 3):
        prompt_tokens(page).nth(place).hover()
        share = 100 * math.exp(scored["token_logprobs"][place + 1])
        expect(rows.first).to_contain_text(f"rank {scored['token_ranks'][place + 1]}")
        assert float(rows.first.inner_text().split()[-2]) == pytest.approx(share, rel=0.01)
        expect(rows).to_have_count(6)


@pytest.mark.parametrize("part", ["sample", "prompt"])
def test_a_click_on_an_alternative_continues_from_there(part: str, page: Page, server: Running) -> None:
    page.locator("#prompt").fill("The plot was silly")
    page.get_by_role("button", name="Generate").click()
    before = texts(page)
    column = (tokens if part == "sample" else prompt_tokens)(page, 1)
    place = next(i for i in range(2, 20) if column.nth(i).text_content())
    kept = "".join(column.all_text_contents()[:place])
    beginning = "The plot was silly" + kept if part == "sample" else kept
    column.nth(place).click()
    chosen = menu(page).nth(2)
    expect(menu(page).first).to_be_focused()
    name = json.loads((chosen.locator("span").first.text_content() or "").replace("\\x", "\\\\x"))
    chosen.click()
    after = texts(page)
    assert after[1] == wanted(server, beginning + name, 0.8)
    assert (after[0], after[2]) == (before[0], before[2])
    expect(page.locator(".chosen")).to_be_focused()
    assert page.locator(".chosen").text_content() == name
    page.get_by_role("button", name="Generate").click()
    assert texts(page) == before


def test_an_alternative_is_chosen_by_keyboard(page: Page, server: Running) -> None:
    page.locator("#prompt").fill("The plot")
    page.keyboard.press("Control+Enter")
    texts(page)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.classList.contains('token')"):
            break
    focused, last = page.locator(".token:focus"), prompt_tokens(page).last
    beginning = "".join(prompt_tokens(page).all_text_contents()[:-1])
    assert focused.get_attribute("role") == "button"
    assert page.locator("section").first.locator("[tabindex='0']").count() == 1
    page.keyboard.press("ArrowLeft")  # into the prompt
    expect(last).to_be_focused()
    page.keyboard.press("Enter")
    expect(menu(page).first).to_be_focused()
    page.keyboard.press("Escape")
    expect(menu(page)).to_have_count(0)
    expect(last).to_be_focused()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    name = json.loads(menu(page).nth(1).locator("span").first.text_content() or "")
    page.keyboard.press("Enter")
    assert texts(page)[0] == wanted(server, beginning + name, 0.5)


def test_the_page_works_by_keyboard_alone(page: Page) -> None:
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("We saw")
    page.keyboard.press("Control+Enter")
    assert all(text.startswith("We saw") and len(text) > 20 for text in texts(page))


def test_an_error_is_shown_and_goes_away(page: Page, server: Running) -> None:
    page.locator("#prompt").fill("¿" * 10_000)  # two bytes each, and each a token
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"`prompt` has \d+ tokens; at most 2048"))
    page.route("**/v1/completions", lambda route: route.abort())
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("the server cannot be reached")
    page.unroute("**/v1/completions")
    page.locator("#prompt").fill("The")
    page.get_by_role("button", name="Generate").click()
    texts(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_text_is_never_taken_for_html(page: Page) -> None:
    html = "<img src=x onerror=alert(1)><b>bold</b>&amp;<script>alert(2)</script>"
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))

    def answer(route: Route) -> None:
        if "echo" in json.loads(route.request.post_data or ""):
            logprobs = {
                "tokens": ["", html], "token_logprobs": [None, -1], "token_ranks": [None, 1], "text_offset": [0, 0],
                "top_logprobs": [None, {html: -1, "": -2, "\\xff": -3}],
            }  # fmt: skip
            route.fulfill(json={"choices": [{"index": 0, "text": html, "logprobs": logprobs}]})
            return
        event = {"index": 0, "text": "🙂" + html, "finish_reason": "stop", "logprobs": {
            "tokens": ["🙂", html], "token_logprobs": [-1, -1], "text_offset": [0, 1],
            "top_logprobs": [{"🙂": -1}, {"7": -3, html: -1}],  # of which JavaScript puts 7 first
        }}  # fmt: skip
        body = f"data: {json.dumps({'choices': [event]})}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/completions", answer)
    page.locator("#prompt").fill(html)
    page.get_by_role("button", name="Generate").click()
    assert texts(page) == [html + "🙂" + html] * 3
    assert tokens(page).first.text_content() == "🙂"
    tokens(page).nth(1).hover()
    for row in (0, 1):
        expect(page.locator("#alternatives div").nth(row)).to_contain_text("onerror")
    assert (
        page.locator("main img, main b, main script, #alternatives img, #alternatives b, #alternatives script").count()
        == 0
    )


def test_the_end_is_an_alternative_and_a_part_of_a_character_is_none(page: Page) -> None:
    def answer(route: Route) -> None:
        scores = {"tokens": ["", "a"], "token_logprobs": [None, -1], "text_offset": [0, 0], "token_ranks": [None, 9]}
        scores["top_logprobs"] = [None, {"\\xff": -0.5, "a": -1, "": -2}]  # type: ignore[list-item]
        if "echo" in json.loads(route.request.post_data or ""):
            route.fulfill(json={"choices": [{"index": 0, "text": "a", "logprobs": scores}]})
        else:
            route.fulfill(status=200, content_type="text/event-stream", body="data: [DONE]\n\n")

    page.route("**/v1/completions", answer)
    page.locator("#prompt").fill("a")
    page.get_by_role("button", name="Generate").click()
    assert texts(page) == ["a"] * 3
    prompt_tokens(page).click()
    assert menu(page).first.is_disabled()
    expect(menu(page).nth(1)).to_be_focused()
    menu(page).nth(2).click()
    assert texts(page) == ["", "a", "a"]


def test_temperatures_come_and_go_and_text_is_copied(page: Page, server: Running) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Add a temperature").click()
    expect(page.locator("section")).to_have_count(4)
    for _ in range(3):
        page.get_by_role("button", name="Remove").first.click()
    expect(page.get_by_role("button", name="Remove")).to_be_disabled()
    page.locator("#prompt").fill("The")
    page.get_by_role("button", name="Generate").click()
    shown = texts(page)
    assert len(shown) == 1
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == shown[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_column_without_scrolling_sideways(browser: Browser, server: Running, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True)  # type: ignore[arg-type]
    page.goto(server.url)
    page.get_by_role("button", name="Generate").tap()
    texts(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    lefts = {box["x"] for section in page.locator("section").all() if (box := section.bounding_box())}
    assert len(lefts) == 1
    tokens(page).nth(3).tap()
    expect(page.locator("#alternatives")).to_be_in_viewport()
    back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 150) == (scheme == "dark")
    page.close()
