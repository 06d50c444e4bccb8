// The studio: views by the address's fragment, the pulse of the service, the API key, and pictures dropped anywhere.

import { Refusal, key } from "./api.js";
import { catalogue } from "./catalogue.js";
import * as models from "./models.js";
import * as score from "./score.js";
import { announce, button, dialog, failure, h, uid } from "./ui.js";

const PULSE_MS = 5000;
const WORK = { score: "scores", generate: "draws" };
/** Views that are always there, and those that are fetched when they are first asked for. */
const modules = { score, models };
const later = ["generate", "complete", "trajectory"];
const views = {};
const notice = document.getElementById("notice");
const pulse = document.getElementById("pulse");
const select = document.getElementById("model");

for (const name of [...Object.keys(modules), ...later]) views[name] = { host: document.getElementById(`view-${name}`) };
for (const name of Object.keys(modules)) mount(name, modules[name]);

function mount(name, module) {
  Object.assign(views[name], module.mount(views[name].host, { hand }));
}

/** A view that can be used: fetched and mounted, once. */
async function view(name) {
  if (later.includes(name)) await (views[name].fetched ??= import(`./${name}.js`).then((module) => mount(name, module)));
  return views[name];
}

/** Give a picture to a view, and go there. */
async function hand(name, file) {
  location.hash = name;
  (await view(name).catch(() => null))?.take([file]); // where it is not there, `route` says so
}

async function route(moved) {
  const fragment = location.hash.slice(1);
  if (fragment === "content") return;
  document.querySelector("dialog")?.close();
  const name = fragment in views ? fragment : "score";
  try {
    await view(name);
  } catch (error) {
    console.error(error);
    views[name].host.querySelector(".failure")?.remove();
    // Browsers keep a fetch that failed, so that only the page as a whole can be tried again.
    views[name].host.append(failure(new Refusal("This view could not be fetched."), () => location.reload()));
  }
  if (fragment !== location.hash.slice(1)) return;
  for (const [other, { host }] of Object.entries(views)) host.hidden = other !== name;
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.getAttribute("href") === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = views[name].host.querySelector("h1");
  document.title = `${title.textContent} · ncml studio`;
  if (!moved) return;
  scrollTo(0, 0);
  title.focus({ preventScroll: true });
}
addEventListener("hashchange", () => route(true));
route(false);

// -- the service's pulse

async function beat() {
  let error = null;
  try {
    const state = await models.metrics();
    const { idle, waiting } = models.summary(state);
    views.models.pulse(state);
    await catalogue.load();
    if (!catalogue.models.length) {
      stand("no model yet", false);
      error = new Refusal("No model is served yet: the workers are loading theirs.", { remedy: "This page goes on by itself as soon as one is ready.", calm: true });
    } else if (idle.length) {
      stand(`no worker for ${idle.join(" or ")}`, false);
      error = new Refusal(`No worker ${idle.map((lane) => WORK[lane] ?? lane).join(" or ")} at the moment.`, { remedy: "Start one, or ask whoever runs the service; this page notices by itself.", calm: true });
    } else stand(`ready · ${waiting} waiting`, true);
  } catch (found) {
    error = found;
    stand(error.status === 401 ? "API key needed" : "not reachable", false);
    if (error.status !== 401) views.models.pulse(error);
  }
  tell(error);
}

function stand(text, well) {
  pulse.className = `pulse ${well ? "well" : "ill"}`;
  pulse.lastChild.textContent = text;
}

let told = "";
function tell(error) {
  const text = error ? error.message : "";
  if (text === told) return;
  told = text;
  notice.replaceChildren(...(error ? [failure(error, error.calm || error.status === 401 ? undefined : beat)] : []));
}

async function live() {
  for (;;) {
    if (!document.hidden) await beat();
    await new Promise((done) => setTimeout(done, catalogue.models.length ? PULSE_MS : 1500));
  }
}
live();

catalogue.addEventListener("list", () => {
  select.replaceChildren(...catalogue.models.map(({ name }) => h("option", { value: name }, name)));
  select.value = catalogue.current?.name ?? "";
  select.parentElement.hidden = catalogue.models.length < 2;
});
select.addEventListener("change", () => catalogue.choose(select.value));

// -- the key

document.getElementById("key").addEventListener("click", () => {
  const id = uid();
  const input = h("input", { type: "password", id, autocomplete: "off", value: key.get(), class: "mono" });
  const shown = dialog("API key", h("form", { class: "stack", onsubmit: (event) => { event.preventDefault(); keep(input.value.trim()); } },
    h("div", { class: "field" }, h("label", { for: id }, "Key"), input,
      h("p", { class: "hint" }, "Kept in this tab only, until it is closed; sent to this service and nowhere else. A service without keys needs none.")),
    h("div", { class: "row start" }, h("button", { type: "submit", class: "primary" }, "Use it"), button("Forget it", () => keep("")))));
  input.focus();
  function keep(value) {
    key.set(value);
    shown.close();
    announce(value ? "The key is used from now on" : "The key is forgotten");
    beat();
  }
});

// -- pictures from anywhere on the page

function arrived(files) {
  if (!files.length) return;
  const here = Object.keys(views).find((name) => !views[name].host.hidden);
  const name = views[here]?.take ? here : "score";
  if (name !== here) location.hash = name;
  views[name].take([...files]);
}
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  arrived(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  arrived(event.clipboardData.files);
});
