// Shared by the views that generate images: a form that submits a job, and the list of runs.

import { h, onSubmit } from "./dom.js";
import { clearRefusals, reveal, showRefusal } from "./feedback.js";
import { Run } from "./run.js";
import { jobs } from "./session.js";

/**
 * Create a notice for failures, and `form`, which ends with it and a submit button. The form calls `submitJob`;
 * `isReady()` is whether it can be submitted, and `update` must be called when that changes.
 */
export function jobForm(label, submitJob, isReady = () => true) {
  const notice = h("div");
  const submitButton = h("button", { type: "submit", class: "primary" }, label);
  let submitting = false;
  const update = () => {
    submitButton.disabled = submitting || !isReady();
  };
  async function submitForm() {
    clearRefusals(element, notice);
    submitting = true;
    update();
    try {
      await submitJob();
    } catch (error) {
      showRefusal(element, notice, error);
    }
    submitting = false;
    update();
  }
  const element = h("form", { class: "controls stack", onsubmit: onSubmit(submitForm) });
  const form = (...elements) => {
    element.append(...elements.flat(), notice, h("div", { class: "row send" }, submitButton));
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
  element = h("div", { class: "runs" });

  constructor(view, { settings, placeholder, use, before = () => [] }) {
    Object.assign(this, { settings, placeholder, use, before });
    const groups = Map.groupBy(jobs.of(view), ({ id, comparedWith }) => comparedWith ?? id);
    for (const records of groups.values()) this.show(records);
  }

  /** Add the run of a job that was submitted, or the two of jobs to be compared. */
  add(...records) {
    for (const record of records) jobs.add(record);
    this.settings.seed.markUsed();
    reveal(this.show(records));
  }

  /** Show the runs of a group side by side. */
  show(records) {
    const group = h("div", { class: records.length > 1 ? "comparison" : "single" });
    const onRemove = () => {
      if (!group.children.length) group.remove();
      this.updatePlaceholder();
    };
    group.append(...records.map((record) => this.createRun(record, onRemove)));
    this.element.prepend(group);
    this.updatePlaceholder();
    return group;
  }

  createRun(record, onRemove) {
    const run = new Run(record, {
      before: this.before(record),
      onReuse: () => this.settings.write(record.settings),
      onRemove,
      onUse: (action, { file, seed }) => {
        if (action === "seed") this.settings.seed.reuse(seed);
        else this.use(action, file);
      },
    });
    return run.element;
  }

  updatePlaceholder() {
    this.placeholder.hidden = this.element.children.length > 0;
  }
}
