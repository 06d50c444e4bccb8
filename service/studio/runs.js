// Shared by the views that generate images: a form that submits a job, and the list of runs.

import { h, onSubmit } from "./dom.js";
import { reveal, showFailure } from "./feedback.js";
import { Run } from "./run.js";
import { jobs } from "./session.js";

/** Create a submit button, a notice for failures, and `form`, which wraps them. The form calls `submitJob`. */
export function jobForm(label, submitJob) {
  const notice = h("div");
  const submitButton = h("button", { type: "submit", class: "primary" }, label);
  async function submitForm() {
    notice.replaceChildren();
    submitButton.disabled = true;
    try {
      await submitJob();
    } catch (error) {
      showFailure(notice, error);
    }
    submitButton.disabled = false;
  }
  const form = (...elements) => h("form", { class: "controls stack", onsubmit: onSubmit(submitForm) }, elements);
  return { notice, submitButton, form };
}

/**
 * The runs of a view, newest first; `placeholder` is shown while there are none. `settings` is the view's form;
 * `use(view, file)` sends a generated image to a view; `before(record)` returns elements to show before the images.
 */
export class RunList {
  element = h("div", { class: "runs" });

  constructor(view, { settings, placeholder, use, before = () => [] }) {
    Object.assign(this, { settings, placeholder, use, before });
    for (const record of jobs.of(view)) this.show(record);
  }

  /** Add the run of a job that was submitted. */
  add(record) {
    jobs.add(record);
    this.settings.seed.advance();
    reveal(this.show(record));
  }

  show(record) {
    const run = new Run(record, {
      before: this.before(record),
      onReuse: () => this.settings.write(record.settings),
      onRemove: () => this.updatePlaceholder(),
      onUse: (action, { file, seed }) => {
        if (action === "seed") this.settings.seed.reuse(seed);
        else this.use(action, file);
      },
    });
    this.element.prepend(run.element);
    this.updatePlaceholder();
    return run.element;
  }

  updatePlaceholder() {
    this.placeholder.hidden = this.element.children.length > 0;
  }
}
