"""Pages in a real Chromium."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from recsys_dist.workspace import Run

TEXTS = """(scope) => {
  const found = [];
  const walker = document.createTreeWalker(document.querySelector(scope), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, .hidden, .skip")) continue;
    if (!parent.checkVisibility({visibilityProperty: true})) continue;
    const clip = parent.closest(".scroll")?.getBoundingClientRect();
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      // The font's box is higher than its letters are.
      let left = rect.left, right = rect.right, inset = rect.height * 0.15;
      if (clip) { left = Math.max(left, clip.left); right = Math.min(right, clip.right); }
      if (right - left < 1) continue;
      found.push({text: node.data.trim(), left, right, top: rect.top + inset, bottom: rect.bottom - inset});
    }
  }
  return found;
}"""
"""Finds the boxes of all texts that are seen."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser."""
    found = shutil.which("chromium")
    assert found, "These tests need Chromium: make browser, or apt-get install chromium."
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=as_root)
        yield launched
        launched.close()


@contextlib.contextmanager
def opener(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the report of a run offline; at the end nothing was said on the console and nothing asked for."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(run: Run, width: int = 1400, scheme: str = "light", **context: Any) -> Page:
        made = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **context
        )
        contexts.append(made)
        page = made.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{run.path}/report.html")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []


def require_no_overlaps(page: Page, width: int) -> None:
    """No text of the page lies over another or leaves it, with all details closed and open."""
    for every in (False, True):
        if every:
            page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        texts = page.evaluate(TEXTS, "body")
        assert len(texts) > 200
        assert [box for box in texts if box["left"] < 0 or box["right"] > width + 0.5] == []
        texts.sort(key=lambda box: box["top"])
        overlapping = [
            (one["text"], two["text"])
            for i, one in enumerate(texts)
            for two in texts[i + 1 : i + 60]
            if two["top"] < one["bottom"] - 0.5
            and min(one["right"], two["right"]) - max(one["left"], two["left"]) > 0.5
        ]
        assert overlapping == []
