"""Compare the throughput of `ncml score --server` with that of the workers alone, for one worker and for two.

The workers are real processes with a synthetic model that takes 40 ms for an image (`--image-ms`) but uses no processor
time, so that the machine's cores do not limit the workers. The throughput of the workers alone is
measured with the same jobs, all queued at once. Goal: at least 0.9 of it.

    python benchmarks/bulk.py [--images N] [--image-ms MS] [--json]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import numpy as np
from PIL import Image

from ncml.cli import main as cli
from ncml.cli.rows import REQUEST
from tests.conftest import Valkey, free_port
from tests.worker.fleet import PIXELS, Fleet, score
from tests.worker.synthetic import write_model

BATCH = 64


def measure(images: int, image_s: float, workers: int) -> tuple[float, float]:
    """Return the images per second that workers score for the command, and with all jobs queued at once."""
    valkey = Valkey()
    valkey.start()
    with tempfile.TemporaryDirectory(prefix="ncml-bulk-") as name:
        folder, port = Path(name), free_port()
        rng = np.random.default_rng(0)
        (folder / "images").mkdir()
        for i in range(images):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "images" / f"{i:06}.jpg")
        write_model(folder / "models", batch_s=0.0, image_s=image_s)
        fleet = Fleet(valkey.url, folder / "models", folder / "log")
        environment = os.environ | {"NCML_REDIS_URL": valkey.url, "NCML_READY_LANES": '["score"]'}
        service = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", str(port)], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            for _ in range(workers):
                fleet.start("score", max_batch=BATCH)
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url)
            score_folder(folder / "images" / "000000.jpg", url, folder / "warm.csv")
            started = time.perf_counter()
            score_folder(folder / "images", url, folder / "scores.csv")
            return images / (time.perf_counter() - started), queue_throughput(fleet, images)
        finally:
            service.terminate()
            service.wait()
            fleet.stop()
            valkey.stop()


def score_folder(images: Path, url: str, table: Path) -> None:
    """Score images with the command."""
    with contextlib.redirect_stdout(sys.stderr):
        assert cli.main(["score", str(images), "--server", url, "--output", str(table)]) == 0


def queue_throughput(fleet: Fleet, images: int) -> float:
    """Return the images per second that workers score with all jobs queued at once."""
    job = score(images=(PIXELS,) * REQUEST)
    started = time.perf_counter()
    ids = [fleet.queue.submit(job) for _ in range(images // REQUEST)]
    fleet.wait(ids, timeout_s=600)
    return len(ids) * REQUEST / (time.perf_counter() - started)


def wait_until_ready(url: str) -> None:
    """Wait until the service is ready."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise SystemExit("the service did not become ready")
        time.sleep(0.1)


def main() -> None:
    """Measure one and two workers, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument(
        "--image-ms", type=float, default=40.0, help="time that the model takes for an image (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.images < REQUEST:
        parser.error(f"--images must be at least {REQUEST}")
    results = []
    for workers in (1, 2):
        rate, possible = measure(options.images, options.image_ms / 1000, workers)
        results.append({"workers": workers, "images_per_s": rate, "possible": possible, "share": rate / possible})
        if not options.json:
            print(f"{workers} worker(s): {rate:.1f} images/s, {rate / possible:.2f} of that of the workers alone")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
