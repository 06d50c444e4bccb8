// Calibrate a model on the user's own images: in the browser where the operator allows it, else on the command line.

import { isReadable, Refusal, submit } from "./api.js";
import { catalogue } from "./catalogue.js";
import { quoted, terminal } from "./curl.js";
import { announce, button, h, keepFocus, mebibytes, plural, uid, viewTitle } from "./dom.js";
import { emptyState, failure, isImage, listed, reveal } from "./feedback.js";
import { dropZone, folderButton, numberField } from "./fields.js";
import { jobMonitor } from "./job.js";
import { powerTable } from "./power.js";
import { jobForm } from "./runs.js";
import { jobs } from "./session.js";
import { requestBytes } from "./submission.js";

const MAX_REASONS = 20; // files that a result names
const MIN_ESTIMATING = 20; // images for estimation
const DEFAULT_RATE = 5; // percent of good images that are flagged
const STAGES = {
  noisy_sampling: "Generating images for comparison: row",
  fit: "Estimating what good images look like: image",
  rank: "Ranking good images: image",
  power: "Measuring what it detects: image",
};
const PHASES = Object.keys(STAGES);

export function mount(host, { sendTo }) {
  const commands = h("div", { class: "stack commands" });
  const bench = h("div", { class: "bench" });
  const upload = new CalibrationForm();
  bench.append(upload.element, upload.stage);
  const disabledHint = h(
    "p",
    { class: "hint" },
    "Calibration in the browser is disabled: the operator of this service can allow it with NCML_ALLOW_CALIBRATION=1.",
  );
  host.append(bench, disabledHint, commands);
  catalogue.addEventListener("change", show);
  catalogue.addEventListener("list", show);
  show();
  return { take: (files) => (catalogue.calibrationAllowed ? upload.take(files) : sendTo("score", ...files)) };

  function show() {
    bench.hidden = !catalogue.calibrationAllowed;
    disabledHint.hidden = catalogue.calibrationAllowed;
    commands.replaceChildren(...commandLines(catalogue.current?.name ?? "cifar10").flat());
  }
}

/** The images that a calibration needs at a false-positive rate in percent: some for estimation, the others to rank. */
const minImages = (rate) => MIN_ESTIMATING + Math.ceil(100 / rate - 1e-9) - 1;

const share = (percent) => Number((percent / 100).toPrecision(6));

/** The command that calibrates on the machine where the images are, however many there are. */
function calibrateCommand(model, name, rate = DEFAULT_RATE) {
  const option = rate === DEFAULT_RATE ? "" : ` --false-positive-rate ${share(rate)}`;
  return `ncml calibrate --unseen --data FOLDER --model ${quoted(model)} --out ${quoted(`models/${name}`)}${option}`;
}

/** How to calibrate on the command line. */
function commandLines(model) {
  return [
    h("h2", {}, "On the command line"),
    h(
      "p",
      {},
      "To find small defects in parts and surfaces, make a detector, which judges images at their own size. FOLDER contains at least 30 good images.",
    ),
    terminal("ncml adapt FOLDER --out models/mine", "command"),
    h(
      "p",
      {},
      `A calibration made here or by this command is for images at the model's size. FOLDER contains at least ${minImages(DEFAULT_RATE)} good images: some for estimation, the others for ranking.`,
    ),
    terminal(calibrateCommand(model, "mine"), "command"),
  ];
}

/** The form that uploads images, and the calibrations that it started. */
class CalibrationForm {
  files = [];
  selection = 0; // counts those that were cleared
  taking = Promise.resolve(); // until all files are added
  summary = h("p", { class: "hint" });
  calibrations = h("div", { class: "runs" });
  placeholder = emptyState(
    "What to upload",
    "Good images of one kind, such as a product without defects. 100 are enough to start, 600 are better. " +
      "Leave out unusual images: every image you upload counts as good.",
  );
  stage = h("div", { class: "stage" }, this.placeholder, this.calibrations);

  constructor() {
    const { notice, update, form } = jobForm(
      "Calibrate",
      (signal) => this.submit(signal),
      () => this.files.length > 0,
      "Uploading",
    );
    Object.assign(this, { notice, update });
    const id = uid();
    const hintId = uid();
    const nameHint = "Letters, digits, dots, hyphens and underscores; the first must be a letter or digit.";
    this.name = h("input", {
      id,
      title: nameHint, // which browsers add to their refusal
      "aria-describedby": hintId,
      required: true,
      pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*",
      maxlength: 64,
    });
    const nameField = h(
      "div",
      { class: "field", "data-field": "name" },
      h("label", { for: id }, "Name of the new model"),
      this.name,
      h("p", { id: hintId, class: "hint" }, nameHint),
    );
    const onFiles = (files) => this.take(files);
    const accept = "image/*,.tif,.tiff,.zip";
    this.zone = dropZone({
      title: "Drop or select good images or a zip file",
      filledTitle: "Add images",
      text: `At least ${minImages(DEFAULT_RATE)} images`,
      multiple: true,
      accept,
      onFiles,
    });
    const images = h(
      "div",
      { class: "field", "data-field": "image" },
      this.zone,
      h(
        "div",
        { class: "row start" },
        folderButton(onFiles),
        button("Clear", () => this.clear(), "small"),
      ),
      this.summary,
    );
    this.rate = numberField({
      label: "False-positive rate in percent",
      field: "false_positive_rate",
      ...{ value: DEFAULT_RATE, min: 0.1, max: 50, step: 0.1, required: true },
      hint: `The share of good images that are flagged. At 1%, at least ${minImages(1)} images are needed, and less is detected.`,
    });
    this.element = form(images, nameField, this.rate.element);
    this.showFiles();
    for (const record of jobs.of("calibrate")) this.watch(record);
  }

  /** Add files, after those of earlier calls. */
  take(files) {
    const selection = this.selection;
    this.taking = this.taking.then(() => this.add(files, selection));
  }

  /** Add files; skip those that are neither images nor zip files, as the service does, and those already added. */
  async add(files, selection) {
    const usable = files.filter(isUsable);
    const selected = Map.groupBy(this.files, fileKey);
    const added = [];
    for (const file of usable) {
      const similar = selected.get(fileKey(file)) ?? [];
      if (await isAmong(file, similar)) continue;
      selected.set(fileKey(file), [...similar, file]);
      added.push(file);
    }
    if (selection !== this.selection) return; // cleared meanwhile
    this.skipped = files.length - usable.length;
    this.repeated = usable.length - added.length;
    this.files = [...this.files, ...added];
    if (!this.name.value) this.name.value = suggestedName(usable);
    this.showFiles();
    announce(this.summary.textContent);
  }

  clear() {
    this.selection++;
    Object.assign(this, { files: [], skipped: 0, repeated: 0 });
    this.showFiles();
    announce(this.summary.textContent);
  }

  showFiles() {
    const { length } = this.files;
    const notes = [
      this.skipped && ` ${plural(this.skipped, "other file")} skipped.`,
      this.repeated && ` ${plural(this.repeated, "file")} already selected.`,
    ];
    const note = notes.filter(Boolean).join("");
    this.summary.textContent = length
      ? `${plural(length, "file")}, ${sizeText(this.files)}.${note}`
      : `No images yet.${note}`;
    this.zone.classList.toggle("filled", length > 0);
    this.update();
  }

  /** Remove files that cannot be uploaded any more, so that they can be selected again; throws a `Refusal` that names them. */
  async removeUnreadable() {
    const areReadable = await Promise.all(this.files.map(isReadable));
    const unreadable = this.files.filter((_, i) => !areReadable[i]);
    if (!unreadable.length) return;
    this.files = this.files.filter((file) => !unreadable.includes(file));
    Object.assign(this, { skipped: unreadable.length, repeated: 0 });
    this.showFiles();
    const [state, remedy] =
      unreadable.length === 1
        ? ["is empty, or has changed since it was", "It was removed: select it again, or calibrate without it."]
        : [
            "are empty, or have changed since they were",
            "They were removed: select them again, or calibrate without them.",
          ];
    const message = `${listed(unreadable.map(({ name }) => name))} ${state} selected.`;
    throw new Refusal(message, { remedy, fields: ["image"] });
  }

  async submit(signal) {
    const { name: base } = await catalogue.requireCurrent();
    await this.taking;
    await this.removeUnreadable();
    const { files } = this;
    const [name, rate] = [this.name.value, this.rate.value]; // these and the files can change during the upload
    const isZipped = files.some(isZip);
    const missing = minImages(rate) - files.length;
    if (!isZipped && missing > 0) {
      const message = `A calibration at this rate needs at least ${minImages(rate)} images.`;
      throw new Refusal(message, { remedy: `Add at least ${missing} more.`, fields: ["image"] });
    }
    const tooLarge = (message) => {
      const remedy = `Upload fewer images, or run this command where the images are: ${calibrateCommand(base, name, rate)}`;
      return new Refusal(message, { status: 413, remedy, fields: ["image"] });
    };
    if (requestBytes(files) > catalogue.maxBytes) throw tooLarge(`The files are too large: ${sizeText(files)}.`);
    const body = new FormData();
    for (const file of files) body.append("image", file, file.name);
    body.set("name", name);
    body.set("model", base);
    body.set("false_positive_rate", share(rate));
    const { id } = await submit("calibrate", body, signal).catch((error) => {
      throw error.status === 413 ? tooLarge(error.message) : error; // proxies have limits of their own
    });
    const record = { id, view: "calibrate", name, base };
    jobs.add(record);
    if (this.name.value === name) this.name.value = "";
    this.files = this.files.filter((file) => !files.includes(file));
    Object.assign(this, { skipped: 0, repeated: 0 });
    this.showFiles();
    reveal(this.watch(record));
  }

  /** Show a calibration and follow its job. */
  watch(record) {
    const notice = h("div");
    const body = h("div");
    const monitor = jobMonitor(record.id, { notice, describe: describeProgress });
    const actions = h("div", { class: "row" }, monitor.cancelButton);
    const heading = h("h2", {}, record.name, h("span", { class: "hint" }, ` from ${record.base}`));
    const progress = h("div", { class: "row progress" }, monitor.status, monitor.bar);
    const attributes = { class: "run", "data-job": record.id };
    const element = h("article", attributes, h("header", { class: "row" }, heading, actions), progress, body, notice);
    const remove = () => {
      jobs.remove(record.id);
      keepFocus(element, viewTitle(element), () => element.remove());
      this.placeholder.hidden = this.calibrations.children.length > 0;
    };
    this.calibrations.prepend(element);
    this.placeholder.hidden = true;
    this.follow(monitor, { body, notice, name: record.name }).finally(() => {
      monitor.bar.remove();
      keepFocus(actions, heading, () => actions.replaceChildren(button("Remove", remove, "small")));
    });
    return element;
  }

  async follow(monitor, { body, notice, name }) {
    try {
      const result = await monitor.result();
      monitor.status.textContent = result ? "Calibrated" : "Canceled. No model was created.";
      announce(`${name}: ${monitor.status.textContent}`);
      if (!result) return;
      body.replaceChildren(calibrationReport(result));
      showPower(body, name);
    } catch (error) {
      monitor.status.remove();
      notice.replaceChildren(failure(error));
    }
  }
}

/** The size of an upload, and its limit. */
const sizeText = (files) => `${mebibytes(requestBytes(files))} of at most ${mebibytes(catalogue.maxBytes)} MiB`;

/** The status of a calibration, whose phases take about equally long. */
function describeProgress({ stage, step, total }) {
  const phase = PHASES.indexOf(stage);
  if (phase < 0) return null;
  const text = `${STAGES[stage]} ${step.toLocaleString("en")} of ${total.toLocaleString("en")}`;
  return { text, fraction: (phase + step / total) / PHASES.length };
}

/** What a finished calibration can and cannot do, and how to use it. */
function calibrationReport({ model, calibration, skipped }) {
  const { n_fit: estimated, n_rank: ranked, weakness, summary } = calibration;
  const use = () => {
    catalogue.select(offeredModel(model.name));
    location.hash = "score";
  };
  const count = `${plural(estimated, "image")} for estimation, ${ranked.toLocaleString("en")} for ranking.`;
  const useButton = button("Score images with it", use, "primary");
  return h(
    "div",
    { class: "stack report" },
    h("p", {}, `${count} ${summary}`),
    weakness && h("p", { class: "caution" }, h("strong", {}, "This calibration is weak"), `: ${weakness}.`),
    skipped.length > 0 &&
      h(
        "details",
        {},
        h("summary", {}, `Files that could not be used (at most ${MAX_REASONS} are listed)`),
        h(
          "ul",
          { class: "hint" },
          skipped.map((reason) => h("li", {}, reason)),
        ),
      ),
    h("div", { class: "power-place" }),
    h("div", { class: "row start" }, useButton),
  );
}

const offeredModel = (name) => catalogue.models.find((model) => model.name === name);

/** Show the power of a new model, and allow its use, as soon as the service offers it. */
function showPower(body, name) {
  const [place, use] = [body.querySelector(".power-place"), body.querySelector("button.primary")];
  const listener = new AbortController();
  const show = () => {
    const model = offeredModel(name);
    use.disabled = !model;
    if (model?.calibration?.power) place.replaceChildren(powerTable(model.calibration.power));
    if (!body.isConnected) listener.abort();
  };
  show();
  catalogue.addEventListener("list", show, { signal: listener.signal });
}

const isZip = ({ name, type }) => /zip/.test(type) || /\.zip$/i.test(name);

const isUsable = (file) => !file.name.startsWith(".") && (isZip(file) || isImage(file));

/** What files have in common that can be the same image, which must not be counted twice. */
const fileKey = ({ name, size, lastModified }) => `${name} ${size} ${lastModified}`;

/** Whether a file has the same content as one of `others`, which have its size. */
async function isAmong(file, others) {
  for (const other of others) if (await haveSameContent(file, other)) return true;
  return false;
}

async function haveSameContent(...files) {
  try {
    const [first, second] = await Promise.all(files.map(async (file) => new Uint8Array(await file.arrayBuffer())));
    return first.every((byte, i) => byte === second[i]);
  } catch {
    return false; // one of them cannot be read any more
  }
}

/** A name for the model: that of the folder or the zip. */
function suggestedName([file]) {
  const folder =
    file?.webkitRelativePath?.split("/")[0] || (file && isZip(file) ? file.name.replace(/\.zip$/i, "") : "");
  return folder.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
}
