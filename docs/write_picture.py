"""Write docs/images/serve.png, the page of `textgen serve` after three texts: `python -m docs.write_picture URL`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

PICTURE = Path(__file__).parent / "images" / "serve.png"


def write_picture(url: str) -> None:
    """Draw texts on a page that is served, and take its picture while the alternatives of a token are shown."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.goto(url)
        page.locator("#prompt").fill("i love this movie because")
        page.locator("#seed").fill("3")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_have_text("done", timeout=60_000)
        page.locator("section").nth(1).locator(".token:not(.prompt)").nth(4).hover()
        expect(page.locator("#alternatives")).to_be_visible()
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    write_picture(sys.argv[1])
