// How the service splits large images into tiles.

import { roundHalfEven } from "./image.js";

/**
 * How the service splits an image: the `size` of a tile, the number `n` of tiles, and the `side` to request, if any: the
 * smallest that gives at most `maxTiles` tiles, unless a `side` is chosen.
 */
export function tiling(model, [width, height], maxTiles, side) {
  const { overlap } = model.tiles ?? { overlap: 0.5 };
  const maxStep = (tile) => Math.ceil(tile * (1 - overlap) - 1e-9);
  const countAlong = (length, tile) => (length < tile ? 0 : Math.ceil((length - tile) / maxStep(tile)) + 1);
  const count = (size) => countAlong(width, size[0]) * countAlong(height, size[1]);
  if (model.tiles) {
    const size = [model.tiles.width, model.tiles.height];
    return { size, n: count(size) };
  }
  const smallest = Math.min(model.width, model.height);
  for (let candidate = side ?? smallest; ; candidate += 1) {
    const size = [model.width, model.height].map((length) => roundHalfEven((candidate * length) / smallest));
    const n = count(size);
    if (side || n <= maxTiles) return { size, n, side: candidate };
  }
}
