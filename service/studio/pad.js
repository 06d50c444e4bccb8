// The image to complete, and the half of it that is known.

import { announce, h } from "./dom.js";
import { chips } from "./fields.js";
import { createCanvas, decode, pixelCanvas, preprocess } from "./image.js";

const SIDE = 320; // width of the pad in CSS pixels; its height follows the model's images
const HALVES = ["top", "bottom", "left", "right"];
const MIN_ALPHA = 128; // below it a pixel is transparent

const INSTRUCTIONS = "Mark the half to keep with a stroke, or choose it below.";
const OPAQUE_HALF = "This image is partly transparent: its opaque half is kept.";
const UNDECODABLE = "This browser cannot display this file; the service may still be able to read it.";

/**
 * Read a file for a model: `modelView`, the ImageData that the model sees (null if the browser cannot decode it), of
 * the size `part` if the file is only a half; the `halves` that can be kept; whether it is `transparent`, which
 * determines the half.
 */
async function readSource(file, model) {
  const halves = HALVES.filter((name) => model.keeps.includes(name));
  try {
    const bitmap = await decode(file);
    const part = halfSize(bitmap, model);
    const modelView = preprocess(bitmap, ...(part?.size ?? [model.width, model.height]));
    if (!part) return { file, modelView, halves, transparent: hasTransparency(bitmap) };
    return { file, modelView, part: part.size, halves: halves.filter((name) => part.halves.includes(name)) };
  } catch {
    return { file, modelView: null, halves };
  }
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

function hasTransparency(bitmap) {
  const [, context] = createCanvas(bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let i = 3; i < data.length; i += 4) if (data[i] < MIN_ALPHA) return true;
  return false;
}

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
    this.element = h("div", { class: "stack", hidden: true }, this.canvas, this.hint, this.choice.element);
    this.canvas.addEventListener("pointerdown", (event) => this.beginStroke(event));
    this.canvas.addEventListener("pointermove", (event) => this.extendStroke(event));
    for (const type of ["pointerup", "pointercancel"]) this.canvas.addEventListener(type, () => this.endStroke());
  }

  /** The known half; undefined if the transparency of the image determines it. */
  get half() {
    return this.source.transparent ? undefined : this.choice.value;
  }

  /** Show a file; resolves to whether it is still the latest. */
  async load(file, model) {
    this.latest = file;
    const source = await readSource(file, model);
    if (this.latest !== file) return false;
    this.source = source;
    const { halves, modelView, transparent } = this.source;
    const selected = halves.includes(this.choice.value) ? this.choice.value : halves[0];
    this.choice.offer(
      HALVES.map((name) => [name, name, !halves.includes(name)]),
      selected,
    );
    this.choice.element.hidden = Boolean(transparent);
    this.hint.textContent = INSTRUCTIONS;
    if (transparent) this.hint.textContent = OPAQUE_HALF;
    if (!modelView) this.hint.textContent = UNDECODABLE;
    this.canvas.height = Math.round((SIDE * model.height) / model.width);
    this.element.hidden = false;
    this.paint();
    return true;
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
    const { file, modelView, transparent } = this.source;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (modelView) this.paintImage(pixelCanvas(modelView, ""));
    if (this.stroke) this.paintStroke();
    const half = transparent ? "opaque" : this.choice.value || "top";
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
    context.globalAlpha = source.transparent ? 1 : 0.16;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    if (!source.transparent) context.drawImage(image, ...halfArea(half, image), ...halfArea(half, canvas));
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
    if (!this.source || this.source.transparent) return;
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
