// Generate: new images, of one class or of any.

import { submit } from "./api.js";
import { catalogue } from "./catalogue.js";
import { h } from "./dom.js";
import { emptyState } from "./feedback.js";
import { jobForm, RunList } from "./runs.js";
import { imagesText, settingsForm } from "./settings.js";

export function mount(host, { sendTo }) {
  const settings = settingsForm({});
  const { notice, submitButton, form } = jobForm("Generate", generate);
  const placeholder = emptyState(
    "Nothing generated yet",
    "Choose a class, or any, and generate images. They appear row by row, in the order in which they are sampled.",
  );
  const runs = new RunList("generate", { settings, placeholder, use: sendTo });
  const stage = h("div", { class: "stage" }, placeholder, runs.element);
  host.append(h("div", { class: "bench" }, form(settings.element, submitButton, notice), stage));

  async function generate() {
    const { width, height } = catalogue.requireCurrent();
    const parameters = settings.read();
    const { id } = await submit("generate", parameters);
    const title = imagesText(parameters);
    runs.add({ id, view: "generate", task: "generate", settings: parameters, size: [width, height], title });
  }
}
