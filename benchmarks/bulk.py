"""`ncml score --server` against what the workers can do, with one worker and with two side by side.

The workers are real processes with a synthetic model that takes as long as the bundled model does on a core of its own
but needs no processor, so that the machine's cores do not limit the workers. What is measured is whether the client,
the service and the queue keep them busy. Goal: at least 0.9.

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
from tests.conftest import Valkey, free_port
from tests.worker.fleet import Fleet
from tests.worker.synthetic import write_model

BATCH = 64


def measure(images: int, image_s: float, workers: int) -> float:
    """Return the images per second that a number of workers score."""
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
            started = time.perf_counter()
            arguments = ["score", str(folder / "images"), "--server", url, "--output", str(folder / "scores.csv")]
            with contextlib.redirect_stdout(sys.stderr):
                assert cli.main(arguments) == 0
            return images / (time.perf_counter() - started)
        finally:
            service.terminate()
            service.wait()
            fleet.stop()
            valkey.stop()


def wait_until_ready(url: str) -> None:
    """Wait until the service has its workers."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise SystemExit("the service did not become ready")
        time.sleep(0.1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--image-ms", type=float, default=40.0, help="of the model, for one image")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for workers in (1, 2):
        possible = workers * 1000 / options.image_ms
        rate = measure(options.images, options.image_ms / 1000, workers)
        results.append({"workers": workers, "images_per_s": rate, "possible": possible, "share": rate / possible})
        if not options.json:
            print(f"{workers} workers: {rate:6.1f} images/s of {possible:6.1f} that they can do: {rate / possible:.2f}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
