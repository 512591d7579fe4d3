"""The report in a real browser: it renders, in light, dark and narrow form, and nothing from data runs."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_data import hostile_data, report_data

from ghostfunc.report import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
DARK = "--blink-settings=preferredColorScheme=0"
ATTACK = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"


class Browser:
    """Chromium without a window."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, source: str, *options: str) -> str:
        page = self.folder / "page.html"
        page.write_text(source, encoding="utf-8")
        still = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
        profile = f"--user-data-dir={self.folder / 'profile'}"
        command = [str(CHROMIUM), *still, profile, *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, check=True, timeout=300).stdout.decode()

    def dom(self, source: str) -> str:
        """The document as it is after everything has run that runs."""
        return self.run(source, "--dump-dom")

    def screenshot(self, source: str, width: int, *options: str) -> np.ndarray:
        """The first 1500 pixels, `[1500, width, 3]`."""
        image = self.folder / "page.png"
        image.unlink(missing_ok=True)
        self.run(source, f"--screenshot={image}", f"--window-size={width},1500", *options)
        return np.asarray(Image.open(image).convert("RGB"))


@pytest.fixture
def browser(tmp_path) -> Browser:
    return Browser(tmp_path)


def test_nothing_from_data_runs(browser):
    assert "<title>owned</title>" in browser.dom(f"<!doctype html><title>mine</title>{ATTACK}")  # it would run
    dom = browser.dom(render(hostile_data()))
    assert "<title>owned</title>" not in dom
    assert not re.search(r"<(script|img|iframe)\b", dom)
    for heading in ("Overview", "Domain by domain", "Queries and passages", "What the scores mean"):
        assert re.search(rf"<h2 id=\"\w+\">{heading}</h2>", dom), heading


def test_even_a_tag_that_was_not_escaped_would_not_run(browser):
    dom = browser.dom(render(report_data()).replace("<main>", f"<main>{ATTACK}"))
    assert "<script>document.title = 'owned'</script>" in dom
    assert "<title>What supports these queries?</title>" in dom


def test_looks_like_a_page_in_light_dark_and_narrow_form(browser):
    source = render(report_data())
    light, dark = browser.screenshot(source, 1200), browser.screenshot(source, 1200, DARK)
    narrow = browser.screenshot(source, 500)
    for image in (light, dark, narrow):
        colours = image.astype(int) @ (65536, 256, 1)  # [1500, width]
        counts = np.bincount(colours.ravel())
        assert np.count_nonzero(counts) > 100  # a blank page has one colour
        assert counts.max() / colours.size < 0.97
        assert (colours != counts.argmax()).any(1).sum() > 600  # rows of pixels with something on them
    assert light.mean() > 200 and dark.mean() < 60
    assert light.shape[1] == 1200 and narrow.shape[1] == 500
    blue = light[..., 2].astype(int) - light[..., 0]
    assert blue.max() > 60 and blue.min() < -60  # both colours of the signs
