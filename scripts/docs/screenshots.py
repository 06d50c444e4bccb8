"""Capture docs/screenshots, which show every view of the studio with the bundled model: `make screenshots`.

Needs Chromium. Seeds are fixed, so that images change only with the model and the page.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import tiles
from PIL import Image
from playwright.sync_api import FilePayload, Page, sync_playwright

import ncml
from ncml.calibration import detector
from ncml.data.good_images import open_folder

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUT = DOCS / "screenshots"
DESKTOP = {"viewport": {"width": 1280, "height": 960}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
ADDRESS = "http://localhost:8000"  # shown in the page's curl commands, whichever port is free
TIMEOUT_MS = 300_000  # of sampling
Save = Callable[[str], None]


@contextmanager
def service(models: Path) -> Iterator[str]:
    """Run `ncml serve` with a folder of models on a free port; yield its address."""
    with tempfile.TemporaryDirectory(prefix="ncml-") as state:
        environment = os.environ | {"NCML_DATA_DIR": state, "NCML_MODELS": str(models), "NCML_ALLOW_CALIBRATION": "1"}
        command = [sys.executable, "-m", "ncml.cli", "serve", "--port", "0"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            line = next((line for line in process.stdout if line.startswith("ncml is ready on")), "")
            if not line:
                sys.exit("ncml serve did not start")
            yield line.split()[4]
        finally:
            process.terminate()
            process.wait(60)


def go(page: Page, view: str) -> None:
    """Open a view with its tab."""
    page.locator(f'.tabs a[href="#{view}"]').click()
    page.evaluate("scrollTo(0, 0)")


def submit(page: Page, view: str, seed: int, **values: int) -> None:
    """Set the seed and the sliders that the first word of their label names, and submit the view's form."""
    form = page.locator(f"#view-{view} form")
    form.get_by_label("Seed", exact=True).fill(str(seed))
    for name, value in values.items():
        form.get_by_label(name.capitalize()).first.fill(str(value))
    form.locator("button[type=submit]").click()


def scroll_to_result(page: Page, view: str) -> None:
    """Scroll to the top of the view or, on a small screen, to its result, which is below the controls."""
    is_small = (page.viewport_size or {"width": 0})["width"] < 760
    page.locator(f"#view-{view} .stage" if is_small and view != "models" else "body").evaluate(
        "e => scrollTo(0, e.getBoundingClientRect().top + scrollY - 12)"
    )


def wide_cat() -> FilePayload:
    """Return an image that is wider than high, so that it needs cropping."""
    buffer = io.BytesIO()
    with Image.open(DOCS / "cat.jpg") as image:
        image.crop((0, 20, 300, 260)).save(buffer, "PNG")
    return FilePayload(name="cat.png", mimeType="image/png", buffer=buffer.getvalue())


def tour(page: Page, save: Save) -> None:
    """Use every view and save a screenshot of each."""
    page.locator("#view-score input[type=file]").set_input_files(wide_cat())
    page.locator(".waiting canvas").nth(1).wait_for()
    save("crop")
    for i, name in enumerate(("noise", "stripes", "gradient", "flat grey")):
        page.locator("#view-score").get_by_role("button", name=name, exact=True).click()
        page.locator(".strip .tile").nth(i).wait_for(timeout=TIMEOUT_MS, state="attached")
    page.locator("#view-score input[type=file]").set_input_files(DOCS / "brick.png")
    page.locator(".waiting canvas").nth(3).wait_for()
    page.get_by_role("button", name="Score 2 images").click()
    page.locator(".strip .tile").nth(5).wait_for(timeout=TIMEOUT_MS)
    page.locator(".reading summary", has_text="Map").click()
    scroll_to_result(page, "score")
    save("score")
    go(page, "generate")
    page.locator("#view-generate").get_by_label("ship", exact=True).check()
    submit(page, "generate", 7, images=12)
    cells = page.locator("#view-generate .cell:enabled")
    cells.nth(11).wait_for(timeout=TIMEOUT_MS)
    scroll_to_result(page, "generate")
    save("generate")
    cells.nth(3).click()
    save("image")
    page.keyboard.press("Escape")
    go(page, "complete")
    page.locator("#view-complete input[type=file]").set_input_files(wide_cat())
    submit(page, "complete", 11, variants=5)
    page.locator("#view-complete .cell:enabled").nth(4).wait_for(timeout=TIMEOUT_MS)
    scroll_to_result(page, "complete")
    save("complete")
    go(page, "trajectory")
    submit(page, "trajectory", 21, images=4)
    page.get_by_text("Recorded").wait_for(timeout=TIMEOUT_MS)
    scroll_to_result(page, "trajectory")
    save("trajectory")
    go(page, "models")
    page.locator("#view-models .expand").first.click()
    page.get_by_role("button", name="Generate 4 of each class").click()
    page.get_by_text("not hand-picked").wait_for(timeout=TIMEOUT_MS)
    scroll_to_result(page, "models")
    save("models")
    page.get_by_role("link", name="Calibrate a model on your own images").click()
    page.locator("#view-calibrate form").wait_for()
    page.evaluate("scrollTo(0, 0)")
    save("calibrate")


def defect(page: Page, save: Save) -> None:
    """Score the wall of scripts/docs/tiles.py in tiles, and save a screenshot of the defect found."""
    page.locator("#view-score input[type=file]").set_input_files(DOCS / "stained.png")
    page.get_by_label("Score in tiles (large images)").check()
    page.get_by_role("button", name="Score 1 image").click()
    page.locator("#view-score .over.whole img").first.wait_for(timeout=TIMEOUT_MS)
    page.locator(".reading summary", has_text="Map").click()
    scroll_to_result(page, "score")
    save("tiles")


def make_detector(folder: Path) -> Path:
    """Make a detector of rendered circuit boards, `folder`/models/board; return the folder of the test images."""
    rendering = ["--kinds", "board", "--only-write", "--training", "60", "--good", "1", "--defective", "1"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "parts.py", *rendering, "--images", folder / "images"], check=True
    )
    images = folder / "images" / "board"
    good = open_folder(images / "train" / "good", sorted((images / "train" / "good").iterdir()))
    detector.make_detector(ncml.load("cifar10"), good, folder / "models" / "board", power_images=4)
    return images / "test"


def inspect(page: Page, save: Save, test: Path) -> None:
    """Judge a board without one of its components and a good one, and show what the detector finds and misses."""
    for kind in ("missing", "good"):
        content = (test / kind / "0000.png").read_bytes()
        file = FilePayload(name=f"{kind}.png", mimeType="image/png", buffer=content)
        page.locator("#view-score input[type=file]").set_input_files(file)
    page.get_by_role("button", name="Score 2 images").click()
    page.locator(".strip .tile").nth(1).wait_for(timeout=TIMEOUT_MS)
    page.locator(".strip .tile", has_text="missing").click()
    scroll_to_result(page, "score")
    save("detector")
    go(page, "models")
    page.locator("#view-models .expand").first.click()
    page.locator("#view-models table.power").evaluate("e => scrollTo(0, e.getBoundingClientRect().top + scrollY - 140)")
    save("power")


def main() -> None:
    """Capture every view with the bundled model, tiles with one calibrated on a wall, and a detector of parts."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser_path:
        sys.exit("no chromium is installed: apt-get install chromium")
    OUT.mkdir(exist_ok=True)
    capture(ROOT / "models", tour, browser_path)
    with tempfile.TemporaryDirectory() as folder:
        tiles.calibrate_wall(Path(folder) / "wall")
        capture(Path(folder), defect, browser_path)
    with tempfile.TemporaryDirectory() as folder:
        test = make_detector(Path(folder))
        capture(Path(folder) / "models", lambda page, save: inspect(page, save, test), browser_path)


def capture(models: Path, use_page: Callable[[Page, Save], None], browser_path: str) -> None:
    """Call `use_page` on a desktop and a phone screen, and save its screenshots in the light and dark schemes."""
    with service(models) as url, sync_playwright() as playwright:
        host_rule = f"--host-resolver-rules=MAP {urlsplit(ADDRESS).netloc} 127.0.0.1:{urlsplit(url).port}"
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu", host_rule]
        )
        for screen, options in (("desktop", DESKTOP), ("phone", PHONE)):
            page = browser.new_context(**options, reduced_motion="reduce").new_page()
            page.goto(ADDRESS)
            page.locator("#pulse.well").wait_for()

            def save(name: str, page: Page = page, screen: str = screen) -> None:
                page.mouse.move(0, 0)
                for scheme in ("light", "dark"):
                    page.emulate_media(color_scheme=scheme)
                    path = OUT / f"{name}-{screen}-{scheme}.webp"
                    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=90, method=6)
                    print(path)
                page.emulate_media(color_scheme="light")

            use_page(page, save)
        browser.close()


if __name__ == "__main__":
    main()
