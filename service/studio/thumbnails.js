// Thumbnails of reviewed images, each loaded when it comes into view.

import { requestBlob } from "./api.js";
import { h } from "./dom.js";

const AHEAD = "200px"; // of the viewport, from where on thumbnails are loaded
const loaders = new WeakMap();

const observer = new IntersectionObserver(
  (entries) => {
    for (const { target } of entries.filter(({ isIntersecting }) => isIntersecting)) {
      observer.unobserve(target);
      loaders.get(target)();
    }
  },
  { rootMargin: AHEAD },
);

/** A frame for the image at a path; it stays empty if that cannot be loaded, and its `onFailure` is called. */
export function thumbnail(path, alt, onFailure) {
  const frame = h("span", { class: "thumbnail" });
  async function load() {
    try {
      const src = URL.createObjectURL(await requestBlob(path)); // an img cannot send the API key
      const done = () => URL.revokeObjectURL(src);
      frame.replaceChildren(h("img", { src, alt, onload: done, onerror: done }));
    } catch {
      onFailure();
    }
  }
  loaders.set(frame, load);
  observer.observe(frame);
  return frame;
}
