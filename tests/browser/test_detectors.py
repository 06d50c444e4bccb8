"""A detector on the page: its verdict on an image, and what it finds and misses."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, Response, Route, expect

from ncml.calibration.power_pictures import PowerPictures
from ncml.checkpoint import describe
from ncml.data import kept_images
from ncml.data.good_images import open_folder
from ncml.images import reduced_jpeg
from ncml.images.alterations import ALTERATIONS
from ncml.images.tiling import Box
from ncml.ood.detector_calibration import DetectorCalibration
from ncml.ood.detector_power import DetectorPower
from tests.browser.answers import Document, with_models, without_models
from tests.browser.layout import rectangles
from tests.conftest import eventually
from tests.detectors import good_image, without_disc


@pytest.fixture(scope="module", autouse=True)
def _detector(site, models: Path, detector_folder: Path) -> Iterator[None]:
    """Serve the detector `washer` while these tests run."""
    hidden = models / ".washer"
    shutil.copytree(detector_folder, hidden)
    illustrate(hidden)
    hidden.rename(models / "washer")
    eventually(lambda: site.http.get("/models/washer").status_code == 200)
    yield
    shutil.rmtree(models / "washer")
    eventually(lambda: site.http.get("/models/washer").status_code == 404)


def illustrate(folder: Path) -> None:
    """Give a detector the pictures of all alterations that fit its images: of spots, one is missed and one found."""
    pictures = PowerPictures()
    shares: dict[str, dict[str, float]] = {}
    image, whole = good_image(7), Box(0, 0, 96, 72)
    for alteration in ALTERATIONS:
        if alteration.fits(72, 96):
            share = {"spot": 0.5, "stain": 0.0}.get(alteration.kind, 1.0)
            shares.setdefault(alteration.kind, {})[alteration.size] = share
            for is_found in ([False] if share < 1 else []) + ([True] if share else []):
                altered = alteration.apply(image, int(is_found))
                pictures.add(alteration, is_found, image, altered, whole)
    sheet, shown = pictures.sheet(shares)
    (folder / "detector.jpg").write_bytes(sheet)
    power = DetectorPower(2, shares, {"one colour": 1.0}).with_pictures(sheet, shown)
    calibration = DetectorCalibration.read(folder, describe(folder).version)
    replace(calibration, power=power).save(folder)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A good image, one in which the disc is missing, two more good ones, and one in grey."""
    grey = good_image(1004)[..., :1].repeat(3, 2)
    arrays = [good_image(1000), without_disc(1001), *map(good_image, range(1002, 1004)), grey]
    paths = [tmp_path / f"{name}.png" for name in ("good", "missing", "a", "b", "grey")]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return paths


def test_a_detector_judges_whole_images_and_says_what_to_do(studio, images: list[Path]) -> None:
    requests: list[str] = []
    page = studio(model="washer", on_response=lambda response: requests.append(response.url))
    for name in ("Generate", "Complete", "Trajectory"):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_hidden()
    view = page.locator("#view-score")
    expect(view.get_by_text("Or score an example:")).to_be_hidden()  # none is of the kind that it judges
    view.locator("input[type=file]").first.set_input_files(images)
    expect(view.locator(".waiting li").first).to_contain_text("96 × 72 pixels")
    expect(view.locator(".waiting li").first.locator("canvas")).to_have_count(1)  # it is not cropped
    view.get_by_role("button", name="Score 5 images").click()
    expect(page.locator(".strip .tile")).to_have_count(5)
    assert len([url for url in requests if url.endswith("/score")]) == 5
    page.locator(".strip .tile", has_text="missing").click()
    reading = page.locator(".reading")
    expect(reading.locator(".label")).to_have_text("Flagged")
    expect(reading.locator("h3")).to_have_text("None of 19 good images is as unusual")
    expect(reading.locator(".verdict")).to_contain_text("One in 20 good images is flagged at this rate")
    expect(reading.locator(".verdict")).to_contain_text(
        "to flag fewer, make the detector again with ncml adapt GOOD --false-positive-rate 0.01 --out NEW, from good "
        "images of at least 110 scenes"
    )
    expect(reading.locator(".verdict")).to_contain_text(  # it keeps no images, and so has no next version
        "put it into a folder, and make the detector again with ncml adapt GOOD --reviewed FOLDER --out NEW"
    )
    expect(reading.locator("figcaption").first).to_contain_text(
        "Most unusual: brightness, contrast or colour of a part"
    )
    place = r"Frame of \d+ × \d+ pixels, \d+ pixels from the left and \d+ from the top, in an image of 96 × 72"
    expect(reading.get_by_role("img", name=re.compile(place))).to_be_visible()
    box, image = rectangles(reading.locator(".over .box").first, reading.locator(".over img").first)
    assert abs(box["x"] - image["x"] - image["width"] / 2) < 4  # the lower right quarter
    assert abs(box["y"] - image["y"] - image["height"] / 2) < 4
    reading.get_by_text("Map: where it differs from good images").click()
    expect(reading.locator(".map canvas.heat")).to_be_visible()
    assert brightest(page) > 600
    expect(reading.locator(".over .box.calm")).to_have_count(0)
    reading.get_by_text("All views").click()
    table = reading.locator("table.views")
    assert table.get_by_role("columnheader").all_inner_texts() == ["View", "What differs", "Part"]
    expect(table.get_by_role("rowheader").first).to_have_text("appearance grid")
    text = reading.inner_text()
    for words in ("calibrate", "Test images of", "crop"):
        assert words not in text
    expect(reading.locator(".verdict")).not_to_contain_text("no good image")
    page.locator(".strip .tile", has_text="grey").click()
    expect(reading.locator(".verdict")).to_contain_text("It is grey, and no good image is.")
    page.locator(".strip .tile", has_text="good").first.click()
    expect(reading.locator(".label")).to_have_text("Not flagged")
    expect(reading.locator("h3")).to_have_text(re.compile(r"^\d+ of 19 good images are at least as unusual$"))
    expect(reading.locator(".verdict")).to_contain_text("This does not mean free of defects")
    expect(reading.locator(".verdict")).to_contain_text(
        "If this image has a defect, put it into a folder, and make the detector again with "
        "ncml adapt GOOD --defective FOLDER --out NEW"
    )
    expect(reading.locator("figcaption").first).to_contain_text(re.compile("^Not flagged. "))
    expect(reading.locator(".over .box:not(.calm)")).to_have_count(0)


def test_conditions_that_decide_nothing_are_not_offered_with_a_detector(studio, images: list[Path]) -> None:
    page = studio()
    view = page.locator("#view-score")
    conditions = view.locator("summary", has_text="Class, noise level")
    conditions.click()
    view.get_by_label("Noise level").fill("2")
    page.select_option("#model", "washer")
    expect(conditions).to_be_hidden()
    view.locator("input[type=file]").first.set_input_files(images[:1])
    page.route("**/score", lambda route: route.continue_())  # only then, the body of the request can be read
    with page.expect_request("**/score") as request:
        view.get_by_role("button", name="Score 1 image").click()
    names = re.findall(rb' name="(\w+)"', request.value.post_data_buffer or b"")
    assert names == [b"image", b"map", b"model"]
    page.route(
        "**/models", with_models(lambda model: model["calibrations"].update(mine={"version": "e" * 64}), "washer")
    )
    expect(conditions).to_be_visible()  # with another calibration, they have an effect
    expect(view.get_by_label("Calibration")).to_be_visible()


def test_an_image_that_is_not_flagged_has_neither_bright_colours_nor_what_only_defects_show(studio, images) -> None:
    def judged_by_place(route: Route) -> None:
        answer = route.fetch()
        result = answer.json()
        box = {"left": 10, "top": 10, "width": 8, "height": 8}
        covered = {"left": 0, "top": 0, "width": 96, "height": 72}
        values = {"view": "places", "score": 0.5, "threshold": 2.0, "is_ood": False, "box": box, "covered": covered}
        result["results"][0]["detection"] |= values | {"map": [[1, 2, 3], [0, 2, 10]]}
        route.fulfill(response=answer, json=result)

    page = studio(model="washer")
    page.route("**/jobs/*/result", judged_by_place)
    view = page.locator("#view-score")
    view.locator("input[type=file]").first.set_input_files(images[:1])
    view.get_by_role("button", name="Score 1 image").click()
    reading = page.locator(".reading")
    expect(reading.locator("figcaption").first).to_have_text("Not flagged. The most unusual place, in the view places")
    expect(reading).not_to_contain_text("something is missing")
    reading.get_by_text("Map: where it differs from good images").click()
    expect(reading.locator(".map canvas.heat")).to_be_visible()
    assert 100 < brightest(page) < 300


def test_a_verdict_does_not_refer_to_a_power_that_was_not_measured(studio, images: list[Path]) -> None:
    page = studio(model="washer")
    page.route("**/models", with_models(lambda model: model["detector"].update(power=None), "washer"))
    page.reload()
    page.locator("#view-score input[type=file]").first.set_input_files(images[0])
    page.get_by_role("button", name="Score 1 image").click()
    verdict = page.locator(".reading .verdict")
    expect(verdict).to_contain_text("free of defects: what this detector misses has not been measured.")


def test_the_failure_of_one_of_many_images_names_it(studio, images: list[Path]) -> None:
    def fail(route: Route) -> None:
        error = {"detail": "it shows no washer."}
        body = f"event: failed\ndata: {json.dumps({'error': error})}\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    page = studio(model="washer")
    page.route("**/jobs/*/events", fail, times=1)
    page.locator("#view-score input[type=file]").first.set_input_files(images[:2])
    page.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile")).to_have_count(1)
    name = page.locator(".waiting li .name")  # of the other one, which can be scored again
    expect(name).to_have_count(1)
    expect(page.locator("#view-score .run .failure")).to_contain_text(f"{name.inner_text()}: it shows no washer.")


def test_a_phone_shows_the_names_of_views_without_breaking_their_words(studio, images) -> None:
    page = studio(model="washer", viewport={"width": 320, "height": 640})
    page.locator("#view-score input[type=file]").first.set_input_files(images[0])
    page.get_by_role("button", name="Score 1 image").click()
    page.locator(".reading").get_by_text("All views").click()
    expect(page.locator(".views tbody th").first).to_be_visible()
    lines = page.locator(".views tbody th").evaluate_all("""names => names.map(name => {
        const word = document.createRange();
        word.setStart(name.firstChild, 0);
        word.setEnd(name.firstChild, name.firstChild.data.split(" ")[0].length);
        return word.getClientRects().length;
    })""")
    assert set(lines) == {1}


def test_an_image_that_the_browser_cannot_decode_is_shown_as_the_service_drew_it(studio, images: list[Path]) -> None:
    tiff = images[1].with_suffix(".tiff")
    Image.open(images[1]).save(tiff)
    page = studio(model="washer")
    view = page.locator("#view-score")
    view.locator("input[type=file]").first.set_input_files(tiff)
    view.get_by_role("button", name="Score 1 image").click()
    reading = page.locator(".reading")
    expect(reading.locator(".label")).to_have_text("Flagged")
    caption = reading.locator("figcaption").first
    expect(caption).to_contain_text("This browser cannot display the file: this is the map on the image in grey")
    expect(reading.get_by_role("img", name=f"{tiff.name} with its map")).to_be_visible()
    size = "(image) => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    assert reading.locator(".over img").evaluate(size) == [96, 72]
    expect(reading.locator("details.map")).to_have_count(0)  # it is shown above
    page.reload()
    expect(caption).to_contain_text("This browser cannot display the file")


def brightest(page: Page) -> int:
    """Return the largest sum of red, green and blue in the map that the page draws."""
    return page.locator(".map canvas.heat").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const length = data.length / 4;
          const sums = Array.from({ length }, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]);
          return Math.max(...sums);
        }"""
    )


POWER = {
    "images": 20,
    "shares": {
        "scratch": {"1 pixel wide, 20 long": 0.05, "3 pixels wide, 100 long": 1.0},
        "stain": {"radius 10 pixels": 0.0, "radius 50 pixels": 0.15},
        "pit": {"radius 4 pixels": 0.3, "radius 16 pixels": 0.85},
    },
    "smallest_found": {"scratch": "3 pixels wide, 100 long", "stain": None, "pit": None},
    "foreign": {"one colour": 1.0},
}


def test_the_power_of_a_detector_begins_with_what_it_misses(studio) -> None:
    page = studio("models", model="tiny")
    page.route("**/models", with_models(lambda model: model["detector"].update(power=POWER), "washer"))
    table = page.locator("table.models")
    row = table.get_by_role("row").filter(has=page.get_by_role("button", name="washer"))
    expect(row).to_contain_text("weak detector")
    expect(row.locator("td").nth(2)).to_have_text("–")  # bits/dim of its base say nothing about it
    expect(row).to_contain_text(
        "Mostly misses, even at the largest size measured: stain radius 50 pixels (15%). "
        "Smallest sizes found in nine of ten: scratch 3 pixels wide, 100 long."
    )
    table.get_by_role("button", name="washer").click()
    details = table.locator("tr.details:visible")
    expect(details).to_contain_text("Flags 5% of good images on average; with 95% confidence at most")
    groups = details.locator("table.power .group").all_inner_texts()
    assert [group.split(" · ")[0] for group in groups] == ["stain", "pit", "scratch", "foreign images"]
    assert groups[0].endswith("no measured size found in nine of ten")
    assert groups[2].endswith("smallest size found in nine of ten: 3 pixels wide, 100 long")
    assert details.locator("table.power td").all_inner_texts() == ["0%", "15%", "30%", "85%", "5%", "100%", "100%"]
    expect(details.get_by_role("button", name="Generate")).to_have_count(0)  # samples of its base


def test_a_detector_is_described_by_its_own_version_and_good_images(studio, site, images: list[Path]) -> None:
    model = site.http.get("/models/washer").json()
    version, count = model["detector"]["version"][:12], model["detector"]["n_fit"] + model["detector"]["n_rank"]
    page = studio("models", model="washer")
    table = page.locator("table.models")
    row = table.get_by_role("row").filter(has=page.get_by_role("button", name="washer"))
    expect(row.locator("td").nth(1)).to_have_text("–")  # the classes of its base
    table.get_by_role("button", name="washer").click()
    assert table.locator("tr.details:visible dl > div").all_inner_texts() == [
        f"Version\n{version}", f"Good images\n{count}", f"Version of its base\n{model['version'][:12]}",
        "Image size of its base\n8 × 8", "Classes of its base\ndark, light",
    ]  # fmt: skip
    page.get_by_role("link", name="Score", exact=True).click()
    page.locator("#view-score input[type=file]").first.set_input_files(images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading header .hint")).to_have_text(f"washer {version}")


def test_scenes_are_explained_where_they_are_counted(studio, images: list[Path]) -> None:
    page = studio("models", model="washer")
    page.locator("table.models").get_by_role("button", name="washer").click()
    explanation = page.locator(".explanation:popover-open")
    page.locator("tr.details:visible").get_by_role("button", name="Explain scenes").press("Enter")
    expect(explanation).to_contain_text("crops of one photograph show the same scene")
    page.get_by_role("link", name="Score", exact=True).click()
    page.locator("#view-score input[type=file]").first.set_input_files(images[0])
    page.get_by_role("button", name="Score 1 image").click()
    caution = page.locator(".reading .caution")
    expect(caution).to_contain_text("it ranks among 19 scenes")
    caution.get_by_role("button", name="Explain scenes").press("Enter")
    expect(explanation).to_contain_text("crops of one photograph show the same scene")


def test_a_phone_shows_the_reviews_of_a_detector_before_its_many_pictures(studio) -> None:
    page = studio("models", model="washer", viewport={"width": 360, "height": 740})
    page.locator("table.models").get_by_role("button", name="washer").click()
    details = page.locator("tr.details:visible")
    pictures = details.get_by_role("heading", name="What it finds and misses")
    reviews, pictures = rectangles(details.get_by_role("heading", name="Your reviews"), pictures)
    assert reviews["y"] < pictures["y"]


def test_the_card_of_a_detector_begins_with_its_own_section(studio) -> None:
    page = studio("models", model="washer")
    card = "# base\n\nTrained.\n\n## Learning curve\n\nIt fell.\n\n## Detector\n\n- flags 5%"
    page.route("**/models", with_models(lambda model: model.update(card=card), "washer"))
    page.reload()
    page.locator("table.models").get_by_role("button", name="washer").click()
    details = page.locator("tr.details:visible")
    details.locator("summary", has_text="Model card").click()
    assert details.locator(".prose h4").all_inner_texts() == ["Detector", "base", "Learning curve"]


def test_each_alteration_has_a_picture_that_is_missed_and_one_that_is_found(studio, site) -> None:
    power = site.http.get("/models/washer").json()["detector"]["power"]
    page = studio("models", model="tiny")
    page.locator("table.models").get_by_role("button", name="washer").click()
    details = page.locator("tr.details:visible")
    expect(details).to_contain_text("the first image that is missed and the first that is found")
    shown = details.locator(".pictures [role=img]").evaluate_all("all => all.map((e) => e.ariaLabel)")
    kinds = sorted(power["shares"].items(), key=lambda item: [*item[1].values()][-1])
    assert shown == [
        f"{kind}, {size}: {outcome}"
        for kind, sizes in kinds
        for outcome in ("missed", "found")
        for size, share in sizes.items()
        if share not in {"missed": (1,), "found": (0,)}[outcome]
    ]
    assert shown[0] == "stain, radius 8 pixels: missed"
    assert shown[1:3] == ["spot, radius 2 pixels: missed", "spot, radius 6 pixels: missed"]
    assert len(shown) > 20
    for canvas in details.locator(".pictures canvas").all():
        levels = canvas.evaluate(
            "e => [...e.getContext('2d').getImageData(0, 0, e.width, e.height).data].filter((_, i) => i % 4 === 0)"
        )
        assert 40 < sum(levels) / len(levels) < 150  # as the images are; the sheet is white
        assert max(levels) - min(levels) > 40
        [box] = rectangles(canvas)
        assert box["width"] >= 96


def test_pictures_that_cannot_be_loaded_can_be_requested_again(studio, tab) -> None:
    tab.expected_messages = ["status of 404"]
    page = studio("models", model="tiny")
    page.route("**/pictures", lambda route: route.fulfill(status=404, json={"detail": "There are no pictures."}))
    page.locator("table.models").get_by_role("button", name="washer").click()
    details = page.locator("tr.details:visible")
    expect(details.get_by_role("alert")).to_contain_text("There are no pictures.")
    page.unroute("**/pictures")
    details.get_by_role("button", name="Try again").click()
    expect(details).to_contain_text("the first image that is missed and the first that is found")


def test_choosing_a_detector_where_images_are_generated_leads_to_its_scores(studio) -> None:
    page = studio("generate", model="tiny")
    entries = page.evaluate("history.length")
    page.select_option("#model", "washer")
    expect(page.locator("#view-score")).to_be_visible()
    assert page.evaluate("history.length") == entries  # Back would return to a view that leads here again
    page.evaluate("location.hash = 'complete'")
    expect(page.locator("#view-score")).to_be_visible()
    expect(page.locator("#view-complete")).to_be_hidden()
    page.select_option("#model", "tiny")
    page.get_by_role("link", name="Generate", exact=True).click()
    expect(page.locator("#view-generate")).to_be_visible()


# -- reviews


@pytest.fixture
def reviewed_detector(site, models: Path, detector_folder: Path) -> Iterator[str]:
    """Serve a detector that keeps its images, `valve`, without reviews; and remove its next versions."""
    hidden = models / ".valve"
    shutil.copytree(detector_folder, hidden)
    images = detector_folder.parents[1] / "images"
    kept_images.keep(hidden, open_folder(images, sorted(images.iterdir())), None, None, "auto")
    hidden.rename(models / "valve")
    eventually(lambda: site.http.get("/models/valve").status_code == 200)
    yield "valve"
    for review in site.http.get("/models/valve/reviews").json()["reviews"]:
        site.http.delete(f"/models/valve/reviews/{review['id']}")
    for folder in models.glob("valve*"):
        shutil.rmtree(folder)
    eventually(lambda: site.http.get("/models/valve").status_code == 404)


def test_reviews_are_sent_undone_listed_and_deleted(
    studio, tab, site, images: list[Path], reviewed_detector: str, tmp_path: Path
) -> None:
    thumbnails: list[str] = []

    def note_thumbnail(response: Response) -> None:
        if response.url.endswith("/thumbnail"):
            thumbnails.append(response.url)

    page = studio(model=reviewed_detector, on_response=note_thumbnail)
    view = page.locator("#view-score")
    view.locator("input[type=file]").first.set_input_files(images[:2])
    view.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    page.locator(".strip .tile", has_text="good").click()
    review = page.locator(".reading .review")
    expect(review.get_by_role("button", name="This image is good")).to_have_count(0)  # it was not flagged
    review.get_by_role("button", name="This image is defective").click()
    expect(review).to_contain_text("Kept as defective until")
    page.locator(".strip .tile", has_text="missing").click()
    expect(page.locator(".reading .verdict")).to_contain_text("the next version of the detector learns from it")
    good = review.get_by_role("button", name="This image is good")
    good.focus()
    page.keyboard.press("Enter")
    expect(review).to_contain_text("Kept as good until")
    undo = review.get_by_role("button", name="Undo")
    expect(undo).to_be_focused()
    undo.click()
    expect(good).to_be_focused()
    good.click()
    expect(review).to_contain_text("Kept as good until")
    page.locator(".strip .tile", has_text="good").click()
    expect(review).to_contain_text("Kept as defective until")  # it is remembered
    page.evaluate("location.hash = 'models'")
    page.locator("table.models").get_by_role("button", name=reviewed_detector).click()
    section = page.locator("section.reviews")
    rows = section.locator(".reviewed li")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("defective")
    expect(rows.nth(1)).to_contain_text("missing.png")
    rows.nth(1).scroll_into_view_if_needed()
    for row, name in enumerate(("good.png", "missing.png")):
        thumbnail = rows.nth(row).get_by_role("img", name=f"Reviewed image {name}")
        expect(thumbnail).to_have_js_property("naturalWidth", 96)
        expect(thumbnail).to_have_js_property("naturalHeight", 72)
    section.get_by_role("button", name="Delete the review of good.png").click()
    expect(rows).to_have_count(1)
    expect(rows.get_by_role("img", name="Reviewed image missing.png")).to_be_visible()
    assert len(thumbnails) == 2  # the list has changed, and loads none again
    assert [entry["verdict"] for entry in site.http.get("/models/valve/reviews").json()["reviews"]] == ["good"]
    tab.expected_messages = ["status of 503"]
    page.route("**/reviews/*", lambda route: route.fulfill(status=503, json={"detail": "The queue refuses it."}))
    with page.expect_response("**/reviews/*"):
        section.get_by_role("button", name="Delete the review of missing.png").click()
    expect(rows.get_by_role("alert")).to_contain_text("The queue refuses it.")
    with page.expect_response("**/models"):  # by then, a list that was loaded again would be shown without the failure
        pass
    expect(rows.get_by_role("alert")).to_contain_text("The queue refuses it.")
    page.unroute_all(behavior="wait")
    expect(section.get_by_text("An update needs")).to_be_hidden()
    axe = Axe().run(page).response
    assert [finding["id"] for finding in axe["violations"] if finding["impact"] in ("serious", "critical")] == []
    section.get_by_role("button", name="Delete the review of missing.png").click()
    expect(section).to_contain_text("None yet.")
    expect(section.get_by_role("button", name="Update detector")).to_have_attribute("aria-disabled", "true")
    expect(section).to_contain_text("An update needs a review.")
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    page.evaluate("location.hash = 'score'")
    page.locator(".strip .tile", has_text="missing").click()
    expect(review).to_contain_text("score it again")  # the page has lost the file


def test_reviews_that_are_sent_while_their_detector_is_away_are_listed_when_it_is_back(
    studio, images: list[Path], reviewed_detector: str
) -> None:
    page = studio(model=reviewed_detector)
    page.locator("#view-score input[type=file]").first.set_input_files(images[1])
    page.get_by_role("button", name="Score 1 image").click()
    review = page.locator(".reading .review")
    expect(review.get_by_role("button", name="This image is good")).to_be_visible()
    page.evaluate("location.hash = 'models'")
    model = page.locator("table.models").get_by_role("button", name=reviewed_detector)
    model.click()
    section = page.locator("section.reviews")
    expect(section).to_contain_text("None yet.")
    page.route("**/models", without_models(reviewed_detector))
    expect(model).to_have_count(0)
    page.evaluate("location.hash = 'score'")
    review.get_by_role("button", name="This image is good").click()
    expect(review).to_contain_text("Kept as good until")
    page.unroute_all(behavior="wait")
    page.evaluate("location.hash = 'models'")
    expect(section.locator(".reviewed li")).to_have_count(1)


def test_a_review_of_a_file_that_was_deleted_names_it(studio, images: list[Path], reviewed_detector: str) -> None:
    page = studio(model=reviewed_detector)
    page.locator("#view-score input[type=file]").first.set_input_files(images[1])
    page.get_by_role("button", name="Score 1 image").click()
    review = page.locator(".reading .review")
    good = review.get_by_role("button", name="This image is good")
    expect(good).to_be_visible()
    images[1].unlink()
    good.click()
    expect(review).to_contain_text("missing.png is empty, or has changed since it was selected.")


def test_undo_does_not_delete_the_review_of_another_tab_and_a_reload_keeps_it(
    studio, images: list[Path], reviewed_detector: str
) -> None:
    pages = [studio(model=reviewed_detector) for _ in range(2)]
    reviews = [page.locator(".reading .review") for page in pages]
    for page in pages:
        page.locator("#view-score input[type=file]").first.set_input_files(images[1])
        page.get_by_role("button", name="Score 1 image").click()
    for page, review, verdict in zip(pages, reviews, ("good", "defective"), strict=True):
        page.get_by_role("button", name=f"This image is {verdict}").click()
        expect(review).to_contain_text(f"Kept as {verdict} until")
    reviews[0].get_by_role("button", name="Undo").click()
    expect(reviews[0]).to_contain_text("Kept as defective until")
    expect(reviews[0]).to_contain_text("This image has been reviewed again.")
    pages[0].reload()
    expect(reviews[0]).to_contain_text("Kept as defective until")  # it is kept with its job
    reviews[0].get_by_role("button", name="Undo").click()
    expect(reviews[0]).to_have_text("To say what this image is, score it again.")  # the page has lost the file
    reviews[1].get_by_role("button", name="Undo").click()
    expect(reviews[1].get_by_role("button", name="This image is good")).to_be_visible()


def test_a_name_that_is_typed_for_a_new_version_stays_while_models_change(studio, reviewed_detector: str) -> None:
    page = studio("models", model=reviewed_detector)
    table = page.get_by_role("table", name="Models")
    toggle = table.get_by_role("button", name=reviewed_detector)
    toggle.click()
    name = table.get_by_label("Name of the new version")
    name.fill("bottle-caps")

    batching = {"groups": "fixed", "check": "failed", "detail": "of another worker"}

    def change(model: Document) -> None:
        model.update(batching=batching)
        if model["name"] == "tiny":
            model["metrics"].update(test_bpd=3.39)

    page.route("**/models", with_models(change))
    expect(table).to_contain_text("3.39")
    expect(name).to_be_focused()
    expect(name).to_have_value("bottle-caps")

    page.route("**/models", with_models(lambda model: model["detector"].update(weakness="it is old"), "valve"))
    expect(table).to_contain_text("This detector is weak: it is old.")
    expect(toggle).to_be_focused()
    expect(name).to_have_value("bottle-caps")


def test_thumbnails_of_reviews_are_loaded_when_they_come_into_view(studio) -> None:
    page = studio("models", model="tiny")
    review = {"verdict": "good", "is_ood": True, "p_value": 0.03, "expires_at": "2030-01-01T00:00:00Z"}
    reviews = [review | {"id": f"{i:016x}", "file": f"{i}.png"} for i in range(50)]
    requested: list[str] = []

    def answer(route: Route) -> None:
        requested.append(route.request.url.split("/")[-2])
        route.fulfill(body=reduced_jpeg(good_image(1), 128), content_type="image/jpeg")

    page.route("**/models/washer/reviews", lambda route: route.fulfill(json={"reviews": reviews}))
    page.route("**/reviews/*/thumbnail", answer)
    page.locator("table.models").get_by_role("button", name="washer").click()
    rows = page.locator("section.reviews .reviewed li")
    expect(rows).to_have_count(50)
    section = page.locator("section.reviews")
    expect(section).to_contain_text("50 good, 0 defective")
    above, listed = rectangles(section.get_by_text("cannot be updated"), section.locator(".reviewed"))
    assert above["y"] < listed["y"]  # an update is within reach, however many reviews there are
    assert listed["height"] < 600
    rows.nth(0).scroll_into_view_if_needed()
    expect(rows.nth(0).get_by_role("img")).to_be_visible()
    assert 0 < len(requested) < 40
    rows.nth(49).scroll_into_view_if_needed()
    expect(rows.nth(49).get_by_role("img", name="Reviewed image 49.png")).to_be_visible()
    assert len(requested) == len(set(requested))
    page.route("**/reviews/*", lambda route: route.fulfill(status=204))  # a deletion
    first = reviews.pop(0)
    reviews[-1]["file"] = "renamed.png"  # by a later review of the same image
    rows.nth(0).get_by_role("button").click()
    expect(rows).to_have_count(49)
    rows.nth(48).scroll_into_view_if_needed()
    expect(rows.nth(48).get_by_role("img", name="Reviewed image renamed.png")).to_be_visible()
    reviews.pop(10)
    rows.nth(47).get_by_role("button").click()
    expect(rows).to_have_count(48)
    assert section.locator(".reviewed").evaluate("(list) => list.scrollTop") > 500  # the place in the list is kept
    reviews.insert(0, first)  # it was reviewed again
    rows.nth(1).get_by_role("button").click()
    expect(rows).to_have_count(49)
    rows.nth(0).scroll_into_view_if_needed()
    expect(rows.nth(0).get_by_role("img")).to_be_visible()
    assert requested.count(first["id"]) == 2


UPDATED = {
    "id": "an-update", "status": "succeeded", "model": {"name": "valve-2", "version": "ab" * 32}, "skipped": [],
    "calibration": {
        "n_fit": 13, "n_rank": 28, "smallest_p": 0.034, "weakness": "28 scenes rank",
        "summary": "71% of all altered images are flagged.",
        "reviews": {
            "good": 1, "still_flagged": 1, "defective": 3, "found": 3, "added": 2, "found_added": 2, "found_before": 1
        },
    },
    "timing": {"queue_s": 0.1, "compute_s": 60.0, "batch_size": 1},
}  # fmt: skip


def test_an_update_learns_from_the_reviews(
    studio, tab, site, models: Path, images: list[Path], reviewed_detector: str
) -> None:
    tab.expected_messages = ["status of 422"]  # of the name that is taken
    flagged = images[1].read_bytes()
    scored = site.http.post("/score", params={"model": reviewed_detector}, files={"image": ("missing.png", flagged)})
    data = {"job": scored.json()["id"], "verdict": "good"}
    sent = site.http.post("/models/valve/reviews", data=data, files={"image": ("missing.png", flagged)})
    assert sent.status_code == 201, sent.text
    page = studio("models", model=reviewed_detector)
    page.locator("table.models").get_by_role("button", name=reviewed_detector).click()
    section = page.locator("section.reviews")
    name = section.get_by_label("Name of the new version")
    expect(name).to_have_value("valve-2")
    update = section.get_by_role("button", name="Update detector")
    expect(update).not_to_have_attribute("aria-disabled", "true")
    name.fill("tiny")
    update.click()
    expect(section.locator(".field .refusal")).to_contain_text("a model 'tiny' already exists")
    requests: list[object] = []

    queued = {"id": "an-update", "status": "queued", "position": 0}

    def accept(route: Route) -> None:
        requests.append(route.request.post_data_json)
        route.fulfill(status=202, json=queued)

    events = [
        ("running", {"status": "running", "error": None}),
        *(
            ("progress", {"stage": "rank", "step": step, "total": 28, "done": 0, "n": 1, "preview": None})
            for step in (14, 21)
        ),
        ("succeeded", {"status": "succeeded", "error": None}),
    ]

    def stream(events: list[tuple[str, dict[str, object]]]) -> Callable[[Route], None]:
        lines = (f"event: {kind}\nid: {i}-0\ndata: {json.dumps(data)}\n\n" for i, (kind, data) in enumerate(events, 1))
        body = "".join(lines)
        return lambda route: route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/update", accept)
    page.route("**/jobs/an-update", lambda route: route.fulfill(json=queued))  # its place in the queue
    page.route("**/jobs/an-update/events", stream(events))
    page.route("**/jobs/an-update/result", lambda route: route.fulfill(json=UPDATED))
    expect(section).to_contain_text("on fewer images if the job runs out of time")
    section.evaluate(
        """section => {
          window.texts = [];
          const added = changes => changes.flatMap(change => [...change.addedNodes]);
          const keep = changes => texts.push(...added(changes).map(node => node.textContent));
          new MutationObserver(keep).observe(section, {childList: true, subtree: true});
        }"""
    )
    name.fill("valve-2")
    update.focus()
    page.keyboard.press("Enter")
    run = section.locator("article.run")
    expect(run).to_contain_text("Updated")
    assert requests == [{"model": "valve", "name": "valve-2"}]
    texts = page.evaluate("window.texts")
    assert "Ranking good images: 14 of 28" in texts
    assert any(re.fullmatch(r"Ranking good images: 21 of 28, about \d+ s left", text) for text in texts)
    expect(run).to_contain_text("13 images for estimation, 1 of them reviewed; 28 for ranking.")
    expect(run).to_contain_text("1 of 1 good image would be flagged again")
    expect(run).to_contain_text(
        "The new version finds 3 of 3 defective images, each judged without learning from it; "
        "of the 2 added, it finds 2 and the former version 1."
    )
    use = run.get_by_role("button", name="Score images with it")
    expect(use).to_be_disabled()
    shutil.copytree(models / "valve", models / ".next")
    (models / ".next").rename(models / "valve-2")
    expect(use).to_be_enabled()
    use.click()
    expect(page.locator("#view-score")).to_be_visible()
    expect(page.locator("#model")).to_have_value(re.compile("valve-2"))
    # names of files with what looks like the id of a review, and a review that does not exist any more
    ids = [sent.json()["id"], "0" * 16, sent.json()["id"]]
    names = ", ".join(f"{review}-{'ab' * 8}-missing.png" for review in ids)
    detail = f"1 reviewed image shows scenes of ranking images: leave out {names}."
    error = {"reason": "input", "field": "reviewed", "detail": detail}
    page.unroute("**/jobs/an-update/events")
    page.route("**/jobs/an-update/events", stream([("failed", {"status": "failed", "error": error})]))
    page.evaluate("location.hash = 'models'")
    run.get_by_role("button", name="Remove").click()
    update.click()
    expect(run.get_by_role("alert")).to_contain_text(detail)
    deleted: list[str] = []
    page.on("request", lambda request: deleted.append(request.url) if request.method == "DELETE" else None)
    run.get_by_role("button", name="Delete this review").click()
    expect(run).to_contain_text("1 review deleted.")
    expect(run.locator("h4")).to_be_focused()
    assert [url.rpartition("/")[2] for url in deleted] == [sent.json()["id"]]
    expect(section).to_contain_text("None yet.")
    assert site.http.get("/models/valve/reviews").json()["reviews"] == []


def test_a_detector_without_its_images_says_why_it_cannot_be_updated(studio) -> None:
    page = studio("models", model="washer")
    page.locator("table.models").get_by_role("button", name="washer").click()
    section = page.locator("section.reviews")
    expect(section).to_contain_text(
        "keeps no good images, so it cannot be updated: make it again with ncml adapt --keep"
    )
    expect(section.get_by_role("button", name="Update detector")).to_have_count(0)
