// Score: from files to exact likelihoods, verdicts and maps.

import { Refusal, submit } from "./api.js";
import { catalogue, reference } from "./catalogue.js";
import { announce, button, greyLevels, h, plural } from "./dom.js";
import { exampleButtons } from "./examples.js";
import { clearRefusals, failure, reveal, showFailure, showRefusal } from "./feedback.js";
import { dropZone, selectField, slider } from "./fields.js";
import { pixelCanvas } from "./image.js";
import { jobMonitor } from "./job.js";
import { PendingImages } from "./pending.js";
import { Results } from "./results.js";
import { jobs } from "./session.js";
import { tileMapUrl } from "./tiles.js";
import { verdict } from "./verdict.js";

export function mount(host) {
  const view = new ScoreView(host);
  return { take: (files) => view.pending.add(files) };
}

class ScoreView {
  submitting = false;
  notice = h("div");
  running = h("div");
  stage = h("div", { class: "stage" });
  results = new Results(() => this.running.children.length > 0);
  submitButton = button("Score", () => this.submitAll(), "primary");
  clearButton = button("Clear", () => this.clear(), "clear");

  constructor(host) {
    this.zone = dropZone({
      title: "Drop, paste or select images",
      filledTitle: "Add images",
      text: "PNG, JPEG, WebP, BMP, TIFF or GIF, any size",
      multiple: true,
      onFiles: (files) => this.pending.add(files),
    });
    this.conditions = conditionFields({ onTiledChange: () => this.pending.refresh() });
    this.pending = new PendingImages({
      isTiled: () => this.conditions.tiled,
      notice: this.notice,
      onChange: () => this.updateButtons(),
    });
    this.stage.append(this.running, ...this.results.elements);
    this.form = this.controls();
    host.append(h("div", { class: "bench" }, this.form, this.stage));
    catalogue.addEventListener("change", () => this.useModel());
    this.useModel();
    this.updateButtons();
    this.results.render();
    for (const record of jobs.of("score")) this.watch(record);
  }

  controls() {
    const onExample = ([file]) => this.scoreAtOnce(file);
    return h(
      "div",
      { class: "controls stack" },
      this.zone,
      this.pending.element,
      exampleButtons({ hint: "Or score an example:", onFiles: onExample, notice: this.notice }),
      this.notice,
      this.conditions.elements,
      h("div", { class: "row send" }, this.submitButton, this.clearButton),
    );
  }

  useModel() {
    if (!catalogue.current) return;
    this.conditions.useModel(catalogue.current);
    this.pending.refresh();
    this.results.refresh();
  }

  updateButtons() {
    const { length } = this.pending.images;
    this.submitButton.disabled = this.submitting || !length;
    this.submitButton.textContent = length ? `Score ${plural(length, "image")}` : "Score";
    this.clearButton.hidden = !length;
    this.zone.classList.toggle("filled", length > 0 || this.results.readings.length > 0);
  }

  clear() {
    this.notice.replaceChildren();
    this.pending.clear();
  }

  submitAll() {
    return this.submitImages(this.pending.images);
  }

  /** Score one file without listing it first. */
  async scoreAtOnce(file) {
    if (!this.submitting) await this.submitImages([this.pending.prepare(file)]);
  }

  /** Submit images as one job or, in tiles, as one job each. Refused images stay in the list. */
  async submitImages(images) {
    this.submitting = true;
    this.updateButtons();
    clearRefusals(this.form, this.notice);
    const refusals = [];
    let submitted = 0;
    try {
      await Promise.all(images.map(({ ready }) => ready));
      const groups = this.conditions.tiled ? images.map((image) => [image]) : [images];
      for (const group of groups) submitted += await this.submitGroup(group, refusals);
    } catch (error) {
      refusals.push(error);
    }
    if (refusals.length) this.showRefusals(refusals, submitted);
    this.submitting = false;
    this.updateButtons();
  }

  /** Submit a group as one job, without the images that are refused; returns how many were submitted. */
  async submitGroup(group, refusals) {
    let images = group;
    while (images.length) {
      try {
        await this.submitJob(images);
        return images.length;
      } catch (error) {
        const refused = refusedImage(error, images);
        refusals.push(error);
        images = images.filter((image) => image !== refused);
      }
    }
    return 0;
  }

  async submitJob(images) {
    const model = catalogue.requireCurrent();
    const conditions = this.conditions.read(images[0]);
    const form = new FormData();
    for (const { file } of images) form.append("image", file, file.name || "image.png");
    for (const [name, value] of Object.entries({ map: 1, model: reference(model), ...conditions })) {
      if (value) form.set(name, value);
    }
    const { id } = await submit("score", form);
    const summaries = images.map(({ name, modelView }) => ({
      name,
      modelView: modelView && pixelCanvas(modelView, "").toDataURL(),
    }));
    this.pending.remove(images);
    const record = { id, view: "score", model: model.name, conditions, images: summaries };
    jobs.add(record);
    this.watch(
      record,
      images.map(({ file }) => file),
    );
    reveal(this.stage);
  }

  showRefusals(refusals, submitted) {
    const message = refusals.map((refusal) => refusal.message).join(" ");
    const others = `${plural(submitted, "image")} ${submitted === 1 ? "was" : "were"} submitted.`;
    const [{ status, remedy = "", fields }] = refusals;
    showRefusal(
      this.form,
      this.notice,
      new Refusal(message, { status, fields, remedy: submitted ? `${others} ${remedy}` : remedy }),
    );
  }

  /** Follow a job and show its results. `files` are those of its images, unless the page was reloaded since. */
  async watch(record, files = []) {
    const notice = h("div");
    const monitor = jobMonitor(record.id, { notice, fraction: null, ...progressTexts(record) });
    monitor.status.className = "grow";
    const row = h(
      "div",
      { class: "run row", "data-job": record.id },
      monitor.status,
      monitor.bar,
      monitor.cancelButton,
      notice,
    );
    this.running.append(row);
    this.results.render();
    try {
      const result = await monitor.result();
      const readings = result && (await toReadings(record, result, files));
      row.remove();
      if (readings) this.addReadings(readings);
      else this.showCanceled(record, files);
    } catch (error) {
      this.reportFailure(row, record, files, error);
    }
    this.results.render();
  }

  /** Put the images of a canceled job back into the list, or report that they must be selected again. */
  showCanceled({ id, images }, files) {
    jobs.remove(id);
    const subject = plural(images.length, "image");
    const remedy = files.length ? "Ready to score again." : "Select the files again to score them.";
    this.pending.add(files);
    const message = `Canceled: ${subject} ${images.length === 1 ? "was" : "were"} not scored.`;
    showFailure(this.notice, new Refusal(message, { remedy, calm: true }));
    announce("Canceled");
  }

  /** Show why a job failed, that it has expired, or why its result could not be fetched, which can be tried again. */
  reportFailure(row, record, files, error) {
    const isOver = error.status === undefined || error.status === 404;
    if (isOver) jobs.remove(record.id);
    const retry = () => {
      row.remove();
      this.watch(record, files);
    };
    const dismiss = () => {
      jobs.remove(record.id);
      row.remove();
      this.results.render();
    };
    row.replaceChildren(failure(error, isOver ? undefined : retry), button("Dismiss", dismiss, "small"));
  }

  addReadings(readings) {
    this.results.add(readings);
    const [first] = readings;
    const { label, title } = verdict(first);
    announce(`${plural(readings.length, "image")} scored. ${first.name}: ${label}. ${title}.`);
    reveal(this.results.article);
  }
}

/** The fields of a score: tiles, the class and noise level that it is conditioned on, and the calibration. */
function conditionFields({ onTiledChange }) {
  const tiledInput = h("input", { type: "checkbox", onchange: onTiledChange });
  const classes = selectField({ label: "Class", field: "class" });
  const calibrations = selectField({ label: "Calibration", field: "calibration" });
  const noise = slider({
    label: "Noise level",
    field: "noise",
    term: "grey levels",
    min: 0,
    max: 10,
    step: 0.5,
    value: 0,
    words: greyLevels,
    hint: "Without noise, you get the exact likelihood of the image.",
  });
  const hint = "Class and noise level affect only the likelihood, not the verdict. They are ignored for tiles.";
  return {
    elements: [
      h("div", { "data-field": "tile" }, h("label", { class: "check" }, tiledInput, "Score in tiles (large images)")),
      h(
        "details",
        {},
        h("summary", {}, "Class, noise level and calibration"),
        classes.element,
        noise.element,
        h("p", { class: "hint" }, hint),
        calibrations.element,
      ),
    ],
    get tiled() {
      return tiledInput.checked;
    },
    /** The parameters of a request for images whose first one is `image`. */
    read(image) {
      if (tiledInput.checked) return { tile: 1, tile_size: image.tiling?.side };
      return {
        class: classes.value || undefined,
        noise: noise.value || undefined,
        calibration: calibrations.value || undefined,
      };
    },
    useModel(model) {
      classes.offer([["", "none"], ...model.classes.map((name) => [name, name])]);
      noise.limit(model.noise);
      const names = Object.keys(model.calibrations ?? {}).filter((name) => name !== "default");
      calibrations.offer([["", "default"], ...names.map((name) => [name, name])]);
      calibrations.element.hidden = !names.length;
    },
  };
}

/** Mark and return the refused image, and put its name into the message; throws the error if it names no image. */
function refusedImage(error, images) {
  const match = /^image(?:\[(\d+)\])?$/.exec(error.fields?.[0]);
  const onlyImage = images.length === 1 ? images[0] : undefined;
  const image = match && (match[1] ? images[match[1]] : onlyImage);
  if (!image) throw error;
  image.element.classList.add("bad");
  const name = image.file.name || "The pasted image";
  error.message = error.message.replace(/\bimage\[\d+\]|^image(?= )/g, () => name);
  return image;
}

/** The status line of a scoring job. */
function progressTexts({ conditions, images }) {
  const scoring = `Scoring ${plural(images.length, "image")}`;
  const [{ name }] = images;
  return {
    labels: {
      queued: `${scoring}: waiting in the queue`,
      running: conditions.tile ? `Scoring ${name}: splitting it into tiles` : scoring,
    },
    describe: ({ stage, step, total }) =>
      stage === "tiles" && { text: `Scoring ${name}: ${step} of ${plural(total, "tile")}`, fraction: step / total },
  };
}

/** The reading of each scored image that the page shows; `scan` is the result if it was scored in tiles. */
async function toReadings(record, result, files) {
  const scan = result.box && result;
  const mapUrl = scan && (await tileMapUrl(record.id));
  const scores = result.results ?? [tiledScore(result)];
  return scores.map((score, i) => ({
    ...record.images[i],
    id: `${record.id}/${i}`,
    score,
    scan,
    mapUrl,
    file: files[i],
    model: result.model,
    conditions: record.conditions,
  }));
}

/** The score of an image that was scored in tiles: its OOD score and verdict alone. */
function tiledScore({ score, p_value, threshold, is_ood, is_weak }) {
  return { score, ood: p_value === null ? null : { p_value, threshold, is_ood, is_weak } };
}
