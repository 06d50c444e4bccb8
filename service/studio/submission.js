// Images in requests that the service accepts, and the images that it refuses.

import { Refusal } from "./api.js";
import { catalogue } from "./catalogue.js";
import { mebibytes, plural } from "./dom.js";

const PART_BYTES = 2048; // of a form for each file besides its content

/** The bytes of a request with these files and a few parameters, at most. */
export const requestBytes = (files) => files.reduce((sum, { size }) => sum + size + PART_BYTES, PART_BYTES);

/** Throw a `Refusal` if an image, which is then alone in its group, does not fit into a request. */
export function checkSize(images) {
  const bytes = requestBytes(images.map(({ file }) => file));
  if (bytes <= catalogue.maxBytes) return;
  const message = `image has ${mebibytes(bytes)} MiB; at most ${mebibytes(catalogue.maxBytes)} MiB are accepted.`;
  throw new Refusal(message, { status: 413, remedy: "Use a smaller image.", fields: ["image"] });
}

/** Split images into groups that fit into a request each: at most `maxImages`, and by bytes. */
export function split(images, maxImages) {
  const groups = [];
  for (const image of images) {
    const group = [...(groups.at(-1) ?? []), image];
    const fits = group.length <= maxImages && requestBytes(group.map(({ file }) => file)) <= catalogue.maxBytes;
    if (fits && groups.length) groups.at(-1).push(image);
    else groups.push([image]);
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
  error.imageName = image.file.name ? image.name : "The pasted image";
  return image;
}

/** A refusal; one that asks for larger tiles belongs to the field of their size. */
export function inFieldOfTileSize(error) {
  if (!error.message.includes("set tile_size")) return error;
  error.message = error.message.replace("tile_size", "the tile size");
  error.fields = ["tile_size"];
  return error;
}

/** One refusal for several: each reason once, with the names of the images that it applies to. */
export function joined(refusals, submitted) {
  const reasons = Map.groupBy(refusals, ({ message }) => message.replace(IMAGE_FIELD, "image"));
  const message = [...reasons.values()].map(reasonText).join(" ");
  const others = `${plural(submitted, "other image")} submitted.`;
  const [{ status, remedy = "", fields }] = refusals;
  const calm = refusals.every((refusal) => refusal.calm);
  return new Refusal(message, { status, fields, calm, remedy: submitted ? `${remedy} ${others}`.trim() : remedy });
}

const IMAGE_FIELD = /\bimage\[\d+\]|^image(?= )/g;

function reasonText(refusals) {
  const [{ message, imageName }, ...others] = refusals;
  const text = message.replace(IMAGE_FIELD, (field) => imageName ?? field);
  const names = others.flatMap((refusal) => refusal.imageName ?? []);
  return names.length ? `${text} The same applies to ${names.join(", ")}.` : text;
}
