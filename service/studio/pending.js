// The images that are selected but not yet submitted, each with the crop that the model will see.

import { catalogue } from "./catalogue.js";
import { announce, disable, h, plural } from "./dom.js";
import { imageFiles, isTiff, UNDISPLAYABLE } from "./feedback.js";
import { cropPreview, pixelCanvas, preprocess, withBitmap } from "./image.js";
import { tiling } from "./tiling.js";

const UNREADABLE = "This file is damaged or not an image.";

/**
 * Decode a file for a model: its `size` [width, height] in pixels, `modelView`, the ImageData that the model sees, and
 * `whole`, a small canvas of the image. Returns null for a file that browsers cannot decode; the service can decode some.
 */
async function decodeFor(file, model) {
  try {
    return await withBitmap(file, (bitmap) => ({
      size: [bitmap.width, bitmap.height],
      modelView: preprocess(bitmap, model.width, model.height),
      whole: cropPreview(bitmap, bitmap.width, bitmap.height),
    }));
  } catch {
    return null;
  }
}

/** A selected file, decoded for the current model. */
class PendingImage {
  decoded = undefined; // until it is known
  decoding = null; // a promise of it

  constructor(file, onRemove) {
    this.file = file;
    this.name = file.name || "pasted image";
    this.previews = h("span", { class: "previews" });
    this.hint = h("span", { class: "hint" }, "Loading");
    const attributes = { type: "button", class: "quiet out", "aria-label": `Remove ${this.name}` };
    this.removeButton = h("button", { ...attributes, onclick: () => onRemove(this) }, "×");
    this.element = h(
      "li",
      {},
      this.previews,
      h("span", { class: "words" }, h("span", { class: "name", title: file.name }, this.name), this.hint),
      this.removeButton,
    );
  }

  /** Keep the image in the list while it is sent. */
  lock(isLocked) {
    disable(this.removeButton, isLocked);
  }

  /** Decode the file for the current model, and show it. */
  async load(tiles) {
    if (!catalogue.current) return;
    const decoding = decodeFor(this.file, catalogue.current);
    this.decoding = decoding;
    const decoded = await decoding;
    if (this.decoding !== decoding) return; // another model was selected meanwhile
    this.decoded = decoded;
    this.show(tiles());
  }

  /** Show what the model will see, or the `tiles` {size} that it will score. */
  show(tiles) {
    if (this.decoded) {
      this.previews.replaceChildren(...(tiles ? [this.decoded.whole] : this.croppedPreviews()));
      this.hint.textContent = this.description(tiles);
    } else if (this.decoded === null) {
      this.previews.replaceChildren();
      this.hint.textContent = isTiff(this.file) ? UNDISPLAYABLE : UNREADABLE;
    }
  }

  croppedPreviews() {
    const { modelView, whole } = this.decoded;
    const label = "What the model sees: the centre of the image, resized to the model’s size";
    return [
      cropPreview(whole, modelView.width, modelView.height),
      h("span", { "aria-hidden": "true" }, "→"),
      pixelCanvas(modelView, label),
    ];
  }

  description(tiles) {
    const { size: imageSize } = this.decoded;
    if (!tiles) return `${imageSize.join(" × ")} pixels`;
    const { n, size } = tiling(catalogue.current, imageSize, catalogue.maxTiles, tiles.size);
    return n ? `${plural(n, "tile")} of ${size.join(" × ")} pixels` : "smaller than a tile";
  }
}

/** The list of pending images. `tiles()` is null, or the {size} of tiles in which they will be scored, if one is chosen. */
export class PendingImages {
  images = [];
  element = h("ul", { class: "waiting", hidden: true });

  constructor({ tiles, notice, onChange }) {
    Object.assign(this, { tiles, notice, onChange });
  }

  add(files) {
    const accepted = imageFiles(files, this.notice);
    const added = accepted.map((file) => new PendingImage(file, (image) => this.remove([image])));
    this.images = [...this.images, ...added];
    this.load(added);
    this.render();
    if (accepted.length) announce(`${plural(this.images.length, "image")} ready to score`);
  }

  /** Prepare an image that is submitted without being listed. */
  prepare(file) {
    const image = new PendingImage(file, () => {});
    this.load([image]);
    return image;
  }

  remove(images) {
    this.images = this.images.filter((image) => !images.includes(image));
    this.render();
  }

  clear() {
    this.remove(this.images);
  }

  /** Decode images for the current model. */
  load(images = this.images) {
    for (const image of images) image.load(this.tiles);
  }

  /** Update the previews after a change of the tiles. */
  show() {
    for (const image of this.images) image.show(this.tiles());
  }

  render() {
    this.element.replaceChildren(...this.images.map((image) => image.element));
    this.element.hidden = !this.images.length;
    this.onChange();
  }
}
