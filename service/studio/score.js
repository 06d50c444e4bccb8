// Score: from files to exact likelihoods, verdicts and maps.

import { Refusal, submit } from "./api.js";
import { catalogue, reference } from "./catalogue.js";
import { conditionFields } from "./conditions.js";
import { announce, button, h, keepFocus, plural, viewTitle } from "./dom.js";
import { exampleButtons } from "./examples.js";
import { clearRefusals, failure, reveal, showFailure, showRefusal } from "./feedback.js";
import { dropZone, folderButton } from "./fields.js";
import { pixelCanvas } from "./image.js";
import { jobMonitor } from "./job.js";
import { PendingImage, PendingImages } from "./pending.js";
import { countText, loadArticles, Results, verdictText } from "./results.js";
import { Sender } from "./send.js";
import { jobs } from "./session.js";
import { checkSize, inFieldOfTileSize, joined, refusedImage, split } from "./submission.js";
import { tiling } from "./tiling.js";

export function mount(host) {
  const view = new ScoreView(host);
  return { take: (files) => view.pending.add(files) };
}

class ScoreView {
  notice = h("div");
  running = h("div");
  stage = h("div", { class: "stage" });
  jobCount = 0; // of followed jobs, oldest first
  runningCount = 0; // of those that have not ended
  unannounced = []; // readings
  results = new Results({
    isRunning: () => this.running.children.length > 0,
    onClear: (readings) => this.forget(readings),
  });
  submitButton = button("Score", () => this.submitAll(), "primary");
  sender = new Sender(this.submitButton, {
    label: () => this.label(),
    isReady: () => this.pending.images.length > 0,
    onChange: () => this.showSending(),
  });
  clearButton = button("Clear", () => this.clear(), "clear");

  constructor(host) {
    this.zone = dropZone({
      title: "Drop, paste or select images",
      filledTitle: "Add images",
      text: "PNG, JPEG, WebP, BMP, TIFF or GIF, any size",
      multiple: true,
      onFiles: (files) => this.pending.add(files),
    });
    this.conditions = conditionFields({ onChange: () => this.pending.show() });
    this.pending = new PendingImages({
      tiles: () => this.conditions.tiles,
      isWhole: () => this.conditions.isDetection,
      onChange: () => this.sender.update(),
    });
    this.stage.append(this.running, ...this.results.elements);
    this.form = this.controls();
    host.append(h("div", { class: "bench" }, this.form, this.stage));
    catalogue.addEventListener("change", () => this.useModel());
    this.useModel();
    this.sender.update();
    this.results.render();
    for (const record of jobs.of("score")) this.watch(record);
  }

  controls() {
    const folder = folderButton((files) => this.pending.add(files));
    const isBusy = () => this.sender.isBusy;
    // An example is scored without being listed first, unless it is loaded while others are sent.
    const onFiles = (files) => (isBusy() ? this.pending.add(files) : this.submitImages([new PendingImage(files[0])]));
    this.examples = exampleButtons({ hint: "Or score an example:", onFiles, notice: this.notice, isBusy });
    return h(
      "div",
      { class: "controls stack" },
      h("div", { class: "field" }, this.zone, h("div", { class: "row start" }, folder)),
      [this.pending.list, this.pending.skipped],
      this.examples.element,
      this.notice,
      this.conditions.elements,
      h("div", { class: "row send" }, this.submitButton, this.sender.cancelButton, this.clearButton),
    );
  }

  useModel() {
    if (!catalogue.current) return;
    this.conditions.useModel(catalogue.current);
    this.examples.element.hidden = Boolean(catalogue.current.detector); // it judges images of one kind
    this.pending.show();
    this.results.refresh();
  }

  label() {
    const { length } = this.pending.images;
    return length ? `Score ${plural(length, "image")}` : "Score";
  }

  /** Show what is possible: while images are sent, others can be added. */
  showSending() {
    const { length } = this.pending.images;
    const { isBusy } = this.sender;
    this.clearButton.hidden = isBusy || !length;
    this.examples.update();
    this.zone.classList.toggle("filled", length > 0 || this.results.readings.length > 0);
  }

  clear() {
    this.notice.replaceChildren();
    keepFocus(this.clearButton, this.zone.control, () => this.pending.clear());
  }

  submitAll() {
    return this.submitImages(this.pending.images);
  }

  /** Submit images as few jobs or, in tiles and for a detector, as one job each. Refused images stay in the list. */
  async submitImages(images) {
    clearRefusals(this.form, this.notice);
    this.results.isPinned = false;
    const refusals = [];
    let submitted = 0;
    for (const image of images) image.lock(true);
    try {
      await this.sender.run(async (signal) => {
        const model = await catalogue.requireCurrent(); // this and the conditions can change during the upload
        const conditions = this.conditions.read();
        const { isDetection } = this.conditions;
        const submission = { model, conditions, isDetection, signal };
        const areSingle = conditions.tile || isDetection; // each of them takes long
        for (const group of split(images, areSingle ? 1 : catalogue.maxImages)) {
          submitted += await this.submitGroup(group, submission, refusals);
        }
      });
    } catch (error) {
      refusals.push(error);
    }
    for (const image of images) image.lock(false);
    if (refusals.length) showRefusal(this.form, this.notice, joined(refusals, submitted));
    else announce(`${plural(submitted, "image")} submitted`);
  }

  /** Submit a group as one job, without the images that are refused; returns how many were submitted. */
  async submitGroup(group, submission, refusals) {
    let images = group;
    while (images.length) {
      try {
        await this.submitJob(images, submission);
        return images.length;
      } catch (error) {
        const refused = refusedImage(error, images);
        refusals.push(inFieldOfTileSize(error));
        images = images.filter((image) => image !== refused);
      }
    }
    return 0;
  }

  async submitJob(images, { model, conditions, isDetection, signal }) {
    checkSize(images);
    const decoded = await Promise.all(images.map((image) => image.decodedFor(model)));
    const parameters = conditions.tile ? tiledParameters(conditions, model, decoded[0]) : conditions;
    const form = new FormData();
    for (const { file } of images) form.append("image", file, file.name || "image.png");
    for (const [name, value] of Object.entries({ map: 1, model: reference(model), ...parameters })) {
      if (value) form.set(name, value);
    }
    const { id } = await submit("score", form, signal);
    const summaries = images.map((image, i) => summary(image, decoded[i], isDetection));
    this.pending.remove(images);
    const record = { id, view: "score", model: model.name, conditions: parameters, images: summaries };
    jobs.add(record);
    this.watch(
      record,
      images.map(({ file }) => file),
    );
    reveal(this.stage);
  }

  /** Follow a job and show its results. `files` are those of its images, unless the page was reloaded since. */
  async watch(record, files = []) {
    const order = this.jobCount++;
    this.runningCount++;
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
      if (result) await loadArticles();
      keepFocus(row, viewTitle(row), () => row.remove());
      if (result) this.addReadings(toReadings(record, result, files, order));
      else this.showCanceled(record, files);
    } catch (error) {
      this.reportFailure(row, record, files, error);
    }
    this.results.render();
    this.runningCount--;
    this.announceScores();
  }

  /** Announce the scores once all jobs have ended, not the verdict of each. */
  announceScores() {
    if (this.runningCount || !this.unannounced.length) return;
    announce(`${countText(this.unannounced)}. ${verdictText(this.unannounced[0])}`);
    this.unannounced = [];
  }

  /** Forget a job without a result, and list its images again if possible; returns what to do. */
  putBack({ id }, files) {
    jobs.remove(id);
    this.pending.add(files);
    return files.length ? "Ready to score again." : "Select the files again to score them.";
  }

  showCanceled(record, files) {
    const { images } = record;
    const subject = plural(images.length, "image");
    const remedy = this.putBack(record, files);
    const message = `Canceled: ${subject} ${images.length === 1 ? "was" : "were"} not scored.`;
    showFailure(this.notice, new Refusal(message, { remedy, calm: true }));
    announce("Canceled");
  }

  /** Show why a job failed, that it has expired, or why its result could not be fetched. */
  reportFailure(row, record, files, error) {
    if (error.status === undefined) error.message = `${subject(record.images)}: ${error.message}`;
    if (error.status === undefined || error.status === 404) error.remedy = this.putBack(record, files);
    const change = (action) => keepFocus(row, viewTitle(row), action);
    const dismiss = () => {
      jobs.remove(record.id);
      change(() => row.remove());
      this.results.render();
    };
    const dismissButton = button("Dismiss", dismiss, "small");
    if (error.isDismissed) dismiss();
    else change(() => row.replaceChildren(failure(error, undefined, dismissButton)));
  }

  /** Forget the jobs of readings that the user has cleared. */
  forget(readings) {
    for (const { job } of readings) jobs.remove(job);
    this.sender.update();
    announce("Results cleared");
  }

  addReadings(readings) {
    const isSelected = this.results.add(readings);
    this.unannounced.push(...readings);
    if (isSelected) reveal(this.results.article);
  }
}

/** The parameters of a request for an image in tiles. */
const tiledParameters = (conditions, model, decoded) =>
  decoded
    ? { ...conditions, tile_size: tiling(model, decoded.size, catalogue.maxTiles, conditions.tile_size).side }
    : conditions;

/** What the results show of a submitted image, also after a reload. */
function summary({ name }, decoded, isDetection) {
  if (!decoded) return { name, modelView: null };
  if (isDetection) return { name, modelView: decoded.whole.toDataURL("image/jpeg", 0.8) };
  return { name, modelView: pixelCanvas(decoded.modelView, "").toDataURL() };
}

/** The name of the image that a job scores, or how many it scores. */
const subject = (images) => (images.length === 1 ? images[0].name : plural(images.length, "image"));

/** The status line of a scoring job. */
function progressTexts({ conditions, images }) {
  const scoring = `Scoring ${subject(images)}`;
  return {
    labels: {
      queued: `${scoring}: waiting in the queue`,
      running: conditions.tile ? `${scoring}: splitting it into tiles` : scoring,
    },
    describe: ({ stage, step, total }) =>
      stage === "tiles" && { text: `${scoring}: ${step} of ${plural(total, "tile")}`, fraction: step / total },
  };
}

/**
 * The reading of each scored image that the page shows; `scan` is the result if it was scored in tiles, and `order` is
 * higher for newer jobs.
 */
function toReadings(record, result, files, order) {
  const scan = result.box && result;
  const scores = result.results ?? [tiledScore(result)];
  return scores.map((score, i) => ({
    ...record.images[i],
    job: record.id,
    order,
    score,
    scan,
    file: files[i],
    model: result.model,
    conditions: record.conditions,
  }));
}

/** The score of an image that was scored in tiles: its OOD score and verdict alone. */
function tiledScore({ score, p_value, threshold, is_ood, is_weak, calibration_version }) {
  return { score, ood: p_value === null ? null : { p_value, threshold, is_ood, is_weak, calibration_version } };
}
