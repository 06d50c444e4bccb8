// Images in requests that the service accepts, and the images that it refuses.

import { Refusal } from "./api.js";
import { catalogue } from "./catalogue.js";
import { plural } from "./dom.js";

const PART_BYTES = 2048; // of a form for each file besides its content

/** Split images into groups that fit into a request each: by number and by bytes, or one each if `isTiled`. */
export function split(images, isTiled) {
  const maxImages = isTiled ? 1 : catalogue.maxImages;
  const groups = [];
  let bytes = 0; // of the last group
  for (const image of images) {
    const size = image.file.size + PART_BYTES;
    bytes += size;
    if (groups.at(-1)?.length < maxImages && bytes < catalogue.maxBytes) groups.at(-1).push(image);
    else {
      groups.push([image]);
      bytes = size + PART_BYTES;
    }
  }
  return groups;
}

/** Mark and return the refused image, and put its name into the message; throws the error if it names no image. */
export function refusedImage(error, images) {
  const match = /^image(?:\[(\d+)\])?$/.exec(error.fields?.[0]);
  const onlyImage = images.length === 1 ? images[0] : undefined;
  const image = match && (match[1] ? images[match[1]] : onlyImage);
  if (!image) throw error;
  image.element.classList.add("bad");
  error.imageName = image.file.name || "The pasted image";
  return image;
}

/** One refusal for several: each reason once, with the names of the images that it applies to. */
export function joined(refusals, submitted) {
  const reasons = Map.groupBy(refusals, ({ message }) => message.replace(IMAGE_FIELD, "image"));
  const message = [...reasons.values()].map(reasonText).join(" ");
  const others = `${plural(submitted, "image")} ${submitted === 1 ? "was" : "were"} submitted.`;
  const [{ status, remedy = "", fields }] = refusals;
  const calm = refusals.every((refusal) => refusal.calm);
  return new Refusal(message, { status, fields, calm, remedy: submitted ? `${others} ${remedy}` : remedy });
}

const IMAGE_FIELD = /\bimage\[\d+\]|^image(?= )/g;

function reasonText(refusals) {
  const [{ message, imageName }, ...others] = refusals;
  const text = message.replace(IMAGE_FIELD, (field) => imageName ?? field);
  const names = others.flatMap((refusal) => refusal.imageName ?? []);
  return names.length ? `${text} The same applies to ${names.join(", ")}.` : text;
}
