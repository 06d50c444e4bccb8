"""A tour of the library and of the client of a running service, in cells: read it, run it or open it as a notebook.

make serve                                          # in another terminal
python scripts/docs/tour.py [http://localhost:8000]
"""

# %% [markdown]
# # The library
# A model scores, generates and completes images. It runs in this process and needs no service.

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
# The same seed gives the same bytes: alone, in a batch, and from the service below.
images = model.generate(2, classes="cat", seeds=7)
completions = model.complete(cat, keep="top", seeds=7)
print(images.shape, completions.shape)
assert np.array_equal(completions[:, :16], cat[None, :16])

# %% [markdown]
# # The client
# It calls a service, on this machine or elsewhere, and needs no PyTorch. Images may be paths, Pillow images or arrays.

# %%
client = Client(URL)
print("service", client.version(), "with", ", ".join(entry["name"] for entry in client.models()))
[remote] = client.score(ROOT / "docs" / "cat.jpg")
print(f"{remote.bpd:.4f} bits/dim, p {remote.ood.p_value:.4f}")
assert abs(remote.bpd - score.bpd) < 1e-4

# %%
# Several images can be sent in one request; each result names its file.
for result in client.score([ROOT / "docs" / "cat.jpg", ROOT / "docs" / "half.png"]):
    print(result.file, f"{result.bpd:.4f}")

# %%
# A long job reports its progress.
generated = client.generate(2, class_="cat", seed=7, on_progress=lambda step: print(step.stage, step.step, step.total))
print(generated.seeds, generated.model)
completed = client.complete(Image.open(ROOT / "docs" / "half.png"), seed=7)
assert completed.images.shape == (1, 32, 32, 3)

# %%
# A large image is split into tiles. It gets a map and, if tiles are calibrated, a verdict.
scan = client.scan(Image.open(ROOT / "docs" / "cat.jpg").crop((64, 64, 128, 128)), map=True)
print(f"{scan.tiles} tiles, the OOD score {scan.score:.1f} at {tuple(scan.box)}, map {scan.map.shape}")

# %%
# An error is one sentence that names the field and the remedy.
try:
    client.generate(class_="unicorn")
except ServiceError as error:
    print(error.status, error, sep=": ")
else:
    raise AssertionError("an unknown class was accepted")

# %%
# For many images, use the command line with the same service.
from ncml.cli import main as command_line  # noqa: E402 - a cell imports what it needs

with tempfile.TemporaryDirectory() as folder:
    for i, image in enumerate(images):
        Image.fromarray(image).save(Path(folder) / f"{i}.png")
    assert command_line.main(["score", folder, "--server", URL, "--output", f"{folder}/scores.csv"]) == 0
    print(Path(folder, "scores.csv").read_text())
client.close()
