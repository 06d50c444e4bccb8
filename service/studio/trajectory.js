// Trajectory: the frames of a generation, from its first row to the refined images.

import { submit } from "./api.js";
import { catalogue } from "./catalogue.js";
import { h } from "./dom.js";
import { emptyState, reveal } from "./feedback.js";
import { jobForm } from "./runs.js";
import { jobs } from "./session.js";
import { settingsForm } from "./settings.js";
import { Trace } from "./trace.js";

export function mount(host) {
  const settings = settingsForm({ images: 4, maxImages: 9, steps: 12, trajectory: true });
  const { form } = jobForm("Trace", submitTrace);
  const placeholder = emptyState(
    "Nothing traced yet",
    "Trace a few images, then step from their first row to the noisy samples to the refined images.",
  );
  const stage = h("div", { class: "stage" }, placeholder);
  host.append(h("div", { class: "bench" }, form(settings.element), stage));
  let trace = null; // the one on the page
  const lastRecord = jobs.of("trajectory").at(-1);
  if (lastRecord) show(lastRecord);

  async function submitTrace(signal) {
    const { width, height } = await catalogue.requireCurrent();
    const parameters = settings.read();
    const { id } = await submit("generate", parameters, signal);
    trace?.remove();
    const record = { id, view: "trajectory", task: "generate", settings: parameters, size: [width, height] };
    jobs.add(record);
    settings.seed.markUsed(parameters.seed);
    reveal(show(record));
  }

  function show(record) {
    placeholder.hidden = true;
    const onRemove = () => {
      trace = null;
      placeholder.hidden = false;
    };
    trace = new Trace(record, { onReuse: () => settings.write(record.settings), onRemove });
    stage.append(trace.element);
    return trace.element;
  }
}
