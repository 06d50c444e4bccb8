// The page: switches views by URL fragment, shows the service's state, and takes images.

import { Refusal } from "./api.js";
import { catalogue, isGenerator } from "./catalogue.js";
import { announce, button, h, keepFocus } from "./dom.js";
import { droppedFiles } from "./drop.js";
import { failure, listed } from "./feedback.js";
import { fetchMetrics, load } from "./metrics.js";
import * as score from "./score.js";

const REFRESH_MS = 5000;
const REFRESH_WITHOUT_MODELS_MS = 1500;
const LANE_TASKS = { score: "score images", generate: "generate images" };
const LAZY_VIEWS = ["generate", "complete", "trajectory", "models", "calibrate"]; // loaded when they are first opened
const GENERATING_VIEWS = ["generate", "complete", "trajectory"]; // only for models that generate
const TAB_OF = { calibrate: "models" }; // views without a tab of their own
const views = {};
const notice = document.getElementById("notice");
const pulse = document.getElementById("pulse");
const modelSelect = document.getElementById("model");
let metrics = null; // null while they are not available

// -- views

for (const name of ["score", ...LAZY_VIEWS]) views[name] = { host: document.getElementById(`view-${name}`) };
mount("score", score);

function mount(name, module) {
  Object.assign(views[name], module.mount(views[name].host, { sendTo }));
  views[name].showHealth?.(metrics);
}

/** Load and mount a view, once. */
async function openView(name) {
  if (LAZY_VIEWS.includes(name)) {
    views[name].loading ??= import(`./${name}.js`).then((module) => mount(name, module));
    await views[name].loading;
  }
  return views[name];
}

/** Open a view with images. */
async function sendTo(name, ...files) {
  location.hash = name;
  const view = await openView(name).catch(() => null); // `route` reports the failure
  view?.take(files);
}

/** Show the view of the address; `navigated` unless the page has just been loaded. */
async function route(navigated) {
  const fragment = location.hash.slice(1);
  document.querySelector("dialog")?.close();
  const name = Object.hasOwn(views, fragment) ? fragment : "score";
  const { host } = views[name];
  try {
    await openView(name);
  } catch (error) {
    console.error(error);
    host.querySelector(".failure")?.remove();
    // Browsers cache a failed import: only a reload of the page can succeed.
    host.append(failure(new Refusal("This view could not be loaded."), () => location.reload()));
  }
  if (fragment !== location.hash.slice(1)) return;
  for (const view of Object.values(views)) view.host.hidden = view.host !== host;
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.getAttribute("href") === `#${TAB_OF[name] ?? name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = host.querySelector("h1");
  document.title = `${title.textContent} · ncml studio`;
  if (!navigated) return;
  scrollTo(0, 0);
  if (document.activeElement === modelSelect)
    announce(title.textContent); // the arrow keys of the list led here
  else title.focus({ preventScroll: true });
}
// Not "hashchange", which browsers omit where Back also leads to another model in the address.
addEventListener("popstate", () => {
  showCurrent(); // which may lead to another view
  route(true);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address keeps the name of the view
  document.getElementById("content").focus();
});
route(false);

// -- the state of the service

async function refresh() {
  const [models, measurements] = await Promise.allSettled([catalogue.load(), fetchMetrics()]);
  metrics = measurements.value ?? null; // an operator may block them
  views.models.showHealth?.(metrics);
  showProblem(models.reason ? showUnavailable(models.reason) : showLoad());
}

/** Show that the models cannot be loaded; returns the reason. */
function showUnavailable(error) {
  showPulse(error.status === 401 ? "API key needed" : "Unreachable", false);
  return error;
}

/** Show whether the service can process jobs; returns the problem if it cannot. */
function showLoad() {
  const { unserved, waiting } = metrics ? load(metrics) : { unserved: [] };
  if (!catalogue.models.length) {
    showPulse("No model yet", false);
    const remedy = "This page continues automatically as soon as one is ready.";
    return new Refusal("No model is available yet: the workers are loading their models.", { remedy, calm: true });
  }
  if (unserved.length) {
    showPulse(`No worker for ${unserved.join(" or ")}`, false);
    const tasks = unserved.map((lane) => LANE_TASKS[lane] ?? lane).join(" or ");
    const remedy = "Start one, or ask the operator of the service; this page continues automatically.";
    return new Refusal(`No worker is available to ${tasks}.`, { remedy, calm: true });
  }
  showPulse(metrics ? `Ready · ${waiting} waiting` : "Ready", true);
  return catalogue.missing && fallback(catalogue.missing, catalogue.current.name);
}

/** The notice that another model replaces the selected one, which the user can accept. */
function fallback(missing, name) {
  const remedy = catalogue.unusable[missing] ?? `${missing} is used again as soon as it is available.`;
  const notice = new Refusal(`${missing} is not available: ${name} is used instead.`, { remedy, calm: true });
  const accept = () => {
    catalogue.select(catalogue.current);
    refresh();
  };
  return Object.assign(notice, { action: button(`Keep using ${name}`, accept, "small") });
}

function showPulse(text, isReady) {
  pulse.className = `pulse ${isReady ? "well" : "ill"}`;
  pulse.lastChild.textContent = text;
}

let problemText = "";
function showProblem(problem) {
  const text = problem?.message ?? "";
  if (text === problemText) return; // a repeated alert would be announced again
  problemText = text;
  const retry = problem?.calm || problem?.status === 401 ? undefined : refresh;
  replace(notice, ...(problem ? [failure(problem, retry, problem.action)] : []));
}

/** Replace messages; if a button of theirs has the focus, the heading of the view gets it. */
function replace(area, ...messages) {
  const heading = document.querySelector("section:not([hidden]) h1");
  keepFocus(area, heading, () => area.replaceChildren(...messages));
}

async function keepRefreshing() {
  while (true) {
    if (!document.hidden) await refresh();
    const delay = catalogue.models.length ? REFRESH_MS : REFRESH_WITHOUT_MODELS_MS;
    await new Promise((resolve) => setTimeout(resolve, delay));
  }
}
keepRefreshing();

catalogue.addEventListener("list", () => {
  modelSelect.replaceChildren(...catalogue.models.map((model) => h("option", {}, catalogue.label(model))));
  showCurrent();
  modelSelect.parentElement.hidden = catalogue.models.length < 2;
});
catalogue.addEventListener("change", showCurrent);
modelSelect.addEventListener("change", () => catalogue.select(catalogue.models[modelSelect.selectedIndex]));
function showCurrent() {
  const { current } = catalogue;
  modelSelect.selectedIndex = catalogue.models.indexOf(current);
  const areOffered = !current || isGenerator(current);
  for (const name of GENERATING_VIEWS) document.querySelector(`.tabs a[href="#${name}"]`).hidden = !areOffered;
  if (!areOffered && GENERATING_VIEWS.includes(location.hash.slice(1))) location.replace("#score");
}

document.getElementById("key").addEventListener("click", async () => {
  try {
    const { openKeyDialog } = await import("./key.js");
    if (!document.querySelector("dialog")) openKeyDialog(refresh);
  } catch (error) {
    console.error(error);
    notice.replaceChildren(failure(new Refusal("The dialog could not be loaded."), () => location.reload()));
  }
});

// -- images that are dropped or pasted anywhere

/** Pass files to the current view, or to Score if it takes none. */
function takeFiles(files) {
  unreadableFiles.replaceChildren();
  if (!files.length) return;
  const current = Object.keys(views).find((name) => !views[name].host.hidden);
  const name = views[current]?.take ? current : "score";
  if (name !== current) location.hash = name;
  views[name].take([...files]);
}
const unreadableFiles = h("div");
notice.after(unreadableFiles);
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  const { files, unreadable } = await droppedFiles(event.dataTransfer);
  takeFiles(files);
  if (unreadable.length) {
    const dismiss = button("Dismiss", () => replace(unreadableFiles), "small");
    const reason = { message: `${listed(unreadable)} could not be read.`, calm: files.length > 0 };
    unreadableFiles.replaceChildren(failure(reason, undefined, dismiss));
  }
});
addEventListener("paste", (event) => takeFiles(event.clipboardData.files));
