// Images in the browser: decode a file, crop and resize it as the model will see it, and draw its pixels.

/** A canvas of a size, and its context. */
export function createCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return [canvas, canvas.getContext("2d", { willReadFrequently: true })];
}

export const decode = (blob) =>
  createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });

const MAX_BITMAPS = 2; // that are decoded at the same time: one of 12 megapixels takes 48 MB
let bitmaps = 0;
const queue = [];

/** Return what `use(bitmap)` returns for a decoded file, which is freed afterwards. */
export async function withBitmap(blob, use) {
  if (bitmaps === MAX_BITMAPS) await new Promise((resolve) => queue.push(resolve));
  else bitmaps += 1;
  try {
    const bitmap = await decode(blob);
    try {
      return await use(bitmap);
    } finally {
      bitmap.close();
    }
  } finally {
    if (queue.length) queue.shift()();
    else bitmaps -= 1;
  }
}

/** The PNG file of a base64 string. */
export const pngBlob = (base64) =>
  new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });

export const toPng = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

/** [left, top, width, height] of the largest centred box of the aspect width:height, as the service computes it. */
function cropBox(imageWidth, imageHeight, width, height) {
  let [boxWidth, boxHeight] = [imageWidth, imageHeight];
  if (imageWidth * height > imageHeight * width) {
    boxWidth = Math.max(1, roundHalfEven((imageHeight * width) / height));
  } else {
    boxHeight = Math.max(1, roundHalfEven((imageWidth * height) / width));
  }
  return [Math.floor((imageWidth - boxWidth) / 2), Math.floor((imageHeight - boxHeight) / 2), boxWidth, boxHeight];
}

/** The nearest integer, rounded as Python does. */
export function roundHalfEven(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
}

const MAX_SIDE = 2048; // of a crop that is resampled here; the browser shrinks a larger one first

/** The image as the model sees it: an ImageData of `width` by `height`, cropped and resampled as the service does. */
export function preprocess(bitmap, width, height) {
  const box = cropBox(bitmap.width, bitmap.height, width, height);
  const scale = Math.min(1, MAX_SIDE / Math.max(box[2], box[3]));
  const [w, h] = [Math.max(1, Math.round(box[2] * scale)), Math.max(1, Math.round(box[3] * scale))];
  const [, context] = createCanvas(w, h);
  context.fillStyle = "#fff"; // transparency is composited on white
  context.fillRect(0, 0, w, h);
  context.drawImage(bitmap, ...box, 0, 0, w, h);
  const crop = context.getImageData(0, 0, w, h);
  return w === width && h === height ? crop : resample(crop, width, height);
}

/** Antialiased bicubic resampling (a = -1/2), columns then rows, each rounded to bytes: the filter of Pillow. */
function resample(image, width, height) {
  const row = 4 * width;
  const narrow = new Uint8ClampedArray(row * image.height);
  const columnTaps = filterTaps(image.width, width);
  for (let y = 0; y < image.height; y += 1) {
    resampleLine(image.data, narrow, columnTaps, { from: 4 * y * image.width, to: row * y, stride: 4 });
  }
  const resized = new Uint8ClampedArray(row * height);
  const rowTaps = filterTaps(image.height, height);
  for (let x = 0; x < width; x += 1) {
    resampleLine(narrow, resized, rowTaps, { from: 4 * x, to: 4 * x, stride: row });
  }
  return new ImageData(resized, width, height);
}

/** Resample a line of pixels that are `stride` bytes apart and begin at byte `from`, to one that begins at `to`. */
function resampleLine(source, target, taps, { from, to, stride }) {
  taps.forEach(({ first, weights }, i) => {
    for (let channel = 0; channel < 4; channel += 1) {
      let sum = 0;
      let byte = from + first * stride + channel;
      for (let k = 0; k < weights.length; k += 1, byte += stride) sum += weights[k] * source[byte];
      target[to + i * stride + channel] = sum;
    }
  });
}

/** For each of `newSize` pixels, the first of the `size` pixels that it is made of and their weights. */
function filterTaps(size, newSize) {
  const scale = size / newSize;
  const spread = Math.max(scale, 1);
  return Array.from({ length: newSize }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 2 * spread + 0.5));
    const end = Math.min(size, Math.trunc(centre + 2 * spread + 0.5));
    const values = Array.from({ length: end - first }, (_, k) => cubic((first + k - centre + 0.5) / spread));
    const sum = values.reduce((a, b) => a + b, 0);
    return { first, weights: values.map((value) => value / sum) };
  });
}

function cubic(x) {
  const t = Math.abs(x);
  if (t < 1) return 1.5 * t ** 3 - 2.5 * t ** 2 + 1;
  return t < 2 ? -0.5 * (t ** 3 - 5 * t ** 2 + 8 * t - 4) : 0;
}

/** A canvas that shows an ImageData, each pixel as a square; one without a label is decoration. */
export function pixelCanvas(image, label) {
  const [canvas, context] = createCanvas(image.width, image.height);
  context.putImageData(image, 0, 0);
  canvas.className = "pixels";
  if (label) {
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
  } else canvas.setAttribute("aria-hidden", "true");
  return canvas;
}

/** A canvas with each pixel of another as a large square, to be saved as a file. */
export function enlarge(small, times = 16) {
  const [large, context] = createCanvas(times * small.width, times * small.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, large.width, large.height);
  return large;
}

/** The whole image, at most `side` pixels a side, with what the crop to width:height removes dimmed. */
export function cropPreview(bitmap, width, height, side = 240) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const [w, h] = [Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale))];
  const [canvas, context] = createCanvas(w, h);
  const box = cropBox(bitmap.width, bitmap.height, width, height);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, w, h);
  context.globalAlpha = 0.28;
  context.drawImage(bitmap, 0, 0, w, h);
  context.globalAlpha = 1;
  context.drawImage(bitmap, ...box, ...box.map((value) => value * scale));
  canvas.setAttribute("aria-hidden", "true");
  if (Math.max(w, h) <= 64) canvas.className = "pixels";
  return canvas;
}
