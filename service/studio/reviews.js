// Reviews: what the user knows better than the verdict of a detector.

import { request, requestJson } from "./api.js";
import { announce, button, disable, h, keepFocus } from "./dom.js";
import { failure } from "./feedback.js";
import { jobs } from "./session.js";
import { thumbnail } from "./thumbnails.js";
import { updateForm } from "./update.js";
import { pText } from "./verdict.js";

const changes = new EventTarget(); // dispatches "change" when this page has sent or deleted a review

const path = (model) => `models/${encodeURIComponent(model)}/reviews`;

const listReviews = async (model) => (await requestJson(path(model))).reviews;

/** Delete reviews, and ignore those that are already gone. */
async function remove(model, ids) {
  let isChanged = false;
  try {
    for (const id of ids) {
      await request(`${path(model)}/${id}`, { method: "DELETE" }).catch(ignoreMissing);
      isChanged = true;
    }
  } finally {
    if (isChanged) changes.dispatchEvent(new Event("change")); // it replaces the row that shows a failure
  }
}

function ignoreMissing(error) {
  if (error.status !== 404) throw error;
}

/** The review of an image as it is now, or null: anyone who shares its key can delete it or review the image again. */
async function latest({ model, id }) {
  return (await listReviews(model)).find((review) => review.id === id) ?? null;
}

/** Send a review of a judged image; returns it. */
function post({ file, job, model }, verdict) {
  const body = new FormData();
  body.append("image", file, file.name || "image.png");
  body.set("job", job);
  body.set("verdict", verdict);
  return requestJson(path(model.name), { method: "POST", body, isQuick: false });
}

/** Keep the review of a judged image, or null, with its reading and, for after a reload, with its job. */
function remember(reading, review) {
  reading.review = review;
  const withReview = ({ images: [image], ...record }) => ({ ...record, images: [{ ...image, review }] });
  jobs.write(jobs.all().map((record) => (record.id === reading.job ? withReview(record) : record)));
}

/** Buttons that say what a judged image is; the reading keeps its `review`. */
export function reviewButtons(reading) {
  const notice = h("div");
  const row = h("div", { class: "row start" });
  const element = h("div", { class: "review" }, row, notice);
  const listener = new AbortController();
  changes.addEventListener("change", () => (element.isConnected ? refresh() : listener.abort()), listener);
  show();
  refresh();
  return element;

  /** Show what has become of the review since. */
  async function refresh() {
    const { review } = reading;
    const now = review && (await latest(review).catch(() => review)); // a button reports failures
    if (reading.review !== review || now?.created_at === review?.created_at) return;
    remember(reading, now);
    show();
  }

  function show() {
    const isFocused = row.contains(document.activeElement);
    row.replaceChildren(...(reading.review ? sent(reading.review) : choices()));
    if (isFocused) row.querySelector("button")?.focus(); // without its file there is none
  }

  function choices() {
    if (!reading.file) return [h("p", { class: "hint" }, "To say what this image is, score it again.")];
    const { is_ood: isOod } = reading.score.detection;
    const good = isOod && button("This image is good", (event) => send(event, "good"), "small");
    return [good, button("This image is defective", (event) => send(event, "defective"), "small")].filter(Boolean);
  }

  function sent(review) {
    const text = `Kept as ${review.verdict} until ${day(review.expires_at)}.`;
    return [h("p", { class: "hint" }, text), button("Undo", (event) => act(event, undo), "small")];
  }

  function send(event, verdict) {
    return act(event, async () => {
      remember(reading, await post(reading, verdict));
      changes.dispatchEvent(new Event("change"));
      announce(`${reading.name} is kept as ${verdict}.`);
    });
  }

  /** Delete the review, but not one that has replaced it. */
  async function undo() {
    const { model, id, created_at: createdAt } = reading.review;
    const now = await latest(reading.review);
    if (now && now.created_at !== createdAt) {
      remember(reading, now);
      const remedy = "That review is shown now, and was not deleted.";
      notice.replaceChildren(failure({ message: "This image has been reviewed again.", remedy, calm: true }));
      return;
    }
    await remove(model, now ? [id] : []);
    remember(reading, null);
    announce("The review is deleted.");
  }

  /** Perform an action of a button, and show its outcome. */
  async function act({ currentTarget }, action) {
    notice.replaceChildren();
    disable(currentTarget, true);
    try {
      await action();
      show();
    } catch (error) {
      disable(currentTarget, false);
      notice.replaceChildren(failure(error));
    }
  }
}

const day = (date) => new Date(date).toLocaleDateString("en", { day: "numeric", month: "long" });

/** The reviews of a detector with this key, and its update. */
export function reviewSection(model) {
  const list = h("div", { class: "stack" });
  const update = updateForm(model, { list: () => listReviews(model.name), remove: (ids) => remove(model.name, ids) });
  const heading = h("h3", {}, "Your reviews");
  const element = h("section", { class: "reviews stack" }, heading, update.element, list); // hundreds may be listed
  let thumbnails = new Map(); // of the list by id and name: a change of the list reloads none that it still has
  const listener = new AbortController();
  changes.addEventListener("change", () => (element.isConnected ? load() : listener.abort()), listener);
  load();
  return element;

  async function load() {
    try {
      const reviews = await listReviews(model.name);
      thumbnails = new Map(reviews.map((review) => [thumbnailKey(review), thumbnailOf(review)]));
      const shown = reviews.length ? reviewList(reviews, reviewItem) : noReviews();
      const { scrollTop = 0 } = list.querySelector("ul") ?? {};
      keepFocus(list, heading, () => list.replaceChildren(shown));
      if (reviews.length) shown.querySelector("ul").scrollTop = scrollTop;
      update.useReviews(reviews);
    } catch (error) {
      list.replaceChildren(failure(error, load));
    }
  }

  function thumbnailOf(review) {
    const key = thumbnailKey(review);
    const forget = () => thumbnails.delete(key); // the next change of the list tries again
    const create = () =>
      thumbnail(`${path(model.name)}/${review.id}/thumbnail`, `Reviewed image ${nameOf(review)}`, forget);
    return thumbnails.get(key) ?? create();
  }

  function reviewItem(review) {
    const { verdict, is_ood: isOod, p_value: pValue, expires_at: expiry } = review;
    const name = nameOf(review);
    const notice = h("div");
    const deleteButton = button("Delete", deleteReview, "small");
    deleteButton.setAttribute("aria-label", `Delete the review of ${name}`);
    async function deleteReview() {
      disable(deleteButton, true);
      try {
        await remove(model.name, [review.id]);
        announce(`The review of ${name} is deleted.`);
      } catch (error) {
        disable(deleteButton, false);
        notice.replaceChildren(failure(error));
      }
    }
    const facts = `p = ${pText(pValue)}, ${isOod ? "flagged" : "not flagged"}; kept until ${day(expiry)}`;
    return h(
      "li",
      {},
      h(
        "div",
        { class: "row" },
        thumbnails.get(thumbnailKey(review)),
        h(
          "span",
          { class: "grow" },
          h("span", { class: verdict === "good" ? "badge" : "badge weak" }, verdict),
          ` ${name}`,
          h("span", { class: "hint" }, ` ${facts}`),
        ),
        deleteButton,
      ),
      notice,
    );
  }
}

/** The number of reviews by verdict, and their list. */
function reviewList(reviews, reviewItem) {
  const good = reviews.filter(({ verdict }) => verdict === "good").length;
  const counts = `${good.toLocaleString("en")} good, ${(reviews.length - good).toLocaleString("en")} defective`;
  const items = h("ul", { class: "reviewed", "aria-label": "Reviewed images" }, reviews.map(reviewItem));
  return h("div", { class: "stack" }, h("p", { class: "hint" }, counts), items);
}

const nameOf = ({ file, id }) => file || id;
const thumbnailKey = (review) => `${review.id} ${nameOf(review)}`;

const noReviews = () =>
  h("p", { class: "hint" }, "None yet. After scoring an image, say that it is good or defective.");
