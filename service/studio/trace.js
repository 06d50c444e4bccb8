// One trace: its frames as they arrive, a slider and a player for them, and the difference from the refined images.

import { cancel } from "./api.js";
import { announce, button, h, keepFocus, viewTitle } from "./dom.js";
import { attempt, failure } from "./feedback.js";
import { slider } from "./fields.js";
import { DIFFERENCE_LABEL, difference, Frames, frameLabel } from "./frames.js";
import { createCanvas, pixelCanvas, pngBlob, withBitmap } from "./image.js";
import { jobMonitor } from "./job.js";
import { previewFetcher } from "./preview.js";
import { describeProgress, downloadButtons, runHeading } from "./run.js";
import { imagesText } from "./sampling.js";
import { jobs } from "./session.js";

const THUMBNAILS = 9;
const FINAL_ONLY =
  "Only the refined images are available: the trace finished before this page was loaded, or too fast to be " +
  "recorded. Trace again with its seed to get the same frames.";

export class Trace {
  timer = null; // while the frames are played
  isOver = false;
  notice = h("div");
  note = h("p", { class: "hint" });
  thumbnails = h("ul", { class: "thumbs", "aria-hidden": "true" });
  differenceHint = h("p", { class: "none hint" }, "Available at the end");
  playButton = button("Play", () => (this.timer ? this.pause() : this.play()), "small");

  constructor(record, { onReuse, onRemove }) {
    Object.assign(this, { record, onRemove });
    const { id, settings, size } = record;
    this.frames = new Frames(size);
    this.columns = Math.ceil(Math.sqrt(settings.n));
    this.imageContext = this.createView("The images in this frame");
    this.differenceContext = this.createView(DIFFERENCE_LABEL);
    const describe = (progress) => describeProgress(progress, settings);
    this.monitor = jobMonitor(id, { notice: this.notice, describe });
    this.fetchPreview = previewFetcher(id, (bitmap, moment) => this.addPreview(bitmap, moment));
    this.slider = slider({
      label: "Frame",
      min: 0,
      max: 0,
      value: 0,
      format: (i) => frameLabel(this.frames.list[i]),
      onInput: () => this.goTo(this.slider.value),
    });
    this.slider.enable(false);
    this.playButton.disabled = true;
    const reuseButton = button("Reuse settings", () => attempt(onReuse, this.notice), "small");
    this.actions = h("div", { class: "row" }, reuseButton, this.monitor.cancelButton);
    this.element = this.createElement();
    this.watch();
  }

  /** The context of a canvas for all images side by side. */
  createView(label) {
    const { settings, size } = this.record;
    const rows = Math.ceil(settings.n / this.columns);
    const [canvas, context] = createCanvas(this.columns * size[0], rows * size[1]);
    canvas.className = "pixels";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    return context;
  }

  createElement() {
    const { id, settings } = this.record;
    const figure = (context, caption, ...more) =>
      h("figure", {}, context.canvas, more, h("figcaption", { class: "hint" }, caption));
    return h(
      "article",
      { class: "run trace", "data-job": id },
      h("header", { class: "row" }, runHeading(imagesText(settings), settings), this.actions),
      h("div", { class: "row progress" }, this.monitor.status, this.monitor.bar),
      h(
        "div",
        { class: "pair" },
        figure(this.imageContext, "The images in this frame"),
        figure(this.differenceContext, DIFFERENCE_LABEL, this.differenceHint),
      ),
      h("div", { class: "row" }, this.playButton, this.slider.element),
      this.thumbnails,
      this.note,
      this.notice,
    );
  }

  async watch() {
    try {
      const result = await this.monitor.result(({ preview }) => preview && this.fetchPreview());
      if (this.isOver) return; // replaced by another trace
      this.stop();
      if (result) await this.showResult(result);
      else this.showCanceled();
    } catch (error) {
      this.stop();
      this.monitor.status.textContent = "";
      if (error.status === 404) {
        jobs.remove(this.record.id);
        error.remedy = "Click “Reuse settings” and trace again: the same seed gives the same images.";
      }
      this.notice.replaceChildren(failure(error));
    }
  }

  stop() {
    this.isOver = true;
    this.monitor.bar.remove();
    const { cancelButton } = this.monitor;
    keepFocus(cancelButton, this.element.querySelector("h2"), () =>
      cancelButton.replaceWith(button("Remove", () => this.remove(), "small")),
    );
  }

  async showResult({ images }) {
    const refined = await Promise.all(images.map(({ png }) => this.decodeImage(png)));
    const steps = this.frames.addFinal(refined);
    const rows = this.showFrames();
    const { settings, size } = this.record;
    const recorded = `${rows} of ${size[1]} rows and ${steps + 1} of ${settings.steps} refinement steps`;
    this.monitor.status.textContent = "Trace complete";
    this.note.textContent =
      this.frames.list.length === 1 ? FINAL_ONLY : `Recorded: ${recorded}. The last frame is the refined image.`;
    this.differenceHint.textContent = "No difference left";
    this.actions.prepend(...downloadButtons(this.record, this.notice));
    announce("Trace complete: move through its frames with the slider");
  }

  decodeImage(png) {
    return withBitmap(pngBlob(png), (bitmap) => {
      const [, context] = createCanvas(...this.record.size);
      context.drawImage(bitmap, 0, 0);
      return context.getImageData(0, 0, ...this.record.size);
    });
  }

  showCanceled() {
    this.monitor.status.textContent = "Canceled. The frames recorded so far are available.";
    this.differenceHint.textContent = "Not available";
    announce("Canceled");
    this.showFrames();
  }

  /** Remove the trace from the page, which cancels it if it is running. */
  remove() {
    this.pause();
    jobs.remove(this.record.id);
    if (!this.isOver) cancel(this.record.id).catch(() => announce("The previous trace could not be canceled"));
    this.isOver = true;
    keepFocus(this.element, viewTitle(this.element), () => this.element.remove());
    this.onRemove();
  }

  addPreview(bitmap, moment) {
    if (this.isOver) return;
    this.frames.addPreview(bitmap, moment, this.record.settings.n);
    const last = this.frames.list.length - 1;
    this.slider.limit(last);
    this.goTo(last);
  }

  /** Make all frames accessible, and show the noisy sample; returns the number of rows. */
  showFrames() {
    const rows = this.frames.expandRows();
    const { length } = this.frames.list;
    this.slider.limit(length - 1);
    this.slider.enable(length > 1);
    this.playButton.disabled = length < 2;
    const spacing = Math.max(1, (length - 1) / (THUMBNAILS - 1));
    const indices = Array.from({ length: Math.min(THUMBNAILS, length) }, (_, i) => Math.round(i * spacing));
    this.thumbnails.replaceChildren(...indices.map((i) => this.thumbnail(i)));
    this.goTo(Math.max(0, rows - 1));
    return rows;
  }

  thumbnail(i) {
    return h("li", { onclick: () => this.goTo(i) }, pixelCanvas(this.frames.list[i].images[0], ""));
  }

  /** Pause, and show a frame. */
  goTo(i) {
    this.pause();
    this.show(i);
  }

  play() {
    const last = this.frames.list.length - 1;
    if (this.slider.value >= last) this.show(0);
    this.playButton.textContent = "Pause";
    const advance = () => {
      this.show(this.slider.value + 1);
      if (this.slider.value >= last) this.pause();
    };
    this.timer = setInterval(advance, Math.max(80, Math.min(300, 5000 / (last + 1))));
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.playButton.textContent = "Play";
  }

  show(i) {
    this.slider.value = i;
    const frame = this.frames.list[i];
    if (!frame) return;
    const { imageContext, differenceContext, frames, columns } = this;
    const { finalImages, width, height } = frames;
    const hasDifference = finalImages !== null && frame.stage !== "end";
    this.differenceHint.hidden = hasDifference;
    imageContext.canvas.setAttribute("aria-label", `The images in this frame: ${frameLabel(frame)}`);
    for (const context of [imageContext, differenceContext]) {
      context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    }
    frame.images.forEach((image, j) => {
      const position = [(j % columns) * width, Math.floor(j / columns) * height];
      imageContext.putImageData(image, ...position);
      if (hasDifference && finalImages[j])
        differenceContext.putImageData(difference(image, finalImages[j]), ...position);
    });
  }
}
