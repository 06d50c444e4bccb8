// Follows a submitted job to its result, with a status line, a progress bar and a Cancel button.

import { cancel, Refusal, result } from "./api.js";
import { button, h } from "./dom.js";
import { follow } from "./events.js";
import { failure } from "./feedback.js";

const LABELS = { queued: "Waiting in the queue", running: "Started" };
const EXPIRED = "This result has expired: the service keeps results for one hour.";
const LOST = "Connection lost: trying again. The job continues meanwhile.";

/** Follow a job to its result; resolves to null if it was canceled, throws if it failed. */
export async function jobResult(id, onEvent = () => {}) {
  try {
    const { status, error } = await follow(id, onEvent);
    if (status === "canceled") return null;
    if (status !== "succeeded") throw new Error(error?.detail ?? `The job ${status}.`);
    return await result(id);
  } catch (error) {
    if (error.status === 404) throw new Refusal(EXPIRED, { status: 404, remedy: "Submit it again.", calm: true });
    throw error;
  }
}

/**
 * The controls of a running job. `labels` are the status lines of its states; `describe(progress)` returns the status
 * line and the completed fraction, {text, fraction}, or null to leave them unchanged. A cancellation that fails is
 * reported in `notice`. `result(onProgress)` resolves as `jobResult` does.
 */
export function jobMonitor(id, { notice, labels = LABELS, describe = () => null, fraction = 0 }) {
  const status = h("p", { class: "hint grow" }, labels.queued);
  const bar = h("progress", { max: 1, value: fraction, "aria-label": "Progress" });
  const cancelButton = button("Cancel", cancelJob, "small");

  async function cancelJob() {
    cancelButton.disabled = true;
    try {
      await cancel(id);
    } catch (error) {
      cancelButton.disabled = false;
      notice.replaceChildren(failure(error));
    }
  }

  let text = labels.queued;
  function show(event) {
    const description = event.progress && describe(event.progress);
    text = description?.text ?? labels[event.status] ?? text;
    if (description) bar.value = description.fraction;
    status.textContent = event.lost ? LOST : text;
    status.classList.toggle("lost", event.lost === true);
  }

  function monitoredResult(onProgress = () => {}) {
    return jobResult(id, (event) => {
      show(event);
      if (event.progress) onProgress(event.progress);
    });
  }

  return { status, bar, cancelButton, result: monitoredResult };
}
