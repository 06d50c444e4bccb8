"""Where elements lie on the page."""

from playwright.sync_api import Locator


def rectangles(*locators: Locator) -> list[dict[str, float]]:
    """The bounding rectangles of elements once all are visible, measured at one moment: a page may still be scrolling.

    Playwright's own `bounding_box` waits for an element, but not until it is visible.
    """
    for locator in locators:
        locator.wait_for()
    elements = [locator.element_handle() for locator in locators]
    script = "elements => elements.map((e) => e.getBoundingClientRect().toJSON())"
    measured = locators[0].page.evaluate(script, elements)
    assert all(rectangle["width"] > 0 and rectangle["height"] > 0 for rectangle in measured)
    return measured
