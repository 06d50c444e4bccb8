// The HTTP API: sends requests with the API key, and reports refusals as sentences. Paths are relative to the page.

import { apiKey } from "./session.js";

const REMEDIES = {
  400: "Choose another file; if it happens again, reload the page.",
  401: "Enter an API key of this service.",
  403: "Ask the operator of the service for a key with this permission.",
  404: "Submit it again.",
  410: "",
  413: "Use a smaller image, or send fewer at once.",
  415: "Save it as PNG or JPEG and try again.",
  422: "",
  429: "The service is busy or you have reached your limit: wait a moment, then try again.",
  500: "Try again; if it happens again, report the request ID to the operator of the service.",
  503: "Wait a few seconds and try again; if it happens again, check the Models view or ask the operator.",
  504: "Request fewer images or fewer steps, or try again when fewer jobs are waiting.",
};

/** A request that failed: `message` is the reason, `remedy` what to do about it, `fields` names the invalid fields. */
export class Refusal extends Error {
  constructor(message, { status = 0, remedy, requestId = "", retryAfter = 0, calm = false, fields = [] } = {}) {
    super(message);
    Object.assign(this, { status, calm, fields });
    this.remedy = remedy ?? REMEDIES[status] ?? "Try again.";
    if (status >= 500 && requestId) this.remedy += ` Request ID: ${requestId}.`;
    else if (retryAfter > 1) this.remedy += ` Retry after ${retryAfter} s.`;
  }
}

/** Fetch a path with the API key; throws a `Refusal` unless the response is a success. */
export async function request(path, { headers = {}, ...options } = {}) {
  const key = apiKey.get();
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...authorization, ...headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const remedy = "Check that it is running and that you are connected, then try again.";
    throw new Refusal("The service cannot be reached.", { remedy });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const isJson = response.headers.get("content-type")?.includes("json");
  const problem = isJson ? await response.json() : {};
  const { detail = `The service responded with ${response.status} ${response.statusText}.`, errors = [] } = problem;
  return new Refusal(detail, {
    status: response.status,
    requestId: response.headers.get("x-request-id"),
    retryAfter: Number(response.headers.get("retry-after")) || 0,
    fields: errors.map(({ field }) => field),
  });
}

export async function requestJson(path, options) {
  const response = await request(path, { ...options, headers: { Accept: "application/json", ...options?.headers } });
  return response.json();
}

/** Submit a job; returns its document. `body` is a FormData, or an object for JSON. */
export function submit(path, body) {
  const isForm = body instanceof FormData;
  return requestJson(path, {
    method: "POST",
    headers: { Prefer: "respond-async", ...(isForm ? {} : { "Content-Type": "application/json" }) },
    body: isForm ? body : JSON.stringify(body),
  });
}

export const cancel = (id) => requestJson(`jobs/${id}/cancel`, { method: "POST" });

export const result = (id) => requestJson(`jobs/${id}/result`);

/** The result of a job as a file of a media type. */
export async function resultFile(id, type) {
  return (await request(`jobs/${id}/result`, { headers: { Accept: type } })).blob();
}
