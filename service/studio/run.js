// One drawing from its job to its pictures: live rows, progress, cancel, a gallery with downloads and curl lines.

import { address, ask, cancel, curl, follow, previews, quoted, result } from "./api.js";
import { spoken } from "./controls.js";
import { jobs } from "./catalogue.js";
import { canvas, cells, decoded, drawn } from "./picture.js";
import { announce, button, copier, dialog, failure, h, plural, save, seconds, terminal } from "./ui.js";

/** The curl line that draws picture `i` of a run again, alone. */
export function line(record, i) {
  const { n: _, seed, ...asked } = record.asked;
  const words = new URLSearchParams({ ...asked, seed: seed + i });
  const out = ["-o", quoted(fileName(record, i))];
  const target = quoted(`${address()}/${record.task}?${String(words).replaceAll("%40", "@").replaceAll("+", "%20")}`);
  if (record.task === "complete") return curl("-F", quoted(`image=@${record.file}`), target, ...out);
  return curl("-X POST", target, ...out);
}

const fileName = (record, i) => `${record.task === "complete" ? "completed" : (record.asked.class ?? "picture")}-${record.asked.seed + i}.png`;

/** Where a drawing is: what is being done, in words, and how much is behind, 0 to 1. All rows count as much as a step, which is so for some eight pictures. */
export function whereabouts({ stage, step, total }, { noise, steps }) {
  const rows = stage === "refine" ? 1 : step / total;
  const refined = stage === "refine" ? step : 0;
  if (!noise || rows < 1) return { words: `Sampling row ${step} of ${total}`, part: rows / (noise ? 1 + steps : 1) };
  return { words: `Refining, step ${Math.min(refined + 1, steps)} of ${steps}`, part: (1 + refined) / (1 + steps) };
}

/** Buttons that save what a run has drawn; what goes wrong is told in `foot`. */
export const downloads = ({ id, task, asked }, foot) => [["PNG", "image/png"], ["Zip", "application/zip"]].map(([label, type]) => button(label, async () => {
  try {
    save(await (await ask(`jobs/${id}/result`, { headers: { Accept: type } })).blob(), `${task}-${asked.seed}.${label.toLowerCase()}`);
  } catch (error) {
    foot.replaceChildren(failure(error));
  }
}, "small"));

/** Columns for `n` tiles, `most` at most, so that rows are as equal as can be. */
const columns = (n, most) => Math.ceil(n / Math.ceil(n / most));

/**
 * Show a run in `host`, first. `record` is what the session keeps: id, view, task, asked, size [width, height], keep.
 * `use(action, picture)` is called for what the rest of the page does with a picture.
 */
export function run(record, host, { before = [], again, use }) {
  const { asked, size: [width, height] } = record;
  const status = h("p", { class: "hint grow" }, "Waiting in the queue");
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
  const stop = button("Cancel", async () => {
    stop.disabled = true;
    try {
      await cancel(record.id);
    } catch (error) {
      stop.disabled = false;
      foot.replaceChildren(failure(error));
    }
  }, "small");
  const actions = h("div", { class: "row" }, stop);
  const tiles = Array.from({ length: asked.n }, (_, i) => tile(i));
  const foot = h("div");
  const shown = tiles.length + before.length;
  const list = h("ol", { class: shown > 16 ? "cells many" : "cells" }, ...before, ...tiles.map((one) => one.el));
  list.style.setProperty("--wide", columns(shown, shown > 16 ? 10 : 6));
  list.style.setProperty("--narrow", columns(shown, shown > 16 ? 5 : 4));
  let together = asked.n; // pictures that are drawn at once, as soon as they have been seen
  const look = previews(record.id, show);
  const self = h("article", { class: "run", "aria-label": `Drawing with seed ${asked.seed}`, "data-job": record.id },
    h("header", { class: "row" }, h("div", {}, h("h2", {}, record.title), h("p", { class: "hint" }, spoken({ ...asked, class: undefined }))), actions),
    h("div", { class: "row progress" }, status, bar),
    list, foot);
  host.prepend(self);
  watch();
  return self;

  function tile(i) {
    const [face, context] = canvas(width, height);
    const open = h("button", { type: "button", class: "cell wait", disabled: true, "aria-label": `Picture with seed ${asked.seed + i}, not drawn yet` }, face);
    return { el: h("li", {}, open, h("span", { class: "seed mono" }, asked.seed + i)), open, face, context };
  }

  async function watch() {
    try {
      const end = await follow(record.id, (event) => (event.progress ? step(event.progress) : stand(event.status)));
      if (end.status === "succeeded") await finish();
      else over(end.status === "canceled" ? new Error("Canceled.") : new Error(end.error?.detail ?? `The job ${end.status}.`), end.status === "canceled");
    } catch (error) {
      if (error.status === 404) error.message = "This job is no longer known: the service keeps results for an hour.";
      over(error);
    }
  }

  function stand(state) {
    if (state === "queued") status.textContent = "Waiting in the queue";
    if (state === "running") status.textContent = "Started";
  }

  function step(progress) {
    const { words, part } = whereabouts(progress, asked);
    status.textContent = progress.done ? `${words} (${progress.done} of ${progress.n} done)` : words;
    bar.value = (progress.done + Math.min(together, progress.n - progress.done) * part) / progress.n;
    if (progress.preview) look();
  }

  function show(bitmap, moment) {
    if (self.dataset.done) return;
    const now = cells(bitmap, width, height, asked.n - moment.done);
    together = now.length;
    now.forEach((cell, k) => {
      const { context, open } = tiles[moment.done + k];
      context.clearRect(0, 0, width, height);
      context.putImageData(cell, 0, 0, ...drawn(cell, moment, record.keep));
      open.classList.remove("wait");
    });
  }

  async function finish() {
    const answer = await result(record.id);
    self.dataset.done = "true";
    answer.images.forEach(({ seed, png }, i) => {
      const src = `data:image/png;base64,${png}`;
      const { open } = tiles[i];
      open.replaceChildren(h("img", { src, alt: "", width, height }));
      open.className = "cell";
      open.disabled = false;
      open.setAttribute("aria-label", `Picture with seed ${seed}: look closer`);
      open.addEventListener("click", () => closer({ record, i, seed, png }, use));
    });
    const { compute_s, queue_s, batch_size } = answer.timing;
    status.textContent = `Drawn in ${seconds(compute_s)} after ${seconds(queue_s)} in the queue${batch_size > asked.n ? `, in a batch of ${batch_size}` : ""}`;
    bar.remove();
    actions.replaceChildren(...downloads(record, foot), button("Reuse settings", () => again(record), "small"), remover());
    announce(`${plural(asked.n, "picture")} drawn`);
  }

  function over(error, calm = false) {
    self.dataset.done = "true";
    bar.remove();
    for (const { open } of tiles) open.classList.remove("wait");
    if (calm) status.textContent = "Canceled. What had been drawn until then is shown.";
    else {
      status.remove();
      foot.replaceChildren(failure(error));
    }
    announce(calm ? "Canceled" : error.message);
    actions.replaceChildren(button("Reuse settings", () => again(record), "small"), remover());
  }

  function remover() {
    return button("Remove", () => {
      jobs.remove(record.id);
      self.remove();
      host.dispatchEvent(new Event("removed"));
    }, "small");
  }
}

/** A picture by itself: large, with its seed, its curl line and what can be done with it. */
function closer({ record, i, seed, png }, use) {
  const src = `data:image/png;base64,${png}`;
  const act = (name) => button({ seed: "Use this seed", score: "Score it", complete: "Complete it" }[name], () => {
    const file = new File([decoded(png)], fileName(record, i), { type: "image/png" });
    shown.close();
    use(name, { file, seed });
  }, "small");
  const shown = dialog(`Seed ${seed}`,
    h("div", { class: "closer" }, h("img", { class: "pixels", src, alt: `Picture with seed ${seed}` }),
      h("div", { class: "stack" },
        h("p", {}, spoken({ ...record.asked, seed })),
        h("div", { class: "row start" }, copier("Copy seed", () => String(seed), "small"),
          h("a", { class: "button small", href: src, download: fileName(record, i) }, "Download PNG"),
          ...["seed", "score", "complete"].map(act)),
        h("p", { class: "strong" }, "The same picture from a terminal"),
        record.task === "complete" && h("p", { class: "hint" }, `Run it where ${record.file} lies.`),
        terminal(line(record, i)))));
}
