"""A real browser and a real service: Valkey, workers, small models, and an installed Chromium.

Without a browser these tests are skipped or, if CI is set, fail.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import psutil
import pytest
import redis
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Request,
    Response,
    expect,
    sync_playwright,
)

from tests.conftest import eventually, free_port
from tests.packages import lacking

ARGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "ncml_of-the-browser-tests"

expect.set_options(timeout=60_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason=lacking("no browser is installed", "chromium"))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))  # the first one also makes models and starts services
            if not CHROMIUM and not os.environ.get("CI"):
                item.add_marker(skip)


@dataclass(frozen=True)
class Site:
    """Two services on one queue: one is open, one requires a key."""

    url: str
    guarded_url: str
    http: httpx2.Client
    workers: tuple[psutil.Process, ...]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the workers, so that jobs wait, and let them continue."""
        for worker in self.workers:
            worker.suspend()
        try:
            eventually(lambda: {worker.status() for worker in self.workers} == {psutil.STATUS_STOPPED})
            yield
        finally:
            for worker in self.workers:
                worker.resume()


@pytest.fixture(scope="session")
def models(model_folder: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` (8x8), calibrated also for tiles, and `wide` (32x32, with a long class name), which is slow."""
    import torch

    import ncml
    from ncml import checkpoint
    from ncml.calibration import tile_estimation
    from ncml.calibration.estimation import calibrate
    from ncml.config import LevelConfig
    from ncml.network.ncpn import NCPN
    from ncml.recipes import smoke

    directory = tmp_path_factory.mktemp("studio-models")
    shutil.copytree(model_folder, directory / "tiny")
    model = ncml.load(directory / "tiny")
    images = np.random.default_rng(0).integers(96, 160, (60, 8, 8, 3), np.uint8)
    calibrate(model, images[:20], images[20:]).save(model.folder)
    large = [lambda i=i: np.tile(images[2 * i : 2 * i + 2].reshape(16, 8, 3), (1, 2, 1)) for i in range(28)]
    tile_estimation.calibrate(model, large[:8], large[8:]).save(model.folder)
    torch.manual_seed(1)
    config = smoke()
    classes = ("dark", "a class whose name is much longer than any button")
    levels = tuple(LevelConfig(width=8, blocks=blocks) for blocks in (5, 0, 1))
    wide = replace(config, model=replace(config.model, height=32, width=32, levels=levels, classes=classes))
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    checkpoint.save(
        directory / "wide",
        NCPN(wide),
        card=f"# wide\n\n- **Untrained**: `for tests`\n\n{table}\n## More\n\n{table}",
    )
    return directory


@pytest.fixture(scope="package")
def site(valkey_server, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    key_line = subprocess.run(
        [sys.executable, "-c", f"from service.keys import digest; print('browser:' + digest({KEY!r}))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (folder / "keys").write_text(key_line.stdout)
    first_port = free_port(2)
    ports = first_port, first_port + 1
    serve = [sys.executable, "-m", "uvicorn", "--factory", "service.app:from_environment", "--port"]
    guarded = {"NCML_API_KEYS_FILE": str(folder / "keys"), "NCML_ALLOW_CALIBRATION": "0"}
    worker = [sys.executable, "-m", "ncml.cli", "worker", "--models", str(models), "--threads", "1", "--drain-s", "1"]
    score_worker, generate_worker = ([*worker, "--lane", lane] for lane in ("score", "generate"))
    environment = os.environ | {
        "NCML_REDIS_URL": valkey_server.url.replace("/0", "/1"),
        "NCML_MAX_IMAGES": "32",
        "NCML_ALLOW_CALIBRATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    with contextlib.closing(redis.Redis.from_url(environment["NCML_REDIS_URL"])) as client:
        client.flushdb()
    with (folder / "log").open("w") as log, contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        for command, variables in [
            (score_worker, {}),
            (generate_worker, {}),
            ([*serve, str(ports[0])], {}),
            ([*serve, str(ports[1])], guarded),
        ]:
            processes.append(subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log))
            stack.callback(processes[-1].wait, 60)
            stack.callback(processes[-1].terminate)
        http = stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=30))
        deadline = time.monotonic() + 300
        while not _ready(http) or not _ready(http, f"http://127.0.0.1:{ports[1]}"):
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        urls = (f"http://127.0.0.1:{port}" for port in ports)
        yield Site(*urls, http, tuple(psutil.Process(process.pid) for process in processes[:2]))


def _ready(http: httpx2.Client, base: str = "") -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return http.get(f"{base}/readyz").status_code == 200
    return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser for one module only: Playwright keeps an event loop running in this thread."""
    assert CHROMIUM, "CI is set, but no chromium is installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGS))
        yield browser
        browser.close()


UNUSED_PRELOAD = "was preloaded using link preload but not used within a few seconds"
"""Chromium's warning if a busy machine renders the page seconds after loading it; it is no fault of the page."""


REFRESH_OFTEN = """const wait = window.setTimeout;
window.setTimeout = (step, ms, ...rest) => wait(step, ms === 5000 ? 500 : ms, ...rest);"""
"""The studio asks for the service's state every 5 s, for which many tests would wait."""


class Tab:
    """Opens pages that must not log errors or send requests to another origin.

    Every error and warning on the console fails the test unless it is one of `expected_messages`.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.contexts: list[BrowserContext] = []
        self.messages: list[str] = []
        self.expected_messages: list[str] = []
        self.foreign_requests: list[str] = []

    def open(self, url: str, on_response: Callable[[Response], None] = lambda _: None, **options) -> Page:
        context = self.browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.contexts.append(context)
        context.add_init_script(REFRESH_OFTEN)
        page = context.new_page()
        page.on("console", self.record)
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        origin = urlsplit(url).netloc

        def check_origin(request: Request) -> None:
            address = urlsplit(request.url)
            if address.scheme not in ("data", "blob") and address.netloc != origin:
                self.foreign_requests.append(request.url)

        page.on("request", check_origin)
        page.on("response", on_response)
        page.goto(url)
        return page

    def record(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and UNUSED_PRELOAD not in message.text:
            self.messages.append(f"{message.text} [{message.location.get('url', '')}]")


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    for context in tab.contexts:
        for page in context.pages:
            with contextlib.suppress(Error):  # a page can be navigating
                page.evaluate("null")  # to receive what has been logged until now
            page.remove_listener("console", tab.record)  # what follows is about requests that the test left open
            page.unroute_all(behavior="ignoreErrors")  # of handlers that are changing an answer
        context.close()
    unexpected = [text for text in tab.messages if not any(part in text for part in tab.expected_messages)]
    assert unexpected == []
    assert tab.foreign_requests == []


@pytest.fixture
def studio(site: Site, tab: Tab) -> Callable[..., Page]:
    """`studio("generate")` opens that view in a new tab, with the model `tiny` by default."""

    def open_view(view: str = "score", model: str = "tiny", **options) -> Page:
        page = tab.open(f"{site.url}/#{view}", **options)
        expect(page.locator(f"#view-{view}")).to_be_visible()  # it has been loaded
        expect(page.locator("#pulse")).to_contain_text("Ready")
        page.select_option("#model", model)
        return page

    return open_view
