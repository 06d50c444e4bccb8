// Generate: new images, of one class or of any, and two settings side by side.

import { cancel, submit } from "./api.js";
import { catalogue } from "./catalogue.js";
import { h } from "./dom.js";
import { emptyState } from "./feedback.js";
import { jobForm, RunList } from "./runs.js";
import { differenceText, imagesText } from "./sampling.js";
import { settingsForm } from "./settings.js";

export function mount(host, { sendTo }) {
  const settings = settingsForm({ comparable: true });
  const { form } = jobForm("Generate", generate);
  const expectation = h("p", { class: "hint expectation" });
  const placeholder = emptyState(
    "Nothing generated yet",
    "Choose a class (or any) and generate images. They appear row by row as they are sampled.",
  );
  const runs = new RunList("generate", { settings, placeholder, use: sendTo });
  const stage = h("div", { class: "stage" }, placeholder, runs.element);
  host.append(h("div", { class: "bench" }, form(expectation, settings.element), stage));
  catalogue.addEventListener("change", showExpectation);
  catalogue.addEventListener("list", showExpectation);
  showExpectation();

  function showExpectation() {
    if (catalogue.current) expectation.textContent = expectationText(catalogue.current);
  }

  async function generate(signal) {
    const { width, height } = await catalogue.requireCurrent();
    const requests = settings.readAll();
    const ids = await submitAll(requests, signal);
    const [comparedWith] = ids;
    const titles = titlesOf(requests);
    const records = ids.map((id, i) => {
      const record = { id, view: "generate", task: "generate", settings: requests[i], size: [width, height] };
      return { ...record, title: titles[i], ...(ids.length > 1 && { comparedWith }) };
    });
    runs.add(...records);
  }
}

/** Submit all requests or none; returns the ids of their jobs. */
async function submitAll(requests, signal) {
  const ids = [];
  try {
    for (const parameters of requests) ids.push((await submit("generate", parameters, signal)).id);
  } catch (error) {
    await Promise.allSettled(ids.map(cancel));
    throw error;
  }
  return ids;
}

/** The titles of runs: what they generate, or what distinguishes two of them. */
function titlesOf([first, second]) {
  if (!second) return [imagesText(first)];
  return [differenceText(first, second), differenceText(second, first)];
}

/** How good the images of a model are, as measured with its default settings. */
function expectationText({ name, classes, metrics, width, height }) {
  const size = `${name} generates images of ${width} × ${height} pixels.`;
  const { class_fidelity: fidelity, class_fidelity_real: real } = metrics;
  if (!classes.length) return size;
  if (fidelity === undefined) return `${size} How often they show their class was not measured: run ncml tune.`;
  const percent = (share) => `${Math.round(100 * share)}%`;
  const comparison = real === undefined ? "" : `, against ${percent(real)} of real ones`;
  const recognised = `a classifier recognises the class of ${percent(fidelity)} of them${comparison}`;
  const limits = "People may recognise fewer: images can have only the colours, textures and layout of their class.";
  return `${size} With its default settings, ${recognised}. ${limits}`;
}
