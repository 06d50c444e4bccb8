// Previews of a running job: a grid of its images as they are at that moment.

import { request } from "./api.js";
import { createCanvas } from "./image.js";

/**
 * Return a function that fetches the current preview of a job; `onPreview(bitmap, {stage, step, total, done})` receives
 * it. Only one fetch runs at a time: calls during a fetch cause a single further one.
 */
export function previewFetcher(id, onPreview) {
  let fetching = false;
  let outdated = false;
  return async () => {
    outdated = true;
    if (fetching) return;
    fetching = true;
    try {
      while (outdated) {
        outdated = false;
        const preview = await fetchPreview(id);
        if (!preview) continue;
        onPreview(preview.bitmap, preview.moment);
        preview.bitmap.close();
      }
    } finally {
      fetching = false;
    }
  };
}

/** The current preview, or null if there is none: a later one replaces it anyway. */
async function fetchPreview(id) {
  try {
    const response = await request(`jobs/${id}/preview`);
    const bitmap = await createImageBitmap(await response.blob());
    const fields = response.headers.get("X-Progress").split(", ");
    const { stage, ...numbers } = Object.fromEntries(fields.map((field) => field.split("=")));
    return { bitmap, moment: { stage, step: +numbers.step, total: +numbers.total, done: +numbers.done } };
  } catch {
    return null;
  }
}

/** The images of a grid, at most `n` of a size; black cells at its end are empty. */
export function gridImages(bitmap, width, height, n) {
  const columns = bitmap.width / width;
  const [, context] = createCanvas(bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const images = Array.from({ length: Math.min(n, columns * (bitmap.height / height)) }, (_, i) =>
    context.getImageData((i % columns) * width, Math.floor(i / columns) * height, width, height),
  );
  const isFilled = ({ data }) => data.some((value, i) => i % 4 !== 3 && value);
  return images.slice(0, images.findLastIndex(isFilled) + 1);
}

/** The part of an image that is sampled at a moment, [x, y, width, height], if sampling begins in the half `keep`. */
export function sampledArea({ width, height }, { stage, step }, keep = "top") {
  const byColumns = keep === "left" || keep === "right";
  const lines = byColumns ? width : height;
  const sampled = stage === "noisy_sampling" ? step : lines;
  const first = keep === "bottom" || keep === "right" ? lines - sampled : 0;
  return byColumns ? [first, 0, sampled, height] : [0, first, width, sampled];
}
