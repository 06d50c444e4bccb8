// Pictures in the browser: what the model will see of a file, test cards, grids of cells, and colours for numbers.

import { ask } from "./api.js";

/** A canvas of a size, and its context. */
export function canvas(width, height) {
  const element = document.createElement("canvas");
  element.width = width;
  element.height = height;
  return [element, element.getContext("2d", { willReadFrequently: true })];
}

export const open = (blob) => createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });

/** [left, top, width, height] of the largest centred box of the aspect width:height, by the service's rules. */
export function centre(w, h, width, height) {
  let [boxW, boxH] = [w, h];
  if (w * height > h * width) boxW = Math.max(1, halfEven((h * width) / height));
  else boxH = Math.max(1, halfEven((w * height) / width));
  return [Math.floor((w - boxW) / 2), Math.floor((h - boxH) / 2), boxW, boxH];
}

/** The nearest whole number, as Python rounds. */
export function halfEven(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
}

const LIMIT = 2048; // pixels along a side that are resampled here; beyond, the browser shrinks the crop first

/** The picture as the model sees it: an ImageData of `width` by `height`, cropped and resampled as the service does. */
export function fit(bitmap, width, height) {
  const box = centre(bitmap.width, bitmap.height, width, height);
  const shrink = Math.min(1, LIMIT / Math.max(box[2], box[3]));
  const [w, h] = [Math.max(1, Math.round(box[2] * shrink)), Math.max(1, Math.round(box[3] * shrink))];
  const [, context] = canvas(w, h);
  context.fillStyle = "#fff"; // transparency is composited on white
  context.fillRect(0, 0, w, h);
  context.drawImage(bitmap, ...box, 0, 0, w, h);
  const source = context.getImageData(0, 0, w, h);
  return w === width && h === height ? source : resample(source, width, height);
}

/** Antialiased bicubic (a = -1/2), columns then rows, each rounded to bytes: the filter of Pillow. */
function resample(source, width, height) {
  const across = lines(source.data, source.width, source.height, width, 4, source.width * 4);
  const down = lines(across, source.height, width, height, width * 4, 4);
  return new ImageData(down, width, height);

  function lines(data, size, others, outSize, stride, otherStride) {
    const out = new Uint8ClampedArray(outSize * others * 4);
    const outStride = stride === 4 ? 4 : width * 4;
    const outOther = stride === 4 ? outSize * 4 : 4;
    taps(size, outSize).forEach(({ from, weights }, i) => {
      for (let j = 0; j < others; j += 1) {
        for (let c = 0; c < 4; c += 1) {
          let sum = 0;
          for (let k = 0; k < weights.length; k += 1) sum += weights[k] * data[(from + k) * stride + j * otherStride + c];
          out[i * outStride + j * outOther + c] = sum;
        }
      }
    });
    return out;
  }
}

function taps(size, outSize) {
  const scale = size / outSize;
  const spread = Math.max(scale, 1);
  return Array.from({ length: outSize }, (_, i) => {
    const middle = (i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(middle - 2 * spread + 0.5));
    const to = Math.min(size, Math.trunc(middle + 2 * spread + 0.5));
    const raw = Array.from({ length: to - from }, (_, k) => cubic((from + k - middle + 0.5) / spread));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { from, weights: raw.map((weight) => weight / sum) };
  });
}

function cubic(x) {
  const t = Math.abs(x);
  if (t < 1) return 1.5 * t ** 3 - 2.5 * t ** 2 + 1;
  return t < 2 ? -0.5 * (t ** 3 - 5 * t ** 2 + 8 * t - 4) : 0;
}

/** A canvas that shows an ImageData, each pixel as a square. */
export function exact(image, label) {
  const [element, context] = canvas(image.width, image.height);
  context.putImageData(image, 0, 0);
  element.className = "pixels";
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  return element;
}

/** A canvas of pixels as large squares, to be looked at outside of the page. */
export function enlarged(small, times = 16) {
  const [large, context] = canvas(times * small.width, times * small.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, large.width, large.height);
  return large;
}

/** The whole picture, with what the crop leaves out dimmed. */
export function cropped(bitmap, width, height, side = 240) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const [w, h] = [Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale))];
  const [element, context] = canvas(w, h);
  const [x, y, boxW, boxH] = centre(bitmap.width, bitmap.height, width, height).map((value) => value * scale);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, w, h);
  context.globalAlpha = 0.28;
  context.drawImage(bitmap, 0, 0, w, h);
  context.globalAlpha = 1;
  context.drawImage(bitmap, x / scale, y / scale, boxW / scale, boxH / scale, x, y, boxW, boxH);
  element.setAttribute("aria-hidden", "true");
  if (Math.max(w, h) <= 64) element.className = "pixels";
  return element;
}

/** The file behind a PNG in base64. */
export const decoded = (png) => new Blob([Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0))], { type: "image/png" });

export const toBlob = (element) => new Promise((done) => element.toBlob(done, "image/png"));

/** Small pictures that show what a likelihood is: a photograph (Chelsea by Stefan van der Walt, CC0), and some drawn at the model's size. */
export const CARDS = {
  photograph: null,
  "flat grey": () => [128, 128, 128],
  gradient: (x, y) => [40 + 180 * x, 60 + 150 * y, 200 - 120 * x],
  stripes: (x, y, i) => (i % 4 < 2 ? [226, 214, 190] : [38, 66, 84]),
  noise: () => [0, 1, 2].map(() => 256 * Math.random()),
};

export async function card(name, width, height) {
  if (!CARDS[name]) return new File([await (await ask("studio/cat.jpg")).blob()], "cat.jpg", { type: "image/jpeg" });
  const image = new ImageData(width, height);
  for (let j = 0; j < height; j += 1) {
    for (let i = 0; i < width; i += 1) image.data.set([...CARDS[name](i / width, j / height, i, j), 255], 4 * (j * width + i));
  }
  return new File([await toBlob(exact(image, name))], `${name.replace(" ", "-")}.png`, { type: "image/png" });
}

/** The cells of a grid of at most `n` pictures of a size; black ones at its end are none. */
export function cells(bitmap, width, height, n) {
  const columns = bitmap.width / width;
  const [, context] = canvas(bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const all = Array.from({ length: Math.min(n, columns * (bitmap.height / height)) }, (_, i) =>
    context.getImageData((i % columns) * width, Math.floor(i / columns) * height, width, height));
  const drawn = (cell) => cell.data.some((value, at) => at % 4 !== 3 && value);
  return all.slice(0, all.findLastIndex(drawn) + 1);
}

/** How much of a cell is drawn at a moment, [x, y, w, h], when lines come from the side `keep` on. */
export function drawn({ width, height }, { stage, step }, keep = "top") {
  const across = keep === "left" || keep === "right";
  const lines = across ? width : height;
  const n = stage === "noisy_sampling" ? step : lines;
  const from = keep === "bottom" || keep === "right" ? lines - n : 0;
  return across ? [from, 0, n, height] : [0, from, width, n];
}

// Inferno by a polynomial of degree six (Matt Zucker, public domain).
const INFERNO = [
  [0.00022, 0.00165, -0.01948], [0.10651, 0.56396, 3.93271], [11.60249, -3.97285, -15.94239], [-41.70399, 17.43639, 44.35414],
  [77.16294, -33.40235, -81.80731], [-71.31943, 32.62606, 73.20952], [25.13113, -12.24267, -23.07033],
];

/** [r, g, b] of a number from 0 (dark) to 1 (bright). */
function heat(t) {
  const x = Math.min(1, Math.max(0, t));
  return [0, 1, 2].map((c) => 255 * INFERNO.reduceRight((sum, row) => sum * x + row[c], 0));
}

/** Rows of numbers as an ImageData, from `low` to `high`. */
export function heatmap(rows, low, high) {
  const image = new ImageData(rows[0].length, rows.length);
  rows.flat().forEach((value, i) => image.data.set([...heat((value - low) / (high - low || 1)), 255], 4 * i));
  return image;
}
