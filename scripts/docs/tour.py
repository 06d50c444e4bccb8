"""A tour in cells, to read, to run, or to open as a notebook: the library, then the client of a running service.

make serve                                          # in another terminal
python scripts/docs/tour.py [http://localhost:8000]
"""

# %% [markdown]
# # The library
# A model scores images, generates new ones and completes halves. It computes in this process, and needs no service.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import ncml
from ncml.client import Client, ServiceError
from ncml.images import open_image, resize_to

ROOT = Path(__file__).resolve().parents[2]
URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"

model = ncml.load(ROOT / "models" / "cifar10")
print(model.name, f"{model.width}x{model.height}", ", ".join(model.classes))

# %%
# Bits per dimension are exact: lower means more likely. The verdict ranks the image among held-out ones.
cat = resize_to(open_image(ROOT / "docs" / "cat.jpg"), model.height, model.width)
[score] = model.score(cat, map=True)
print(f"{score.bpd:.4f} bits/dim, p {score.ood.p_value:.4f}, out-of-distribution: {score.ood.is_ood}")
print(f"the least likely pixel takes {score.map.max():.1f} bits per channel, the median {np.median(score.map):.1f}")

# %%
# A seed determines an image: the same bytes alone, in a batch, and from the service below.
images = model.generate(2, classes="cat", seeds=7)
completions = model.complete(cat, keep="top", seeds=7)
print(images.shape, completions.shape)
assert np.array_equal(completions[:, :16], cat[None, :16])

# %% [markdown]
# # The client
# The same from a service, on this or another machine, without PyTorch. Images may be paths, Pillow images or arrays.

# %%
client = Client(URL)
print("service", client.version(), "with", ", ".join(entry["name"] for entry in client.models()))
[remote] = client.score(ROOT / "docs" / "cat.jpg")
print(f"{remote.bpd:.4f} bits/dim, p {remote.ood.p_value:.4f}")
assert abs(remote.bpd - score.bpd) < 1e-4

# %%
# Several images are one request; each result names its file.
for result in client.score([ROOT / "docs" / "cat.jpg", ROOT / "docs" / "half.png"]):
    print(result.file, f"{result.bpd:.4f}")

# %%
# A long job reports its progress.
generated = client.generate(2, class_="cat", seed=7, on_progress=lambda step: print(step.stage, step.step, step.total))
print(generated.seeds, generated.model)
completed = client.complete(Image.open(ROOT / "docs" / "half.png"), seed=7)
assert completed.images.shape == (1, 32, 32, 3)

# %%
# A large image is judged by its tiles if tiles are calibrated, and mapped in any case.
scan = client.scan(Image.open(ROOT / "docs" / "cat.jpg").crop((64, 64, 128, 128)), map=True)
print(f"{scan.tiles} tiles, the largest score {scan.score:.1f} at {tuple(scan.box)}, map {scan.map.shape}")

# %%
# A mistake is one sentence with the field and the remedy.
try:
    client.generate(class_="unicorn")
except ServiceError as error:
    print(error.status, error.field, error, sep=": ")
else:
    raise AssertionError("a unicorn was generated")

# %%
# Many images: the command line, through the same service.
from ncml.cli import main as command_line  # noqa: E402 - a cell imports what it needs

with tempfile.TemporaryDirectory() as folder:
    for i, image in enumerate(images):
        Image.fromarray(image).save(Path(folder) / f"{i}.png")
    assert command_line.main(["score", folder, "--server", URL, "--output", f"{folder}/scores.csv"]) == 0
    print(Path(folder, "scores.csv").read_text())
client.close()
