// Follows the state and the progress of a job, by its event stream or by polling.
// Events are read through fetch: EventSource cannot send an API key.

import { Refusal, request, requestJson } from "./api.js";

// A browser opens six connections to a host: streams must leave some for other requests.
const MAX_STREAMS = 3;
const MAX_FAILURES = 30;
const FINAL_STATES = new Set(["succeeded", "failed", "canceled", "expired"]);
let openStreams = 0;

/**
 * Follow a job: call `onEvent({status} | {progress} | {lost})` for each change; resolves to its final {status, error}.
 * `lost` is whether the connection is lost; it resumes after the last event received. If several streams are already
 * open, the job is polled instead.
 */
export async function follow(id, onEvent) {
  if (openStreams >= MAX_STREAMS) return retry(poller(id, onEvent), onEvent);
  openStreams += 1;
  try {
    return await retry(streamer(id, onEvent), onEvent);
  } finally {
    openStreams -= 1;
  }
}

/** Call `attempt(onAlive)` until it returns the final state, or fails permanently or too often. */
async function retry(attempt, onEvent) {
  let failures = 0;
  const onAlive = () => {
    if (failures) onEvent({ lost: false });
    failures = 0;
  };
  while (true) {
    try {
      const end = await attempt(onAlive);
      if (end) return end;
    } catch (error) {
      failures += 1;
      if (isPermanent(error) || failures > MAX_FAILURES) throw error;
      onEvent({ lost: true });
    }
    await pause(Math.min(500 * 2 ** failures, 5000));
  }
}

const isPermanent = (error) =>
  error instanceof Refusal && error.status !== 0 && error.status < 500 && error.status !== 429;

/** An attempt to follow the event stream of a job; it returns null if the stream ends early. */
function streamer(id, onEvent) {
  let lastId = "0";
  return async (onAlive) => {
    const response = await request(`jobs/${id}/events`, { headers: { "Last-Event-ID": lastId } });
    onAlive();
    if (response.status === 204) return requestJson(`jobs/${id}`); // the job has ended, and there are no more events
    for await (const event of messages(response.body)) {
      lastId = event.id || lastId;
      const data = JSON.parse(event.data);
      onEvent(event.name === "progress" ? { progress: data } : { status: event.name });
      if (FINAL_STATES.has(event.name)) return { status: event.name, error: data.error };
    }
    return null;
  };
}

/** An attempt to poll a job; it returns null until the job has ended. */
function poller(id, onEvent) {
  let lastStatus = "";
  return async (onAlive) => {
    const { status, error, progress } = await requestJson(`jobs/${id}`);
    onAlive();
    if (status !== lastStatus) onEvent({ status });
    lastStatus = status;
    if (FINAL_STATES.has(status)) return { status, error };
    if (progress) onEvent({ progress });
    return null;
  };
}

/** The messages of a text/event-stream. */
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value.replaceAll("\r", "");
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop(); // the incomplete one
    for (const block of blocks) {
      const event = parseMessage(block);
      if (event.data) yield event;
    }
  }
}

function parseMessage(block) {
  const event = { name: "message", id: "", data: "" };
  for (const line of block.split("\n")) {
    const [, field, text] = /^(\w*):? ?(.*)$/.exec(line) ?? [];
    if (field === "event") event.name = text;
    else if (field === "id") event.id = text;
    else if (field === "data") event.data += text;
  }
  return event;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
