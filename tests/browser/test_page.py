"""The page as a whole: jobs outlive a reload, keys, keyboard, small screens, accessibility, weight, speed."""

import re
from importlib.metadata import version

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from service.settings import Settings

VIEWS = ("score", "generate", "complete", "trajectory", "models")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def pictures(page: Page, n: int, view: str = "generate") -> None:
    """Set how many pictures a view draws, and begin."""
    form = page.locator(f"#view-{view} form")
    form.get_by_label("Pictures").fill(str(n))
    form.locator("button[type=submit]").click()


def long_drawing(page: Page, wait: bool = True) -> str:
    """Begin a drawing that takes many seconds; returns its job."""
    form = page.locator("#view-generate form")
    if not form.get_by_label("Solver").is_visible():
        form.locator("summary").click()
    form.get_by_label("Solver").select_option("predictor-corrector")
    form.get_by_label("Pictures").fill("32")
    form.get_by_label("Refinement steps").fill("32")
    form.get_by_role("button", name="Draw").click()
    run = page.locator("#view-generate article.run").first
    if wait:
        expect(run).to_contain_text(re.compile("row|step"))
    return run.get_attribute("data-job") or ""


def test_a_drawing_is_canceled(studio, site) -> None:
    page = studio("generate", model="wide")
    job = long_drawing(page)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("article.run")).to_contain_text("Canceled.")
    assert site.http.get(f"/jobs/{job}").json()["status"] == "canceled"


def test_a_reload_finds_running_and_finished_jobs_again(studio) -> None:
    page = studio("generate")
    pictures(page, 2)
    expect(page.locator(".cell img")).to_have_count(2)
    page.select_option("#model", "wide")
    job = long_drawing(page)
    page.reload()
    run = page.locator(f'article.run[data-job="{job}"]')
    expect(run).to_contain_text(re.compile("row|step"))
    expect(page.locator(".cell img")).to_have_count(2)
    run.get_by_role("button", name="Cancel").click()
    expect(run).to_contain_text("Canceled.")
    run.get_by_role("button", name="Remove").click()
    expect(run).to_have_count(0)


def test_a_reload_keeps_scores(studio) -> None:
    page = studio("score")
    page.locator("#view-score").get_by_role("button", name="stripes").click()
    page.get_by_role("button", name="Score 1 picture").click()
    expect(page.locator(".reading .verdict")).to_be_visible()
    bits = page.locator(".reading .big .mono").text_content()
    page.reload()
    expect(page.locator(".reading .big .mono")).to_have_text(bits or "")
    expect(page.locator(".reading")).to_contain_text("choose the picture again")


def test_nothing_blocks_while_many_drawings_run(studio, site) -> None:
    """More jobs than the browser has connections; a score still gets through and each drawing can be ended."""
    page = studio("generate", model="wide")
    ids = {long_drawing(page, wait=False) for _ in range(7)}
    expect(page.locator("article.run")).to_have_count(7)
    page.get_by_role("link", name="Models").click()
    expect(page.locator("#view-models .health")).to_contain_text("busy")
    page.get_by_role("link", name="Generate").click()
    for job in ids:
        page.locator(f'article.run[data-job="{job}"]').get_by_role("button", name="Cancel").click()
    expect(page.locator("article.run").filter(has_text="Canceled.")).to_have_count(7)
    assert {site.http.get(f"/jobs/{job}").json()["status"] for job in ids} == {"canceled"}


def test_a_service_with_keys_asks_for_one_and_works_with_it(site, tab) -> None:
    tab.foreseen = ["status of 401"]
    page = tab.open(f"{site.guarded_url}/#generate")
    expect(page.locator("#pulse")).to_have_text("API key needed")
    page.locator("#notice").get_by_role("button", name="Enter an API key").click()
    page.get_by_label("Key", exact=True).fill("ncml_of-the-browser-tests")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#pulse")).to_contain_text("ready")
    expect(page.locator("#notice .failure")).to_have_count(0)
    pictures(page, 2)  # submits, follows events, fetches previews and results
    expect(page.locator(".cell img")).to_have_count(2)
    page.locator(".cell").first.click()
    line = page.locator(".curl").text_content() or ""
    assert '-H "Authorization: Bearer $NCML_API_KEY"' in line
    assert "ncml_of" not in page.content()
    assert page.evaluate("Object.keys(localStorage).length") == 0
    page.reload()
    expect(page.locator(".cell img")).to_have_count(2)


def test_everything_is_reached_by_the_keyboard(studio) -> None:
    page = studio("score")
    page.locator("body").press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()

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
    tab_to(page.get_by_role("button", name="Score 1 picture"))
    page.keyboard.press("Enter")
    fade = page.get_by_label("Map over picture")
    expect(fade).to_be_visible()
    tab_to(fade)
    page.keyboard.press("ArrowRight")
    expect(fade).to_have_value("51")
    page.reload()
    tab_to(page.get_by_role("link", name="Generate"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Draw new pictures")).to_be_focused()
    tab_to(page.locator("#view-generate .chips input:checked"))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-generate").get_by_label("dark")).to_be_checked()
    tab_to(page.locator("#view-generate").get_by_label("Pictures"))
    page.keyboard.press("Home")
    tab_to(page.get_by_role("button", name="Draw"))
    page.keyboard.press("Enter")
    cell = page.locator(".cell:enabled")
    expect(cell).to_have_count(1)
    tab_to(cell)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(cell).to_be_focused()


def test_a_phone_shows_every_view_without_scrolling_sideways(studio) -> None:
    page = studio("score", model="wide", **PHONE)
    page.locator("#view-score").get_by_role("button", name="gradient").tap()
    page.get_by_role("button", name="Score 1 picture").tap()
    expect(page.locator(".reading .big")).to_be_visible()
    for view in VIEWS:
        link = page.locator(f'.tabs a[href="#{view}"]')
        link.tap()
        expect(page.locator(f"#view-{view}")).to_be_visible()
        expect(link).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator('.tabs a[href="#generate"]').tap()
    pictures(page, 3)
    expect(page.locator("#view-generate .cell img")).to_have_count(3, timeout=60_000)
    page.locator("#view-generate .cell").first.tap()
    expect(page.get_by_role("button", name="Copy curl")).to_be_visible()
    box = page.get_by_role("dialog").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(studio, scheme: str) -> None:
    page = studio("score", color_scheme=scheme, reduced_motion="reduce")
    axe = Axe()

    def check(where: str) -> None:
        found = axe.run(page).response["violations"]
        serious = [
            f"{one['id']}: {[node['html'] for node in one['nodes']]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], where

    check("score, empty")
    for name in ("flat grey", "stripes"):
        page.locator("#view-score").get_by_role("button", name=name).click()
    check("score, waiting")
    page.get_by_role("button", name="Score 2 pictures").click()
    expect(page.locator(".strip .tile")).to_have_count(2)
    check("score, read")
    for view in ("generate", "trajectory"):
        page.goto(page.url.split("#")[0] + f"#{view}")
        pictures(page, 2, view)
        expect(page.locator(f"#view-{view} article.run")).to_contain_text(re.compile("Drawn in|previews|Only the end"))
        check(view)
    page.locator('.tabs a[href="#generate"]').click()
    page.locator("#view-generate .cell").first.click()
    check("a picture by itself")
    page.get_by_role("button", name="Complete it").click()
    page.get_by_role("button", name="Complete", exact=True).click()
    expect(page.locator("#view-complete")).to_contain_text("Drawn in")
    check("complete")
    page.locator('.tabs a[href="#models"]').click()
    page.locator("#view-models summary").first.click()
    check("models")
    page.locator("#key").click()
    check("the key")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.cell, progress') ?? document.body).animationName")
        == "none"
    )


def test_the_page_is_light_quick_and_brings_everything_itself(site, tab) -> None:
    weights: dict[str, int] = {}
    page = tab.open("about:blank")
    page.on("response", lambda response: weights.__setitem__(response.url, len(response.body())))
    quickest = 1e9
    for _ in range(3):
        page.goto(site.url)
        expect(page.locator("#view-score input[type=file]")).to_be_attached()
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        quickest = min(quickest, timing)
    expect(page.locator("#pulse")).to_contain_text("ready")
    assert quickest < 1000  # milliseconds; modules run before this event, so that everything answers then
    assert all(url.startswith(site.url) for url in weights)
    own = {url: size for url, size in weights.items() if re.fullmatch(rf"{site.url}/(studio/.*)?", url)}
    assert len(own) > 10
    assert 0 < sum(own.values()) < 150_000
    policy = site.http.get("/").headers["content-security-policy"]
    assert "'unsafe-inline'" not in policy
    assert "default-src 'none'" in policy


def test_the_api_is_linked_and_its_documentation_still_there(site, studio) -> None:
    page = studio("score")
    assert page.get_by_role("link", name="API", exact=True).get_attribute("href") == "docs"
    assert site.http.get("/docs").status_code == 200
    assert site.http.get("/openapi.json").json()["info"]["version"] == version("ncml")
    assert Settings.model_config.get("env_prefix") == "NCML_"
