// The HTTP API: sends requests with the API key, and reports refusals as sentences. Paths are relative to the page.

import { apiKey } from "./session.js";

const REMEDIES = {
  400: "Choose another file; if it happens again, reload the page.",
  401: "Enter an API key of this service.",
  403: "",
  404: "",
  410: "",
  413: "Use a smaller image, or send fewer at once.",
  415: "Save it as PNG or JPEG and try again.",
  422: "",
  429: "Wait a moment, then try again.",
  500: "Try again; if it happens again, report the request ID to the operator of the service.",
  503: "Wait a few seconds and try again; if it happens again, check the Models view or ask the operator.",
  504: "Request fewer images or fewer steps, or try again when fewer jobs are waiting.",
};

const PRIORITY_REMEDY = "Ask the operator of the service for a key with this permission.";

/** A request that failed: `message` is the reason, `remedy` what to do about it, `fields` names the invalid fields. */
export class Refusal extends Error {
  constructor(message, { status = 0, remedy, requestId = "", retryAfter = 0, calm = false, fields = [] } = {}) {
    super(status === 401 ? message.replace(/;.*/, ".") : message);
    Object.assign(this, { status, calm, fields });
    this.remedy = remedy ?? REMEDIES[status] ?? "Try again.";
    if (status >= 500 && requestId) this.remedy += ` Request ID: ${requestId}.`;
    if (status === 429 && /retry in \d|retry later|delete some/.test(message)) this.remedy = "";
    else if (status === 429 && retryAfter > 1) this.remedy = `Try again in ${retryAfter} s.`;
    else if (status === 503 && retryAfter > 1) this.remedy += ` Retry after ${retryAfter} s.`;
  }
}

const TIMEOUT_MS = 10_000;

/**
 * Fetch a path with the API key; throws a `Refusal` unless the response is a success. `isQuick` is whether the whole
 * response must arrive within a few seconds; `signal` aborts the request.
 */
export async function request(path, { headers = {}, isQuick = true, signal, ...options } = {}) {
  if (options.body instanceof FormData) await checkFiles(options.body.getAll("image"));
  const key = apiKey.get();
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  const signals = [signal, isQuick && AbortSignal.timeout(TIMEOUT_MS)].filter(Boolean);
  const response = await reaching(
    fetch(path, { ...options, signal: AbortSignal.any(signals), headers: { ...authorization, ...headers } }),
  );
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Await a request or the body of a response; throws a `Refusal` if it fails, takes too long or is aborted. */
async function reaching(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw new Refusal("The request was canceled.", { remedy: "", calm: true });
    const remedy = "Check that it is running and that you are connected, then try again.";
    const isSilent = error.name === "TimeoutError";
    throw new Refusal(`The service ${isSilent ? "does not respond" : "cannot be reached"}.`, { remedy });
  }
}

async function refusal(response) {
  const isJson = response.headers.get("content-type")?.includes("json");
  const problem = isJson ? await reaching(response.json()) : {};
  const { detail = `The service responded with ${response.status} ${response.statusText}.`, errors = [] } = problem;
  const isPriority = problem.type === "urn:ncml:problem:priority";
  return new Refusal(detail, {
    status: response.status,
    remedy: isPriority ? PRIORITY_REMEDY : undefined,
    requestId: response.headers.get("x-request-id"),
    retryAfter: Number(response.headers.get("retry-after")) || 0,
    fields: errors.map(({ field }) => field),
  });
}

export async function requestJson(path, options) {
  const response = await request(path, { ...options, headers: { Accept: "application/json", ...options?.headers } });
  return reaching(response.json());
}

export const requestText = async (path) => reaching((await request(path)).text());

export const requestBlob = async (path, options) => reaching((await request(path, options)).blob());

/** Submit a job; returns its document. `body` is a FormData, or an object for JSON; `signal` aborts it. */
export async function submit(path, body, signal) {
  const isForm = body instanceof FormData;
  return requestJson(path, {
    method: "POST",
    headers: { Prefer: "respond-async", ...(isForm ? {} : { "Content-Type": "application/json" }) },
    body: isForm ? body : JSON.stringify(body),
    isQuick: false,
    signal,
  });
}

/** Whether a file can be uploaded: it is not empty, and was not changed or deleted after its selection. */
export async function isReadable(file) {
  const start = await file
    .slice(0, 1)
    .arrayBuffer()
    .catch(() => null);
  return Boolean(start?.byteLength); // a part of a deleted file is empty
}

/** Throw a `Refusal` that names a file which cannot be uploaded. */
async function checkFiles(files) {
  for (const [i, file] of files.entries()) {
    if (await isReadable(file)) continue;
    const options = { remedy: "Select it again.", fields: [`image[${i}]`] };
    throw new Refusal(`${file.name} is empty, or has changed since it was selected.`, options);
  }
}

export const cancel = (id) => requestJson(`jobs/${id}/cancel`, { method: "POST" });

export const result = (id) => requestJson(`jobs/${id}/result`, { isQuick: false });

/** The result of a job as a file of a media type. */
export const resultFile = (id, type) => requestBlob(`jobs/${id}/result`, { headers: { Accept: type }, isQuick: false });
