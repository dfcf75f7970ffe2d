"""A real browser for the page tests: Debian's chromium, driven by playwright; it is installed if possible."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_path() -> str:
    """Return the path of the browser. Skip the test, with a reason, if there is none and it cannot be installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if not shutil.which("apt-get") or os.geteuid() != 0:
        pytest.skip("no chromium here, and installing one takes apt-get and root: apt install chromium")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]):
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"chromium cannot be installed: {' '.join(command)}: {done.stderr.strip()[-200:]}")
    return shutil.which("chromium") or pytest.skip("apt-get installed no chromium")


@contextmanager
def browser() -> Iterator:
    """A running headless browser as a playwright Browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = chromium_path()
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


CONTROLS = {"button", "slider", "spinbutton", "textbox", "combobox", "radio", "checkbox", "link", "tab", "image", "group"}
"""Accessibility roles that must have a name."""


def unnamed(page, patience: float = 5.0) -> list[str]:
    """Return the HTML of controls and images of a playwright Page that have no name for a screen reader.

    The page's script names elements after Gradio has made them, so the list is taken again until it is empty or `patience`
    seconds are over.
    """
    session = page.context.new_cdp_session(page)
    end = time.monotonic() + patience
    while True:
        found = []
        for node in session.send("Accessibility.getFullAXTree")["nodes"]:
            if not node.get("ignored") and node["role"]["value"] in CONTROLS and not node.get("name", {}).get("value"):
                found.append(session.send("DOM.getOuterHTML", {"backendNodeId": node["backendDOMNodeId"]})["outerHTML"][:200])
        if not found or time.monotonic() > end:
            return found
        page.wait_for_timeout(200)
