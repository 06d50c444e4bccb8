// Large pictures in tiles: how many there are, and their map over the whole picture.

import { ask } from "./api.js";
import { halfEven } from "./picture.js";
import { fader, h, stem } from "./ui.js";

const MOST = 1024; // tiles of a picture, of which a core does some twenty-five a second

/** How the service cuts a picture: [width, height] of a tile, how many, and the `side` to ask for if there is a choice. */
export function cut(model, width, height) {
  const least = Math.min(model.width, model.height);
  const along = (length, tile) => (length < tile ? 0 : Math.ceil((length - tile) / Math.max(1, tile >> 1)) + 1);
  const all = (w, h, side) => ({ size: [w, h], n: along(width, w) * along(height, h), side });
  if (model.tiles) return all(model.tiles.width, model.tiles.height);
  for (let side = least; ; side += 1) {
    const found = all(...[model.width, model.height].map((length) => halfEven((side * length) / least)), side);
    if (found.n <= MOST) return found;
  }
}

/** Where the map of a scan is, as the service drew it. */
export const mapOf = async (id) => URL.createObjectURL(await (await ask(`jobs/${id}/result`, { headers: { Accept: "image/png" } })).blob());

/** The picture, where its file is at hand, under its map and a frame around the worst tile. */
export function overlay(one) {
  const { file, map, name, scan: { box, width, height, threshold } } = one;
  const layer = h("img", { src: map, width, height, alt: `Map of the scores of ${name}’s tiles` });
  const frame = h("span", { class: "box" });
  const parts = { left: box.left / width, top: box.top / height, width: box.width / width, height: box.height / height };
  for (const [side, part] of Object.entries(parts)) frame.style[side] = `${100 * part}%`;
  const holder = h("div", { class: "over whole" }, layer, frame);
  const fade = fader(layer, file);
  if (file) {
    const picture = h("img", { src: (one.address ??= URL.createObjectURL(file)), width, height, alt: name, onerror: () => { picture.remove(); fade.alone(); } });
    holder.prepend(picture);
  }
  return h("div", { class: "stack map" }, holder, fade.el,
    h("p", { class: "hint" }, `Framed: the worst tile, ${box.left} pixels from the left and ${box.top} from the top. `,
      threshold ? `A picture with a tile above ${threshold.toPrecision(3)} counts as foreign; the map is brightest there.` : "The map is bright where tiles are least usual."),
    h("div", {}, h("a", { class: "button small", href: map, download: `${stem(name)}-map.png` }, "Download map")));
}
