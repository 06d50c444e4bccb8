// The image to complete, and the half of it that is known.

import { chips } from "./chips.js";
import { announce, h } from "./dom.js";
import { UNDISPLAYABLE } from "./feedback.js";
import { createCanvas, pixelCanvas, preprocess, withBitmap } from "./image.js";

const SIDE = 320; // width of the pad in CSS pixels; its height follows the model's images
const HALVES = ["top", "bottom", "left", "right"];
const MIN_ALPHA = 128; // below it a pixel is transparent

const INSTRUCTIONS = "Mark the half to keep with a stroke, or choose it below.";
const OPAQUE_HALF = "Half of this image is transparent: its opaque half is kept.";
const HALF_SHAPE = "This image has the shape of a half and is used as one. Choose below which half it is.";

/**
 * Read a file for a model: `modelView`, the ImageData that the model sees (null if the browser cannot decode it), of
 * the size `part` if the file is only a half; the `halves` that can be kept; `opaque`, the opaque half if the other
 * one is transparent; `isHalfShaped`, whether the file has the shape of a half, which `asWhole` ignores; and
 * `isRedrawn`, whether the service would not read the file in this way, and therefore gets what the model sees.
 */
async function readSource(file, model, asWhole) {
  const halves = HALVES.filter((name) => model.keeps.includes(name));
  try {
    return await withBitmap(file, (bitmap) => describe(file, bitmap, { model, halves, asWhole }));
  } catch {
    return { file, modelView: null, halves };
  }
}

function describe(file, bitmap, { model, halves, asWhole }) {
  const { opaque, isTransparent } = file.type === "image/jpeg" ? { isTransparent: false } : transparency(bitmap);
  const shape = opaque ? null : halfSize(bitmap, model);
  const part = asWhole ? null : shape;
  return {
    file,
    modelView: preprocess(bitmap, ...(part?.size ?? [model.width, model.height])),
    part: part?.size,
    halves: part ? halves.filter((name) => part.halves.includes(name)) : halves,
    opaque,
    isHalfShaped: shape !== null,
    isRedrawn: (isTransparent && !opaque) || (shape !== null && asWhole),
  };
}

/** If an image is itself a half: the size at which the model sees it, and which half it can be; otherwise null. */
function halfSize({ width, height }, model) {
  if (2 * height * model.width === width * model.height) {
    return { size: [model.width, Math.floor(model.height / 2)], halves: ["top", "bottom"] };
  }
  if (height * model.width === 2 * width * model.height) {
    return { size: [Math.floor(model.width / 2), model.height], halves: ["left", "right"] };
  }
  return null;
}

/** Whether an image has transparent pixels, and which half is `opaque` if they are exactly the other one. */
function transparency(bitmap) {
  const { width, height } = bitmap;
  const [, context] = createCanvas(width, height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const isOpaque = new Uint8Array(width * height);
  // A loop: calling a function for each of millions of pixels takes some ten times as long.
  for (let i = 0; i < isOpaque.length; i += 1) isOpaque[i] = data[4 * i + 3] >= MIN_ALPHA;
  const isHalf = (half) => {
    const [length, position] = half === "top" || half === "bottom" ? [height, rowOf] : [width, columnOf];
    const isFirst = half === "top" || half === "left";
    // The middle line of an odd size belongs to either half.
    return [Math.floor(length / 2), Math.ceil(length / 2)].some((middle) =>
      isOpaque.every((opaque, i) => (opaque === 1) === (position(i, width) < middle === isFirst)),
    );
  };
  const isTransparent = isOpaque.includes(0);
  return { isTransparent, opaque: isTransparent ? HALVES.find(isHalf) : undefined };
}

const rowOf = (i, width) => Math.floor(i / width);
const columnOf = (i, width) => i % width;

/** [x, y, width, height] of a half of a box. */
function halfArea(half, { width, height }) {
  const [w, h] = [width / 2, height / 2];
  return { top: [0, 0, width, h], bottom: [0, h, width, h], left: [0, 0, w, height], right: [w, 0, w, height] }[half];
}

/** Shows an image with its known half, which a stroke or a chip selects. */
export class KnownHalfPad {
  source = null;
  stroke = null; // its points while one is drawn
  hint = h("p", { class: "hint" }, INSTRUCTIONS);

  constructor() {
    [this.canvas, this.context] = createCanvas(SIDE, SIDE);
    this.canvas.className = "pad";
    this.canvas.setAttribute("role", "img");
    this.choice = chips({ legend: "Known half", options: [], value: "top", onChange: () => this.paint() });
    this.wholeInput = h("input", { type: "checkbox", onchange: () => this.reload() });
    this.wholeChoice = h("label", { class: "check" }, this.wholeInput, "Use it as a whole image");
    const elements = [this.canvas, this.hint, this.wholeChoice, this.choice.element];
    this.element = h("div", { class: "stack", hidden: true }, elements);
    this.canvas.addEventListener("pointerdown", (event) => this.beginStroke(event));
    this.canvas.addEventListener("pointermove", (event) => this.extendStroke(event));
    for (const type of ["pointerup", "pointercancel"]) this.canvas.addEventListener(type, () => this.endStroke());
  }

  /** The known half; undefined if the transparency of the image determines it. */
  get half() {
    return this.source.opaque ? undefined : this.choice.value;
  }

  /** Show a file; resolves to whether it is still the latest. */
  async load(file, model) {
    if (file !== this.latest?.file) this.wholeInput.checked = false;
    const request = { file, model };
    this.latest = request;
    const source = await readSource(file, model, this.wholeInput.checked);
    if (this.latest !== request) return false;
    this.source = source;
    const { halves } = source;
    const selected = halves.includes(this.choice.value) ? this.choice.value : halves[0];
    this.choice.offer(
      HALVES.map((name) => [name, name, !halves.includes(name)]),
      selected,
    );
    this.choice.element.hidden = Boolean(source.opaque);
    this.wholeChoice.hidden = !source.isHalfShaped;
    this.hint.textContent = hintOf(source);
    this.canvas.height = Math.round((SIDE * model.height) / model.width);
    this.element.hidden = false;
    this.paint();
    return true;
  }

  /** Show the same file again, as a half or as a whole image. */
  reload() {
    return this.load(this.latest.file, this.latest.model);
  }

  /** The submitted image at the model's size; a half is drawn where it belongs. */
  submittedUrl(width, height) {
    const { modelView, part } = this.source;
    if (!modelView) return undefined;
    const [canvas, context] = createCanvas(width, height);
    context.drawImage(pixelCanvas(modelView, ""), ...(part ? halfArea(this.half, canvas) : [0, 0]));
    return canvas.toDataURL();
  }

  paint() {
    if (!this.source) return;
    const { canvas, context } = this;
    const { file, modelView, opaque } = this.source;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (modelView) this.paintImage(pixelCanvas(modelView, ""));
    if (this.stroke) this.paintStroke();
    const half = opaque ?? (this.choice.value || "top");
    canvas.setAttribute("aria-label", `${file.name}; its ${half} half is kept`);
  }

  /** Paint the known half, and the other half faintly. */
  paintImage(image) {
    const { canvas, context, source } = this;
    const half = this.choice.value || "top";
    if (source.part) {
      context.drawImage(image, ...halfArea(half, canvas));
      return;
    }
    context.globalAlpha = source.opaque ? 1 : 0.16;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    if (!source.opaque) context.drawImage(image, ...halfArea(half, image), ...halfArea(half, canvas));
  }

  paintStroke() {
    const { canvas, context } = this;
    context.strokeStyle = getComputedStyle(canvas).getPropertyValue("--accent");
    context.lineWidth = 18;
    context.lineCap = "round";
    context.lineJoin = "round";
    context.globalAlpha = 0.6;
    context.beginPath();
    for (const [x, y] of this.stroke) context.lineTo(x, y);
    context.stroke();
    context.globalAlpha = 1;
  }

  beginStroke(event) {
    if (!this.source || this.source.opaque) return;
    this.stroke = [this.position(event)];
    this.canvas.setPointerCapture(event.pointerId);
  }

  extendStroke(event) {
    if (!this.stroke) return;
    this.stroke.push(this.position(event));
    this.paint();
  }

  endStroke() {
    if (!this.stroke) return;
    const half = strokeHalf(this.stroke, this.canvas, this.source.halves);
    this.stroke = null;
    if (half) {
      this.choice.value = half;
      announce(`The ${half} half is kept`);
    }
    this.paint();
  }

  position({ clientX, clientY }) {
    const { left, top, width, height } = this.canvas.getBoundingClientRect();
    return [((clientX - left) / width) * this.canvas.width, ((clientY - top) / height) * this.canvas.height];
  }
}

function hintOf({ modelView, opaque, part }) {
  if (!modelView) return UNDISPLAYABLE;
  if (opaque) return OPAQUE_HALF;
  return part ? HALF_SHAPE : INSTRUCTIONS;
}

/** The half that a stroke marks by its mean position: the top or the bottom if the stroke is wider than high. */
function strokeHalf(stroke, { width, height }, halves) {
  const [xs, ys] = [stroke.map(([x]) => x), stroke.map(([, y]) => y)];
  const extent = (values) => Math.max(...values) - Math.min(...values);
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const vertical = mean(ys) < height / 2 ? "top" : "bottom";
  const horizontal = mean(xs) < width / 2 ? "left" : "right";
  const preference = extent(xs) >= extent(ys) ? [vertical, horizontal] : [horizontal, vertical];
  return preference.find((half) => halves.includes(half));
}
