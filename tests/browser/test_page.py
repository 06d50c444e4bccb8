"""The page as a whole: reloads, API keys, keyboard, small screens, accessibility, weight and speed."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.announcements import RECORD_ANNOUNCEMENTS
from tests.browser.answers import with_members, with_models
from tests.browser.conftest import ARGS, CHROMIUM, KEY, Tab
from tests.browser.layout import rectangles

ROOT = Path(__file__).parents[2]

VIEWS = ("score", "generate", "complete", "trajectory", "models")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def generate(page: Page, n: int, view: str = "generate") -> None:
    """Set how many images a view generates, and submit its form."""
    form = page.locator(f"#view-{view} form")
    form.get_by_label("Images").fill(str(n))
    form.locator("button[type=submit]").click()


def long_run(page: Page, wait: bool = True) -> str:
    """Submit a job that takes many seconds; returns its id."""
    form = page.locator("#view-generate form")
    if not form.get_by_label("Solver", exact=True).is_visible():
        form.locator("summary").click()
    form.get_by_label("Solver", exact=True).select_option("predictor-corrector")
    form.get_by_label("Images").fill("32")
    form.get_by_label("Refinement steps").fill("32")
    runs = page.locator("#view-generate article.run")
    count = runs.count()
    form.get_by_role("button", name="Generate").click()
    expect(runs).to_have_count(count + 1)
    run = runs.first
    if wait:
        expect(run).to_contain_text(re.compile("Sampling row|Refining"))
    return run.get_attribute("data-job") or ""


def test_a_run_is_canceled(studio, site) -> None:
    page = studio("generate", model="wide")
    job = long_run(page)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("article.run")).to_contain_text("Canceled.")
    assert site.http.get(f"/jobs/{job}").json()["status"] == "canceled"


def test_a_reload_restores_running_and_finished_jobs(studio) -> None:
    page = studio("generate")
    generate(page, 2)
    expect(page.locator(".cell img")).to_have_count(2)
    page.select_option("#model", "wide")
    job = long_run(page)
    page.reload()
    run = page.locator(f'article.run[data-job="{job}"]')
    expect(run).to_contain_text(re.compile("Sampling row|Refining"))
    expect(page.locator(".cell img")).to_have_count(2)
    run.get_by_role("button", name="Cancel").click()
    expect(run).to_contain_text("Canceled.")
    run.get_by_role("button", name="Remove").click()
    expect(run).to_have_count(0)


def test_a_view_keeps_its_newest_jobs_whatever_the_others_add(studio) -> None:
    counts = studio("score").evaluate(
        """async () => {
            const { jobs } = await import("/studio/session.js");
            jobs.add({ id: "first", view: "generate" });
            for (let i = 0; i < 60; i += 1) jobs.add({ id: `score-${i}`, view: "score" });
            const ids = (view) => jobs.of(view).map(({ id }) => id);
            return [ids("generate"), ids("score").length, ids("score").at(-1)];
        }"""
    )
    assert counts == [["first"], 48, "score-59"]


def test_a_full_storage_costs_old_thumbnails_first_and_no_other_view_its_jobs(studio) -> None:
    kept = studio("score").evaluate(
        """async () => {
            const { jobs } = await import("/studio/session.js");
            jobs.add({ id: "calibration", view: "calibrate" });
            const modelView = "data:".padEnd(300_000);
            for (let i = 0; i < 40; i += 1) jobs.add({ id: i, view: "score", images: [{ name: "a", modelView }] });
            const thumbnails = jobs.of("score").map(({ images }) => Boolean(images[0].modelView));
            for (let i = 0; i < 40; i += 1) jobs.add({ id: i, view: "complete", source: modelView });
            const counts = ["calibrate", "score", "complete"].map((view) => jobs.of(view).length);
            return { thumbnails, counts, newest: jobs.of("complete").at(-1).id };
        }"""
    )
    thumbnails = kept["thumbnails"]
    assert len(thumbnails) == 40
    assert thumbnails == sorted(thumbnails)  # the newest have one
    assert 10 < sum(thumbnails) < 40
    assert kept["counts"][:2] == [1, 40]
    assert 10 < kept["counts"][2] < 40
    assert kept["newest"] == 39


def test_a_reload_during_a_trace_continues_to_follow_it(studio) -> None:
    page = studio("trajectory", model="wide")
    page.locator("#view-trajectory").get_by_label("Refinement steps").fill("2")
    generate(page, 4, "trajectory")
    expect(page.locator("article.trace")).to_contain_text(re.compile("Sampling row|Refining, step"))
    page.reload()
    expect(page.locator("article.trace")).to_contain_text("Trace complete", timeout=60_000)


def test_a_reload_keeps_scores(studio) -> None:
    page = studio("score")
    page.locator("#view-score").get_by_role("button", name="stripes").click()
    expect(page.locator(".reading .verdict")).to_be_visible()
    bits = page.locator(".reading .big .mono").text_content()
    page.reload()
    expect(page.locator(".reading .big .mono")).to_have_text(bits or "")
    expect(page.locator(".reading")).to_contain_text("choose the image again")


def test_nothing_blocks_while_many_jobs_run(studio, site) -> None:
    """More jobs than the browser has connections: scoring still works, and each job can be canceled."""
    page = studio("generate", model="wide")
    ids = {long_run(page, wait=False) for _ in range(7)}
    assert len(ids) == 7
    page.get_by_role("link", name="Score").click()
    page.locator("#view-score").get_by_role("button", name="stripes").click()
    expect(page.locator(".reading .big .mono")).to_be_visible()
    page.get_by_role("link", name="Models").click()
    expect(page.locator("#view-models .health")).to_contain_text("busy")
    page.get_by_role("link", name="Generate").click()
    for job in ids:
        page.locator(f'article.run[data-job="{job}"]').get_by_role("button", name="Cancel").click()
    expect(page.locator("article.run").filter(has_text="Canceled.")).to_have_count(7)
    assert {site.http.get(f"/jobs/{job}").json()["status"] for job in ids} == {"canceled"}


@pytest.mark.parametrize(("polled", "most"), [(5, 170), (40, 320)])
def test_many_polled_jobs_send_few_requests(studio, polled: int, most: int) -> None:
    """In a minute of simulated time, in which two other jobs are streamed."""
    requests, positions = studio("score").evaluate(
        """async (polled) => {
            const { follow } = await import("/studio/events.js");
            const [originalFetch, originalTimeout] = [window.fetch, window.setTimeout];
            const timers = [];
            let now = 0;
            let requests = 0;
            window.setTimeout = (step, ms) => timers.push({ time: now + ms, step });
            window.fetch = async (path, options) => {
                if (!/^jobs.simulated/.test(path)) return originalFetch(path, options);
                if (path.endsWith("/events")) return new Promise(() => {});
                requests += 1;
                const document = { status: now < 60_000 ? "queued" : "succeeded", position: 2 };
                return { ok: true, json: async () => document };
            };
            const positions = new Set();
            const ids = Array.from({ length: 2 + polled }, (_, i) => `simulated-${i}`);
            for (const id of ids) follow(id, ({ position }) => position === 2 && positions.add(id));
            const turn = () => new Promise((resolve) => originalTimeout(resolve));
            for (await turn(); now < 60_000; await turn()) {
                timers.sort((a, b) => a.time - b.time);
                for (now = timers[0]?.time ?? now; timers[0]?.time === now; ) timers.shift().step();
            }
            Object.assign(window, { fetch: originalFetch, setTimeout: originalTimeout });
            return [requests, positions.size];
        }""",
        polled,
    )
    assert 6 * polled <= requests <= most
    assert positions == polled + 2


def test_a_service_with_keys_asks_for_one_and_works_with_it(site, tab) -> None:
    tab.expected_messages = ["status of 401"]
    page = tab.open(f"{site.guarded_url}/#generate")
    expect(page.locator("#pulse")).to_have_text("API key needed")
    expect(page.locator("#notice p").first).to_have_text("An API key is required.")  # without remedies for programs
    page.locator("#notice").get_by_role("button", name="Enter an API key").click()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#pulse")).to_contain_text("Ready")
    expect(page.locator("#notice .failure")).to_have_count(0)
    generate(page, 2)  # submits, follows events, fetches previews and results
    expect(page.locator(".cell img")).to_have_count(2)
    page.locator(".cell").first.click()
    line = page.locator(".curl").text_content() or ""
    assert '-H "Authorization: Bearer $NCML_API_KEY"' in line
    assert "ncml_of" not in page.content()
    assert page.evaluate("Object.keys(localStorage).length") == 0
    page.reload()
    expect(page.locator(".cell img")).to_have_count(2)
    page.locator("#key").click()
    page.get_by_role("button", name="Remove key").click()
    expect(page.locator("#pulse")).to_have_text("API key needed")
    expect(page.locator(".cell")).to_have_count(0)
    assert page.evaluate("sessionStorage.getItem('ncml.job-records')") == "[]", "the next user sees no results of this"


def test_a_page_reloaded_after_its_skip_link_shows_the_same_view(studio) -> None:
    page = studio("generate")
    expect(page.locator("#view-generate h1")).to_be_visible()
    page.get_by_role("link", name="Skip to content").press("Enter")
    expect(page.locator("#content")).to_be_focused()
    expect(page).to_have_url(re.compile("#generate$"))
    page.reload()
    expect(page.locator("#view-generate h1")).to_be_visible()


def test_everything_can_be_reached_by_keyboard(studio) -> None:
    page = studio("score")
    page.on("filechooser", lambda _: None)  # without a listener the browser opens none
    page.locator("body").press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()

    def tab_to(target) -> None:
        for _ in range(40):
            if target.evaluate("e => e === document.activeElement"):
                assert target.evaluate("e => getComputedStyle(e).outlineStyle !== 'none' || e.type === 'file'")
                return
            page.keyboard.press("Tab")
        pytest.fail(f"{target} cannot be reached by Tab")

    tab_to(page.locator("#view-score input[type=file]"))
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    tab_to(page.locator("#view-score").get_by_role("button", name="gradient"))
    page.keyboard.press("Enter")
    summary = page.locator(".reading summary", has_text="Map")
    expect(summary).to_be_visible()
    tab_to(summary)
    page.keyboard.press("Enter")
    tab_to(page.get_by_role("button", name="Download map"))
    page.reload()
    tab_to(page.get_by_role("link", name="Generate"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Generate new images")).to_be_focused()
    tab_to(page.locator("#view-generate .chips input:checked"))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-generate").get_by_label("dark")).to_be_checked()
    tab_to(page.locator("#view-generate").get_by_label("Images"))
    page.keyboard.press("Home")
    tab_to(page.get_by_role("button", name="Generate"))
    page.keyboard.press("Enter")
    cell = page.locator(".cell:enabled")
    expect(cell).to_have_count(1)
    tab_to(cell)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(cell).to_be_focused()
    page.keyboard.press("Enter")
    tab_to(page.get_by_role("button", name="Complete it"))
    page.keyboard.press("Enter")
    tab_to(page.locator("#view-complete").get_by_role("radio", name="top"))
    page.keyboard.press("ArrowDown")
    expect(page.locator(".pad")).to_have_attribute("aria-label", re.compile("its bottom half is kept"))
    tab_to(page.locator("#view-complete").get_by_role("button", name="Complete", exact=True))
    page.keyboard.press("Enter")
    expect(page.locator("#view-complete .cell:enabled")).to_have_count(4)
    page.reload()
    tab_to(page.get_by_role("link", name="Trajectory"))
    page.keyboard.press("Enter")
    tab_to(page.get_by_role("button", name="Trace"))
    page.keyboard.press("Enter")
    slider = page.get_by_role("slider", name="Frame")
    expect(slider).to_be_enabled()
    tab_to(slider)
    page.keyboard.press("Home")
    expect(slider).to_have_value("0")
    page.reload()
    tab_to(page.get_by_role("link", name="Models"))
    page.keyboard.press("Enter")
    toggle = page.locator("#view-models .expand").last
    tab_to(toggle)
    page.keyboard.press("Enter")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    tab_to(page.locator("#view-models summary:visible", has_text="Model card").first)
    page.keyboard.press("Enter")
    expect(page.locator("#view-models .prose").first).to_be_visible()


def test_a_phone_breaks_no_word_of_a_models_name(studio) -> None:
    page = studio("models", **PHONE)
    page.route("**/models", with_models(lambda model: model.update(name="detector-base"), "wide"))
    long_name = page.locator("table.models").get_by_role("button", name="detector-base")
    expect(long_name).to_be_visible()
    long, short = rectangles(long_name, page.locator("table.models").get_by_role("button", name="tiny"))
    assert long["height"] == short["height"]


def test_a_phone_shows_every_view_without_scrolling_sideways(studio) -> None:
    page = studio("score", model="wide", **PHONE)
    page.locator("#view-score").get_by_role("button", name="gradient").tap()
    expect(page.locator(".reading .big")).to_be_visible()
    for view in VIEWS:
        link = page.locator(f'.tabs a[href="#{view}"]')
        link.tap()
        expect(page.locator(f"#view-{view}")).to_be_visible()
        expect(link).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator('.tabs a[href="#generate"]').tap()
    generate(page, 3)
    expect(page.locator("#view-generate article.run h2")).to_be_in_viewport()  # it lies below the controls
    expect(page.locator("#view-generate .cell img")).to_have_count(3, timeout=60_000)
    page.locator("#view-generate .cell").first.tap()
    expect(page.get_by_role("button", name="Copy curl")).to_be_visible()
    [box] = rectangles(page.get_by_role("dialog"))
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_the_start_and_the_progress_of_a_long_job_are_announced(studio) -> None:
    page = studio("generate", model="wide")
    page.evaluate(RECORD_ANNOUNCEMENTS)
    page.evaluate("performance.now = ((now) => () => 1000 * now())(performance.now.bind(performance))")
    job = long_run(page)
    expect(page.locator("#live")).to_have_text(re.compile("Sampling row|Refining"))
    assert page.evaluate("window.announced").count("Submitted") == 1
    page.locator(f'article.run[data-job="{job}"]').get_by_role("button", name="Cancel").click()


def test_forced_colours_show_what_is_selected_and_a_phone_more_than_a_colour(studio) -> None:
    style = "(e, [name, pseudo]) => getComputedStyle(e, pseudo)[name]"
    page = studio("generate", forced_colors="active")
    selected, other = (page.locator(f'.tabs a[href="#{view}"]') for view in ("generate", "score"))
    assert selected.evaluate(style, ["textDecorationLine", None]) == "underline"
    assert other.evaluate(style, ["textDecorationLine", None]) == "none"
    selected_chip, other_chip = (page.locator(f"#view-generate .chips label:nth-child({n}) span") for n in (1, 2))
    backgrounds = [chip.evaluate(style, ["backgroundColor", None]) for chip in (selected_chip, other_chip)]
    assert backgrounds[0] != backgrounds[1]
    track = page.locator("#view-generate input[type=range]").first
    assert track.evaluate(style, ["forcedColorAdjust", None]) == "none"  # else it has no track
    page.locator('.tabs a[href="#score"]').click()
    page.locator("#view-score input[type=file]").first.set_input_files(
        [ROOT / "docs" / "cat.jpg", ROOT / "docs" / "brick.png"]
    )
    page.get_by_role("button", name="Score 2 images").click()
    tiles = page.locator(".strip .tile")
    expect(tiles).to_have_count(2)
    assert tiles.evaluate_all("all => all.map((e) => getComputedStyle(e).borderTopWidth)") == ["4px", "1px"]
    page.emulate_media(forced_colors="none")
    page.set_viewport_size({"width": 360, "height": 740})
    assert other.evaluate(style, ["boxShadow", None]) != "none"  # now the selected one
    assert selected.evaluate(style, ["boxShadow", None]) == "none"


def test_at_400_percent_zoom_most_of_the_screen_is_left_to_the_content(studio) -> None:
    page = studio("generate", viewport={"width": 320, "height": 225})
    [tabs] = rectangles(page.locator(".tabs"))
    assert tabs["bottom"] == 225
    assert tabs["height"] < 0.2 * 225
    button = page.locator("#view-generate .send .primary")
    expect(button).not_to_be_in_viewport()  # it does not lie over the fields
    button.focus()
    [focused] = rectangles(button)
    assert focused["bottom"] <= tabs["top"]
    assert page.evaluate("document.documentElement.scrollWidth") == 320


TARGETS = """() => [...document.querySelectorAll("a, button, summary, select, label.check, input[type=range]")]
    .filter((e) => e.checkVisibility() && !e.closest("p, .skip, .hint") && !e.matches(".skip, .explain"))
    .map((e) => [e.textContent, e.getBoundingClientRect()])
    .filter(([, { width, height }]) => Math.min(width, height) < 24).map(([text]) => text)"""
"""Controls outside of sentences that are narrower or lower than 24 pixels; question marks react around their circle."""


def test_a_phone_has_no_control_that_is_smaller_than_a_finger_can_hit(studio) -> None:
    page = studio("score", **PHONE)
    page.locator("#view-score").get_by_role("button", name="gradient").tap()
    expect(page.locator(".reading .big")).to_be_visible()
    for view in VIEWS:
        page.locator(f'.tabs a[href="#{view}"]').tap()
        expect(page.locator(f"#view-{view}")).to_be_visible()
        assert page.evaluate(TARGETS) == [], view
    key = page.locator("#key")
    assert key.evaluate("e => e.scrollWidth <= e.clientWidth")  # its text fits


@pytest.mark.parametrize("width", [390, 1280])
def test_text_of_twice_the_size_fits_the_screen(site, browser: Browser, width: int) -> None:
    large = browser.browser_type.launch(
        executable_path=CHROMIUM, args=[*ARGS, "--blink-settings=defaultFontSize=32"]
    )  # as in the settings of a browser
    page = Tab(large).open(f"{site.url}/#generate", viewport={"width": width, "height": 900})
    expect(page.locator("#view-generate form")).to_be_visible()
    assert page.evaluate("parseFloat(getComputedStyle(document.documentElement).fontSize)") == 32
    assert page.evaluate("document.documentElement.scrollWidth") == width
    expect(page.get_by_role("link", name="API docs")).to_be_in_viewport(ratio=1)
    large.close()


def test_axe_finds_no_serious_violation(studio, tab, tmp_path: Path) -> None:
    tab.expected_messages = ["Failed to load resource"]
    page = studio("score", reduced_motion="reduce")
    axe = Axe()

    def check(state: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            response = axe.run(page).response
            # axe cannot decide whether a name that an element must not have matters
            prohibited = [finding for finding in response["incomplete"] if finding["id"] == "aria-prohibited-attr"]
            serious = [
                f"{finding['id']}: {[node['html'] for node in finding['nodes']]}"
                for finding in response["violations"] + prohibited
                if finding["impact"] in ("serious", "critical")
            ]
            assert serious == [], f"{state}, {scheme}"

    check("score, empty")
    images = [ROOT / "docs" / "cat.jpg", ROOT / "docs" / "brick.png"]
    page.locator("#view-score input[type=file]").set_input_files(images)
    check("score, waiting")
    page.get_by_role("button", name="Score 2 images").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    page.locator(".reading summary", has_text="Map").click()
    check("score, scored")
    page.get_by_label("In tiles").check()
    page.locator("#view-score input[type=file]").set_input_files(images[0])
    check("score, waiting in tiles")
    page.get_by_role("button", name="Clear").click()
    page.locator("#view-score").get_by_role("button", name="gradient").click()
    expect(page.locator(".answer .box")).to_be_visible()
    check("score, scored in tiles")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    page.locator("#view-score input[type=file]").set_input_files(tmp_path / "broken.png")
    page.get_by_role("button", name="Score 1 image").click()
    expect(page.locator("#view-score .failure")).to_be_visible()
    check("score, refused")
    for view in ("generate", "trajectory"):
        page.goto(page.url.split("#")[0] + f"#{view}")
        generate(page, 2, view)
        expect(page.locator(f"#view-{view} article.run")).to_contain_text(re.compile("Generated in|Recorded|Only the"))
        check(view)
    page.locator('.tabs a[href="#generate"]').click()
    page.locator("#view-generate .cell").first.click()
    check("one image")
    page.get_by_role("button", name="Complete it").click()
    page.get_by_role("button", name="Complete", exact=True).click()
    expect(page.locator("#view-complete")).to_contain_text("Generated in")
    check("complete")
    page.locator('.tabs a[href="#models"]').click()
    page.locator("#view-models .expand").first.click()
    page.locator("#view-models summary:visible").first.click()
    check("models")
    page.context.set_offline(True)
    expect(page.locator("#notice .failure")).to_be_visible()
    check("models, unreachable")
    page.context.set_offline(False)
    expect(page.locator("#notice .failure")).to_have_count(0)
    page.select_option("#model", "wide")
    page.locator('.tabs a[href="#generate"]').click()
    job = long_run(page)
    check("generate, running")
    run = page.locator(f'article.run[data-job="{job}"]')
    run.get_by_role("button", name="Cancel").click()
    expect(run).to_contain_text("Canceled.")
    check("generate, canceled")
    page.locator("#key").click()
    check("the API key")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.cell, progress') ?? document.body).animationName")
        == "none"
    )


def test_the_page_is_light_and_loads_nothing_from_elsewhere(site, tab) -> None:
    weights: dict[str, int] = {}
    page = tab.open(site.url, lambda response: weights.__setitem__(response.url, len(response.body())))
    # Modules run before this event, so that everything is interactive then.
    interactive = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    expect(page.locator("#pulse")).to_contain_text("Ready")
    files = {url: size for url, size in weights.items() if re.fullmatch(rf"{site.url}/(studio/.*)?", url)}
    assert len(files) > 10
    print(f"first view: {sum(files.values()):,} bytes in {len(files)} files, interactive after {interactive:.0f} ms")
    assert sum(files.values()) < 150_000
    policy = site.http.get("/").headers["content-security-policy"]
    assert "'unsafe-inline'" not in policy
    assert "default-src 'none'" in policy


def test_a_view_that_cannot_be_loaded_is_reported_and_can_be_tried_again(studio, tab) -> None:
    tab.expected_messages = ["Failed to load resource", "dynamically imported module"]
    page = studio("score")
    page.route("**/studio/trajectory.js", lambda route: route.abort())
    page.locator('.tabs a[href="#trajectory"]').click()
    view = page.locator("#view-trajectory")
    expect(view.get_by_role("alert")).to_contain_text("This view could not be loaded.")
    expect(view.locator("h1")).to_be_focused()
    page.unroute("**/studio/trajectory.js")
    view.get_by_role("button", name="Try again").click()
    expect(view.get_by_role("button", name="Trace")).to_be_visible()
    expect(view.get_by_role("alert")).to_have_count(0)


def test_a_key_dialog_that_cannot_be_loaded_is_reported(studio, tab) -> None:
    tab.expected_messages = ["Failed to load resource", "dynamically imported module"]
    page = studio("score")
    page.route("**/studio/key.js", lambda route: route.abort())
    page.locator("#key").click()
    notice = page.locator("#notice").get_by_role("alert")
    expect(notice).to_contain_text("The dialog could not be loaded.")
    page.unroute("**/studio/key.js")
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_have_count(0)
    expect(page.locator("#pulse")).to_contain_text("Ready")  # the page has been loaded again
    page.locator("#key").click()
    expect(page.get_by_role("dialog").get_by_label("Key")).to_be_focused()


def test_the_api_docs_are_linked_and_available(site, studio) -> None:
    page = studio("score")
    assert page.get_by_role("link", name="API docs").get_attribute("href") == "docs"
    assert site.http.get("/docs").status_code == 200
    assert site.http.get("/openapi.json").json()["info"]["version"] == version("ncml")


def test_curl_commands_come_with_a_hint_at_webhooks_where_these_are_allowed(studio, tab) -> None:
    tab.expected_messages = ["escaping deep link whitespace"]  # of Swagger UI, about its own link
    page = studio("score")
    reading = page.locator(".reading")

    def open_command() -> None:
        page.locator("#view-score").get_by_role("button", name="stripes", exact=True).click()
        reading.locator("summary", has_text="terminal").click()
        expect(reading.locator(".curl")).to_be_visible()

    open_command()
    expect(reading).not_to_contain_text("webhook")
    page.route("**/models", with_members(webhooks_allowed=True))
    page.reload()
    open_command()
    expect(reading).to_contain_text("Add -F webhook=https://… to have the end of a long job sent to an address")
    reading.get_by_role("link", name="API docs").click()
    expect(page.locator(".opblock.is-open")).to_contain_text("Receive the end of a job")
