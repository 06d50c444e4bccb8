// Trajectory: a drawing's way from its first row to the refined picture, to be scrubbed through.

import { cancel, follow, previews, result, submit } from "./api.js";
import { catalogue, jobs } from "./catalogue.js";
import { settings, spoken } from "./controls.js";
import { canvas, cells, decoded, drawn, exact, open } from "./picture.js";
import { downloads, whereabouts } from "./run.js";
import { announce, button, complain, empty, failure, h, plural, reveal, slider } from "./ui.js";

const AMPLIFIED = 8; // times that a difference is enlarged to be seen
const THUMBS = 9;

export function mount(host) {
  const drawing = settings({ few: 4, most: 9, steps: 12, trajectory: true });
  const trouble = h("div");
  const start = h("button", { type: "submit", class: "primary" }, "Trace");
  const form = h("form", { class: "controls stack", onsubmit: (event) => { event.preventDefault(); trace(); } }, drawing.el, start, trouble);
  const nothing = empty("Nothing traced yet", "Trace a few pictures, then scrub from the first row through the noisy sample to the refined end.");
  const stage = h("div", { class: "stage" }, nothing);
  host.append(h("div", { class: "bench" }, form, stage));
  const last = jobs.of("trajectory").at(-1);
  if (last) show(last);

  async function trace() {
    trouble.replaceChildren();
    start.disabled = true;
    try {
      const model = catalogue.need();
      const asked = drawing.read();
      const job = await submit("generate", asked);
      for (const former of jobs.of("trajectory")) {
        jobs.remove(former.id);
        stage.querySelector(`[data-job="${former.id}"]`)?.dispatchEvent(new Event("leave"));
      }
      const record = { id: job.id, view: "trajectory", task: "generate", asked, size: [model.width, model.height] };
      jobs.add(record);
      drawing.seed.next();
      reveal(show(record));
    } catch (error) {
      complain(trouble, error);
    }
    start.disabled = false;
  }

  function show(record) {
    const { asked, size: [width, height] } = record;
    const columns = Math.ceil(Math.sqrt(asked.n));
    const rows = Math.ceil(asked.n / columns);
    const frames = []; // {stage, step, total, images}
    let over = false;

    const [face, ink] = canvas(columns * width, rows * height);
    const [rest, restInk] = canvas(columns * width, rows * height);
    for (const [element, label] of [[face, "The pictures at this moment"], [rest, "What is still to be removed"]]) {
      element.className = "pixels";
      element.setAttribute("role", "img");
      element.setAttribute("aria-label", label);
    }
    const none = h("p", { class: "none hint" }, "Known at the end");
    const look = previews(record.id, glimpse);
    const scrub = slider({ label: "Moment", min: 0, max: 0, value: 0, words: (i) => moment(frames[i]), oninput: () => { pause(); paint(); } });
    scrub.enable(false);
    let timer = null;
    const play = button("Play", () => (timer ? pause() : begin()), "small");
    play.disabled = true;
    const status = h("p", { class: "hint grow" }, "Waiting in the queue");
    const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
    const stop = button("Cancel", async () => {
      stop.disabled = true;
      await cancel(record.id).catch((error) => foot.replaceChildren(failure(error)));
    }, "small");
    const actions = h("div", { class: "row" }, button("Reuse settings", () => drawing.write(asked), "small"), stop);
    const thumbs = h("ul", { class: "thumbs", "aria-hidden": "true" });
    const note = h("p", { class: "hint" });
    const foot = h("div");
    const self = h("article", { class: "run trace", "data-job": record.id },
      h("header", { class: "row" }, h("div", {}, h("h2", {}, asked.class ? `${asked.n} × ${asked.class}` : plural(asked.n, "picture")), h("p", { class: "hint" }, spoken({ ...asked, class: undefined }))), actions),
      h("div", { class: "row progress" }, status, bar),
      h("div", { class: "pair" }, h("figure", {}, face, h("figcaption", { class: "hint" }, "The pictures at this moment")),
        h("figure", {}, rest, none, h("figcaption", { class: "hint" }, `What is still to be removed, ${AMPLIFIED} times enlarged`))),
      h("div", { class: "row" }, play, scrub.el), thumbs, note, foot);
    self.addEventListener("leave", () => {
      pause();
      if (!over) cancel(record.id).catch(() => announce("The former trace goes on")); // nobody looks at it any more
      over = true;
      self.remove();
    });
    nothing.hidden = true;
    stage.append(self);
    watch();
    return self;

    async function watch() {
      try {
        const end = await follow(record.id, ({ status: state, progress }) => {
          if (state === "running") status.textContent = "Started";
          if (!progress) return;
          ({ words: status.textContent, part: bar.value } = whereabouts(progress, asked));
          if (progress.preview) look();
        });
        if (over) return;
        over = true;
        ended();
        if (end.status === "succeeded") await finish();
        else if (end.status === "canceled") {
          status.textContent = "Canceled. What was seen until then can be scrubbed through.";
          none.textContent = "Not known";
          announce("Canceled");
          ready();
        } else throw new Error(end.error?.detail ?? `The job ${end.status}.`);
      } catch (error) {
        over = true;
        ended();
        status.textContent = "";
        if (error.status === 404) {
          jobs.remove(record.id);
          error.message = "This trace is no longer known: the service keeps results for an hour.";
        }
        foot.replaceChildren(failure(error));
      }
    }

    function ended() {
      bar.remove();
      stop.replaceWith(button("Remove", () => {
        jobs.remove(record.id);
        pause();
        self.remove();
        nothing.hidden = stage.children.length > 1;
      }, "small"));
    }

    /** Take a preview, unless it is the last one again. */
    function glimpse(bitmap, moment) {
      const last = frames.at(-1);
      if (over || (last?.stage === moment.stage && last.step === moment.step)) return;
      add({ ...moment, images: until(cells(bitmap, width, height, asked.n), moment) });
    }

    /** Pictures of which only so many rows are drawn as at a moment. */
    function until(images, moment) {
      return images.map(({ data }) => new ImageData(data.slice().fill(0, 4 * width * drawn({ width, height }, moment)[3]), width));
    }

    /** Have a frame for each row: what is drawn of a sample stays, so that the last one that was seen shows them all. */
    function everyRow() {
      const seen = frames.filter(({ stage }) => stage === "noisy_sampling");
      const { images, step: rows = 0, ...rest } = seen.at(-1) ?? {};
      frames.splice(0, seen.length, ...Array.from({ length: rows }, (_, i) => ({ ...rest, step: i + 1, images: until(images, { ...rest, step: i + 1 }) })));
      return rows;
    }

    function add(frame) {
      frames.push(frame);
      scrub.limit(frames.length - 1);
      scrub.value = frames.length - 1;
      paint();
    }

    async function finish() {
      const answer = await result(record.id);
      const images = await Promise.all(answer.images.map(async ({ png }) => {
        const bitmap = await open(decoded(png));
        const [, context] = canvas(width, height);
        context.drawImage(bitmap, 0, 0);
        return context.getImageData(0, 0, width, height);
      }));
      if (frames.at(-1)?.stage === "refine" && frames.at(-1).step === frames.at(-1).total) frames.pop(); // the same, not yet rounded
      const steps = frames.filter((frame) => frame.stage === "refine").length;
      add({ stage: "end", images });
      status.textContent = "Traced";
      const rows = ready();
      note.textContent = frames.length === 1
        ? "Only the end is known: the trace was made before this page was loaded, or too fast to be watched. Its seed gives the same trace again."
        : `Shown are ${rows} of ${height} rows and ${steps + 1} of ${asked.steps} refinement steps, as the service told of them; the last is the finished picture.`;
      none.textContent = "Nothing left";
      actions.prepend(...downloads(record, foot));
      announce("Traced: scrub through it with the slider");
    }

    /** Let the moments be scrubbed through, from the noisy sample on; returns how many rows are known. */
    function ready() {
      const rows = everyRow();
      scrub.limit(frames.length - 1);
      scrub.value = Math.max(0, rows - 1);
      scrub.enable(frames.length > 1);
      play.disabled = frames.length < 2;
      const every = Math.max(1, (frames.length - 1) / (THUMBS - 1));
      const shown = [...new Set(Array.from({ length: Math.min(THUMBS, frames.length) }, (_, i) => Math.round(i * every)))].filter((i) => i < frames.length);
      thumbs.replaceChildren(...shown.map((i) => h("li", { onclick: () => { pause(); scrub.value = i; paint(); } }, exact(frames[i].images[0], ""))));
      paint();
      return rows;
    }

    function begin() {
      if (scrub.value >= frames.length - 1) scrub.value = 0;
      play.textContent = "Pause";
      paint();
      timer = setInterval(() => {
        scrub.value += 1;
        paint();
        if (scrub.value >= frames.length - 1) pause();
      }, Math.max(80, Math.min(300, 5000 / frames.length)));
    }

    function pause() {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    }

    function paint() {
      const frame = frames[scrub.value];
      if (!frame) return;
      const end = frames.at(-1).stage === "end" ? frames.at(-1).images : null;
      none.hidden = end !== null && frame.stage !== "end";
      ink.clearRect(0, 0, face.width, face.height);
      restInk.clearRect(0, 0, rest.width, rest.height);
      frame.images.forEach((image, i) => {
        const place = [(i % columns) * width, Math.floor(i / columns) * height];
        ink.putImageData(image, ...place);
        if (!none.hidden || !end[i]) return;
        const difference = new ImageData(width, height);
        for (let at = 0; at < image.data.length; at += 4) {
          for (let c = 0; c < 3; c += 1) difference.data[at + c] = 128 + AMPLIFIED * (image.data[at + c] - end[i].data[at + c]);
          difference.data[at + 3] = image.data[at + 3];
        }
        restInk.putImageData(difference, ...place);
      });
    }
  }
}

/** What a moment is called. */
function moment(frame) {
  if (!frame) return "";
  if (frame.stage === "end") return "Refined picture";
  if (frame.stage === "refine") return `Refinement, step ${frame.step}`;
  return frame.step === frame.total ? "Noisy sample" : `Sampling, row ${frame.step}`;
}
