"""Takes README's picture of the committed study: the first screen of its page.

`python .ci/picture.py` needs a headless Chromium, and the test extra.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

REPORT = Path(__file__).resolve().parent.parent / "results" / "example" / "report"
SIZE, COLOURS = (1280, 900), 96


def main() -> None:
    """Write report.png beside the page."""
    browser = next(c for c in ("chromium-headless-shell", "chromium", "google-chrome") if shutil.which(c))
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=shutil.which(browser), args=["--no-sandbox", "--disable-gpu"])
        page = started.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        page.goto((REPORT / "index.html").as_uri())
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        started.close()
    few = shot.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(REPORT / "report.png", optimize=True)


if __name__ == "__main__":
    main()
