// Follows a submitted job to its result, with a status line, a progress bar and a Cancel button.

import { cancel, Refusal, result } from "./api.js";
import { announce, button, disable, h, keepFocus, plural, viewTitle } from "./dom.js";
import { follow, retry } from "./events.js";
import { failure } from "./feedback.js";
import { apiKey } from "./session.js";

const LABELS = { queued: "Waiting in the queue", running: "Started" };
const EXPIRED = "This result has expired: the service keeps results for one hour.";
const HIDDEN = "This result has expired, after one hour, or was requested with another API key.";
const MAX_FETCHES = 5; // of a result, until the user is asked
const LOST = "Connection lost: trying again. The job continues meanwhile.";

const ANNOUNCEMENT_MS = 30_000; // between announcements of progress, of whichever job

let announcedAt = 0;
function announceProgress(text) {
  if (performance.now() < announcedAt + ANNOUNCEMENT_MS) return;
  announcedAt = performance.now();
  announce(text);
}

/** Follow a job to its result; resolves to null if it was canceled, throws if it failed. */
async function jobResult(id, onEvent = () => {}) {
  try {
    const { status, error } = await follow(id, onEvent);
    if (status === "canceled") return null;
    if (status !== "succeeded") throw new Error(error?.detail ?? `The job ${status}.`);
    return await retry((onAlive) => fetchResult(id, onAlive), onEvent, MAX_FETCHES - 1);
  } catch (error) {
    if (error.status !== 404) throw error;
    throw new Refusal(apiKey.get() ? HIDDEN : EXPIRED, { status: 404, remedy: "Submit it again.", calm: true });
  }
}

async function fetchResult(id, onAlive) {
  const document = await result(id);
  onAlive();
  return document;
}

/** Whether nothing can be fetched any more: the job failed or has expired. */
const isOver = ({ status }) => status === undefined || status === 404;

/**
 * As `jobResult`, but if the connection fails or the API key is refused, the user is asked in `notice` whether to try
 * again; throws an error that `isDismissed` if they do not.
 */
export async function persistentResult(id, notice, onEvent = () => {}) {
  while (true) {
    try {
      return await jobResult(id, onEvent);
    } catch (error) {
      if (isOver(error)) throw error;
      onEvent({ lost: false });
      await new Promise((resolve, reject) => {
        const dismiss = button("Dismiss", () => reject(Object.assign(error, { isDismissed: true })), "small");
        notice.replaceChildren(failure(error, resolve, dismiss));
      });
      keepFocus(notice, viewTitle(notice), () => notice.replaceChildren());
    }
  }
}

/**
 * The controls of a running job. `labels` are the status lines of its states; `describe(progress)` returns the status
 * line and the completed fraction, {text, fraction}, or null to leave them unchanged. A cancellation that fails is
 * reported in `notice` until the next event. `result(onProgress)` resolves as `persistentResult` does.
 */
export function jobMonitor(id, { notice, labels = LABELS, describe = () => null, fraction = 0 }) {
  announcedAt = performance.now(); // its start is announced where it is submitted
  const status = h("p", { class: "hint grow" }, labels.queued);
  const bar = h("progress", { max: 1, value: fraction, "aria-label": "Progress" });
  const cancelButton = button("Cancel", cancelJob, "small");

  let cancelFailure = null;
  async function cancelJob() {
    disable(cancelButton, true);
    try {
      await cancel(id);
    } catch (error) {
      disable(cancelButton, false);
      cancelFailure = failure(error);
      notice.replaceChildren(cancelFailure);
    }
  }

  let text = labels.queued;
  function show(event) {
    cancelFailure?.remove();
    const description = event.progress && describe(event.progress);
    const { position } = event;
    const waiting = position ? `${labels.queued}, ${plural(position, "job")} ahead` : labels.queued;
    text = description?.text ?? (position === undefined ? labels[event.status] : waiting) ?? text;
    if (description) bar.value = description.fraction;
    status.textContent = event.lost ? LOST : text;
    announceProgress(status.textContent);
    status.classList.toggle("lost", event.lost === true);
  }

  function monitoredResult(onProgress = () => {}) {
    return persistentResult(id, notice, (event) => {
      show(event);
      if (event.progress) onProgress(event.progress);
    });
  }

  return { status, bar, cancelButton, result: monitoredResult };
}
