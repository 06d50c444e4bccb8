// The frames of a trace: its images as they are sampled row by row and refined step by step.

import { gridImages, sampledArea } from "./preview.js";

const AMPLIFICATION = 8; // of a difference, so that it is visible
export const DIFFERENCE_LABEL = `Difference from the refined image, amplified ${AMPLIFICATION} times`;

/** Frames {stage, step, total, images} in order; the stage of the last one is "end" when the trace is complete. */
export class Frames {
  list = [];

  constructor([width, height]) {
    Object.assign(this, { width, height });
  }

  get last() {
    return this.list.at(-1);
  }

  /** The refined images, or null until they are available. */
  get finalImages() {
    return this.last?.stage === "end" ? this.last.images : null;
  }

  /** Add a preview of at most `n` images, unless it repeats the last one. */
  addPreview(bitmap, moment, n) {
    const { last } = this;
    if (last?.stage === moment.stage && last.step === moment.step) return;
    const images = gridImages(bitmap, this.width, this.height, n);
    if (images.length) this.list.push({ ...moment, images: this.sampledImages(images, moment) });
  }

  /** Add the refined images; returns the number of refinement steps among the frames. */
  addFinal(images) {
    const { last } = this;
    // The last step shows the refined images before they are rounded.
    if (last?.stage === "refine" && last.step === last.total) this.list.pop();
    const steps = this.list.filter(({ stage }) => stage === "refine").length;
    this.list.push({ stage: "end", images });
    return steps;
  }

  /** Replace the previews of sampling by a frame for each row, all cut from the last preview; returns their number. */
  expandRows() {
    const previews = this.list.filter(({ stage }) => stage === "noisy_sampling");
    const last = previews.at(-1);
    if (!last) return 0;
    const rows = Array.from({ length: last.step }, (_, i) => {
      const moment = { ...last, step: i + 1 };
      return { ...moment, images: this.sampledImages(last.images, moment) };
    });
    this.list.splice(0, previews.length, ...rows);
    return rows.length;
  }

  /** Copy images without the rows that are not sampled at a moment. */
  sampledImages(images, moment) {
    const [, , width, rows] = sampledArea(this, moment);
    return images.map(({ data }) => new ImageData(data.slice().fill(0, 4 * width * rows), width));
  }
}

/** What a frame shows, in words. */
export function frameLabel(frame) {
  if (!frame) return "";
  if (frame.stage === "end") return "Refined image";
  if (frame.stage === "refine") return `Refinement, step ${frame.step}`;
  return frame.step === frame.total ? "Noisy sample" : `Sampling, row ${frame.step}`;
}

/** The amplified difference of two images around grey, where the first one is opaque. */
export function difference(image, reference) {
  const result = new ImageData(image.width, image.height);
  for (let i = 0; i < image.data.length; i += 4) {
    for (let channel = i; channel < i + 3; channel += 1) {
      result.data[channel] = 128 + AMPLIFICATION * (image.data[channel] - reference.data[channel]);
    }
    result.data[i + 3] = image.data[i + 3];
  }
  return result;
}
