// Complete: keep one half of an image and generate variants of the other.

import { submit } from "./api.js";
import { catalogue } from "./catalogue.js";
import { announce, h, plural, stem } from "./dom.js";
import { EXAMPLES, exampleButtons } from "./examples.js";
import { emptyState, failure, imageFiles } from "./feedback.js";
import { dropZone } from "./fields.js";
import { pngBlob } from "./image.js";
import { KnownHalfPad } from "./pad.js";
import { jobForm, RunList } from "./runs.js";
import { settingsForm } from "./settings.js";

export function mount(host, { sendTo }) {
  const settings = settingsForm({ images: 4, maxImages: 16, countLabel: "Variants", classInDetails: true });
  const pad = new KnownHalfPad();
  let selectedFile = null;
  async function complete(signal) {
    const model = await catalogue.requireCurrent();
    runs.add(await submitCompletion(pad, settings.read(), model, signal));
  }
  const { notice, update, form } = jobForm("Complete", complete, () => pad.source !== null, "Uploading");
  const placeholder = emptyState(
    "Nothing completed yet",
    "Choose an image and the half to keep, or press “Complete it” on a generated image. The variants appear here.",
  );
  const runs = new RunList("complete", {
    settings,
    placeholder,
    use: (view, generated) => (view === "complete" ? take([generated]) : sendTo(view, generated)),
    before: submittedImage,
  });
  const zone = dropZone({
    title: "Drop, paste or select an image",
    filledTitle: "Choose another image",
    text: "A whole image, or only one half of it",
    onFiles: take,
  });
  const names = EXAMPLES.filter((name) => name !== "noise");
  const { element: examples } = exampleButtons({ names, hint: "Or use an example:", onFiles: take, notice });
  const fields = [zone, pad.element, examples, settings.element];
  const stage = h("div", { class: "stage" }, placeholder, runs.element);
  host.append(h("div", { class: "bench" }, form(fields), stage));
  catalogue.addEventListener("change", showFile);
  return { take };

  async function take(files) {
    const [file, ...others] = imageFiles(files, notice);
    if (!file) return;
    if (others.length) {
      const message = `Only ${file.name} is used: one image is completed at a time.`;
      notice.append(failure({ message, calm: true }));
    }
    selectedFile = file;
    await showFile();
  }

  /** Show the file as the current model sees it, as soon as there is a model. */
  async function showFile() {
    if (!selectedFile || !catalogue.current) return;
    const isLatest = await pad.load(selectedFile, catalogue.current);
    if (!isLatest) return;
    update();
    zone.classList.add("filled");
    announce(`${selectedFile.name} is ready to be completed`);
  }
}

/** Submit the image on the pad, and return the record of its run. */
async function submitCompletion(pad, settings, { width, height }, signal) {
  const { half: keep, source: shown } = pad;
  const source = pad.submittedUrl(width, height); // before another image can be loaded
  const parameters = { ...settings, ...(keep ? { keep } : {}) };
  const { file, isRedrawn } = shown;
  const name = file.name || "image.png";
  const fileName = isRedrawn ? `${stem(name)}-submitted.png` : name;
  const body = new FormData();
  body.append("image", isRedrawn ? pngBlob(source.split(",")[1]) : file, fileName);
  for (const [key, value] of Object.entries(parameters)) body.set(key, value);
  const { id } = await submit("complete", body, signal);
  const title = `${plural(parameters.n, "variant")} of ${file.name || "a pasted image"}`;
  const record = { id, view: "complete", task: "complete", settings: parameters, size: [width, height], title };
  return { ...record, keep: keep ?? shown.opaque, fileName, isRedrawn, source };
}

/** The image that a run completes, with its known half. */
function submittedImage({ source, keep, size: [width, height] }) {
  if (!source) return [];
  const alt = `The submitted image; its ${keep} half is kept`;
  const image = h("span", { class: `cell kept-${keep}` }, h("img", { src: source, width, height, alt }));
  const caption = h("span", { class: "seed" }, `${keep} kept`);
  return [h("li", { class: "source" }, image, caption)];
}
