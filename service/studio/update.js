// The update of a detector: a new version that learns from the reviews of its verdicts.

import { submit } from "./api.js";
import { catalogue } from "./catalogue.js";
import { announce, button, disable, h, keepFocus, plural, uid, viewTitle } from "./dom.js";
import { failure } from "./feedback.js";
import { jobMonitor } from "./job.js";
import { jobForm } from "./runs.js";
import { jobs } from "./session.js";

const STAGES = {
  read: "Reading images",
  "find scenes": "Comparing images",
  align: "Aligning images",
  "known defects": "Learning defects",
  "judge altered images": "Judging altered images",
  rank: "Ranking good images",
  "judge defective images": "Judging defective images",
  test: "Testing the former version",
  power: "Measuring what it finds",
};

/** The form that updates a detector, and the updates that it started; `kept` lists and removes its reviews. */
export function updateForm(model, kept) {
  const { name: base, detector } = model;
  if (!detector.keeps_images || !catalogue.calibrationAllowed) {
    const text = detector.keeps_images
      ? "Updates in the browser are disabled: the operator of this service can allow them with NCML_ALLOW_CALIBRATION=1."
      : "This detector keeps no good images, so it cannot be updated: make it again with ncml adapt --keep-images.";
    return { element: h("p", { class: "hint" }, text), useReviews: () => {} };
  }
  const updates = h("div", { class: "runs" });
  let count = 0;
  const { update, form } = jobForm("Update detector", send, () => count > 0);
  const id = uid();
  const hintId = uid();
  const name = h("input", {
    ...{ id, "aria-describedby": hintId, required: true, maxlength: 64, value: nextName(base) },
    pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*",
    title: "Letters, digits, dots, hyphens and underscores; the first must be a letter or digit.",
  });
  const hint =
    "The new version learns from the reviewed images and keeps copies of them, even if their reviews are deleted; " +
    "the former version remains. An update takes minutes: what the new version finds is measured last, and on fewer " +
    "images if the job runs out of time.";
  const field = h(
    "div",
    { class: "field", "data-field": "name" },
    h("label", { for: id }, "Name of the new version"),
    name,
    h("p", { id: hintId, class: "hint" }, hint),
  );
  const need = h("p", { class: "hint" }, "An update needs a review.");
  const element = h("div", { class: "stack" }, form(field, need), updates);
  for (const record of jobs.of("update")) if (record.base === base) watch(record, updates, kept);
  return { element, useReviews };

  function useReviews(reviews) {
    count = reviews.length;
    need.hidden = count > 0;
    update();
  }

  async function send(signal) {
    const { value } = name;
    const submitted = await submit("update", { model: base, name: value }, signal);
    const record = { id: submitted.id, view: "update", name: value, base };
    jobs.add(record);
    watch(record, updates, kept);
  }
}

/** Show an update and follow its job. */
async function watch(record, updates, kept) {
  const notice = h("div");
  const body = h("div");
  const monitor = jobMonitor(record.id, { notice, describe: progressDescriber() });
  const heading = h("h4", {}, record.name, h("span", { class: "hint" }, ` from ${record.base}`));
  const actions = h("div", { class: "row" }, monitor.cancelButton);
  const progress = h("div", { class: "row progress" }, monitor.status, monitor.bar);
  const attributes = { class: "run", "data-job": record.id };
  const run = h("article", attributes, h("header", { class: "row" }, heading, actions), progress, body, notice);
  updates.prepend(run);
  try {
    const result = await monitor.result();
    monitor.status.textContent = result ? "Updated" : "Canceled. No model was created.";
    announce(`${record.name}: ${monitor.status.textContent}`);
    if (result) body.replaceChildren(updateReport(result));
  } catch (error) {
    monitor.status.remove();
    const ids = await refusedReviews(error, kept);
    notice.replaceChildren(failure(error, null, ids.length ? deletionButton(ids, notice, kept) : null));
  }
  monitor.bar.remove();
  const remove = () => {
    jobs.remove(record.id);
    keepFocus(run, viewTitle(run), () => run.remove());
  };
  keepFocus(actions, heading, () => actions.replaceChildren(button("Remove", remove, "small")));
}

const REVIEW_IDS = /(?<=leave out |, )[0-9a-f]{16}(?=-)/g; // at the start of names, as the service makes them

/** The ids of the reviews that an error of an update names and that still exist. */
async function refusedReviews(error, kept) {
  const named = new Set(error.message.match(REVIEW_IDS));
  if (!named.size) return [];
  const reviews = await kept.list().catch(() => []); // the section of the reviews shows why they cannot be listed
  return reviews.map(({ id }) => id).filter((id) => named.has(id));
}

/** A button that deletes reviews. */
function deletionButton(ids, notice, kept) {
  const label = ids.length > 1 ? `Delete these ${ids.length} reviews` : "Delete this review";
  const deleteButton = button(label, deleteNamed, "small");
  async function deleteNamed() {
    disable(deleteButton, true);
    try {
      await kept.remove(ids);
      const text = `${plural(ids.length, "review")} deleted.`;
      keepFocus(notice, notice.closest(".run").querySelector("h4"), () => deleteButton.replaceWith(text));
      announce(text);
    } catch (failed) {
      disable(deleteButton, false);
      notice.append(failure(failed));
    }
  }
  return deleteButton;
}

/** Return a function that describes progress, with the time that its stage has left. */
function progressDescriber() {
  let since = {};
  return ({ stage, step, total }) => {
    if (stage !== since.stage) since = { stage, step, time: performance.now() };
    const text = STAGES[stage] ?? "Estimating what good images look like";
    const secondsLeft = Math.round(((performance.now() - since.time) / (step - since.step) / 1000) * (total - step));
    const left = step > since.step ? `, about ${secondsLeft.toLocaleString("en")} s left` : "";
    const counted = `${step.toLocaleString("en")} of ${total.toLocaleString("en")}`;
    return { text: `${text}: ${counted}${left}`, fraction: step / total };
  };
}

/** What has become of the reviewed images, and what the new version finds. */
function updateReport({ model, calibration }) {
  const { n_fit: estimated, n_rank: ranked, weakness, summary, reviews } = calibration;
  const { good, defective, found, added } = reviews;
  const { found_added: foundAdded, found_before: foundBefore } = reviews;
  const comparison =
    added === defective
      ? `the former version finds ${foundBefore}`
      : `of the ${added} added, it finds ${foundAdded} and the former version ${foundBefore}`;
  const lines = [
    `${plural(estimated, "image")} for estimation, ${good.toLocaleString("en")} of them reviewed; ` +
      `${ranked.toLocaleString("en")} for ranking.`,
    good &&
      `${reviews.still_flagged} of ${plural(good, "good image")} would be flagged again if only images of other scenes had been added.`,
    defective &&
      `The new version finds ${found} of ${plural(defective, "defective image")}, each judged without learning from it` +
        `${added ? `; ${comparison}` : ""}.`,
  ].filter(Boolean);
  const offered = () => catalogue.models.find(({ name }) => name === model.name);
  const use = () => {
    catalogue.select(offered());
    location.hash = "score";
  };
  const useButton = button("Score images with it", use, "primary");
  const listener = new AbortController();
  const show = () => {
    useButton.disabled = !offered();
    if (offered()) listener.abort();
  };
  catalogue.addEventListener("list", show, listener);
  show();
  return h(
    "div",
    { class: "stack report" },
    h(
      "ul",
      { class: "steps" },
      lines.map((line) => h("li", {}, line)),
    ),
    weakness && h("p", { class: "caution" }, h("strong", {}, "This detector is weak"), `: ${weakness}.`),
    h("details", {}, h("summary", {}, "What it finds and misses"), h("p", { class: "hint" }, summary)),
    h("div", { class: "row start" }, useButton),
  );
}

/** A name for the next version: bottles-2 after bottles, bottles-3 after bottles-2. */
function nextName(name) {
  const [, stem, number = "1"] = /^(.*?)(?:-(\d+))?$/.exec(name);
  const taken = new Set(catalogue.models.map((model) => model.name));
  for (let next = Number(number) + 1; ; next++) if (!taken.has(`${stem}-${next}`)) return `${stem}-${next}`;
}
