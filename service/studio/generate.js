// Generate: new pictures, of a class or of any.

import { submit } from "./api.js";
import { catalogue, jobs } from "./catalogue.js";
import { settings } from "./controls.js";
import { run } from "./run.js";
import { complain, empty, h, plural, reveal } from "./ui.js";

export function mount(host, { hand }) {
  const drawing = settings({});
  const trouble = h("div");
  const runs = h("div", { class: "runs" });
  const start = h("button", { type: "submit", class: "primary" }, "Draw");
  const form = h("form", { class: "controls stack", onsubmit: (event) => { event.preventDefault(); draw(); } }, drawing.el, start, trouble);
  const nothing = empty("Nothing drawn yet", "Choose a class, or none, and draw. The pictures appear row by row, in the order in which the model thinks of them.");
  host.append(h("div", { class: "bench" }, form, h("div", { class: "stage" }, nothing, runs)));
  runs.addEventListener("removed", tidy);
  for (const record of jobs.of("generate")) show(record);
  tidy();

  function tidy() {
    nothing.hidden = runs.children.length > 0;
  }

  function show(record) {
    const shown = run(record, runs, {
      again: (former) => drawing.write(former.asked),
      use: (action, { file, seed }) => (action === "seed" ? drawing.seed.reuse(seed) : hand(action, file)),
    });
    tidy();
    return shown;
  }

  async function draw() {
    trouble.replaceChildren();
    start.disabled = true;
    try {
      const model = catalogue.need();
      const asked = drawing.read();
      const job = await submit("generate", asked);
      const record = { id: job.id, view: "generate", task: "generate", asked, size: [model.width, model.height], title: asked.class ? `${asked.n} × ${asked.class}` : plural(asked.n, "picture") };
      jobs.add(record);
      drawing.seed.next();
      reveal(show(record));
    } catch (error) {
      complain(trouble, error);
    }
    start.disabled = false;
  }
}
