"""What the page announces to screen readers."""

RECORD_ANNOUNCEMENTS = """() => {
    window.announced = [];
    const live = document.getElementById("live");
    new MutationObserver(() => window.announced.push(live.textContent)).observe(live, {childList: true});
}"""
"""Keeps the texts that are announced from now on in `window.announced`."""
