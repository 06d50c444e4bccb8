// Shared by the views that generate images: a form that submits a job, and the list of runs.

import { announce, button, h, onSubmit } from "./dom.js";
import { clearRefusals, reveal, showRefusal } from "./feedback.js";
import { Run } from "./run.js";
import { Sender } from "./send.js";
import { jobs } from "./session.js";

/**
 * Create a notice for failures, and `form`, which ends with it and a submit button. The form calls
 * `submitJob(signal)`; `isReady()` is whether it can be submitted, and `update` must be called when that changes;
 * `busyLabel` is shown while a request is sent.
 */
export function jobForm(label, submitJob, isReady = () => true, busyLabel = "Submitting") {
  const notice = h("div");
  const submitButton = h("button", { type: "submit", class: "primary" }, label);
  const sender = new Sender(submitButton, { label: () => label, isReady, busyLabel });
  const update = () => sender.update();
  async function submitForm() {
    clearRefusals(element, notice);
    try {
      await sender.run(submitJob);
      announce("Submitted");
    } catch (error) {
      showRefusal(element, notice, error);
    }
  }
  const element = h("form", { class: "controls stack", onsubmit: onSubmit(submitForm) });
  const form = (...elements) => {
    element.append(...elements.flat(), notice, h("div", { class: "row send" }, submitButton, sender.cancelButton));
    return element;
  };
  update();
  return { notice, update, form };
}

/**
 * The runs of a view, newest first; `placeholder` is shown while there are none. `settings` is the view's form;
 * `use(view, file)` sends a generated image to a view; `before(record)` returns elements to show before the images.
 */
export class RunList {
  runs = new Set();
  list = h("div", { class: "runs" });
  removeButton = button("Remove all finished runs", () => this.removeFinished(), "small");
  element = h("div", { class: "stack" }, this.list, h("div", {}, this.removeButton));

  constructor(view, { settings, placeholder, use, before = () => [] }) {
    Object.assign(this, { settings, placeholder, use, before });
    this.updatePlaceholder();
    const groups = Map.groupBy(jobs.of(view), ({ id, comparedWith }) => comparedWith ?? id);
    for (const records of groups.values()) this.show(records);
  }

  /** Add the run of a job that was submitted, or the two of jobs to be compared. */
  add(...records) {
    for (const record of records) jobs.add(record);
    this.settings.seed.markUsed(records[0].settings.seed);
    reveal(this.show(records));
  }

  /** Show the runs of a group side by side. */
  show(records) {
    const group = h("div", { class: records.length > 1 ? "comparison" : "single" });
    const onRemove = (run) => {
      this.runs.delete(run);
      if (!group.children.length) group.remove();
      this.updatePlaceholder();
    };
    group.append(...records.map((record) => this.createRun(record, onRemove)));
    this.list.prepend(group);
    this.updatePlaceholder();
    return group;
  }

  createRun(record, onRemove) {
    const run = new Run(record, {
      before: this.before(record),
      onReuse: () => this.settings.write(record.settings),
      onRemove: () => onRemove(run),
      onUse: (action, { file, seed }) => {
        if (action === "seed") this.settings.seed.reuse(seed);
        else this.use(action, file);
      },
    });
    this.runs.add(run);
    return run.element;
  }

  removeFinished() {
    for (const run of [...this.runs].filter(({ isOver }) => isOver)) run.remove();
  }

  updatePlaceholder() {
    this.placeholder.hidden = this.runs.size > 0;
    this.removeButton.hidden = this.runs.size < 2;
  }
}
