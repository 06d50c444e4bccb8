"""The page while something fails: the connection, the service, the models, or an upload."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Page, Request, Route, expect

from tests.browser.announcements import RECORD_ANNOUNCEMENTS
from tests.browser.answers import changed, with_members, with_models, without_models
from tests.browser.layout import rectangles

REFUSED = "Failed to load resource"
ABORTED = "ERR_FAILED"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of 8x8 pixels."""
    pixels = np.random.default_rng(3).integers(96, 160, (3, 8, 8, 3), np.uint8)
    paths = [tmp_path / f"{name}.png" for name in ("first", "second", "third")]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


def refuse(route: Route) -> None:
    """Answer that the API key is not valid."""
    route.fulfill(status=401, json={"detail": "The API key is not valid.", "status": 401})


def select_images(page: Page, paths: list[Path]) -> None:
    page.locator("#view-score input[type=file]").set_input_files(paths)
    expect(page.locator(".waiting li")).to_have_count(len(paths))


def test_a_result_is_fetched_again_after_a_lost_connection(studio, tab) -> None:
    tab.expected_messages = [REFUSED, ABORTED]
    page = studio("generate")
    page.route("**/jobs/*/result", lambda route: route.abort(), times=1)
    page.locator("#view-generate").get_by_role("button", name="Generate").click()
    expect(page.locator("article.run .cell img")).to_have_count(8)
    expect(page.locator("article.run .failure")).to_have_count(0)


@pytest.mark.parametrize(
    ("view", "end"), [("generate", "Generated in"), ("trajectory", "Trace complete")], ids=["generate", "trajectory"]
)
def test_a_result_that_is_refused_can_be_fetched_later(studio, tab, view: str, end: str) -> None:
    tab.expected_messages = [REFUSED]
    page = studio(view)
    page.route("**/jobs/*/result", refuse)
    page.locator(f"#view-{view} button[type=submit]").click()
    run = page.locator("article.run")
    failure = run.locator(".failure")
    expect(failure).to_contain_text("The API key is not valid.")
    page.unroute("**/jobs/*/result")
    failure.get_by_role("button", name="Try again").click()
    expect(run).to_contain_text(end)
    expect(failure).to_have_count(0)
    page.route("**/jobs/*/result", refuse)
    page.reload()
    failure.get_by_role("button", name="Dismiss").click()
    run.get_by_role("button", name="Remove").click()
    expect(run).to_have_count(0)


def test_a_score_that_cannot_be_fetched_is_dismissed_at_once(studio, tab, images: list[Path]) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score")
    page.route("**/jobs/*/result", refuse)
    select_images(page, images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    failure = page.locator("#view-score .run .failure")
    expect(failure).to_contain_text("The API key is not valid.")
    failure.get_by_role("button", name="Dismiss").click()
    expect(page.locator("#view-score .run")).to_have_count(0)
    expect(page.locator("#view-score .failure")).to_have_count(0)


FAILED = 'event: failed\ndata: {"error": {"detail": "It failed."}}\n\n'
EXPIRED = {"status": 404, "json": {"status": 404, "detail": "There is no such job."}}


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ({"content_type": "text/event-stream", "body": FAILED}, "3 images: It failed."),
        (EXPIRED, "This result has expired"),
    ],
    ids=["failed", "expired"],
)
def test_the_images_of_a_score_without_a_result_can_be_scored_again(
    studio, tab, images: list[Path], end: dict, message: str
) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score")
    held_routes: list[Route] = []
    page.route("**/score", lambda route: route.fulfill(status=202, json={"id": "unknown"}))
    page.route("**/jobs/unknown/events", lambda route: held_routes.append(route))
    select_images(page, images)
    with page.expect_request("**/jobs/unknown/events"):
        page.get_by_role("button", name="Score 3 images").click()
    page.locator("#view-score .run").get_by_role("button", name="Cancel").focus()
    held_routes[0].fulfill(**end)
    failure = page.locator("#view-score .run .failure")
    expect(failure).to_contain_text(message)
    expect(failure).to_contain_text("Ready to score again.")
    expect(page.locator("#view-score h1")).to_be_focused()
    expect(page.locator(".waiting li")).to_have_count(3)
    page.unroute("**/score")
    page.get_by_role("button", name="Score 3 images").click()
    expect(page.locator(".strip .tile")).to_have_count(3)


def test_a_result_that_is_hidden_from_a_new_api_key_may_belong_to_another(studio, tab, images: list[Path]) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score")
    page.route("**/score", lambda route: route.fulfill(status=202, json={"id": "unknown"}))
    page.route("**/jobs/unknown/events", lambda route: route.fulfill(**EXPIRED))
    page.locator("#key").click()
    page.get_by_label("Key", exact=True).fill("ncml_other")
    page.get_by_role("button", name="Use key").click()
    select_images(page, images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator("#view-score .run .failure")).to_contain_text("or was requested with another API key.")


@pytest.mark.parametrize("view", ["generate", "calibrate"])
def test_a_failure_is_announced_once(studio, tmp_path: Path, view: str) -> None:
    page = studio(view)
    page.route(f"**/{view}", lambda route: route.fulfill(status=202, json={"id": "unknown"}))
    page.route("**/jobs/unknown/events", lambda route: route.fulfill(content_type="text/event-stream", body=FAILED))
    if view == "calibrate":
        (tmp_path / "images.zip").write_bytes(b"PK")
        page.locator("#view-calibrate input[type=file]").first.set_input_files(tmp_path / "images.zip")
    page.locator(f"#view-{view} button[type=submit]").click()
    expect(page.locator("article.run").get_by_role("alert")).to_contain_text("It failed.")  # which is announced
    expect(page.locator("#live")).to_have_text("Submitted")


def test_a_map_that_cannot_be_fetched_does_not_cost_the_score(studio, tab, images: list[Path]) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("score")

    def refuse_maps(route: Route) -> None:
        if route.request.headers["accept"] != "image/png":
            route.continue_()
            return
        route.fulfill(status=503, json={"detail": "The queue is unreachable.", "status": 503})

    page.route("**/jobs/*/result", refuse_maps)
    page.get_by_label("In tiles").check()
    select_images(page, images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading .answer img")).to_be_visible()
    page.locator(".reading summary", has_text="Map").click()
    failure = page.locator(".reading .map .failure")
    expect(failure).to_contain_text("The queue is unreachable.")
    page.unroute("**/jobs/*/result")
    failure.get_by_role("button", name="Try again").click()
    expect(page.locator(".reading .map img")).to_have_count(2)
    page.reload()
    expect(page.locator(".reading .answer")).to_contain_text("Only the map")
    expect(page.locator(".reading .answer img")).to_be_visible()


def test_a_restart_of_the_service_keeps_the_settings(studio) -> None:
    page = studio("generate")
    view = page.locator("#view-generate")
    view.locator("summary").click()
    values = {"Temperature": "0.7", "Guidance": "3", "Refinement steps": "5"}
    for label, value in values.items():
        view.get_by_label(label, exact=True).fill(value)
    page.route("**/models", without_models("tiny", "wide"))
    expect(page.locator("#pulse")).to_have_text("No model yet")
    page.unroute_all(behavior="wait")
    expect(page.locator("#pulse")).to_contain_text("Ready")
    for label, value in values.items():
        expect(view.get_by_label(label, exact=True)).to_have_value(value)


def test_another_model_replaces_the_selected_one_with_a_notice_until_it_is_back(studio) -> None:
    page = studio("score", model="wide")
    notice = page.locator("#notice")
    for _ in range(2):
        page.route("**/models", without_models("wide"))
        expect(notice).to_contain_text("wide is not available: tiny is used instead.")
        expect(page.locator("#model")).to_have_value("tiny")
        page.unroute_all(behavior="wait")
        expect(page.locator("#model")).to_have_value("wide")
        expect(notice.locator(".failure")).to_have_count(0)
    class_field = page.locator("#view-score").get_by_label("Class")
    page.locator("#view-score summary").click()
    class_field.select_option("dark")
    page.route("**/models", without_models("wide"))
    notice.get_by_role("button", name="Keep using tiny").click()
    expect(notice.locator(".failure")).to_have_count(0)
    page.unroute_all(behavior="wait")
    expect(page.locator("#model option")).to_have_count(2)
    expect(page.locator("#model")).to_have_value("tiny")
    expect(class_field).to_have_value("dark")


def test_a_model_that_workers_cannot_use_is_shown_with_the_reason(studio) -> None:
    page = studio("score", model="wide")
    fault = "wide/detector.json has format 4, not 5: make the detector again."
    page.route("**/models", without_models("wide", fault=fault))
    expect(page.locator("#notice")).to_contain_text(f"wide is not available: tiny is used instead.{fault}")
    page.evaluate("location.hash = 'models'")
    listed = page.locator("#view-models .failure")
    expect(listed).to_contain_text("wide cannot be used")
    expect(listed).to_contain_text(fault)
    page.unroute_all(behavior="wait")
    expect(listed).to_have_count(0)


def test_two_versions_of_a_model_are_distinguished_during_an_update(studio, site) -> None:
    page = studio("generate")
    version = next(model["version"] for model in site.http.get("/models").json()["models"] if model["name"] == "tiny")
    used, other = f"tiny@{version[:12]}", "tiny@ffffffffffff"

    def add_version(document: dict) -> None:
        newer = [model | {"version": "f" * 64} for model in document["models"] if model["name"] == "tiny"]
        document["models"] = newer + document["models"]

    view = page.locator("#view-generate")
    view.get_by_label("Images").fill("1")
    view.get_by_role("button", name="Generate").click()
    run = page.locator("article.run")
    expect(run.locator(".cell img")).to_have_count(1)
    page.route("**/models", changed(add_version))
    select = page.locator("#model")
    expect(select.locator("option")).to_have_text([other, used, "wide"])
    expect(select).to_have_value(used)
    select.select_option(other)
    run.get_by_role("button", name="Reuse settings").click()
    expect(select).to_have_value(used)
    for _ in range(2):  # the second answer has been processed when the third is requested
        with page.expect_response("**/models"):
            pass
    expect(select).to_have_value(used)
    page.route("**/generate", lambda route: None)
    with page.expect_request("**/generate") as request:
        view.get_by_role("button", name="Generate").click()
    assert request.value.post_data_json["model"] == used
    page.get_by_role("link", name="Models").click()
    table = page.get_by_role("table", name="Models")
    table.get_by_role("button", name=other).click()
    expect(table.locator("tr.details:visible")).to_have_count(1)
    expect(table.get_by_role("button", name=used)).to_have_attribute("aria-expanded", "false")


def test_a_service_that_does_not_respond_is_reported(studio) -> None:
    page = studio("score")
    page.route("**/models", lambda route: None)  # neither answered nor refused
    expect(page.locator("#notice")).to_contain_text("The service does not respond.")
    expect(page.locator("#pulse")).to_have_text("Unreachable")
    page.unroute("**/models")
    expect(page.locator("#pulse")).to_contain_text("Ready")


def test_an_example_clicked_before_the_models_are_known_is_scored_afterwards(studio) -> None:
    page = studio("score")
    held_routes: list[Route] = []
    is_held = True
    page.route("**/models", lambda route: held_routes.append(route) if is_held else route.continue_())
    with page.expect_request("**/models"):
        page.reload()
    page.get_by_role("button", name="stripes", exact=True).click()
    is_held = False
    for route in held_routes:
        route.continue_()
    expect(page.locator(".strip .tile")).to_have_count(1)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_images_are_scored_where_the_metrics_are_blocked(studio, tab, images: list[Path]) -> None:
    tab.expected_messages = [REFUSED]
    page = studio("models")
    page.route("**/metrics", lambda route: route.fulfill(status=403))
    page.reload()
    expect(page.locator("#pulse")).to_have_text("Ready")
    expect(page.locator("#notice .failure")).to_have_count(0)
    expect(page.locator("#view-models .health")).to_have_text(
        "Not available: the metrics of the service cannot be loaded."
    )
    page.get_by_role("link", name="Score").click()
    select_images(page, images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading h2")).to_have_text("first.png")


def calibrate_again(model: dict) -> None:
    for calibration in (model["calibration"], *model["calibrations"].values(), model["tiles"]):
        calibration |= {"version": "f" * 64, "n_rank": 1000, "weakness": "", "smallest_p": 0.001}


@pytest.mark.parametrize("tiled", [False, True])
def test_a_verdict_is_not_explained_with_a_later_calibration(studio, images: list[Path], tiled: bool) -> None:
    page = studio("score")
    page.get_by_label("In tiles").set_checked(tiled)
    select_images(page, images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    verdict = page.locator(".reading .verdict")
    expect(verdict).to_contain_text(re.compile(r"of the \d+ held-out images"))
    page.route("**/models", with_models(calibrate_again, "tiny"))
    expect(verdict).not_to_contain_text("held-out images")
    expect(verdict).to_contain_text("p = ")
    expect(page.locator(".reading .placed")).to_have_count(0)
    page.unroute_all(behavior="wait")
    expect(verdict).to_contain_text(re.compile(r"of the \d+ held-out images"))


def test_a_new_calibration_of_the_model_is_used_at_once(studio, images: list[Path]) -> None:
    page = studio("score")
    page.get_by_label("In tiles").check()
    select_images(page, images[:1])
    expect(page.locator(".waiting")).to_contain_text("1 tile of 8 × 8 pixels")

    def change(model: dict) -> None:
        model["calibrations"]["tolerant"] = model["calibrations"]["default"] | {"version": "e" * 64}
        model["tiles"] |= {"version": "f" * 64, "width": 4, "height": 4}

    page.route("**/models", with_models(change, "tiny"))
    expect(page.locator(".waiting")).to_contain_text("9 tiles of 4 × 4 pixels")
    expect(page.get_by_label("Calibration").locator("option")).to_have_text(["default", "tolerant"])


def test_new_calibrations_of_the_model_keep_the_settings(studio) -> None:
    page = studio("generate")
    temperature = page.locator("#view-generate").get_by_label("Temperature", exact=True)
    page.locator("#view-generate summary").click()
    temperature.fill("0.7")
    page.get_by_role("link", name="Score").click()
    page.locator("#view-score summary", has_text="Class, noise level").click()
    condition = page.locator("#view-score details").get_by_label
    condition("Class").select_option("dark")
    condition("Noise level").fill("2")
    names = ["default"]
    for name in ("tolerant", "strict"):
        names.append(name)

        def change(model: dict) -> None:
            model["calibrations"] |= dict.fromkeys(names, model["calibrations"]["default"])

        page.route("**/models", with_models(change, "tiny"))
        expect(condition("Calibration").locator("option")).to_have_text(names)
        expect(condition("Calibration")).to_have_value("" if name == "tolerant" else "tolerant")
        condition("Calibration").select_option("tolerant")
    expect(condition("Class")).to_have_value("dark")
    expect(condition("Noise level")).to_have_value("2")
    expect(temperature).to_have_value("0.7")


def test_an_upload_is_shown_and_can_be_canceled(studio, images: list[Path]) -> None:
    page = studio("score")
    view = page.locator("#view-score")
    select_images(page, images)
    page.route("**/score", lambda route: None)  # as if the upload took long
    submit = view.locator(".send .primary")
    submit.click()
    expect(submit).to_have_text("Uploading")
    expect(submit).to_have_attribute("aria-busy", "true")
    expect(submit).to_be_disabled()
    expect(view.get_by_role("button", name="Remove first.png")).to_be_disabled()
    expect(view.get_by_role("button", name="stripes")).to_be_disabled()
    view.get_by_role("button", name="Cancel").click()
    expect(view.get_by_role("status").filter(has_text="The request was canceled.")).to_be_visible()
    expect(submit).to_have_text("Score 3 images")
    expect(submit).to_be_focused()
    page.unroute("**/score")
    submit.click()
    expect(page.locator(".strip .tile")).to_have_count(3)


def test_an_example_that_is_loaded_while_others_are_sent_is_listed(studio, images: list[Path]) -> None:
    page = studio("score")
    view = page.locator("#view-score")
    select_images(page, images)
    held_routes: list[Route] = []
    for path in ("**/studio/chelsea.jpg", "**/score"):
        page.route(path, lambda route: held_routes.append(route))
    with page.expect_request("**/studio/chelsea.jpg"):
        view.get_by_role("button", name="photo").click()
    with page.expect_request("**/score"):
        view.get_by_role("button", name="Score 3 images").click()
    expect(view.locator(".send .primary")).to_have_text("Uploading")
    photo, upload = held_routes
    photo.continue_()
    expect(page.locator(".waiting li")).to_have_count(4)
    expect(view.get_by_role("button", name="stripes")).to_be_disabled()
    upload.continue_()
    expect(page.locator(".strip .tile")).to_have_count(3)
    expect(page.locator(".waiting li")).to_contain_text("chelsea.jpg")
    expect(view.get_by_role("button", name="stripes")).to_be_enabled()


def score_with_limits(page: Page, images: list[Path], limits: dict[str, int]) -> list[Request]:
    """Score three images on a service with these limits; return the list of its requests, which still grows."""
    page.route("**/models", with_members(**limits))
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    submissions: list[Request] = []
    page.on("request", lambda request: request.url.endswith("/score") and submissions.append(request))
    select_images(page, images)
    page.get_by_role("button", name="Score 3 images").click()
    return submissions


@pytest.mark.parametrize("limits", [{"max_images": 2}, {"max_body_bytes": 8000}], ids=["by number", "by bytes"])
def test_images_are_split_into_requests_that_the_service_accepts(studio, images: list[Path], limits) -> None:
    page = studio("score")
    submissions = score_with_limits(page, images, limits)
    expect(page.locator(".strip .tile")).to_have_count(3)
    assert len(submissions) == 2


def test_an_image_that_no_request_can_hold_is_named_and_not_uploaded(studio, images: list[Path]) -> None:
    images[1].write_bytes(images[1].read_bytes() + bytes(8000))
    page = studio("score")
    submissions = score_with_limits(page, images, {"max_body_bytes": 8000})
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("second.png has 0.0 MiB; at most 0.0 MiB are accepted.")
    expect(refusal).to_contain_text("Use a smaller image. 2 other images submitted.")
    expect(page.locator(".strip .tile")).to_have_count(2)
    expect(page.locator(".waiting .bad")).to_contain_text("second.png")
    assert len(submissions) == 2


def test_settings_changed_during_an_upload_apply_to_the_next_one(studio, images: list[Path]) -> None:
    page = studio("score")
    page.route("**/models", with_members(max_images=1))
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    select_images(page, images)
    held_routes: list[Route] = []
    is_held = True
    page.route("**/score", lambda route: held_routes.append(route) if is_held else route.continue_())
    with page.expect_request("**/score"):
        page.get_by_role("button", name="Score 3 images").click()
    page.get_by_label("In tiles").check()
    page.select_option("#model", "wide")
    is_held = False
    for route in held_routes:
        route.continue_()
    expect(page.locator(".strip .tile")).to_have_count(3)
    for image in images:
        page.locator(".strip .tile", has_text=image.name).click()
        expect(page.locator(".reading h2")).to_have_text(image.name)
        expect(page.locator(".reading header .hint")).to_contain_text("tiny")
        shown = page.locator(".reading .answer img")
        expect(shown).to_have_js_property("naturalWidth", 8)
        expect(shown).to_have_js_property("naturalHeight", 8)
        expect(page.locator(".reading .big")).to_contain_text("bits/dim")  # not in tiles


def test_an_image_is_shown_as_the_latest_model_sees_it(studio, images: list[Path]) -> None:
    page = studio("score")
    page.evaluate(
        """() => {
            const original = window.createImageBitmap;
            window.calls = [];
            window.closedBitmaps = 0;
            window.createImageBitmap = async (...args) => {
                await new Promise((resolve) => window.calls.push(resolve));
                const bitmap = await original(...args);
                const close = bitmap.close.bind(bitmap);
                bitmap.close = () => {
                    window.closedBitmaps += 1;
                    close();
                };
                return bitmap;
            };
        }"""
    )
    select_images(page, images[:1])
    page.wait_for_function("() => window.calls.length === 1")
    page.select_option("#model", "wide")
    page.wait_for_function("() => window.calls.length === 2")
    view = page.locator(".waiting canvas[role=img]")
    page.evaluate("window.calls[1]()")
    expect(view).to_have_attribute("width", "32")
    page.evaluate("window.calls[0]()")
    page.wait_for_function("() => window.closedBitmaps === 2")
    expect(view).to_have_attribute("width", "32")


def test_few_images_are_decoded_at_the_same_time_and_then_freed(studio, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    for path in paths:
        Image.new("RGB", (64, 64), (90, 120, 150)).save(path)
    page = studio("score")
    page.evaluate(
        """() => {
            const original = window.createImageBitmap;
            window.bitmaps = { open: 0, most: 0, all: 0 };
            window.createImageBitmap = async (...args) => {
                const { bitmaps } = window;
                bitmaps.all += 1;
                bitmaps.open += 1;
                bitmaps.most = Math.max(bitmaps.most, bitmaps.open);
                const bitmap = await original(...args);
                const close = bitmap.close.bind(bitmap);
                bitmap.close = () => {
                    bitmaps.open -= 1;
                    close();
                };
                return bitmap;
            };
        }"""
    )
    select_images(page, paths)
    expect(page.locator(".waiting li").filter(has_text="64 × 64 pixels")).to_have_count(9)
    assert page.evaluate("window.bitmaps") == {"open": 0, "most": 2, "all": 9}
    page.get_by_label("In tiles").check()
    expect(page.locator(".waiting li").filter(has_text=re.compile("tiles of 8 × 8"))).to_have_count(9)
    assert page.evaluate("window.bitmaps.all") == 9  # not decoded again


def test_of_a_large_folder_only_some_images_are_listed_and_decoded(studio) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    names = [f"{i}.png" for i in range(103)]
    files = [FilePayload(name=name, mimeType="image/png", buffer=buffer.getvalue()) for name in names]
    page = studio("score")
    page.evaluate(
        """() => {
            const original = window.createImageBitmap;
            window.decoded = 0;
            window.createImageBitmap = (...args) => {
                window.decoded += 1;
                return original(...args);
            };
        }"""
    )
    page.locator("#view-score input[type=file]").set_input_files(files)
    items = page.locator(".waiting li")
    expect(items).to_have_count(101)
    expect(items.last).to_have_text("and 3 more images")
    expect(items.filter(has_text="8 × 8 pixels")).to_have_count(100)
    assert page.evaluate("window.decoded") == 100
    page.get_by_role("button", name="Remove 0.png").click()
    expect(items.last).to_have_text("and 2 more images")
    expect(items.filter(has_text="8 × 8 pixels")).to_have_count(100)
    page.route("**/score", lambda route: route.fulfill(status=202, json={"id": "unknown"}))
    page.route("**/jobs/unknown*", lambda route: None)
    page.route("**/jobs/unknown/*", lambda route: None)
    page.get_by_role("button", name="Score 102 images").click()
    expect(items).to_have_count(0)
    assert page.evaluate("window.decoded") == 103  # the others when they are sent
    records = page.evaluate("JSON.parse(sessionStorage['ncml.job-records'])")
    views = [image["modelView"] for record in records for image in record["images"]]
    assert len(views) == 102
    assert all(views)


def test_files_that_are_left_out_are_named_until_the_next_selection(studio, images: list[Path]) -> None:
    notes, empty = (images[0].with_name(name) for name in ("notes.txt", "empty.jpg"))
    notes.write_text("hello")
    empty.touch()
    page = studio("score")
    selection = page.locator("#view-score input[type=file]").first
    selection.set_input_files([images[0], notes, empty, images[1]])
    skipped = page.get_by_role("status").filter(has_text="Skipped")
    page.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(skipped).to_have_text("Skipped: notes.txt (not an image), empty.jpg (empty).")
    selection.set_input_files(images[2])
    expect(page.get_by_role("button", name="Score 1 image")).to_be_visible()
    expect(skipped).to_have_count(0)


def test_a_file_that_was_deleted_after_its_selection_is_named(studio, images: list[Path]) -> None:
    page = studio("score")
    select_images(page, images)
    images[1].unlink()
    page.get_by_role("button", name="Score 3 images").click()
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("second.png is empty, or has changed since it was selected.")
    expect(refusal).to_contain_text("Select it again. 2 other images submitted.")
    expect(page.locator(".strip .tile")).to_have_count(2)
    expect(page.locator(".waiting .bad")).to_contain_text("second.png")


def test_a_file_that_became_empty_after_its_selection_can_be_replaced_in_a_calibration(
    studio, images: list[Path]
) -> None:
    page = studio("calibrate")
    view = page.locator("#view-calibrate")
    files, summary = view.locator("input[type=file]").first, view.locator("[data-field=image] > .hint")
    files.set_input_files(images)
    content, status = images[1].read_bytes(), images[1].stat()
    images[1].write_bytes(b"")
    view.get_by_label("Name of the new model").fill("mine")
    view.get_by_role("button", name="Calibrate").click()
    expect(view.locator("[data-field=image] .failure")).to_have_text(
        "second.png is empty, or has changed since it was selected."
        "It was removed: select it again, or calibrate without it."
    )
    expect(summary).to_have_text("2 files, 0.0 of at most 64.0 MiB. 1 other file skipped.")
    images[1].write_bytes(content)
    os.utime(images[1], ns=(status.st_atime_ns, status.st_mtime_ns))  # the same file as before
    files.set_input_files(images[1])
    expect(summary).to_have_text("3 files, 0.0 of at most 64.0 MiB.")


def test_a_waiting_job_shows_how_many_are_ahead(studio) -> None:
    page = studio("generate")
    waiting = {"status": "queued", "position": 2}
    page.route(re.compile(r"/jobs/[^/]+$"), changed(lambda document: document.update(waiting)))
    page.route("**/jobs/*/events", lambda route: None)
    page.locator("#view-generate").get_by_role("button", name="Generate").click()
    status = page.locator("article.run .progress p")
    expect(status).to_have_text("Waiting in the queue, 2 jobs ahead")
    waiting["position"] = 0
    expect(status).to_have_text("Waiting in the queue")  # it is the next one


def test_a_small_false_positive_rate_is_not_rounded_to_nothing(studio) -> None:
    page = studio("models")
    page.route("**/models", with_models(lambda model: model["calibration"].update(false_positive_rate=0.001), "tiny"))
    page.reload()
    page.get_by_role("button", name="tiny").click()
    expect(page.locator("tr.details:visible")).to_contain_text("At most 0.1% of in-distribution images")


def test_a_new_score_does_not_replace_a_reading_that_is_in_use(studio, images: list[Path]) -> None:
    page = studio("score")
    page.get_by_label("In tiles").check()
    select_images(page, images[:1])
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator(".reading h2")).to_have_text("first.png")
    held_routes: list[Route] = []
    is_held = True
    page.route("**/jobs/*/result", lambda route: held_routes.append(route) if is_held else route.continue_())
    select_images(page, images[1:])
    with page.expect_request("**/jobs/*/result"):
        page.get_by_role("button", name="Score 2 images").click()
    page.locator(".reading summary", has_text="Map").click()
    is_held = False
    for route in held_routes:
        route.continue_()
    expect(page.locator(".strip .tile")).to_have_count(3)
    expect(page.locator(".reading h2")).to_have_text("first.png")
    tile = page.locator(".tile", has_text="third.png")
    tile.click()
    expect(tile).to_be_focused()
    expect(page.locator(".reading h2")).to_have_text("third.png")
    # An image that is removed while it loads is an error in the console.
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    page.get_by_role("button", name="Remove results").click()
    expect(page.get_by_text("No scores yet")).to_be_visible()
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    expect(page.get_by_text("No scores yet")).to_be_visible()


@pytest.mark.parametrize("late", [0, 1], ids=["oldest last", "newest last"])
def test_scores_keep_their_order_after_a_reload(studio, late: int) -> None:
    page = studio("score")
    tiles = page.locator(".strip .tile")
    for count, name in enumerate(("stripes", "noise"), 1):
        page.get_by_role("button", name=name, exact=True).click()
        expect(tiles).to_have_count(count)
    ids = page.evaluate("JSON.parse(sessionStorage['ncml.job-records']).map(({ id }) => id)")
    held_routes: list[Route] = []
    page.route(f"**/jobs/{ids[late]}/result", lambda route: held_routes.append(route))
    with page.expect_request(f"**/jobs/{ids[late]}/result"):
        page.reload()
    expect(tiles).to_have_count(1)
    held_routes[0].continue_()
    expect(tiles).to_have_count(2)
    expect(tiles.locator(".name")).to_have_text(["noise.png", "stripes.png"])
    expect(page.locator(".reading h2")).to_have_text("noise.png")


def test_the_tables_of_the_health_keep_their_scroll_and_focus(studio) -> None:
    page = studio("models", viewport={"width": 360, "height": 740})
    table = page.locator("#view-models .scroll").first
    table.focus()
    table.evaluate("e => { e.scrollLeft = 40; }")
    for _ in range(2):
        with page.expect_response("**/models"):
            pass
    expect(table).to_be_focused()
    assert table.evaluate("e => e.scrollLeft") == 40


def test_tables_of_a_card_are_named_after_their_headings(studio) -> None:
    page = studio("models")
    page.get_by_role("button", name="wide").click()
    page.locator("summary:visible", has_text="Model card").click()
    for name in ("wide: a, b", "More: a, b"):
        expect(page.get_by_role("region", name=name)).to_be_visible()


def test_the_table_of_the_models_keeps_its_focus_and_an_open_card(studio) -> None:
    page = studio("models")
    table = page.get_by_role("table", name="Models")
    toggle = table.get_by_role("button", name="wide")
    toggle.click()
    summary = table.locator("summary:visible", has_text="Model card")
    summary.click()
    page.route("**/models", with_models(calibrate_again, "tiny"))
    expect(table).to_contain_text("calibrated on 1,000 images")
    expect(summary).to_be_focused()
    expect(table.locator(".prose:visible")).to_contain_text("Untrained")

    page.route("**/models", with_models(lambda model: model["metrics"].update(test_bpd=3.39)))
    expect(table).to_contain_text("3.39")
    expect(toggle).to_be_focused()
    expect(table.locator(".prose:visible")).to_contain_text("Untrained")
    page.route("**/models", without_models("tiny", "wide"))
    expect(page.get_by_text("Models appear here")).to_be_visible()
    expect(table).to_be_hidden()


def test_a_dialog_stays_open_while_its_text_is_selected(studio) -> None:
    page = studio("score")
    page.locator("#key").click()
    dialog = page.get_by_role("dialog")
    [box] = rectangles(dialog)
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] - 60, box["y"] - 60)
    page.mouse.up()
    expect(dialog).to_be_visible()
    page.mouse.click(box["x"] - 60, box["y"] - 60)
    expect(dialog).to_have_count(0)


def test_many_scores_are_announced_once_they_are_all_there(studio, site, images: list[Path]) -> None:
    page = studio("score")
    view = page.locator("#view-score")
    page.route("**/models", with_members(max_images=1))  # a job for each
    page.reload()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    select_images(page, images)
    page.evaluate(RECORD_ANNOUNCEMENTS)
    with site.paused():
        view.get_by_role("button", name="Score 3 images").click()
        expect(view.locator(".run")).to_have_count(3)
        expect(page.locator("#live")).to_have_text("3 images submitted")
    expect(page.locator("#live")).to_have_text(re.compile(r"^3 images scored, \d flagged\. \w+\.png: "))
    expect(view.get_by_text(re.compile(r"^3 images scored, \d flagged$"))).to_be_visible()
    assert len(page.evaluate("window.announced")) == 2


def test_the_focus_stays_where_images_are_removed(studio, images: list[Path]) -> None:
    page = studio("score")
    select_images(page, images)
    view, live = page.locator("#view-score"), page.locator("#live")
    view.get_by_role("button", name="Remove second.png").press("Enter")
    expect(live).to_have_text("2 images ready to score")
    expect(view.get_by_role("button", name="Remove third.png")).to_be_focused()
    page.keyboard.press("Enter")
    expect(view.get_by_role("button", name="Remove first.png")).to_be_focused()
    page.keyboard.press("Enter")
    expect(view.locator("h1")).to_be_focused()
    select_images(page, images)
    view.get_by_role("button", name="Clear").press("Enter")
    expect(live).to_have_text("0 images ready to score")
    expect(view.locator("input[type=file]")).to_be_focused()


def test_a_notice_that_is_closed_with_the_keyboard_leaves_the_focus_in_its_view(studio, tab) -> None:
    tab.expected_messages = [ABORTED]
    page = studio("score")
    page.evaluate(DROP_FOLDER)
    page.get_by_role("status").filter(has_text="gone.png").get_by_role("button", name="Dismiss").press("Enter")
    expect(page.locator("#view-score h1")).to_be_focused()
    page.route("**/models", lambda route: route.abort())
    with page.expect_event("requestfailed"):
        pass
    try_again = page.locator("#notice").get_by_role("button", name="Try again")
    try_again.focus()
    page.unroute("**/models")
    try_again.press("Enter")
    expect(page.locator("#view-score h1")).to_be_focused()


def test_the_list_of_models_keeps_the_focus_where_a_model_has_no_such_view(studio) -> None:
    page = studio("generate")
    page.route("**/models", with_models(lambda model: model.update(generates=False), "wide"))
    page.reload()
    expect(page.locator("#view-generate")).to_be_visible()
    models = page.locator("#model")
    expect(models).to_be_visible()  # while it is hidden, it cannot have the focus
    models.focus()
    models.select_option("wide")
    expect(page.locator("#view-score")).to_be_visible()
    expect(page.locator("#live")).to_have_text("How unusual is this image?")
    expect(models).to_be_focused()


def test_selected_files_of_a_calibration_are_announced(studio, images: list[Path]) -> None:
    page = studio("calibrate")
    page.locator("#view-calibrate input[type=file]").first.set_input_files(images[:2])
    expect(page.locator("#live")).to_have_text(re.compile("^2 files, "))
    page.locator("#view-calibrate").get_by_role("button", name="Clear").click()
    expect(page.locator("#live")).to_have_text("No images yet.")


def test_announcements_are_made_inside_an_open_dialog(studio) -> None:
    """What lies outside a modal dialog is inert, also a live region."""
    page = studio("score")
    announce = "async (text) => (await import('/studio/dom.js')).announce(text)"
    page.locator("#key").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.evaluate(announce, "Copied")
    expect(dialog.locator("[aria-live=polite]")).to_have_text("Copied")
    expect(page.locator("#live")).to_be_empty()
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)
    page.evaluate(announce, "Canceled")
    expect(page.locator("#live")).to_have_text("Canceled")


def test_an_api_key_that_no_header_can_contain_is_refused_in_its_dialog(studio) -> None:
    page = studio("score")
    page.locator("#key").click()
    key = page.get_by_label("Key", exact=True)
    key.fill("ncml_ключ")
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert not key.evaluate("e => e.validity.valid")


def test_reused_settings_are_not_compared(studio) -> None:
    page = studio("generate")
    view = page.locator("#view-generate")
    view.get_by_label("Images").fill("1")
    view.get_by_label("Compare with other settings").check()
    view.locator(".other").get_by_label("Temperature", exact=True).fill("0.8")
    view.locator("button[type=submit]").click()
    expect(page.locator("article.run .cell img")).to_have_count(2)
    page.locator("article.run").nth(1).get_by_role("button", name="Reuse settings").click()
    expect(view.get_by_label("Compare with other settings")).not_to_be_checked()
    view.locator("button[type=submit]").click()
    expect(page.locator("article.run .cell img")).to_have_count(3)
    page.get_by_role("button", name="Remove all finished runs").click()
    expect(page.locator("article.run")).to_have_count(0)


def test_an_unknown_view_is_that_of_scores(studio) -> None:
    page = studio("score")
    page.goto(page.url.split("#")[0] + "#constructor")
    expect(page.locator("#view-score h1")).to_be_visible()


@pytest.mark.parametrize("width", [320, 360, 768, 820, 1280])
def test_nothing_is_wider_than_the_screen_or_its_column(studio, tmp_path: Path, width: int) -> None:
    page = studio("score", viewport={"width": width, "height": 900})
    Image.new("RGB", (300, 240)).save(tmp_path / "wide.png")
    page.locator("#view-score input[type=file]").set_input_files(tmp_path / "wide.png")
    card = page.locator(".waiting li")
    expect(card.locator("canvas")).to_have_count(2)
    column, row, name, remove = rectangles(
        page.locator(".waiting"), card, card.locator(".words"), card.get_by_role("button")
    )
    assert row["width"] <= column["width"]
    assert remove["x"] + remove["width"] <= column["x"] + column["width"]
    assert remove["y"] < name["y"] + name["height"]  # in the same line
    mark, model = rectangles(page.locator(".mark"), page.locator("#model"))
    assert mark["x"] + mark["width"] <= model["x"]
    for view in ("score", "generate", "complete", "trajectory", "models", "calibrate"):
        page.goto(page.url.split("#")[0] + f"#{view}")
        expect(page.locator(f"#view-{view} h1")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


def test_an_image_is_not_added_twice_to_a_calibration(studio, images: list[Path]) -> None:
    page = studio("calibrate")
    view = page.locator("#view-calibrate")
    for selection, summary in (
        (images[:2], "2 files, 0.0 of at most 64.0 MiB."),
        (images, "3 files, 0.0 of at most 64.0 MiB. 2 files already selected."),
    ):
        view.locator("input[type=file]").set_input_files(selection)
        expect(view.locator("[data-field=image] > .hint")).to_have_text(summary)


DROP_FILES = """(files) => {
    const event = new Event("drop", { cancelable: true });
    Object.defineProperty(event, "dataTransfer", { value: { files, items: [] } });
    dispatchEvent(event);
}"""


def test_an_image_that_is_dropped_after_its_folder_was_selected_is_not_added_twice(studio, images: list[Path]) -> None:
    page = studio("calibrate")
    view = page.locator("#view-calibrate")
    page.evaluate(
        """() => {
            const { click } = HTMLInputElement.prototype;
            const copy = (file) => new File([file], file.name, { lastModified: file.lastModified });
            HTMLInputElement.prototype.click = function () {
                const keep = () => { window.dropped = [...this.files].map(copy); };  // as when dropped, without a path
                this.addEventListener("change", keep, { capture: true });
                click.call(this);
            };
        }"""
    )
    with page.expect_file_chooser() as chooser:
        view.get_by_role("button", name="Select a folder").click()
    chooser.value.set_files(images[0].parent)
    summary = view.locator("[data-field=image] > .hint")
    expect(summary).to_have_text("3 files, 0.0 of at most 64.0 MiB.")
    page.evaluate(f"({DROP_FILES})(window.dropped)")
    expect(summary).to_have_text("3 files, 0.0 of at most 64.0 MiB. 3 files already selected.")


def test_different_images_of_the_same_name_size_and_time_are_both_added(studio) -> None:
    page = studio("calibrate")
    page.evaluate(
        f"""() => {{
            const file = (byte) => new File([new Uint8Array([137, byte])], "1.png", {{ lastModified: 1 }});
            ({DROP_FILES})([file(1), file(2), file(1)]);
        }}"""
    )
    expect(page.locator("#view-calibrate [data-field=image] > .hint")).to_have_text(
        "2 files, 0.0 of at most 64.0 MiB. 1 file already selected."
    )


DROP = """async (names) => {
    const { exampleFile } = await import("/studio/examples.js");
    const data = new DataTransfer();
    for (const name of names) data.items.add(await exampleFile(name, 8, 8));
    const event = new Event("drop", { cancelable: true });
    Object.defineProperty(event, "dataTransfer", { value: data });
    dispatchEvent(event);
}"""


def test_an_image_dropped_where_calibration_is_disabled_is_taken_by_score(studio) -> None:
    page = studio("calibrate")
    page.route("**/models", with_members(calibration_allowed=False))
    expect(page.get_by_text("Calibration in the browser is disabled")).to_be_visible()
    page.evaluate(DROP, ["stripes"])
    expect(page.locator("#view-score .waiting li")).to_contain_text("stripes.png")


DROP_FOLDER = """async () => {
    const { exampleFile } = await import("/studio/examples.js");
    const image = await exampleFile("stripes", 8, 8);
    const entries = [
        { isFile: true, name: "gone.png", file: (_, reject) => reject(new DOMException("gone", "NotFoundError")) },
        { isFile: true, name: image.name, fullPath: `/lot/${image.name}`, file: (resolve) => resolve(image) },
        { isDirectory: true, name: "locked", createReader: () => ({ readEntries: (_, fail) => fail(new Error()) }) },
    ];
    const batches = [entries, []];
    const folder = { isDirectory: true, createReader: () => ({ readEntries: (resolve) => resolve(batches.shift()) }) };
    const event = new Event("drop", { cancelable: true });
    const value = { files: [], items: [{ webkitGetAsEntry: () => folder }] };
    Object.defineProperty(event, "dataTransfer", { value });
    dispatchEvent(event);
}"""


def test_files_of_a_dropped_folder_that_cannot_be_read_are_named_and_the_others_taken(studio) -> None:
    page = studio("score")
    page.evaluate(DROP_FOLDER)
    expect(page.locator("#view-score .waiting li")).to_contain_text("lot/stripes.png")
    notice = page.get_by_role("status").filter(has_text="gone.png, locked could not be read.")
    expect(notice).to_be_in_viewport()
    notice.get_by_role("button", name="Dismiss").click()
    expect(notice).to_have_count(0)
    page.evaluate(DROP_FOLDER)
    expect(notice).to_be_visible()
    page.evaluate(DROP, ["stripes"])
    expect(notice).to_have_count(0)


def test_images_of_one_name_from_two_folders_are_distinguished(studio, images: list[Path], tmp_path: Path) -> None:
    names = [f"lot/camera-{camera}/part.png" for camera in ("left", "right")]
    for name, image in zip(names, images, strict=False):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        image.rename(path)
    page = studio("score")
    view = page.locator("#view-score")
    with page.expect_file_chooser() as chooser:
        view.get_by_role("button", name="Select a folder").click()
    chooser.value.set_files(tmp_path / "lot")
    expect(view.locator(".waiting li")).to_have_count(2)
    assert sorted(view.locator(".waiting .name").all_inner_texts()) == names
    view.get_by_role("button", name="Score 2 images").click()
    tiles = view.locator(".strip .tile")
    expect(tiles).to_have_count(2)
    assert sorted(tiles.locator(".name").all_inner_texts()) == names
    [tile, end] = rectangles(tiles.first, tiles.first.locator(".name bdi"))
    assert end["right"] <= tile["right"]  # the end of the path is visible, and its start is cut off
    assert end["left"] < tile["left"]


def test_of_several_images_dropped_on_complete_the_one_in_use_is_named(studio) -> None:
    page = studio("complete")
    expect(page.locator("#view-complete .drop")).to_be_visible()
    page.evaluate(DROP, ["gradient", "stripes"])
    expect(page.locator("#view-complete")).to_contain_text("Only gradient.png is used")
    expect(page.locator("#view-complete .pad")).to_be_visible()
