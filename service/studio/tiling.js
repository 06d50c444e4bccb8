// How the service splits large images into tiles.

import { resultFile } from "./api.js";
import { roundHalfEven } from "./image.js";

const MAX_TILES = 1024; // of an image; a core scores about 16 a second

/** How the service splits an image: the `size` of a tile, the number `n` of tiles, and the `side` to request, if any. */
export function tiling(model, width, height) {
  const { overlap } = model.tiles ?? { overlap: 0.5 };
  const maxStep = (tile) => Math.ceil(tile * (1 - overlap) - 1e-9);
  const countAlong = (length, tile) => (length < tile ? 0 : Math.ceil((length - tile) / maxStep(tile)) + 1);
  const count = (size) => countAlong(width, size[0]) * countAlong(height, size[1]);
  if (model.tiles) {
    const size = [model.tiles.width, model.tiles.height];
    return { size, n: count(size) };
  }
  const smallest = Math.min(model.width, model.height);
  for (let side = smallest; ; side += 1) {
    const size = [model.width, model.height].map((length) => roundHalfEven((side * length) / smallest));
    const n = count(size);
    if (n <= MAX_TILES) return { size, n, side };
  }
}

/** The address of the map that the service drew for a job. */
export const tileMapUrl = async (id) => URL.createObjectURL(await resultFile(id, "image/png"));
