// The images that are selected but not yet submitted, each with what the model will see of it.

import { catalogue, reference } from "./catalogue.js";
import { announce, disable, h, keepFocus, plural, viewTitle } from "./dom.js";
import { imageFiles, isTiff, UNDISPLAYABLE } from "./feedback.js";
import { cropPreview, pixelCanvas, preprocess, withBitmap } from "./image.js";
import { tiling } from "./tiling.js";

const MAX_LISTED = 100; // images, whose previews take up to half a megabyte each
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

/** A selected file. Once it is shown, it is decoded for the latest model. */
export class PendingImage {
  model = null; // the reference of the model that it is decoded for
  decoding = null;

  constructor(file, onRemove) {
    this.file = file;
    this.name = file.path || file.webkitRelativePath || file.name || "pasted image";
    this.previews = h("span", { class: "previews" });
    this.hint = h("span", { class: "hint" }, "Loading");
    const attributes = { type: "button", class: "quiet out", "aria-label": `Remove ${this.name}` };
    this.removeButton = h("button", { ...attributes, onclick: () => onRemove(this) }, "×");
    this.element = h(
      "li",
      {},
      this.previews,
      h("span", { class: "words" }, h("span", { class: "name", title: this.name }, h("bdi", {}, this.name)), this.hint),
      this.removeButton,
    );
  }

  /** Keep the image in the list while it is sent. */
  lock(isLocked) {
    disable(this.removeButton, isLocked);
  }

  /** The promise of the file decoded for a model. */
  decodedFor(model) {
    return this.model === reference(model) ? this.decoding : decodeFor(this.file, model);
  }

  /** Show what the current model will see: the whole image if `isWhole()`, or the tiles if `tiles()` has their {size}. */
  async show(tiles, isWhole) {
    const { current } = catalogue;
    if (!current) return;
    const decoding = this.decodedFor(current);
    Object.assign(this, { model: reference(current), decoding });
    const decoded = await decoding;
    if (this.decoding !== decoding) return; // another model was selected meanwhile
    if (decoded) {
      this.previews.replaceChildren(...(tiles() || isWhole() ? [decoded.whole] : this.croppedPreviews(decoded)));
      this.hint.textContent = this.description(decoded.size, tiles());
    } else {
      this.previews.replaceChildren();
      this.hint.textContent = isTiff(this.file) ? UNDISPLAYABLE : UNREADABLE;
    }
  }

  croppedPreviews({ modelView, whole }) {
    const label = "What the model sees: the centre of the image, resized to the model’s size";
    return [
      cropPreview(whole, modelView.width, modelView.height),
      h("span", { "aria-hidden": "true" }, "→"),
      pixelCanvas(modelView, label),
    ];
  }

  description(imageSize, tiles) {
    if (!tiles) return `${imageSize.join(" × ")} pixels`;
    const { n, size } = tiling(catalogue.current, imageSize, catalogue.maxTiles, tiles.size);
    return n ? `${plural(n, "tile")} of ${size.join(" × ")} pixels` : "smaller than a tile";
  }
}

/**
 * The list of pending images. `tiles()` is null, or the {size} of tiles in which they will be scored, if one is chosen;
 * `isWhole()` is whether a detector will judge them whole.
 */
export class PendingImages {
  images = [];
  list = h("ul", { class: "waiting", hidden: true });
  skipped = h("div"); // files of the last selection

  constructor({ tiles, isWhole, onChange }) {
    Object.assign(this, { tiles, isWhole, onChange });
  }

  add(files) {
    const accepted = imageFiles(files, this.skipped);
    const added = accepted.map((file) => new PendingImage(file, (image) => this.discard([image])));
    this.images = [...this.images, ...added];
    this.render();
    if (accepted.length) this.announce();
  }

  announce() {
    announce(`${plural(this.images.length, "image")} ready to score`);
  }

  remove(images) {
    const others = this.images.filter((image) => !images.includes(image));
    const next = others[this.images.indexOf(images[0])] ?? others.at(-1);
    keepFocus(this.list, next?.removeButton ?? viewTitle(this.list), () => {
      this.images = others;
      this.render();
    });
  }

  /** Remove images that the user does not want to score. */
  discard(images) {
    this.remove(images);
    this.announce();
  }

  clear() {
    this.skipped.replaceChildren();
    this.discard(this.images);
  }

  get listed() {
    return this.images.slice(0, MAX_LISTED);
  }

  /** Update the previews after a change of the model or the tiles. */
  show() {
    for (const image of this.listed) image.show(this.tiles, this.isWhole);
  }

  render() {
    const { images, listed } = this;
    for (const image of listed) if (!image.decoding) image.show(this.tiles, this.isWhole);
    const others = images.length - listed.length;
    const more = others ? [h("li", { class: "hint" }, `and ${plural(others, "more image")}`)] : [];
    this.list.replaceChildren(...listed.map(({ element }) => element), ...more);
    this.list.hidden = !images.length;
    this.onChange();
  }
}
