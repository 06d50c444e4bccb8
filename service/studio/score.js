// Score: from files to exact likelihoods, verdicts and maps.

import { Refusal, address, cancel, curl, follow, json, quoted, result, submit } from "./api.js";
import { catalogue, jobs, reference } from "./catalogue.js";
import { axis, histogram } from "./chart.js";
import { cards, grey } from "./controls.js";
import { cropped, enlarged, exact, fit, heatmap, open, toBlob } from "./picture.js";
import { cut, mapOf, overlay } from "./tiles.js";
import { announce, button, chips, complain, dropzone, empty, fader, failure, h, pictures, plural, reveal, save, slider, stem, terminal, uid, why } from "./ui.js";

const MOST = 64;

export function mount(host) {
  let waiting = []; // files that were chosen and not sent: {file, seen, look}
  let readings = []; // pictures that were scored, newest first
  let chosen = null;

  const queue = h("ul", { class: "waiting" });
  const send = button("Score", score, "primary");
  const trouble = h("div");
  const running = h("div");
  const stage = h("div", { class: "stage" });
  const sum = h("p", { class: "hint" });
  const top = h("div", { class: "row" }, sum, button("Download scores (CSV)", () => save(new Blob([table(readings)], { type: "text/csv" }), "scores.csv"), "small"));
  const strip = h("ul", { class: "strip", "aria-label": "Scored pictures" });
  const reading = h("div");
  const classId = uid();
  const classes = h("select", { id: classId });
  const noise = slider({ label: "Noise level", about: "grey levels", min: 0, max: 10, step: 0.5, value: 0, words: grey, hint: "None: the exact likelihood of the picture." });
  const tiled = h("input", { type: "checkbox", onchange: () => { for (const one of waiting) one.look(); } });

  host.append(h("div", { class: "bench" },
    h("div", { class: "controls stack" },
      dropzone({ title: "Drop, paste or pick pictures", text: "PNG, JPEG, WebP, BMP, TIFF or GIF, of any size", multiple: true, onfiles: take }),
      cards(take, trouble), trouble, queue,
      h("label", { class: "check" }, tiled, "In tiles (large pictures)"),
      h("details", {}, h("summary", {}, "Score under conditions"),
        h("div", { class: "field" }, h("label", { for: classId }, "Class"), classes), noise.el,
        h("p", { class: "hint" }, "Not for tiles. The verdict always uses the conditions of the calibration.")),
      h("div", { class: "row send" }, send, button("Clear", () => { waiting = []; trouble.replaceChildren(); list(); }, "clear"))),
    stage));
  stage.append(running, top, strip, reading);

  catalogue.addEventListener("change", adopt);
  adopt();
  list();
  draw();
  for (const record of jobs.of("score")) watch(record);

  return { take };

  function adopt() {
    const model = catalogue.current;
    if (!model) return;
    classes.replaceChildren(h("option", { value: "" }, "none"), ...model.classes.map((name) => h("option", { value: name }, name)));
    noise.limit(model.noise);
    for (const one of waiting) one.look();
    draw();
  }

  /** Files from a drop, the clipboard, the dialog or another view. */
  function take(given) {
    const files = pictures(given, trouble);
    const room = MOST - waiting.length;
    if (files.length > room) complain(trouble, new Refusal(`${plural(files.length, "picture")} are more than fit.`, { remedy: `${MOST} can be scored at once; the first ${room} were taken.` }));
    for (const file of files.slice(0, room)) {
      const [faces, hint] = [h("span", { class: "look" }), h("span", { class: "hint" }, "reading")];
      const one = { file, seen: null, look: () => look(one, faces, hint) };
      one.el = h("li", {}, faces, h("span", { class: "words" }, h("span", { class: "name", title: file.name }, file.name || "pasted picture"), hint),
        h("button", { type: "button", class: "quiet out", "aria-label": `Leave out ${file.name}`, onclick: () => { waiting = waiting.filter((other) => other !== one); list(); } }, "×"));
      waiting.push(one);
      one.look();
    }
    list();
    if (files.length) announce(`${plural(waiting.length, "picture")} ready to be scored`);
  }

  /** The crop and what the model will see of it; a file that the browser cannot open may still be one for the service. */
  async function look(one, faces, hint) {
    const model = catalogue.current;
    if (!model) return;
    try {
      const bitmap = await open(one.file);
      const { width, height } = bitmap;
      one.seen = fit(bitmap, model.width, model.height);
      one.cut = cut(model, width, height);
      if (tiled.checked) faces.replaceChildren(cropped(bitmap, width, height));
      else faces.replaceChildren(cropped(bitmap, model.width, model.height), h("span", { "aria-hidden": "true" }, "→"), exact(one.seen, "What the model sees: the centre of the picture at the model’s size"));
      hint.textContent = !tiled.checked ? `${width} × ${height} pixels` : one.cut.n ? `${plural(one.cut.n, "tile")} of ${one.cut.size.join(" × ")} pixels` : "smaller than a tile";
    } catch {
      one.seen = null;
      faces.replaceChildren();
      hint.textContent = "This browser cannot show this file; the service may be able to read it.";
    }
  }

  function list() {
    queue.replaceChildren(...waiting.map((one) => one.el));
    queue.hidden = !waiting.length;
    send.disabled = !waiting.length;
    send.textContent = waiting.length ? `Score ${plural(waiting.length, "picture")}` : "Score";
    send.nextSibling.hidden = !waiting.length;
  }

  /** Send what waits: at once, or picture by picture in tiles. What is refused of several stays; the rest goes without it. */
  async function score() {
    send.disabled = true;
    trouble.replaceChildren();
    const refused = [];
    let others = 0;
    try {
      for (let group of tiled.checked ? waiting.map((one) => [one]) : [waiting]) {
        while (group.length) {
          try {
            await order(group);
            others += group.length;
            break;
          } catch (error) {
            const bad = blame(error, group);
            refused.push(error);
            group = group.filter((one) => one !== bad);
          }
        }
      }
    } catch (error) {
      refused.push(error);
    }
    if (refused.length) {
      const [first] = refused;
      first.message = refused.map(({ message }) => message).join(" ");
      if (others) first.remedy = `The other ${others > 1 ? `${others} pictures are` : "picture is"} scored. ${first.remedy}`;
      complain(trouble, first);
    }
    list();
  }

  /** Send pictures as one job: several, or one that is cut into tiles. */
  async function order(sent) {
    const model = catalogue.need();
    const conditions = tiled.checked ? { tile: 1, tile_size: sent[0].cut?.side } : { class: classes.value || undefined, noise: noise.value || undefined };
    const form = new FormData();
    for (const { file } of sent) form.append("image", file, file.name || "picture.png");
    for (const [name, value] of Object.entries({ map: 1, model: reference(model), ...conditions })) if (value) form.set(name, value);
    const job = await submit("score", form);
    waiting = waiting.filter((one) => !sent.includes(one));
    const record = { id: job.id, view: "score", model: model.name, conditions, pictures: sent.map(({ file, seen }) => ({ name: file.name || "pasted picture", seen: seen && exact(seen, "").toDataURL() })) };
    jobs.add(record);
    watch(record, sent.map(({ file }) => file));
    reveal(stage);
  }

  /** Mark and return the picture that was refused, and call it by its name; where none in particular was, throw on. */
  function blame(error, sent) {
    const found = /^image(?:\[(\d+)\])?$/.exec(error.fields?.[0]);
    const bad = found && (found[1] ? sent[found[1]] : sent.length === 1 && sent[0]);
    if (!bad) throw error;
    bad.el.classList.add("bad");
    error.message = error.message.replace(/\bimage\[\d+\]|^image(?= )/g, () => bad.file.name || "The pasted picture");
    return bad;
  }

  /** Follow a scoring to its readings; `files` are at hand unless the page was loaded again. */
  async function watch(record, files = []) {
    const words = h("p", { class: "grow" }, `Scoring ${plural(record.pictures.length, "picture")}: waiting in the queue`);
    const stop = button("Cancel", async () => {
      stop.disabled = true;
      await cancel(record.id).catch((error) => words.replaceChildren(error.message));
    }, "small");
    const bar = h("progress", { "aria-label": "Progress" });
    const note = h("div", { class: "run row", "data-job": record.id }, words, bar, stop);
    running.append(note);
    draw();
    try {
      const end = await follow(record.id, ({ status, progress }) => {
        if (status === "running") words.textContent = record.conditions.tile ? `Scoring ${record.pictures[0].name}: cutting it into tiles` : `Scoring ${plural(record.pictures.length, "picture")}`;
        if (progress?.stage === "tiles") {
          words.textContent = `Scoring ${record.pictures[0].name}: ${progress.step} of ${plural(progress.total, "tile")}`;
          bar.value = progress.step / progress.total;
        }
      });
      if (end.status === "canceled") {
        jobs.remove(record.id);
        announce("Canceled");
        note.remove();
      } else if (end.status !== "succeeded") throw new Error(end.error?.detail ?? `The job ${end.status}.`);
      else {
        const answer = await result(record.id);
        const map = answer.box && (await mapOf(record.id));
        const found = (answer.results ?? [judged(answer)]).map((score, i) => ({ ...record.pictures[i], id: `${record.id}/${i}`, score, scan: answer.box && answer, map, file: files[i], model: answer.model, conditions: record.conditions }));
        readings = [...found, ...readings];
        note.remove();
        choose(found[0]);
        announce(`${plural(found.length, "picture")} scored: ${found[0].name}, ${number(found[0])} ${map ? "in the worst tile" : "bits per dimension"}`);
      }
    } catch (error) {
      jobs.remove(record.id);
      if (error.status === 404 && !files.length) note.remove(); // from before a reload, and past its time
      else note.replaceChildren(failure(error), button("Dismiss", () => { note.remove(); draw(); }, "small"));
    }
    draw();
  }

  function choose(one) {
    chosen = one;
    draw();
  }

  function press(one) {
    choose(one);
    strip.querySelector("[aria-pressed=true]").focus({ preventScroll: true }); // in place of the tile that was pressed
  }

  function draw() {
    top.hidden = !readings.length;
    sum.textContent = `${plural(readings.length, "picture")} scored`;
    strip.hidden = readings.length < 2;
    strip.replaceChildren(...readings.map((one) => {
      const { kind, title } = verdict(one);
      return h("li", {}, h("button", { type: "button", class: `tile ${kind}`, title: `${one.name}: ${title.toLowerCase()}`, "aria-pressed": String(one === chosen), onclick: () => press(one) },
        one.seen ? h("img", { src: one.seen, alt: "", class: "pixels" }) : h("span", { class: "blank" }),
        h("span", { class: "row" }, h("span", { class: "mono" }, number(one)), h("span", { "aria-hidden": "true" }, { in: "✓", out: "✕" }[kind])),
        h("span", { class: "name" }, one.name), h("span", { class: "unseen" }, title)));
    }));
    if (chosen) reading.replaceChildren(show(chosen, readings));
    else if (!running.children.length) {
      reading.replaceChildren(empty("Nothing scored yet", "Choose pictures, look at the crop that the model will see, and score them. A flat grey and pure noise show the two ends of the scale."));
    } else reading.replaceChildren();
  }
}

/** The score of a picture that was cut into tiles: a verdict alone. */
const judged = ({ score, p_value, threshold, is_ood }) => ({ score, ood: p_value === null ? null : { p_value, threshold, is_ood } });

/** A reading's first number. */
const number = ({ score, scan }) => (scan ? score.score : score.bpd).toFixed(2);

/** The served model's calibration that a picture was ranked by, as long as it is still the same. */
function calibration({ score: { ood }, scan, model }) {
  const served = catalogue.models.find(({ name, version }) => name === model.name && version === model.version);
  return (ood && served?.[scan ? "tiles" : "calibration"]) || null;
}

/** What a score means, in words. */
function verdict(one) {
  const { ood } = one.score;
  if (!ood && one.scan) return { kind: "unknown", title: "No verdict", text: "This model’s tiles are not calibrated (ncml calibrate --tile): the map tells where the picture is least usual, not whether it belongs." };
  if (!ood) return { kind: "unknown", title: "Not calibrated", text: "This model has no calibration, so there is no verdict: only bits per dimension, which alone do not tell whether a picture belongs." };
  const share = 100 * ood.p_value;
  const percent = `${share < 0.1 ? share.toFixed(2) : share < 10 ? share.toFixed(1) : share.toFixed(0)}\u00a0%`;
  const { n_rank: ranked, false_positive_rate: rate } = calibration(one) ?? {};
  const beyond = Math.round(ood.p_value * (ranked + 1)) - 1; // the picture itself counts, too, in p
  const how = !ranked ? `Of the held-out pictures ${percent} look at least as unusual`
    : beyond ? `${beyond.toLocaleString("en")} of the ${ranked.toLocaleString("en")} held-out pictures look at least as unusual`
      : `None of the ${ranked.toLocaleString("en")} held-out pictures looks as unusual`;
  return ood.is_ood
    ? { kind: "out", title: "Does not belong", text: `${how}.${rate ? ` A picture is flagged when fewer than ${(100 * rate).toFixed(0)}\u00a0% look as unusual.` : ""}` }
    : { kind: "in", title: "Belongs", text: `${how}: nothing out of the ordinary.` };
}

function show(one, all) {
  const { score, scan } = one;
  const { kind, title, text } = verdict(one);
  const served = catalogue.models.find((model) => model.name === one.model.name);
  const ranks = calibration(one);
  return h("article", { class: "reading" },
    h("header", {}, h("h2", {}, one.name), h("p", { class: "hint" }, [`${one.model.name} ${one.model.version.slice(0, 12)}`, one.conditions.class && `class ${one.conditions.class}`, one.conditions.noise && `at ${grey(one.conditions.noise)}`].filter(Boolean).join(" · "))),
    h("div", { class: "facts" },
      h("p", { class: "big" }, h("span", { class: "mono" }, number(one)), scan ? " worst tile" : [" bits/dim", why("bits/dim")]),
      h("p", { class: "hint" }, scan ? `${plural(scan.rows * scan.columns, "tile")} of ${scan.tile_width} × ${scan.tile_height} pixels, each half over the next.` : `${score.log_likelihood.toLocaleString("en", { maximumFractionDigits: 0 }).replace("-", "−")} nats for the whole picture.`,
        !scan && served?.metrics.test_bpd && ` Test pictures of ${served.name} take ${served.metrics.test_bpd.toFixed(2)} bits/dim on average.`),
      h("div", { class: `verdict ${kind}` }, h("p", { class: "strong" }, title), h("p", {}, text), score.ood && h("p", { class: "mono" }, `p = ${score.ood.p_value.toPrecision(2)}`))),
    scan ? overlay(one) : map(one, all),
    h("div", { class: "facts" },
      !scan && [ranks && placed(one, ranks), flip(one)],
      line(one)));
}

/** The p-value, and bits/dim, each on its histogram of held-out pictures. */
function placed({ score }, { histograms, n_rank: ranked, smallest_p: smallest }) {
  const { statistic } = score.ood;
  const holder = h("div");
  const names = [statistic, "bpd"].filter((name, i, all) => histograms?.[name] && all.indexOf(name) === i);
  if (!names.length) return null;
  const tabs = chips({ legend: `Among ${ranked.toLocaleString("en")} held-out pictures`, options: names.map((name) => [name, name === "bpd" ? "bits/dim" : name]), value: names[0], kind: "chips small", onchange: draw });
  function draw(name) {
    const own = name === statistic;
    const value = own ? score.ood.score : score.bpd;
    const words = own ? `${name}: this picture at ${value.toPrecision(3)}, threshold ${score.ood.threshold.toPrecision(3)}, p = ${score.ood.p_value.toPrecision(2)}` : `Bits per dimension: this picture at ${value.toFixed(2)}`;
    holder.replaceChildren(histogram(histograms[name], { axis: axis(name), value, threshold: own ? score.ood.threshold : undefined, words, tail: own }),
      h("p", { class: "hint" }, own ? `${value > histograms[name].edges.at(-1) ? "" : "Shaded: as unusual or more. "}p can be ${smallest.toPrecision(1)} at the least with so many pictures.` : "Likelihood alone: simple pictures lie far to the left and need not belong."));
  }
  draw(names[0]);
  if (names[0] === "multiscale") tabs.el.append(...why("multiscale"));
  return h("div", { class: "placed" }, tabs.el, holder);
}

let oneScale = false; // for the maps of all pictures, so that they can be compared

/** The picture with its map on it; the slider fades one into the other. */
function map(one, all) {
  const { seen, score, name } = one;
  const holder = h("div", { class: "over" });
  if (seen) holder.append(h("img", { src: seen, alt: `What the model saw of ${name}`, class: "pixels" }));
  if (!score.map) return holder;
  const mapped = all.filter((other) => other.score.map);
  const [least, most] = span([one], 0);
  const layer = exact(heatmap(score.map, least, most), `Bits per dimension of each pixel, from ${least.toFixed(1)} to ${most.toFixed(1)}`);
  holder.append(layer);
  const value = h("output", { class: "mono" }, " ");
  holder.addEventListener("pointermove", (event) => {
    const box = layer.getBoundingClientRect();
    const [i, j] = [Math.floor(((event.clientX - box.left) / box.width) * layer.width), Math.floor(((event.clientY - box.top) / box.height) * layer.height)];
    const bits = score.map[j]?.[i];
    if (bits !== undefined) value.textContent = `row ${j + 1}, column ${i + 1}: ${bits.toFixed(2)} bits/dim`;
  });
  const scale = exact(heatmap([Array.from({ length: 64 }, (_, i) => i)], 0, 63), "The colours from low to high");
  const ends = [h("span", { class: "mono" }), h("span", { class: "mono" })];
  const paint = () => {
    const [low, high] = span(oneScale ? mapped : [one]);
    const from = Math.min(0, low);
    layer.getContext("2d").putImageData(heatmap(score.map, from, high), 0, 0);
    [from, high].forEach((end, i) => (ends[i].textContent = end.toFixed(1)));
  };
  paint();
  return h("div", { class: "stack map" }, holder, fader(layer, seen).el, h("div", { class: "scale" }, ends[0], scale, ends[1]),
    mapped.length > 1 && h("label", { class: "check" }, h("input", { type: "checkbox", checked: oneScale, onchange: ({ target }) => { oneScale = target.checked; paint(); } }), "One colour scale for all pictures"),
    h("p", { class: "hint" }, "Bits per dimension of each pixel, given those before it: bright pixels surprised. ", value),
    h("div", {}, button("Download map", async () => save(await toBlob(enlarged(layer)), `${stem(name)}-map.png`), "small")));
}

/** From where to where the bits of maps go, but for a part of the pixels at each end. */
function span(readings, part = 0.02) {
  const flat = readings.flatMap(({ score }) => score.map.flat()).sort((a, b) => a - b);
  return [part, 1 - part].map((at) => flat[Math.round(at * (flat.length - 1))]);
}

const COLUMNS = ["picture", "bits_per_dim", "nats", "score", "threshold", "p_value", "belongs", "tile_left", "tile_top", "tile_width", "tile_height", "class", "noise", "model", "version"];

/** What stands on the page, for a spreadsheet. */
function table(readings) {
  const rows = readings.map(({ name, score: { bpd, log_likelihood: nats, score: worst, ood }, scan, model, conditions }) => {
    const { score = worst, threshold, p_value: p, is_ood: out } = ood ?? {};
    const { left, top, width, height } = scan?.box ?? {};
    return [name, bpd, nats, score, threshold, p, ood && (out ? "no" : "yes"), left, top, width, height, conditions.class, scan ? "" : (conditions.noise ?? 0), model.name, model.version];
  });
  return [COLUMNS, ...rows].map((row) => `${row.map((cell) => (/[",\r\n]/.test(cell ?? "") ? `"${cell.replaceAll('"', '""')}"` : (cell ?? ""))).join()}\r\n`).join("");
}

/** The paper's sanity test: every least significant bit flipped. */
function flip({ file, score, model, name }) {
  const holder = h("div", { class: "flip" });
  const ask = h("div", { class: "row" }, h("p", { class: "hint grow" }, "Flip every least significant bit: invisible to an eye, and told by a likelihood that is exact."),
    button("Flip the last bits", test, "small"));
  if (file) holder.append(ask);
  else holder.append(h("p", { class: "hint" }, "To flip its last bits, choose the picture again: a page that was loaded anew no longer has the file."));
  return holder;

  async function test() {
    holder.replaceChildren(h("p", { class: "hint" }, "Scoring the flipped picture"), h("progress", { "aria-label": "Progress" }));
    try {
      const form = new FormData();
      form.append("image", file, name);
      form.set("sanity", "1");
      form.set("model", `${model.name}@${model.version.slice(0, 12)}`);
      const job = await submit("score", form);
      const end = await follow(job.id, () => {});
      if (end.status !== "succeeded") throw new Error(end.error?.detail ?? `The job ${end.status}.`);
      const [{ bpd, sanity }] = (await json(`jobs/${job.id}/result`)).results;
      const change = sanity.flipped_bpd - bpd;
      holder.replaceChildren(h("p", { class: "strong" }, "Last bits flipped"),
        h("p", { class: "mono" }, `${bpd.toFixed(3)} → ${sanity.flipped_bpd.toFixed(3)} bits/dim (${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(3)})`),
        h("p", { class: "hint" }, change > 0.0005 ? "The flipped picture is less likely: the model knows even its last bits." : change < -0.0005 ? "The flipped picture is likelier, which happens where last bits carry no structure." : "No difference: the last bits of this picture carry nothing that the model knows."));
      announce(`Flipped: ${sanity.flipped_bpd.toFixed(3)} bits per dimension instead of ${bpd.toFixed(3)}`);
    } catch (error) {
      holder.replaceChildren(failure(error, test));
    }
  }
}

function line({ name, model, conditions }) {
  const words = new URLSearchParams({ model: `${model.name}@${model.version.slice(0, 12)}`, map: "1" });
  for (const [key, value] of Object.entries(conditions)) if (value) words.set(key, value);
  const text = curl("-F", quoted(`image=@${name}`), quoted(`${address()}/score?${String(words).replaceAll("%40", "@").replaceAll("+", "%20")}`));
  return h("details", {}, h("summary", {}, "From a terminal"), terminal(text));
}
