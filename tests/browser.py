"""A real page in headless Chromium, for the tests of ``app.py``."""

import contextlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_BROWSER = (
    "chromium is not installed (apt-get install chromium)" if not CHROMIUM
    else "playwright is not installed" if not importlib.util.find_spec("playwright") else ""
)  # fmt: skip
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@contextlib.contextmanager
def open_page(width: int = 1280) -> Iterator[Any]:
    """Open a page, and the list of what it asks of other machines, which it does not get."""
    if NO_BROWSER:
        pytest.skip(NO_BROWSER)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 860})
        page.set_default_timeout(60_000)
        abroad: list[str] = []

        def keep_home(route: Any) -> None:
            if route.request.url.startswith("http://127.0.0.1:"):
                route.continue_()
            else:
                abroad.append(route.request.url)
                route.abort()

        page.route("**/*", keep_home)
        try:
            yield page, abroad
        finally:
            browser.close()


def select_words(page: Any, element: str, words: str) -> None:
    """Select words of a text element as a mouse does: press, drag, release."""
    place = page.evaluate(
        """([element, words]) => {
          const box = document.querySelector(element + ' .text');
          const nodes = [], walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) nodes.push(walker.currentNode);
          let at = box.textContent.indexOf(words), range = document.createRange();
          const find = (offset) => {
            for (const node of nodes) {
              if (offset <= node.length) return [node, offset];
              offset -= node.length;
            }
          };
          range.setStart(...find(at));
          range.setEnd(...find(at + words.length));
          const boxes = range.getClientRects(), a = boxes[0], z = boxes[boxes.length - 1];
          return [a.left + 0.5, a.top + a.height / 2, z.right - 0.5, z.top + z.height / 2];
        }""",
        [element, words],
    )
    page.mouse.move(*place[:2])
    page.mouse.down()
    page.mouse.move(*place[2:], steps=5)
    page.mouse.up()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
