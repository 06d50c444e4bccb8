// One run: progress, rows as they are sampled, and the generated images with downloads and curl commands.

import { resultFile } from "./api.js";
import { copyButton } from "./copy.js";
import { curl, endpoint, imageField, quoted, terminal } from "./curl.js";
import { openDialog } from "./dialog.js";
import { announce, button, h, keepFocus, plural, save, seconds, viewTitle } from "./dom.js";
import { attempt, failure } from "./feedback.js";
import { createCanvas, pngBlob } from "./image.js";
import { jobMonitor } from "./job.js";
import { gridImages, previewFetcher, sampledArea } from "./preview.js";
import { settingsText } from "./sampling.js";
import { jobs } from "./session.js";

const MANY = 16; // images above which they are shown smaller

/**
 * Describe the progress of a generation: its status line and the completed fraction. Sampling all rows, or columns
 * beside a known half `keep`, counts as one refinement step, which is about right for eight images.
 */
export function describeProgress({ stage, step, total }, { noise, steps }, keep) {
  const sampled = stage === "refine" ? 1 : step / total;
  const refined = stage === "refine" ? step : 0;
  if (!noise || sampled < 1) {
    const line = ["left", "right"].includes(keep) ? "column" : "row";
    return { text: `Sampling ${line} ${step} of ${total}`, fraction: sampled / (noise ? 1 + steps : 1) };
  }
  const text = `Refining, step ${Math.min(refined + 1, steps)} of ${steps}`;
  return { text, fraction: (1 + refined) / (1 + steps) };
}

/** Buttons that save the images of a run; failures are reported in `notice`. */
export function downloadButtons({ id, task, settings }, notice) {
  async function download(type, extension) {
    try {
      save(await resultFile(id, type), `${task}-${settings.seed}.${extension}`);
    } catch (error) {
      notice.replaceChildren(failure(error));
    }
  }
  return [
    button("PNG", () => download("image/png", "png"), "small"),
    button("Zip", () => download("application/zip", "zip"), "small"),
  ];
}

/** The title and the settings of a run. */
export const runHeading = (title, settings) =>
  h("div", {}, h("h2", {}, title), h("p", { class: "hint" }, settingsText({ ...settings, class: undefined })));

/**
 * The run of a job. Its record holds the id, view, task, settings, size [width, height], title, and `keep`, the known
 * half; `before` are elements to show before the images.
 */
export class Run {
  notice = h("div");
  isOver = false;

  constructor(record, { before, onReuse, onRemove, onUse }) {
    Object.assign(this, { record, onReuse, onRemove, onUse });
    const { id, settings, title } = record;
    this.concurrent = settings.n; // images that are sampled together; a preview shows how many
    this.cells = Array.from({ length: settings.n }, (_, i) => this.createCell(i));
    this.monitor = jobMonitor(id, { notice: this.notice, describe: (progress) => this.describe(progress) });
    this.fetchPreview = previewFetcher(id, (bitmap, moment) => this.showPreview(bitmap, moment));
    this.actions = h("div", { class: "row" }, this.monitor.cancelButton);
    this.element = h(
      "article",
      { class: "run", "aria-label": `Run with seed ${settings.seed}`, "data-job": id },
      h("header", { class: "row" }, runHeading(title, settings), this.actions),
      h("div", { class: "row progress" }, this.monitor.status, this.monitor.bar),
      imageGrid([...before, ...this.cells.map((cell) => cell.element)]),
      this.notice,
    );
    this.watch();
  }

  createCell(i) {
    const seed = this.record.settings.seed + i;
    const [canvas, context] = createCanvas(...this.record.size);
    const label = `Image with seed ${seed}, not generated yet`;
    const open = h("button", { type: "button", class: "cell wait", disabled: true, "aria-label": label }, canvas);
    return { element: h("li", {}, open, h("span", { class: "seed mono" }, seed)), open, context };
  }

  async watch() {
    try {
      const result = await this.monitor.result(({ preview }) => preview && this.fetchPreview());
      if (result) this.showResult(result);
      else this.showCanceled();
    } catch (error) {
      this.showFailure(error);
    }
  }

  describe(progress) {
    const { text, fraction } = describeProgress(progress, this.record.settings, this.record.keep);
    const { done, n } = progress;
    const concurrent = Math.min(this.concurrent, n - done);
    return {
      text: done ? `${text} (${done} of ${n} done)` : text,
      fraction: (done + concurrent * fraction) / n,
    };
  }

  showPreview(bitmap, moment) {
    if (this.isOver) return;
    const { settings, size, keep } = this.record;
    const images = gridImages(bitmap, ...size, settings.n - moment.done);
    this.concurrent = images.length;
    images.forEach((image, i) => {
      const { context, open } = this.cells[moment.done + i];
      context.clearRect(0, 0, ...size);
      context.putImageData(image, 0, 0, ...sampledArea(image, moment, keep));
      open.classList.remove("wait");
    });
  }

  showResult({ images, timing }) {
    this.isOver = true;
    images.forEach((image, i) => {
      this.showImage(image, i);
    });
    const { compute_s: computeTime, queue_s: queueTime, batch_size: batchSize } = timing;
    const { n } = this.record.settings;
    const batch = batchSize > n ? `, in a batch of ${batchSize}` : "";
    const times = `${seconds(computeTime)} after ${seconds(queueTime)} in the queue`;
    this.monitor.status.textContent = `Generated in ${times}${batch}`;
    this.monitor.bar.remove();
    this.setActions(...downloadButtons(this.record, this.notice), ...this.finalActions());
    announce(`${plural(n, "image")} generated`);
  }

  showImage({ seed, png }, i) {
    const { open } = this.cells[i];
    const [width, height] = this.record.size;
    open.replaceChildren(h("img", { src: `data:image/png;base64,${png}`, alt: "", width, height }));
    open.className = "cell";
    open.disabled = false;
    open.setAttribute("aria-label", `Open the image with seed ${seed}`);
    open.addEventListener("click", () => openImage({ record: this.record, i, seed, png }, this.onUse));
  }

  showCanceled() {
    this.stop();
    this.monitor.status.textContent = "Canceled. What was sampled so far is shown.";
    announce("Canceled");
  }

  showFailure(error) {
    this.stop();
    this.monitor.status.remove();
    if (error.status === 404) this.showExpired(error);
    this.notice.replaceChildren(failure(error));
  }

  /** An expired run has no images, but its settings reproduce them. */
  showExpired(error) {
    this.element.classList.add("expired");
    error.remedy = "Click “Reuse settings” and generate again: the same seed gives the same images.";
  }

  stop() {
    this.isOver = true;
    this.monitor.bar.remove();
    for (const { open } of this.cells) open.classList.remove("wait");
    this.setActions(...this.finalActions());
  }

  /** Replace the buttons of the run; if one has the focus, the heading gets it. */
  setActions(...actions) {
    keepFocus(this.actions, this.element.querySelector("h2"), () => this.actions.replaceChildren(...actions));
  }

  finalActions() {
    return [
      button("Reuse settings", () => attempt(this.onReuse, this.notice), "small"),
      button("Remove", () => this.remove(), "small"),
    ];
  }

  remove() {
    jobs.remove(this.record.id);
    keepFocus(this.element, viewTitle(this.element), () => this.element.remove());
    this.onRemove();
  }
}

/** A grid with rows of about equal length, on wide and on narrow screens. */
function imageGrid(items) {
  const isMany = items.length > MANY;
  const columns = (most) => Math.ceil(items.length / Math.ceil(items.length / most));
  const grid = h("ol", { class: isMany ? "cells many" : "cells" }, items);
  grid.style.setProperty("--wide", columns(isMany ? 10 : 6));
  grid.style.setProperty("--narrow", columns(isMany ? 5 : 4));
  return grid;
}

/** Open one image in a dialog: enlarged, with its seed, its curl command and actions. */
function openImage({ record, i, seed, png }, onUse) {
  const src = `data:image/png;base64,${png}`;
  const name = downloadName(record, i);
  const useButton = (label, action) => {
    const use = () => {
      dialog.close();
      onUse(action, { file: new File([pngBlob(png)], name, { type: "image/png" }), seed });
    };
    return button(label, use, "small");
  };
  const actions = h(
    "div",
    { class: "row start" },
    copyButton("Copy seed", () => String(seed), "small"),
    h("a", { class: "button small", href: src, download: name }, "Download PNG"),
    useButton("Use this seed", "seed"),
    useButton("Score it", "score"),
    useButton("Complete it", "complete"),
  );
  const details = h(
    "div",
    { class: "stack" },
    h("p", {}, settingsText({ ...record.settings, seed })),
    actions,
    h("p", { class: "strong" }, "The same image from a terminal"),
    record.task === "complete" && uploadedFile(record),
    terminal(curlCommand(record, i)),
  );
  const image = h("img", { class: "pixels", src, alt: `Image with seed ${seed}` });
  const dialog = openDialog(`Seed ${seed}`, h("div", { class: "closer" }, image, details));
}

/** Where the file is that the curl command uploads. */
function uploadedFile({ fileName, isRedrawn, source }) {
  const download = h("a", { class: "button small", href: source, download: fileName }, "Download the submitted image");
  return [
    h("p", { class: "hint" }, `Run it in the folder that contains ${fileName}.`),
    isRedrawn && h("div", {}, download),
  ];
}

/** The curl command that generates image `i` of a run again, alone. */
function curlCommand(record, i) {
  const { n: _, seed, ...parameters } = record.settings;
  const target = endpoint(record.task, { ...parameters, seed: seed + i });
  const output = ["-o", quoted(downloadName(record, i))];
  if (record.task === "complete") return curl("-F", imageField(record.fileName), target, ...output);
  return curl("-X POST", target, ...output);
}

function downloadName({ task, settings }, i) {
  const kind = task === "complete" ? "completed" : (settings.class ?? "image");
  return `${kind}-${settings.seed + i}.png`;
}
