"""A real browser for tests: Debian's chromium through Playwright. Where there is none the tests are skipped."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian: apt-get install chromium")


@contextmanager
def open_browser():
    """A headless browser with a profile of its own; `browser.new_page()` opens a page. Page errors are the test's to
    collect: `page.on("pageerror", errors.append)`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
