// The images that are selected but not yet submitted, each with the crop that the model will see.

import { Refusal } from "./api.js";
import { catalogue } from "./catalogue.js";
import { announce, h, plural } from "./dom.js";
import { imageFiles, showFailure } from "./feedback.js";
import { cropPreview, decode, pixelCanvas, preprocess } from "./image.js";
import { tiling } from "./tiles.js";

const MAX_IMAGES = 64; // of a request

/** A selected file: `modelView` is the ImageData that the model sees, `tiling` how the service splits it into tiles. */
class PendingImage {
  modelView = null;
  tiling = null;
  ready = null; // a promise that resolves when both are known

  constructor(file, onRemove) {
    this.file = file;
    this.name = file.name || "pasted image";
    this.previews = h("span", { class: "previews" });
    this.hint = h("span", { class: "hint" }, "Loading");
    const attributes = { type: "button", class: "quiet out", "aria-label": `Remove ${this.name}` };
    this.element = h(
      "li",
      {},
      this.previews,
      h("span", { class: "words" }, h("span", { class: "name", title: file.name }, this.name), this.hint),
      h("button", { ...attributes, onclick: () => onRemove(this) }, "×"),
    );
  }

  /** Decode the file and show what the model will see. The service decodes some files that browsers cannot. */
  async refresh(isTiled) {
    const model = catalogue.current;
    if (!model) return;
    try {
      const bitmap = await decode(this.file);
      this.modelView = preprocess(bitmap, model.width, model.height);
      this.tiling = tiling(model, bitmap.width, bitmap.height);
      this.previews.replaceChildren(...this.previewElements(bitmap, model, isTiled()));
      this.hint.textContent = this.description(bitmap, isTiled());
    } catch {
      this.modelView = null;
      this.previews.replaceChildren();
      this.hint.textContent = "This browser cannot display this file; the service may still be able to read it.";
    }
  }

  previewElements(bitmap, model, tiled) {
    if (tiled) return [cropPreview(bitmap, bitmap.width, bitmap.height)];
    const label = "What the model sees: the centre of the image, resized to the model’s size";
    return [
      cropPreview(bitmap, model.width, model.height),
      h("span", { "aria-hidden": "true" }, "→"),
      pixelCanvas(this.modelView, label),
    ];
  }

  description(bitmap, tiled) {
    if (!tiled) return `${bitmap.width} × ${bitmap.height} pixels`;
    const { n, size } = this.tiling;
    return n ? `${plural(n, "tile")} of ${size.join(" × ")} pixels` : "smaller than a tile";
  }
}

/** The list of pending images. `isTiled()` is whether they will be scored in tiles. */
export class PendingImages {
  images = [];
  element = h("ul", { class: "waiting", hidden: true });

  constructor({ isTiled, notice, onChange }) {
    Object.assign(this, { isTiled, notice, onChange });
  }

  add(files) {
    const accepted = imageFiles(files, this.notice);
    const room = MAX_IMAGES - this.images.length;
    if (accepted.length > room) {
      const message = `At most ${MAX_IMAGES} images can be scored at once: ${room} of ${accepted.length} were added.`;
      showFailure(this.notice, new Refusal(message, { remedy: "Score these first, then add the others." }));
    }
    const added = accepted.slice(0, room).map((file) => new PendingImage(file, (image) => this.remove([image])));
    this.images = [...this.images, ...added];
    this.refresh(added);
    this.render();
    if (accepted.length) announce(`${plural(this.images.length, "image")} ready to score`);
  }

  /** Prepare an image that is submitted without being listed. */
  prepare(file) {
    const image = new PendingImage(file, () => {});
    this.refresh([image]);
    return image;
  }

  remove(images) {
    this.images = this.images.filter((image) => !images.includes(image));
    this.render();
  }

  clear() {
    this.remove(this.images);
  }

  /** Update the previews, for example after a change of the model or of the use of tiles. */
  refresh(images = this.images) {
    for (const image of images) image.ready = image.refresh(this.isTiled);
  }

  render() {
    this.element.replaceChildren(...this.images.map((image) => image.element));
    this.element.hidden = !this.images.length;
    this.onChange();
  }
}
