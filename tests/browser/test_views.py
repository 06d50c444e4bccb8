"""Each view works, or reports what to do when it cannot."""

import base64
import csv
import io
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, Route, expect

from ncml.images import resize_to, to_png
from tests.browser.answers import Document, Handler, changed, with_members, with_models, without_models
from tests.browser.conftest import KEY
from tests.browser.layout import rectangles

NUMBER = re.compile(r"^\d+\.\d\d$")
REFUSED = "Failed to load resource"  # Chromium logs this for every response that is not a success


def upload(page: Page, view: str, *files: Path) -> None:
    page.locator(f"#view-{view} input[type=file]").set_input_files(files)


def size(download) -> tuple[int, int]:
    with Image.open(download.value.path()) as image:
        return image.size


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An image larger than the model's, wider than high, with a name that needs quoting."""
    ramp = np.linspace(0, 255, 90).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:60, None], np.uint8(90)), axis=-1)
    Image.fromarray(pixels).save(tmp_path / "it's a photo.png")
    return tmp_path / "it's a photo.png"


def submit(page: Page, view: str, **values: int) -> None:
    """Set sliders by their label's first word and submit the view's form."""
    form = page.locator(f"#view-{view} form")
    for name, value in values.items():
        form.get_by_label(re.compile(f"^{name}", re.IGNORECASE)).fill(str(value))
    form.locator("button[type=submit]").click()


def score_example(page: Page, *names: str) -> None:
    """Click examples, which scores each immediately; wait for their scores."""
    count = page.locator(".strip .tile").count()
    for name in names:
        page.locator("#view-score").get_by_role("button", name=name, exact=True).click()
        count += 1
        expect(page.locator(".strip .tile")).to_have_count(count)


def choose_examples(page: Page, *names: str) -> None:
    """Select files with the pixels of examples, without scoring them."""
    files = page.evaluate(
        """async (names) => {
            const { exampleFile } = await import("/studio/examples.js");
            const file = async (name) => {
                const example = await exampleFile(name, 8, 8);
                const bytes = new Uint8Array(await example.arrayBuffer());
                return [example.name, btoa(String.fromCharCode(...bytes))];
            };
            return Promise.all(names.map(file));
        }""",
        names,
    )
    payloads = [FilePayload(name=name, mimeType="image/png", buffer=base64.b64decode(data)) for name, data in files]
    page.locator("#view-score input[type=file]").set_input_files(payloads)


# Score


def test_an_image_is_scored_ranked_and_mapped(studio, photo: Path) -> None:
    page = studio("score")
    upload(page, "score", photo)
    expect(page.locator(".waiting canvas")).to_have_count(2)  # the crop, and what the model sees
    page.get_by_role("button", name="Score 1 image").click()
    reading = page.locator(".reading")
    expect(reading.locator(".big .mono")).to_have_text(NUMBER)
    verdict = reading.locator(".verdict")
    expect(verdict.locator(".label")).to_have_text("Out of distribution")
    expect(verdict.locator("h3")).to_have_text("More unusual than all 40 of the images tiny was calibrated on")
    expect(verdict).to_contain_text("p = 0.024, the smallest possible with 40 images. An image is flagged at p ≤ 0.05.")
    assert "p\u00a0≤\u00a00.05" in verdict.inner_text()  # on one line
    expect(verdict).to_contain_text("This calibration is weak: it ranks among 40 images")
    assert verdict.get_by_role("link", name="calibrate a model").get_attribute("href") == "#calibrate"
    above, below = rectangles(verdict, reading.locator(".big"))
    assert above["y"] < below["y"]  # the verdict comes first
    expect(reading.locator(".chart .value").first).to_be_attached()
    expect(reading.locator(".chart .within, .chart .beyond")).not_to_have_count(0)
    layer = reading.locator(".over canvas")
    expect(layer).to_have_count(0)
    reading.locator("summary", has_text="Map").click()
    image, pixels = rectangles(reading.locator(".pair img"), layer)
    assert image["right"] < pixels["left"]  # side by side
    assert min(image["width"], pixels["width"]) > 300
    layer.hover(position={"x": 3, "y": pixels["height"] - 3})
    expect(reading.locator(".map output")).to_have_text(re.compile(r"^Row 8, column 1: -?\d+\.\d\d bits/dim$"))
    expect(reading.locator(".spot:visible")).to_have_count(2)
    colours = layer.evaluate("e => new Set(e.getContext('2d').getImageData(0, 0, 8, 8).data).size")
    assert colours > 8
    layer.click(position={"x": pixels["width"] - 3, "y": 3})
    expect(reading.locator(".map output")).to_have_text(re.compile("^Row 1, column 8:"))
    reading.get_by_role("group", name="Map").press("ArrowLeft")
    expect(reading.locator(".map output")).to_have_text(re.compile("^Row 1, column 7:"))
    reading.get_by_role("group", name="Map").press("ArrowUp")  # already in the top row
    expect(page.locator("#live")).to_have_text(re.compile("^Row 1, column 7:"))
    page.route("**/score", lambda route: route.continue_())  # only then, the body of the request can be read
    with page.expect_request("**/score") as request:
        page.get_by_role("button", name="Flip the lowest bits").click()
    assert b'name="ood"\r\n\r\n0\r\n' in (request.value.post_data_buffer or b"")
    expect(reading.locator(".flip .mono")).to_have_text(
        re.compile(r"^\d+\.\d{3} → \d+\.\d{3} bits/dim \([−+]\d+\.\d{3}\)$")
    )
    expect(reading.get_by_role("region", name="Flipped bits")).to_be_focused()
    reading.locator("summary", has_text="terminal").click()
    assert "-F 'image=@it'\\''s a photo.png'" in (reading.locator(".curl").text_content() or "")


def test_shading_is_explained_only_where_it_is_shown(studio, tmp_path: Path) -> None:
    usual = np.random.default_rng(9).integers(96, 160, (8, 8, 3), np.uint8)
    Image.fromarray(usual).save(tmp_path / "usual.png")
    page = studio("score")
    upload(page, "score", tmp_path / "usual.png")
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".verdict .label")).to_have_text("Not flagged")
    expect(page.locator(".verdict h3")).to_have_text("No difference found from the images tiny was calibrated on")
    expect(page.locator(".verdict")).to_contain_text(
        re.compile(
            r"\d+ of the 40 held-out images (is|are) at least as unusual. p = 0.\d+; the smallest possible is 0.024"
        )
    )
    placed = page.locator(".reading .placed")
    expect(placed.locator(".chart")).to_contain_text("OOD score: higher is more unusual")
    expect(placed).to_contain_text("Shaded: held-out images with at least this OOD score.")
    page.locator("#view-score").get_by_role("button", name="noise", exact=True).click()
    expect(placed.locator(".chart")).to_contain_text("this image, above the scale")
    expect(placed).not_to_contain_text("Shaded")
    placed.get_by_role("radio", name="bits/dim").check()
    expect(placed.locator(".chart")).to_contain_text("bits/dim: lower is more likely")


def test_a_likelihood_is_compared_only_under_the_same_conditions(studio) -> None:
    page = studio("score")
    reading = page.locator(".reading")
    likelihood = reading.locator(".likelihood")
    page.route("**/models", with_test_bpd)
    page.reload()
    score_example(page, "stripes")
    expect(likelihood).to_contain_text("Lower means more likely. Test images of tiny average 3.39.")
    expect(reading.get_by_role("button", name="Explain bits/dim")).to_be_visible()
    expect(reading.get_by_role("radio", name="bits/dim")).to_be_visible()
    view = page.locator("#view-score")
    view.locator("summary", has_text="Class, noise level").click()
    view.get_by_label("Class").select_option("dark")
    view.get_by_label("Noise level").fill("2")
    score_example(page, "gradient")
    expect(reading.locator("h2")).to_have_text("gradient.png")
    expect(likelihood).to_contain_text(
        "Compare it only with images scored under the same conditions: class dark, noise of 2 grey levels."
    )
    expect(likelihood).not_to_contain_text("Test images")
    expect(reading.get_by_role("button", name="Explain bits/dim")).to_have_count(0)
    expect(reading.locator(".placed .chips label")).to_have_text(["multiscale_corr"])


def test_a_model_of_your_own_images_shows_its_bits_per_dimension(tab, site) -> None:
    """A folder of images has no test split: such a model is measured on held-out images."""
    page = tab.open(site.url)
    page.route("**/models", with_models(lambda model: model["metrics"].update(held_out_bpd=4.742)))
    page.reload()
    score_example(page, "stripes")
    expect(page.locator(".reading .likelihood")).to_contain_text("Held-out images of tiny average 4.74.")
    page.get_by_role("link", name="Models").click()
    table = page.locator("#view-models").get_by_role("table", name="Models")
    expect(table.locator(":scope > tbody > tr").first).to_contain_text("4.74")


with_test_bpd = with_models(lambda model: model["metrics"].update(test_bpd=3.39))
"""Answers /models as if the models had been evaluated."""


def test_maps_can_be_compared_on_one_scale(studio) -> None:
    page = studio("score")
    score_example(page, "stripes")
    page.locator(".reading summary", has_text="Map").click()
    expect(page.locator(".reading .scale")).to_be_visible()
    expect(page.get_by_label("Same colour scale")).to_have_count(0)  # there is nothing to compare
    expect(page.locator(".reading .map")).not_to_contain_text("false")
    score_example(page, "noise")  # its map is shown, too

    def scales() -> list[str]:
        texts = []
        for name in ("stripes.png", "noise.png"):
            page.locator(".tile", has_text=name).click()
            expect(page.locator(".reading h2")).to_have_text(name)
            texts.append(page.locator(".reading .scale").text_content() or "")
        return texts

    own = scales()
    assert own[0] != own[1]
    page.get_by_label("Same colour scale").check()
    assert len(set(scales())) == 1
    page.get_by_label("Same colour scale").uncheck()
    assert scales() == own
    page.locator("#view-score summary", has_text="Class, noise level").click()
    page.locator("#view-score").get_by_label("Noise level").fill("2")
    score_example(page, "gradient")  # under other conditions
    page.locator(".tile", has_text="gradient.png").click()
    expect(page.locator(".reading h2")).to_have_text("gradient.png")
    expect(page.locator(".reading .scale")).to_be_visible()
    expect(page.get_by_label("Same colour scale")).to_have_count(0)


def test_scores_and_maps_are_downloaded(studio, photo: Path) -> None:
    page = studio("score")
    upload(page, "score", photo)
    choose_examples(page, "stripes")
    page.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    page.locator(".reading summary", has_text="Map").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download map").click()
    assert download.value.suggested_filename == "it's a photo-map.png"
    assert size(download) == (128, 128)
    page.get_by_label("In tiles").check()
    photo = photo.rename(photo.with_name('=a "large", photo.png'))
    upload(page, "score", photo)
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading .verdict")).to_contain_text("308 tiles of 8 × 8 pixels")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download map").click()
    assert size(download) == (90, 60)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download scores (CSV)").click()
    assert download.value.suggested_filename == "scores.csv"
    with Path(download.value.path()).open(newline="") as file:
        scan, first, second = csv.DictReader(file)
    assert [row["image"] for row in (scan, first, second)] == [f"./{photo.name}", "it's a photo.png", "stripes.png"]
    assert (scan["bits_per_dim"], scan["box_width"], scan["out_of_distribution"]) == ("", "8", "yes")
    assert (scan["statistic"], scan["view"], len(scan["calibration_version"])) == ("tiles", "worst_tile", 64)
    assert float(scan["ood_score"]) > float(scan["threshold"])
    page.locator(".tile", has_text="stripes.png").click()
    expect(page.locator(".reading .big .mono")).to_have_text(f"{float(second['bits_per_dim']):.2f}")
    assert (second["box_left"], second["noise"], second["model"]) == ("", "0", "tiny")
    assert (second["statistic"], second["view"], second["calibration"]) == ("multiscale_corr", "", "default")
    assert len(second["calibration_version"]) == 64
    assert 0 < float(second["p_value"]) <= 1


def test_explanations_can_be_opened_with_the_keyboard(studio) -> None:
    page = studio("score")
    score_example(page, "stripes")
    for view, term, text in (
        ("score", "bits/dim", "Lower means more likely"),
        ("score", "multiscale_corr", "Higher means more out-of-distribution"),
        ("score", "grey levels", "256 levels"),
        ("generate", "solver", "in one step"),
    ):
        page.locator(f'.tabs a[href="#{view}"]').click()
        expect(page.locator(f"#view-{view} .controls")).to_be_visible()
        for summary in page.locator(f"#view-{view} .controls details:not([open]) summary").all():
            summary.click()
        question_mark = page.locator(f"#view-{view}").get_by_role("button", name=f"Explain {term}", exact=True)
        explanation = page.locator(".explanation:popover-open")
        question_mark.press("Enter")
        expect(explanation).to_contain_text(text)
        expect(explanation).to_be_in_viewport(ratio=1)
        page.keyboard.press("Escape")
        expect(explanation).to_have_count(0)
        expect(question_mark).to_be_focused()


@pytest.mark.parametrize("tiled", [False, True])
def test_a_scoring_job_is_canceled(studio, site, tiled: bool) -> None:
    page = studio("score")
    page.get_by_label("In tiles").set_checked(tiled)
    with site.paused():
        page.locator("#view-score").get_by_role("button", name="stripes").click()
        running = page.locator("#view-score .run")
        job = running.get_attribute("data-job")
        expect(running).to_contain_text("Scoring stripes.png")
        running.get_by_role("button", name="Cancel").click()
        expect(running).to_have_count(0)
        expect(page.get_by_role("status").filter(has_text="Canceled: 1 image was not scored.")).to_be_visible()
        expect(page.locator(".waiting li")).to_have_count(1)  # to be scored again
        assert site.http.get(f"/jobs/{job}").json()["status"] == "canceled"


def test_a_flip_test_is_canceled(studio, site) -> None:
    page = studio("score")
    score_example(page, "stripes")
    held_routes = []
    page.route("**/jobs/*/events", lambda route: held_routes.append(route))  # as if the job took long
    start = page.get_by_role("button", name="Flip the lowest bits")
    start.click()
    flip = page.get_by_role("region", name="Flipped bits")
    with page.expect_response("**/jobs/*/cancel"):
        flip.get_by_role("button", name="Cancel").click()
    canceled = {"status": 200, "content_type": "text/event-stream", "body": "event: canceled\ndata: {}\n\n"}
    held_routes[0].fulfill(**canceled)  # the service may have been quicker
    expect(start).to_be_visible()
    expect(flip).to_be_focused()


def test_a_flip_test_is_kept_while_another_reading_or_model_is_selected(studio) -> None:
    page = studio("score")
    score_example(page, "stripes", "noise")
    held_routes: list[Route] = []
    page.route("**/jobs/*/events", lambda route: held_routes.append(route))  # as if the job took long
    with page.expect_request("**/jobs/*/events"):
        page.get_by_role("button", name="Flip the lowest bits").click()
    flip = page.get_by_role("region", name="Flipped bits")

    def select_another_reading_meanwhile() -> None:
        for name in ("stripes.png", "noise.png"):
            page.locator(".tile", has_text=name).click()
            expect(page.locator(".reading h2")).to_have_text(name)

    expect(flip.get_by_role("button", name="Cancel")).to_be_visible()
    select_another_reading_meanwhile()
    expect(flip.get_by_role("button", name="Cancel")).to_be_visible()
    held_routes[0].continue_()
    expect(flip).to_contain_text("Lowest bits flipped")
    select_another_reading_meanwhile()
    expect(flip).to_contain_text("Lowest bits flipped")
    page.select_option("#model", "wide")
    expect(flip).to_contain_text("Lowest bits flipped")


def test_a_large_image_is_judged_by_its_tiles(studio, photo: Path) -> None:
    page = studio("score")
    page.get_by_label("In tiles").check()
    upload(page, "score", photo)
    expect(page.locator(".waiting")).to_contain_text("308 tiles of 8 × 8 pixels")
    choose_examples(page, "flat grey")
    expect(page.locator(".waiting li").nth(1)).to_contain_text("1 tile of 8 × 8 pixels")
    page.get_by_role("button", name="Score 2 images").click()
    page.locator(".tile", has_text="photo.png").click()
    reading = page.locator(".reading")
    expect(reading.locator("h2")).to_have_text("it's a photo.png")
    verdict = reading.locator(".verdict")
    expect(verdict.locator(".label")).to_have_text("Out of distribution")  # it is a ramp, not noise
    expect(verdict.locator("h3")).to_have_text("More unusual than all 20 of the images tiny was calibrated on")
    expect(verdict).to_contain_text("None of the 20 held-out images is as unusual. p = 0.048, the smallest possible")
    expect(verdict).to_contain_text(re.compile(r"Most unusual view: .*, with an OOD score of \d+\.\d\d"))
    expect(reading.locator(".over img")).to_have_count(1)  # the image; its map takes a click
    reading.locator("summary", has_text="Map").click()
    pair = reading.locator(".pair .over img")
    expect(pair).to_have_count(2)
    for image in pair.all():
        expect(image).to_have_js_property("naturalWidth", 90)
        expect(image).to_have_js_property("naturalHeight", 60)
    whole, frame = rectangles(reading.locator(".answer .over"), reading.locator(".answer .box"))
    assert frame["width"] == pytest.approx(whole["width"] * 8 / 90, abs=1)
    assert whole["width"] / whole["height"] == pytest.approx(90 / 60, rel=0.02)
    assert whole["x"] <= frame["x"] + 1
    assert frame["bottom"] <= whole["bottom"] + 1
    reading.locator("summary", has_text="terminal").click()
    assert "tile=1" in (reading.locator(".curl").text_content() or "")
    page.reload()
    page.locator(".tile", has_text="photo.png").click()
    expect(reading.locator(".over img")).to_have_count(1)  # the map; the file is no longer available


def test_the_size_of_tiles_is_chosen(studio, photo: Path) -> None:
    page = studio("score")
    size = page.get_by_label("Tile size in pixels")
    page.get_by_label("In tiles").check()
    expect(page.locator(".drop")).to_be_visible()
    expect(size).to_be_hidden()  # the calibration of tiles determines it
    page.route("**/models", without_tiles(max_tiles=100))
    expect(size).to_be_visible()
    upload(page, "score", photo)
    expect(page.locator(".waiting")).to_contain_text("96 tiles of 13 × 13 pixels")  # at most 100
    size.fill("7")
    page.get_by_role("button", name="Score 1 image").click()
    refusal = page.locator("[data-field=tile_size]").get_by_role("alert")
    expect(refusal).to_contain_text("The tile size must be a whole number, at least 8.")
    expect(size).to_have_attribute("aria-invalid", "true")
    size.fill("20")
    expect(page.locator(".waiting")).to_contain_text("40 tiles of 20 × 20 pixels")
    page.route("**/score", lambda route: None)  # the tiles of the service's model have another size
    with page.expect_request("**/score") as request:
        page.get_by_role("button", name="Score 1 image").click()
    assert b'name="tile_size"\r\n\r\n20\r\n' in (request.value.post_data_buffer or b"")
    expect(refusal).to_have_count(0)
    expect(size).not_to_have_attribute("aria-invalid", "true")


def test_a_file_that_the_browser_cannot_read_is_scored_in_tiles_of_the_chosen_size(studio, tab, photo: Path) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score")
    page.route("**/models", without_tiles())
    page.get_by_label("In tiles").check()
    size = page.get_by_label("Tile size in pixels")
    size.fill("30")
    tiff = photo.with_suffix(".tiff")
    Image.open(photo).save(tiff)
    upload(page, "score", tiff)
    expect(page.locator(".waiting")).to_contain_text("This browser cannot display this file")
    detail = "image is 90 x 60 pixels, which makes 9000 tiles; at most 4096 are scored, so set tile_size to 9 or more."
    problem = {"status": 422, "detail": detail, "errors": [{"field": "image", "detail": detail}]}
    page.route("**/score", lambda route: route.fulfill(status=422, json=problem))
    with page.expect_request("**/score") as request:
        page.get_by_role("button", name="Score 1 image").click()
    assert b'name="tile_size"\r\n\r\n30\r\n' in (request.value.post_data_buffer or b"")
    expect(page.locator("[data-field=tile_size]").get_by_role("alert")).to_contain_text(
        "it's a photo.tiff is 90 x 60 pixels, which makes 9000 tiles; at most 4096 are scored, so set the tile size to"
    )


def test_an_image_that_the_browser_cannot_read_has_its_type_in_the_strip(studio, photo: Path) -> None:
    tiff = photo.with_suffix(".tiff")
    Image.open(photo).save(tiff)
    page = studio("score")
    upload(page, "score", tiff, photo)
    page.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile").nth(0).locator(".blank")).to_have_text("TIFF")
    expect(page.locator(".strip .tile").nth(1).locator("img")).to_be_visible()


def without_tiles(**limits: int) -> Handler:
    """Answer /models with other limits, as if no tiles were calibrated."""
    return changed(lambda document: document.update(limits, models=[m | {"tiles": None} for m in document["models"]]))


def test_impossible_tiles_are_refused_in_a_sentence(studio, tab, tmp_path: Path) -> None:
    tab.expected_messages = [REFUSED]
    Image.new("RGB", (5, 9)).save(tmp_path / "thin.png")
    page = studio("score")
    page.get_by_label("In tiles").check()
    upload(page, "score", tmp_path / "thin.png")
    expect(page.locator(".waiting")).to_contain_text("smaller than a tile")
    page.get_by_role("button", name="Score 1 image").click()
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("An image of 5 x 9 pixels is smaller than a tile of 8 x 8: score it without tiles.")
    page.get_by_label("In tiles").uncheck()
    expect(page.locator(".waiting canvas")).to_have_count(2)
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading .big")).to_contain_text("bits/dim")
    page.select_option("#model", "wide")
    page.get_by_label("In tiles").check()
    expect(page.locator("summary", has_text="Class, noise level")).to_be_hidden()  # tiles ignore them
    page.locator("#view-score").get_by_role("button", name="noise").click()
    expect(refusal).to_contain_text("wide is not calibrated")


def test_each_of_several_images_can_be_selected_and_removed(studio) -> None:
    page = studio("score")
    choose_examples(page, "flat grey", "noise", "stripes")
    page.get_by_role("button", name="Remove stripes.png").click()
    page.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    page.locator(".tile", has_text="noise.png").click()
    expect(page.locator(".reading h2")).to_have_text("noise.png")
    expect(page.locator(".tile[aria-pressed=true]")).to_contain_text("noise.png")


def test_a_model_without_calibration_gives_no_verdict(studio) -> None:
    page = studio("score", model="wide")
    score_example(page, "gradient")
    expect(page.locator(".verdict .label")).to_have_text("No verdict")
    expect(page.locator(".verdict h3")).to_have_text("wide is not calibrated")
    page.locator(".verdict").get_by_role("link", name="calibrate a model").click()
    expect(page.locator("#view-calibrate")).to_contain_text(
        "ncml calibrate --unseen --data FOLDER --model wide --out models/mine"
    )
    expect(page.locator("#view-calibrate")).not_to_contain_text("false")
    page.get_by_role("link", name="Score").click()
    expect(page.locator(".reading .chart")).to_have_count(0)


def test_a_file_that_is_not_an_image_is_refused_in_a_sentence(studio, tab, tmp_path: Path) -> None:
    tab.expected_messages = [REFUSED]
    (tmp_path / "broken.png").write_bytes(b"not an image")
    page = studio("score")
    upload(page, "score", tmp_path / "broken.png")
    expect(page.locator(".waiting")).to_contain_text("This file is damaged or not an image.")
    page.get_by_role("button", name="Score 1 image").click()
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("broken.png is not an image")
    expect(refusal).to_contain_text("send a PNG, JPEG")
    expect(page.get_by_role("button", name="Score 1 image")).to_be_enabled()  # the selection is not lost


@pytest.mark.parametrize("tiled", [False, True])
def test_refused_images_do_not_delay_the_others(studio, tab, tmp_path: Path, tiled: bool) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score", viewport={"width": 1440, "height": 900})
    page.get_by_label("In tiles").set_checked(tiled)
    for name in ("broken.png", "notes.txt", "cut.png"):
        (tmp_path / name).write_bytes(b"not an image")
    upload(page, "score", tmp_path / "broken.png", tmp_path / "notes.txt")
    expect(page.get_by_role("status").filter(has_text="Skipped: notes.txt (not an image).")).to_be_in_viewport()
    choose_examples(page, "flat grey", "stripes")
    upload(page, "score", tmp_path / "cut.png")
    page.get_by_role("button", name="Score 4 images").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    expect(page.locator(".waiting li")).to_have_count(2)
    expect(page.locator(".waiting .bad")).to_have_text([re.compile("broken.png"), re.compile("cut.png")])
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text(re.compile(r"broken.png is not an image.*\. The same applies to cut.png\."))
    expect(refusal).to_contain_text("2 other images submitted.")
    expect(refusal).to_be_in_viewport(ratio=1)


def test_files_that_are_not_images_are_reported_where_they_were_dropped(studio, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    page = studio("complete")
    upload(page, "complete", tmp_path / "notes.txt")
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("Skipped: notes.txt (not an image).")
    expect(refusal).to_contain_text("Choose a PNG")
    expect(page.locator(".pad")).to_be_hidden()
    page.get_by_role("link", name="Models").click()
    expect(page.locator("#view-models")).to_be_visible()
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["hello"], "more.txt", { type: "text/plain" }));
            const event = new Event("drop", { cancelable: true });
            Object.defineProperty(event, "dataTransfer", { value: data });
            dispatchEvent(event);
        }"""
    )
    expect(page.locator("#view-score").get_by_role("alert")).to_contain_text("Skipped: more.txt (not an image).")


def test_a_long_list_of_images_fades_out_and_all_can_be_reached(studio) -> None:
    page = studio("score")
    cards = page.locator(".waiting li")
    for n in range(1, 8):
        choose_examples(page, "stripes")
        expect(cards).to_have_count(n)
        queue = page.locator(".waiting").evaluate(
            "e => ({ cut: e.scrollHeight > e.clientHeight, fades: getComputedStyle(e).maskImage !== 'none' })"
        )
        assert queue == {"cut": n > 5, "fades": n > 5}
    page.locator(".waiting").evaluate("e => e.scrollTo(0, e.scrollHeight)")
    end, fade = rectangles(cards.last, page.locator(".waiting"))
    assert end["bottom"] <= fade["bottom"] - 30  # clear of the fade


def test_a_photograph_is_among_the_examples(studio) -> None:
    page = studio("score")
    score_example(page, "photo")
    expect(page.locator(".reading h2")).to_have_text("chelsea.jpg")
    expect(page.locator(".reading .answer img")).to_be_visible()
    expect(page.locator(".waiting li")).to_have_count(0)


def test_a_double_click_scores_an_example_once(studio) -> None:
    page = studio("score")
    submissions = []
    page.on("request", lambda request: request.url.endswith("/score") and submissions.append(request))
    page.locator("#view-score").get_by_role("button", name="photo").dblclick()
    expect(page.locator(".reading h2")).to_have_text("chelsea.jpg")
    assert len(submissions) == 1


@pytest.mark.parametrize("view", ["score", "generate", "complete", "trajectory"])
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 800}, {"width": 390, "height": 844}])
def test_the_primary_button_stays_visible(studio, photo: Path, view: str, viewport: dict[str, int]) -> None:
    """It does so with an image chosen and the settings open, however far the controls are scrolled."""
    page = studio(view, viewport=viewport)
    if view in ("score", "complete"):
        upload(page, view, photo)
        title = "Add images" if view == "score" else "Choose another image"
        expect(page.locator(f"#view-{view} .drop.filled")).to_have_text(title, use_inner_text=True)
    button = page.locator(f"#view-{view} .send .primary")
    expect(button).to_be_enabled()
    for summary in page.locator(f"#view-{view} .controls details:not([open]) summary").all():
        summary.click()
    controls = page.locator(f"#view-{view} .controls")
    for share in (0, 0.5, 1):
        controls.evaluate("(e, share) => scrollTo(0, share * Math.max(0, e.scrollHeight - 500))", share)
        expect(button).to_be_in_viewport(ratio=1)
        covering = button.evaluate(
            "e => { const { x, y, width, height } = e.getBoundingClientRect();"
            " return document.elementFromPoint(x + width / 2, y + height - 2) === e; }"
        )
        assert covering, share  # neither the tabs nor a field lie over it


def test_a_phone_scrolls_to_the_verdict(studio) -> None:
    page = studio("score", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator("#view-score").get_by_role("button", name="stripes").tap()
    expect(page.locator(".reading .answer img")).to_be_in_viewport(ratio=1)
    expect(page.locator(".verdict h3")).to_be_in_viewport(ratio=1)


def test_images_can_be_pasted_and_dropped(studio) -> None:
    page = studio("score")
    for kind, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """async ([kind, holder]) => {
                const { exampleFile } = await import("/studio/examples.js");
                const data = new DataTransfer();
                data.items.add(await exampleFile("gradient", 8, 8));
                const event = new Event(kind, { cancelable: true });
                Object.defineProperty(event, holder, { value: data });
                dispatchEvent(event);
            }""",
            [kind, holder],
        )
    expect(page.get_by_role("button", name="Score 2 images")).to_be_enabled()


def test_the_page_preprocesses_a_file_as_the_service_does(studio) -> None:
    page = studio("score")
    rng = np.random.default_rng(7)
    for width, height in [(8, 8), (61, 33), (5, 9), (120, 90)]:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        data = page.evaluate(
            """async (png) => {
                const { decode, pngBlob, preprocess } = await import("/studio/image.js");
                return [...preprocess(await decode(pngBlob(png)), 8, 8).data];
            }""",
            base64.b64encode(to_png(image)).decode(),
        )
        model_view = np.array(data, np.uint8).reshape(8, 8, 4)[..., :3]
        assert np.abs(model_view.astype(int) - resize_to(image, 8, 8)).max() <= 1


@pytest.mark.parametrize("keep", ["top", "bottom", "left", "right"])
def test_only_sampled_lines_are_shown(studio, keep: str) -> None:
    """A preview reports how many of its lines are sampled; during refinement, all are."""
    page = studio("generate")
    boxes, refined = page.evaluate(
        """async (keep) => {
            const { sampledArea } = await import("/studio/preview.js");
            const image = new ImageData(8, 6);
            const boxes = [0, 1, 3].map((step) => sampledArea(image, { stage: "noisy_sampling", step }, keep));
            return [boxes, sampledArea(image, { stage: "refine", step: 1 }, keep)];
        }""",
        keep,
    )
    assert refined == [0, 0, 8, 6]
    assert (
        boxes
        == {
            "top": [[0, 0, 8, 0], [0, 0, 8, 1], [0, 0, 8, 3]],
            "bottom": [[0, 6, 8, 0], [0, 5, 8, 1], [0, 3, 8, 3]],
            "left": [[0, 0, 0, 6], [0, 0, 1, 6], [0, 0, 3, 6]],
            "right": [[8, 0, 0, 6], [7, 0, 1, 6], [5, 0, 3, 6]],
        }[keep]
    )


# Generate


def test_rows_appear_and_images_can_be_opened_and_downloaded(studio, site) -> None:
    page = studio("generate", model="wide")
    page.locator("#view-generate").get_by_label("dark").check()
    seed = int(page.locator("#view-generate").get_by_label("Seed", exact=True).input_value())
    submit(page, "generate", images=6)
    run = page.locator("article.run")
    expect(run).to_contain_text("Sampling row")
    page.wait_for_function(
        """() => [...document.querySelectorAll(".cell canvas")].some((face) => {
            const { data } = face.getContext("2d").getImageData(0, 0, 1, face.height);
            return data[3] === 255 && data[data.length - 1] === 0;  // the first row is sampled, the last is not
        })"""
    )
    expect(run).to_contain_text("Generated in", timeout=60_000)
    expect(run.locator(".cell img")).to_have_count(6)
    run.locator(".cell").nth(2).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(f"Seed {seed + 2}")
    line = dialog.locator(".curl").text_content() or ""
    path = re.fullmatch(rf"curl -X POST '{site.url}(/generate\?\S+)' -o dark-{seed + 2}\.png", line)
    assert path, line
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download PNG").click()
    assert Path(download.value.path()).read_bytes() == site.http.post(path[1]).content  # the line gives the same image
    dialog.get_by_role("button", name="Use this seed").click()
    expect(page.locator("#view-generate").get_by_label("Seed", exact=True)).to_have_value(str(seed + 2))
    with page.expect_download() as download:
        run.get_by_role("button", name="Zip").click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert f"02-seed-{seed + 2}.png" in names
    with page.expect_download() as download:
        run.get_by_role("button", name="PNG").click()
    assert Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).size == (96, 64)


def test_a_seed_is_copied_in_a_dialog_of_a_page_over_plain_http(studio) -> None:
    page = studio("generate")
    page.evaluate(
        """() => {
            Object.defineProperty(navigator, "clipboard", { value: undefined });  // only localhost and HTTPS have it
            document.addEventListener("copy", ({ target }) => {
                window.copied = target.value?.slice(target.selectionStart, target.selectionEnd);
            });
        }"""
    )
    seed = page.locator("#view-generate").get_by_label("Seed", exact=True).input_value()
    submit(page, "generate", images=1)
    page.locator("#view-generate .cell:enabled").click()
    copy = page.get_by_role("dialog").get_by_role("button", name="Copy seed")
    copy.click()
    expect(page.get_by_role("dialog").get_by_role("button", name="Copied")).to_be_focused()
    assert page.evaluate("window.copied") == seed


def test_an_image_is_sent_to_the_other_views(studio) -> None:
    page = studio("generate")
    submit(page, "generate", images=1)
    cell = page.locator("#view-generate .cell:enabled")
    cell.click()
    page.get_by_role("button", name="Score it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("How unusual is this image?")
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading h2")).to_have_text(re.compile(r"^image-\d+\.png$"))
    page.get_by_role("link", name="Generate").click()
    cell.click()
    page.get_by_role("button", name="Complete it").click()
    expect(page.locator("#view-complete .pad")).to_have_attribute("aria-label", re.compile("its top half is kept"))


def test_too_many_images_are_refused_and_fewer_are_accepted(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("generate")
    expect(page.locator("#view-generate").get_by_label("Images")).to_have_attribute("max", "32")
    page.route("**/models", with_members(max_images=64))  # the limit is lowered while the page is open
    page.reload()
    submit(page, "generate", images=64)
    expect(page.locator("#view-generate .failure")).to_contain_text("at most 32 at once")
    submit(page, "generate", images=2)
    expect(page.locator("#view-generate .cell img")).to_have_count(2)
    expect(page.locator("#view-generate .failure")).to_have_count(0)


def test_the_same_settings_give_the_same_image(studio) -> None:
    page = studio("generate")
    page.locator("#view-generate summary").click()
    submit(page, "generate", images=1, refinement=4)
    expect(page.locator("article.run .cell img")).to_have_count(1)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Generate").click()
    images = page.locator("article.run .cell img")
    expect(images).to_have_count(2)
    assert images.nth(0).get_attribute("src") == images.nth(1).get_attribute("src")


def test_guidance_and_temperature_are_sent_and_shown(studio) -> None:
    page = studio("generate")
    view = page.locator("#view-generate")
    view.locator("summary").click()
    view.get_by_label("Guidance", exact=True).fill("3")
    view.get_by_label("Temperature", exact=True).fill("0.9")
    with page.expect_request("**/generate*") as request:
        submit(page, "generate", images=1)
    assert request.value.post_data_json["temperature"] == 0.9
    assert "guidance" not in request.value.post_data_json
    view.get_by_label("dark").check()
    with page.expect_request("**/generate*") as request:
        submit(page, "generate", images=1)
    assert request.value.post_data_json["guidance"] == 3
    expect(page.locator("article.run").first).to_contain_text("guidance 3 · temperature 0.9")


@pytest.mark.parametrize(
    ("view", "noise", "sent"),
    [("generate", 1.1, {"noise": 0.75, "steps": 50}), ("trajectory", 1.1, {"noise": 1.1, "steps": 12}),
     ("trajectory", 0.3, {"noise": 0.3, "steps": 12})],
)  # fmt: skip
def test_the_defaults_of_a_model_are_sent_exactly(studio, view: str, noise: float, sent: dict[str, float]) -> None:
    defaults = {"start_noise": 0.75, "solver": "euler-maruyama", "steps": 50, "guidance": 1.2, "temperature": 0.875}
    page = studio(view)
    page.route("**/models", with_models(lambda model: model.update(defaults, noise=noise)))
    page.reload()
    page.locator(f"#view-{view}").get_by_label("dark").check()
    page.route("**/generate", lambda route: None)
    with page.expect_request("**/generate") as request:
        submit(page, view, images=1)
    parameters = request.value.post_data_json
    assert {key: parameters[key] for key in sent} == sent
    assert (parameters["guidance"], parameters["temperature"]) == (1.2, 0.875)
    slider = page.locator(f"#view-{view}").get_by_label("Initial noise")
    expect(slider).to_have_attribute("aria-valuetext", f"{sent['noise']:g} grey levels")
    if view == "generate":
        page.locator(f"#view-{view} summary").click()
    for key, level in [("End", noise), ("ArrowLeft", min(noise, 1)), ("ArrowRight", noise)]:
        slider.press(key)
        expect(slider).to_have_attribute("aria-valuetext", re.compile(rf"^{level:g} grey levels?$"))


def test_the_seed_on_the_page_is_that_of_the_images(studio) -> None:
    page = studio("generate")
    field = page.locator("#view-generate").get_by_label("Seed", exact=True)
    field.fill("7")
    seeds = []
    for count in (1, 2):
        submit(page, "generate", images=1)
        runs = page.locator("article.run")
        expect(runs).to_have_count(count)
        expect(runs.first.locator(".cell img")).to_have_count(1)
        expect(runs.first.locator(".seed")).to_have_text(field.input_value())
        seeds.append(field.input_value())
    assert seeds[0] == "7"
    assert seeds[1] != "7"  # a new one for the second run


@pytest.mark.parametrize("view", ["generate", "trajectory"])
def test_a_seed_that_is_typed_while_a_request_is_sent_is_used_next(studio, view: str) -> None:
    page = studio(view)
    field = page.locator(f"#view-{view}").get_by_label("Seed", exact=True)
    held_routes: list[Route] = []
    page.route("**/generate", lambda route: held_routes.append(route), times=1)
    field.fill("7")
    with page.expect_request("**/generate"):
        submit(page, view, images=1)
    field.fill("8")
    held_routes[0].continue_()
    expect(page.locator("article.run")).to_have_count(1)
    with page.expect_request("**/generate") as request:
        submit(page, view)
    assert request.value.post_data_json["seed"] == 8


def test_the_page_states_what_to_expect_of_the_images(studio) -> None:
    page = studio("generate")
    expectation = page.locator("#view-generate .expectation")
    expect(expectation).to_contain_text("tiny generates images of 8 × 8 pixels. How often they show their class")
    page.route("**/models", with_fidelity)
    page.reload()
    expect(expectation).to_contain_text("a classifier recognises the class of 60% of them, against 78%")
    expect(expectation).to_contain_text("People may recognise fewer")
    page.locator("#view-generate summary").click()
    expect(page.locator("#view-generate .defaults")).to_contain_text("Defaults of tiny: noise of 10 grey levels")
    fields = page.locator("#view-generate")
    guidance, steps = (fields.get_by_label(label, exact=True) for label in ("Guidance", "Refinement steps"))
    default_steps = steps.input_value()
    guidance.fill("4")
    steps.fill("20")
    page.get_by_role("button", name="Use defaults").click()
    expect(guidance).to_have_value("1")
    expect(steps).to_have_value(default_steps)


def test_new_defaults_and_metrics_of_the_same_version_are_shown_at_once(studio) -> None:
    page = studio("generate")
    view = page.locator("#view-generate")
    view.locator("summary").click()
    guidance = view.get_by_label("Guidance", exact=True)
    guidance.fill("4")
    page.route("**/models", with_models(tuned))
    expect(view.locator(".defaults")).to_contain_text("guidance 2.5")
    expect(view.locator(".expectation")).to_contain_text("a classifier recognises the class of 91% of them")
    expect(guidance).to_have_value("4")  # until the user asks for the defaults
    view.get_by_role("button", name="Use defaults").click()
    expect(guidance).to_have_attribute("aria-valuetext", "2.5")
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("table", name="Models")).to_contain_text("3.39")


def tuned(model: Document) -> None:
    model["guidance"] = 2.5
    model["metrics"] |= {"class_fidelity": 0.91, "test_bpd": 3.39}


with_fidelity = with_models(lambda model: model["metrics"].update(class_fidelity=0.602, class_fidelity_real=0.784))
"""Answers /models as if the models had been tuned."""


def test_two_settings_are_compared_for_the_same_seeds(studio) -> None:
    page = studio("generate")
    view = page.locator("#view-generate")
    view.get_by_label("dark").check()
    view.get_by_label("Seed", exact=True).fill("11")
    view.get_by_label("Compare with other settings").check()
    submit(page, "generate", images=2)
    expect(view.locator("[data-field=other] .failure")).to_contain_text("Both sets of settings are identical.")
    view.locator(".other").get_by_label("Temperature", exact=True).fill("0.8")
    view.locator("button[type=submit]").click()
    runs = page.locator(".comparison article.run")
    expect(view.locator(".failure")).to_have_count(0)
    expect(runs.locator("h2")).to_have_text(["temperature 1", "temperature 0.8"])
    for run in runs.all():
        expect(run.locator(".seed")).to_have_text(["11", "12"])
        expect(run.locator(".cell img")).to_have_count(2)
    left, right = rectangles(*(run.locator(".cell").first for run in runs.all()))
    assert left["y"] == right["y"]
    assert left["right"] < right["left"]
    page.reload()
    expect(runs).to_have_count(2)
    for count in (1, 0):
        runs.first.get_by_role("button", name="Remove").click()
        expect(runs).to_have_count(count)
    expect(page.get_by_text("Nothing generated yet")).to_be_visible()


def test_a_refusal_is_shown_beside_its_control(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("generate")
    page.route("**/models", with_members(max_images=64))
    page.reload()
    view = page.locator("#view-generate")
    view.get_by_label("Seed", exact=True).fill(str(2**32 - 1))
    submit(page, "generate", images=4)
    expect(view.locator("[data-field=seed] .failure")).to_contain_text("it must be at most")
    view.get_by_label("Seed", exact=True).fill("1")
    submit(page, "generate", images=33)
    expect(view.locator("[data-field=n] .failure")).to_contain_text("at most 32 at once")
    expect(view.locator(".failure")).to_have_count(1)
    view.locator("summary").click()
    page.route("**/generate", lambda route: route.fulfill(status=422, json=refusal_of("guidance")))
    view.locator("summary").click()
    submit(page, "generate", images=1)
    expect(view.locator("details [data-field=guidance] .failure")).to_be_visible()  # its details are unfolded


def refusal_of(field: str) -> dict[str, object]:
    return {"status": 422, "detail": "It is out of range.", "errors": [{"field": field, "detail": "It is."}]}


@pytest.mark.parametrize("kind", ["priority", "cross-site"])
def test_only_a_reserved_priority_asks_for_another_key(studio, tab, kind: str) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("generate")
    problem = {"type": f"urn:ncml:problem:{kind}", "status": 403, "detail": "It is refused."}
    page.route("**/generate", lambda route: route.fulfill(status=403, json=problem))
    submit(page, "generate", images=1)
    failure = page.locator("#view-generate .failure")
    remedy = "Ask the operator of the service for a key with this permission." if kind == "priority" else ""
    expect(failure).to_have_text(f"It is refused.{remedy}")


@pytest.mark.parametrize(
    ("detail", "remedy"),
    [
        ("The quota of 5 requests per hour is exhausted; retry in 20 s.", ""),
        ("The proxy is busy.", "Try again in 20 s."),
    ],
)
def test_when_to_try_again_is_stated_once(studio, tab, detail: str, remedy: str) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("generate")
    problem, headers = {"status": 429, "detail": detail}, {"Retry-After": "20"}
    page.route("**/generate", lambda route: route.fulfill(status=429, headers=headers, json=problem))
    submit(page, "generate", images=1)
    expect(page.locator("#view-generate .failure")).to_have_text(detail + remedy)


def test_a_lost_connection_and_an_expired_result_are_shown(studio, tab) -> None:
    tab.expected_messages = ["ERR_INTERNET_DISCONNECTED", "ERR_FAILED", REFUSED]
    page = studio("generate", model="wide")
    page.route("**/jobs/*/events", lambda route: route.abort())
    submit(page, "generate", images=1)
    run = page.locator("article.run")
    expect(run.locator(".lost")).to_contain_text("Connection lost: trying again.")
    page.unroute("**/jobs/*/events")
    expect(run.locator(".cell img")).to_have_count(1)
    expect(run.locator(".lost")).to_have_count(0)
    page.route("**/jobs/*/events", lambda route: route.fulfill(status=404, json=refusal_of("id") | {"status": 404}))
    page.reload()
    expect(run.get_by_role("status")).to_contain_text(
        "This result has expired: the service keeps results for one hour."
    )
    expect(run).to_contain_text("“Reuse settings” and generate again: the same seed gives the same images.")
    expect(run.locator(".cells")).to_be_hidden()
    page.unroute("**/jobs/*/events")
    run.get_by_role("button", name="Reuse settings").click()
    page.locator("#view-generate").locator("button[type=submit]").click()
    expect(page.locator("article.run").first.locator(".cell img")).to_have_count(1)


def test_a_result_that_could_not_be_fetched_is_fetched_again(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score")
    page.route("**/jobs/*/result", lambda route: route.fulfill(status=503, json=refusal_of("") | {"status": 503}))
    page.get_by_role("button", name="stripes", exact=True).click()
    failed = page.locator(".run .failure")
    expect(failed).to_contain_text("It is out of range.")
    page.unroute("**/jobs/*/result")
    failed.get_by_role("button", name="Try again").click()
    expect(page.locator(".reading h2")).to_have_text("stripes.png")
    expect(page.locator(".run")).to_have_count(0)


def test_settings_are_reused_with_the_model_that_they_were_used_with(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("generate", model="wide")
    submit(page, "generate", images=1)
    run = page.locator("article.run")
    expect(run.locator(".cell img")).to_have_count(1)
    page.locator("#model").select_option("tiny")
    run.get_by_role("button", name="Reuse settings").click()
    expect(page.locator("#model")).to_have_value("wide")
    page.route("**/models", without_models("wide"))
    page.reload()
    run.get_by_role("button", name="Reuse settings").click()
    expect(run.locator(".failure")).to_contain_text(re.compile("wide@[0-9a-f]{12} is no longer available"))


# Complete


@pytest.mark.parametrize("half", ["right", "top"])
def test_the_known_half_is_marked_or_chosen_and_shown_beside_the_variants(studio, photo: Path, half: str) -> None:
    page = studio("complete")
    upload(page, "complete", photo)
    if half == "top":
        page.locator("#view-complete").get_by_role("radio", name="bottom").check()
        page.locator("#view-complete").get_by_role("radio", name="top").check()
    else:
        [box] = rectangles(page.locator(".pad"))
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.9 * box["height"], steps=5)
        page.mouse.up()
    expect(page.locator("#view-complete").get_by_role("radio", name=half)).to_be_checked()
    submit(page, "complete", variants=3)
    run = page.locator("#view-complete article.run")
    expect(run.locator(".source")).to_contain_text(f"{half} kept")
    expect(run.locator("button.cell img")).to_have_count(3)
    differences = page.evaluate(
        """async () => {
            const { createCanvas } = await import("/studio/image.js");
            const pixels = [...document.querySelectorAll(".run .cell img")].map((image) => {
                const [, context] = createCanvas(8, 8);
                context.drawImage(image, 0, 0);
                return [...context.getImageData(0, 0, 8, 8).data];
            });
            const places = [...pixels[0].keys()];
            return pixels.slice(1).map((other) => places.filter((j) => Math.abs(pixels[0][j] - other[j]) > 1));
        }"""
    )
    assert all(differences)
    for index in (index for indices in differences for index in indices):  # of a value in 8x8 RGBA pixels
        row, column = divmod(index // 4, 8)
        assert row >= 4 if half == "top" else column < 4


def check_curl_line(page: Page, site, run: Locator, source: str) -> None:
    """Check that the curl line of a completion gives the same image for the submitted file, which can be downloaded."""
    run.locator("button.cell").click()
    dialog = page.get_by_role("dialog")
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download the submitted image").click()
    assert download.value.suggested_filename == source
    line = dialog.locator(".curl").text_content() or ""
    path = re.fullmatch(rf"curl -F image=@{source} '{site.url}(/complete\?\S+)' -o \S+", line)
    assert path, line
    submitted = Path(download.value.path()).read_bytes()
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Download PNG").click()
    completed = site.http.post(path[1], files={"image": (source, submitted, "image/png")})
    assert completed.content == Path(download.value.path()).read_bytes()
    dialog.get_by_role("button", name="Close").click()


def test_only_an_exact_opaque_half_determines_the_known_half(studio, site, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    pixels[..., 3] = 255
    for name, transparent in (("corner", np.s_[:4, :4]), ("bottom", np.s_[8:, :])):
        image = pixels.copy()
        image[*transparent, 3] = 0
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    page = studio("complete")
    view = page.locator("#view-complete")
    upload(page, "complete", tmp_path / "corner.png")  # the service gets it on white
    view.get_by_role("radio", name="right").check()
    submit(page, "complete", variants=1)
    expect(view.locator("article.run").first.locator("button.cell img")).to_have_count(1)
    expect(view.locator("article.run").first).to_contain_text("right kept")
    check_curl_line(page, site, view.locator("article.run").first, "corner-submitted.png")
    upload(page, "complete", tmp_path / "bottom.png")
    expect(view).to_contain_text("Half of this image is transparent: its opaque half is kept.")
    expect(view.get_by_role("radio", name="right")).to_be_hidden()
    submit(page, "complete", variants=1)
    expect(view.locator("article.run")).to_have_count(2)
    expect(view.locator("article.run").first.locator("button.cell img")).to_have_count(1)
    expect(view.locator("article.run").first).to_contain_text("top kept")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_with_the_shape_of_a_half_can_be_used_whole(studio, site, tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (40, 20), (200, 100, 50)).save(tmp_path / f"wide.{suffix}")
    page = studio("complete")
    view = page.locator("#view-complete")
    upload(page, "complete", tmp_path / f"wide.{suffix}")
    expect(view).to_contain_text("This image has the shape of a half and is used as one.")
    expect(view.get_by_role("radio", name="left")).to_be_disabled()
    view.get_by_label("Use it as a whole image").check()
    view.get_by_role("radio", name="left").check()
    submit(page, "complete", variants=1)
    expect(view.locator("article.run button.cell img")).to_have_count(1)
    expect(view.locator("article.run")).to_contain_text("left kept")
    check_curl_line(page, site, view.locator("article.run"), "wide-submitted.png")


def test_an_image_that_is_dropped_before_the_models_are_loaded_is_kept(studio, photo: Path) -> None:
    page = studio("complete")
    held_routes = []
    page.route("**/models", lambda route: held_routes.append(route))
    with page.expect_request("**/models"):
        page.reload()
    upload(page, "complete", photo)
    expect(page.locator(".pad")).to_be_hidden()
    held_routes[0].continue_()
    expect(page.locator(".pad")).to_be_visible()


# Trajectory


def test_a_trace_shows_every_row_and_its_refinement(studio) -> None:
    page = studio("trajectory", model="wide")
    submit(page, "trajectory", images=4, refinement=6)
    trace = page.locator("article.trace")
    expect(trace.locator(".progress")).to_contain_text(re.compile(r"^(Sampling row \d+ of 32|Refining, step \d of 6)$"))
    expect(trace).to_contain_text("Available at the end")
    expect(trace).to_contain_text("refinement steps", timeout=60_000)
    slider = trace.get_by_role("slider", name="Frame")
    expect(slider).to_have_attribute("aria-valuetext", "Noisy sample")  # the most informative frame
    last = int(slider.get_attribute("max") or 0)
    images, difference = trace.locator("figure canvas").all()
    opaque_pixels = (
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length"
    )
    labels, counts = [], []
    for frame in range(last + 1):
        slider.fill(str(frame))
        labels.append(slider.get_attribute("aria-valuetext") or "")
        counts.append(images.evaluate(opaque_pixels))
        expect(trace.get_by_text("No difference left")).to_be_visible(visible=frame == last)
        assert bool(difference.evaluate(opaque_pixels)) == (frame < last)
    assert labels[:32] == [*(f"Sampling, row {row}" for row in range(1, 32)), "Noisy sample"]
    assert counts[:32] == [4 * 32 * row for row in range(1, 33)]  # in all four images
    assert labels[-1] == "Refined image"
    expect(trace.get_by_role("img", name="The images in this frame: Refined image")).to_be_visible()
    assert sum(name.startswith("Refinement") for name in labels) >= 1
    thumbnails = trace.locator(".thumbs canvas").evaluate_all("all => all.map((canvas) => canvas.toDataURL())")
    assert len(set(thumbnails)) == len(thumbnails) == 9
    trace.get_by_role("button", name="Play").click()
    expect(trace.get_by_role("button", name="Play")).to_be_visible()
    expect(slider).to_have_attribute("aria-valuetext", "Refined image")


def test_a_trace_is_downloaded_and_removed(studio) -> None:
    page = studio("trajectory")
    submit(page, "trajectory", images=4)
    trace = page.locator("article.trace")
    expect(trace).to_contain_text("Trace complete")
    page.reload()
    expect(trace).to_contain_text("Trace complete")
    with page.expect_download() as download:
        trace.get_by_role("button", name="PNG").click()
    assert size(download) == (16, 16)
    with page.expect_download() as download:
        trace.get_by_role("button", name="Zip").click()
    assert re.fullmatch(r"generate-\d+\.zip", download.value.suggested_filename)
    trace.get_by_role("button", name="Remove").click()
    expect(trace).to_have_count(0)
    expect(page.get_by_text("Nothing traced yet")).to_be_visible()
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    expect(trace).to_have_count(0)


def test_a_trace_with_an_impossible_seed_is_refused(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("trajectory")
    page.locator("#view-trajectory").get_by_label("Seed", exact=True).fill(str(2**32 - 1))
    submit(page, "trajectory", images=4)
    expect(page.locator("#view-trajectory .failure")).to_contain_text("it must be at most")


def test_a_canceled_trace_is_reported(studio) -> None:
    page = studio("trajectory", model="wide")
    submit(page, "trajectory", images=9, refinement=32)
    trace = page.locator("article.trace")
    expect(trace).to_contain_text("Refinement, step", timeout=60_000)
    trace.get_by_role("button", name="Cancel").click()
    expect(trace).to_contain_text("Canceled")
    expect(trace.get_by_role("slider", name="Frame")).to_have_attribute("aria-valuetext", "Noisy sample")
    expect(trace).to_contain_text("Not available")
    trace.get_by_role("button", name="Remove").click()
    expect(trace).to_have_count(0)


# Models and health


def factory(document: Document) -> None:
    """Serve 60 further models, as of several lines, and name one that cannot be used."""
    [tiny] = (model for model in document["models"] if model["name"] == "tiny")
    names = [f"line{line}-{part}" for line in range(1, 6) for part in "abcdefghijkl"]
    document["models"] += [tiny | {"name": name, "default": False} for name in names]
    document["unusable"] = {"line3-cap": "line3-cap/config.json is damaged."}


def test_one_of_many_models_is_found_by_a_part_of_its_name_and_used(studio) -> None:
    page = studio("models")
    view = page.locator("#view-models")
    field = view.get_by_label("Find a model")
    expect(field).to_be_hidden()
    page.route("**/models", changed(factory))
    rows = view.locator("table.models .expand")
    expect(view.get_by_role("status").first).to_have_text("20 of 62 models")
    expect(rows).to_have_count(20)  # health is below them
    view.get_by_role("button", name="List all 62").click()
    expect(rows).to_have_count(62)
    view.get_by_role("button", name="List 20").click()
    expect(rows).to_have_count(20)
    field.press_sequentially("C line3")
    expect(rows).to_have_text(["line3-c"])
    expect(view.locator(".failure")).to_contain_text("line3-cap cannot be used")
    field.fill("line4-d")
    expect(view.locator(".failure")).to_have_count(0)
    page.keyboard.press("Tab")
    expect(rows).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#view-score")).to_be_visible()
    expect(page.locator("#model")).to_have_value("line4-d")
    expect(page).to_have_url(re.compile(r"\?model=line4-d#score$"))


def test_an_address_opens_the_page_with_its_model(tab, site) -> None:
    page = tab.open(f"{site.url}/?model=wide#models")
    expect(page.locator("#model")).to_have_value("wide")
    page.select_option("#model", "tiny")
    page.reload()
    expect(page.locator("#model")).to_have_value("tiny")
    expect(page).to_have_url(re.compile(r"\?model=tiny#models$"))
    absent = tab.open(f"{site.url}/?model=wde")
    expect(absent.locator("#notice")).to_contain_text("wde is not available: tiny is used instead.")


def test_back_leads_to_another_view_with_the_selected_model(tab, site) -> None:
    page = tab.open(f"{site.url}/?model=wide#models")
    page.get_by_role("link", name="Score", exact=True).click()
    expect(page.locator("#model")).to_have_value("wide")
    page.select_option("#model", "tiny")
    page.go_back()
    expect(page).to_have_url(re.compile(r"\?model=tiny#models$"))
    with page.expect_response("**/models"):
        pass
    expect(page.locator("#pulse")).to_contain_text("Ready")
    expect(page.locator("#model")).to_have_value("tiny")


def test_models_and_health_are_shown(studio) -> None:
    page = studio("models")
    view = page.locator("#view-models")
    expect(view.get_by_role("table", name="Queues and workers")).to_contain_text("score")
    expect(view.get_by_role("table", name="Responses since the service started")).to_contain_text("/models")
    table = view.get_by_role("table", name="Models")
    expect(table.locator("thead")).to_have_text("ModelSizeClassesBits/dimVerdicts")
    tiny, wide = table.locator(":scope > tbody > tr:not(.details)").all()
    expect(tiny).to_contain_text("tinydefault8 × 8")
    expect(tiny.locator(".badge.weak")).to_have_text("weak")
    expect(tiny).to_contain_text(re.compile("It ranks among 40 images, and 76 are needed.* Misses .* Detects "))
    expect(wide).to_contain_text("Not calibrated")
    expect(wide.locator(".badge")).to_have_text("none")
    top, bottom = rectangles(table, view.get_by_role("heading", name="Health", exact=True))
    assert top["height"] < 300  # compact
    assert top["y"] < bottom["y"]  # health comes last
    toggle = tiny.get_by_role("button", name="tiny")
    toggle.click()
    expect(toggle).to_have_attribute("aria-expanded", "true")
    details = table.locator("tr.details:visible")
    expect(details).to_contain_text("images are ranked among 40 others")
    power = details.get_by_role(
        "table", name="What it flags, of 40 held-out images, unchanged or changed, and of foreign"
    )
    expect(power.get_by_role("rowheader", name="unchanged", exact=True)).to_be_visible()
    expect(power.locator("td").first).to_have_text(re.compile(r"^\d+%$"))
    expect(details.locator(".chart")).to_be_visible()
    details.get_by_role("button", name="Generate 4 of each class").click()
    expect(details.locator(".samples-of-class img")).to_have_count(8)
    expect(details).to_contain_text("not hand-picked")
    toggle.click()
    expect(details).to_have_count(0)
    wide.get_by_role("button").click()
    details.locator("summary").click()
    expect(details.locator(".prose strong")).to_have_text("Untrained")
    expect(details.locator(".prose td").first).to_have_text("1")


def test_samples_are_of_any_class_if_there_are_many(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("models")
    page.route("**/models", with_many_classes)
    page.reload()
    page.locator("#view-models").get_by_role("button", name="tiny").click()
    with page.expect_request("**/generate") as request:
        page.get_by_role("button", name="Generate 16 samples").click()
    assert "class" not in request.value.post_data_json
    samples = page.locator(".samples-of-class img")
    expect(samples).to_have_count(16)
    page.reload()
    page.locator("#view-models").get_by_role("button", name="tiny").click()
    expect(samples).to_have_count(16)
    # Once they have expired, nothing is left to cancel.
    page.route(re.compile("/jobs/"), lambda route: route.fulfill(status=404, json=refusal_of("id")))
    cancellations = []
    page.on("request", lambda request: request.url.endswith("/cancel") and cancellations.append(request))
    page.reload()
    page.locator("#view-models").get_by_role("button", name="tiny").click()
    expect(page.get_by_role("button", name="Generate 16 samples")).to_be_visible()
    assert cancellations == []
    page.get_by_role("button", name="Generate 16 samples").click()
    expect(page.get_by_role("button", name="Generate 16 samples")).to_be_visible()


def test_samples_that_are_canceled_elsewhere_are_offered_again(studio) -> None:
    page = studio("models")
    page.route("**/generate", lambda route: route.fulfill(status=202, json={"id": "unknown"}))
    held_routes: list[Route] = []
    page.route("**/jobs/unknown/events", lambda route: held_routes.append(route))
    page.route("**/jobs/unknown/cancel", lambda route: route.fulfill(json={}))
    page.locator("#view-models").get_by_role("button", name="tiny").click()
    offer = page.get_by_role("button", name="Generate 4 of each class")
    with page.expect_request("**/jobs/unknown/events"):
        offer.press("Enter")
    expect(page.locator(".samples")).to_contain_text("Generating samples")
    expect(page.locator(".samples")).to_be_focused()  # instead of the button, which is gone
    canceled = {"content_type": "text/event-stream", "body": "event: canceled\ndata: {}\n\n"}
    held_routes[0].fulfill(**canceled)
    expect(offer).to_be_visible()
    assert page.evaluate("sessionStorage['ncml.job-records']") == "[]"


with_many_classes = with_models(lambda model: model.update(classes=[f"class {i}" for i in range(21)]))
"""Answers /models as if the models had 21 classes."""


def test_responses_that_accept_or_refuse_a_job_are_not_counted(studio) -> None:
    page = studio("models")
    name = "ncml_http_request_duration_seconds_bucket"
    buckets = [
        ("/generate", "202", 90, 90),
        ("/generate", "200", 0, 4),
        ("/generate", "429", 80, 80),
        ("/score", "202", 7, 7),
        ("/score", "200", 3, 4),
    ]
    text = "".join(
        f'{name}{{code="{code}",le="{edge}",route="{route}"}} {n}\n'
        for route, code, *counts in buckets
        for edge, n in zip(("0.5", "+Inf"), counts, strict=True)
    )
    text += 'ncml_workers{lane="score",state="idle"} 1.0\nncml_workers{lane="generate",state="busy"} 1.0\n'
    text += 'ncml_lane_jobs_per_second{lane="generate"} 0.25\nncml_lane_jobs_per_second{lane="score"} 6.5\n'
    page.route("**/metrics", lambda route: route.fulfill(body=text))
    responses = page.locator("#view-models").get_by_role("table", name="Responses since the service started")
    expect(responses.locator("tbody tr")).to_have_text(
        ["/generate4over a minuteover a minute", "/score4500 msover a minute"]
    )
    lanes = page.locator("#view-models").get_by_role("table", name="Queues and workers").locator("tbody tr")
    expect(lanes).to_have_text(["score0–154 ms per job1 idle", "generate0–4.0 s per job1 busy"])


def test_an_unreachable_service_is_reported_and_reached_again(studio, tab) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("models")
    page.context.set_offline(True)
    expect(page.locator("#pulse")).to_have_text("Unreachable")
    expect(page.locator("#notice")).to_contain_text("Check that it is running")
    # A hidden page does not ask by itself, which would remove the button that is about to be clicked.
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => true })")
    page.context.set_offline(False)
    page.locator("#notice").get_by_role("button", name="Try again").click()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    expect(page.locator("#notice .failure")).to_have_count(0)


# Own images


def good_images(count: int) -> list[FilePayload]:
    """Return files of images like those that `tiny` was calibrated on."""
    images = np.random.default_rng(5).integers(96, 160, (count, 8, 8, 3), np.uint8)
    return [FilePayload(name=f"{i}.png", mimeType="image/png", buffer=to_png(images[i])) for i in range(count)]


def good_zip(count: int) -> FilePayload:
    """Return a zip of such images and a text file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("good/notes.txt", "hello")
        for file in good_images(count):
            archive.writestr(f"good/{file['name']}", file["buffer"])
    return FilePayload(name="good ones.zip", mimeType="application/zip", buffer=buffer.getvalue())


def test_a_model_is_calibrated_on_own_images_and_can_be_used_at_once(studio, models: Path) -> None:
    page = studio("calibrate")
    view = page.locator("#view-calibrate")
    expect(view).to_contain_text("ncml calibrate --unseen --data FOLDER --model tiny --out models/mine")
    expect(view.get_by_role("button", name="Calibrate")).to_be_disabled()
    view.locator("input[type=file]").first.set_input_files([good_zip(60)])
    name = view.get_by_label("Name of the new model")
    expect(name).to_have_value("good-ones")
    expect(view).to_contain_text("1 file, 0.0 of at most 64.0 MiB")
    view.get_by_label("False-positive rate").fill("7.5")
    try:
        view.get_by_role("button", name="Calibrate").click()
        run = view.locator("article.run")
        expect(run).to_contain_text(re.compile("Generating images|Estimating what|Ranking good images|Measuring what"))
        page.reload()
        expect(run).to_contain_text("Calibrated", timeout=90_000)
        expect(run).to_contain_text("20 images for estimation, 40 for ranking. This calibration")
        expect(run).to_contain_text("This calibration is weak: it ranks among 40 images")
        expect(run.get_by_role("rowheader", name="unchanged", exact=True)).to_be_visible()
        run.locator("summary").click()
        expect(run).to_contain_text("good/notes.txt is not an image")
        run.get_by_role("button", name="Score images with it").click()
        expect(page.locator("#model")).to_have_value("good-ones")
        score_example(page, "stripes")
        expect(page.locator(".verdict")).to_contain_text("An image is flagged at p ≤ 0.075.")
        expect(page.locator(".verdict h3")).to_contain_text("the images good-ones was calibrated on")
    finally:
        shutil.rmtree(models / "good-ones", ignore_errors=True)
        expect(page.locator("#model option")).to_have_count(2)


def test_a_calibration_is_canceled(studio, models: Path, site) -> None:
    page = studio("calibrate", model="wide")
    view = page.locator("#view-calibrate")
    view.locator("input[type=file]").first.set_input_files(good_images(300))
    view.get_by_label("Name of the new model").fill("never")
    view.get_by_role("button", name="Calibrate").click()
    run = view.locator("article.run")
    run.get_by_role("button", name="Cancel").click()
    expect(run).to_contain_text("Canceled. No model was created.")
    assert site.http.get(f"/jobs/{run.get_attribute('data-job')}").json()["status"] == "canceled"
    assert [path.name for path in sorted(models.iterdir())] == ["tiny", "wide"]
    run.get_by_role("button", name="Remove").click()
    expect(view.get_by_text("What to upload")).to_be_visible()


def test_unusable_images_and_names_are_refused_beside_their_controls(studio, tab, tmp_path: Path) -> None:
    tab.expected_messages = [REFUSED]
    (tmp_path / "notes.txt").write_text("hello")
    page = studio("calibrate")
    view = page.locator("#view-calibrate")
    files = view.locator("input[type=file]").first
    files.set_input_files(good_images(12))
    files.set_input_files(tmp_path / "notes.txt")
    expect(view).to_contain_text("1 other file skipped.")
    view.get_by_label("Name of the new model").fill("mine")
    submit_button = view.get_by_role("button", name="Calibrate")
    submit_button.click()
    expect(view.locator("[data-field=image] .failure")).to_contain_text(
        "A calibration at this rate needs at least 39 images.Add at least 27 more."
    )
    view.get_by_label("False-positive rate").fill("1")
    submit_button.click()
    expect(view.locator("[data-field=image] .failure")).to_contain_text("at least 119 images.Add at least 107 more.")
    view.get_by_label("False-positive rate").fill("10")
    submit_button.click()
    expect(view.locator("[data-field=image] .failure")).to_contain_text("at least 29 images.Add at least 17 more.")
    files.set_input_files(good_images(30)[12:])  # 30 in all
    view.get_by_label("Name of the new model").fill("tiny")
    submit_button.click()
    expect(view.locator("[data-field=name] .failure")).to_contain_text("a model 'tiny' already exists")
    view.get_by_role("button", name="Clear").click()
    damaged = FilePayload(name="a.zip", mimeType="application/zip", buffer=b"PK\x03\x04 and no more")
    files.set_input_files([damaged])
    view.get_by_label("Name of the new model").fill("mine")
    submit_button.click()
    # Beside the images or, if the service accepted the job before it unpacked the zip, with the job.
    expect(view.get_by_role("alert").filter(has_text="is a zip that cannot be read")).to_be_visible()
    view.get_by_role("button", name="Clear").click()
    page.route("**/models", with_members(max_body_bytes=50_000))
    page.reload()
    files.set_input_files(good_images(40))
    view.get_by_label("Name of the new model").fill("mine")
    submit_button.click()
    refusal = view.locator("[data-field=image] .failure")
    expect(refusal).to_contain_text("The files are too large: 0.1 of at most 0.0 MiB.")
    expect(refusal).to_contain_text("ncml calibrate --unseen --data FOLDER --model tiny --out models/mine")
    page.unroute_all(behavior="wait")
    page.reload()
    # A proxy may have a lower limit.
    detail = "The request body is too large: at most 67108864 bytes are accepted; send fewer or smaller images."
    page.route("**/calibrate", lambda route: route.fulfill(status=413, json={"detail": detail}))
    files.set_input_files(good_images(40))
    view.get_by_label("Name of the new model").fill("mine")
    submit_button.click()
    expect(refusal).to_contain_text("at most 67108864 bytes are accepted")
    expect(refusal).to_contain_text("ncml calibrate --unseen --data FOLDER --model tiny --out models/mine")


def test_a_service_that_does_not_calibrate_names_the_setting_and_the_command(site, tab) -> None:
    page = tab.open(f"{site.guarded_url}/#calibrate")
    tab.expected_messages = ["status of 401"]
    page.evaluate("(key) => sessionStorage.setItem('ncml.key', key)", KEY)
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    view = page.locator("#view-calibrate")
    expect(view).to_contain_text("the operator of this service can allow it with NCML_ALLOW_CALIBRATION=1")
    expect(view).to_contain_text("ncml calibrate --unseen --data FOLDER --model")
    expect(view).to_contain_text("ncml adapt FOLDER --out models/mine")
    expect(view.locator("form")).to_be_hidden()
