"""Takes README's picture of the committed study: the top of its page, and two of its figures beside each other.

`python .ci/picture.py` needs a headless Chromium, and the test extra.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

REPORT = Path(__file__).resolve().parent.parent / "results" / "example" / "report"
WIDTH, FIGURES, COLOURS = 1060, ("final-loss", "attn-logit-peak"), 96


def main() -> None:
    """Write report.png beside the page."""
    browser = next(c for c in ("chromium-headless-shell", "chromium", "google-chrome") if shutil.which(c))
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=shutil.which(browser), args=["--no-sandbox", "--disable-gpu"])
        page = started.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto((REPORT / "index.html").as_uri())
        top, figures = _top(page), [_shot(page, name) for name in FIGURES]
        started.close()
    width = WIDTH // len(figures)
    small = [f.resize((width, f.height * width // f.width), Image.Resampling.LANCZOS) for f in figures]
    picture = Image.new("RGB", (WIDTH, top.height + max(f.height for f in small)), "white")
    picture.paste(top, (0, 0))
    for i, figure in enumerate(small):
        picture.paste(figure, (i * width, top.height))
    few = picture.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(REPORT / "report.png", optimize=True)


def _top(page: Page) -> Image.Image:
    """From the title to the end of the box."""
    box = page.locator(".box").bounding_box()
    assert box is not None
    shot = page.screenshot(
        full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 12}
    )
    return Image.open(io.BytesIO(shot)).convert("RGB")


def _shot(page: Page, name: str) -> Image.Image:
    return Image.open(io.BytesIO(page.locator(f"#{name} img").screenshot())).convert("RGB")


if __name__ == "__main__":
    main()
