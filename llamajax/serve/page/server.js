// The server's API: what the server is doing, which model it has, and an answer while it is written.
// Paths are relative to the page, so that the server can be mounted under any prefix.

export class ServerError extends Error {
  /** status: HTTP's, or 0 if there was no response. */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server does not answer. Is llamajax serve still running?");
  });
  if (!response.ok) throw new ServerError(response.status, await refusal(response));
  return response;
}

/** Why a request was refused, in one or two sentences. */
async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const said = body.error?.message ?? body.message ?? body.status ?? response.statusText;
  const wait = response.headers.get("Retry-After");
  switch (response.status) {
    case 401:
      return "The server asks for an API key: enter it in the settings.";
    case 429:
      return `The server is busy: ${said}.` + (wait ? ` Try again in ${wait} s.` : " Try again soon.");
    case 503:
      return `The server cannot answer now: ${said}.`;
    default:
      return body.error ? `The server refused the request: ${said}` : `The server failed (${response.status}): ${said}`;
  }
}

/** The one model: its `id`, and `max_model_len`, its context in tokens. */
export async function fetchModel(key) {
  const { data } = await (await request("v1/models", key)).json();
  return data[0];
}

/** `""` if the model is ready, or what the server is doing until then. Throws a ServerError if it does not answer. */
export async function fetchProgress() {
  const response = await fetch("health", { cache: "no-store" }).catch(() => {
    throw new ServerError(0, "The server does not answer. Waiting for it …");
  });
  if (response.ok) return "";
  const body = await response.json().catch(() => ({}));
  return body.message ?? body.error?.message ?? body.status ?? "loading the model";
}

/** An answer's chunks, as OpenAI streams them. Throws a ServerError if the answer is refused or breaks off. */
export async function* streamAnswer(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    body: JSON.stringify(streamed),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, `The answer broke off: ${chunk.error.message}`);
    yield chunk;
  }
  throw new ServerError(0, "The connection ended before the answer did.");
}

/** The data of server-sent events; comments are left out. */
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) return;
    const blocks = (unread + value).split(/\r?\n\r?\n/);
    unread = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
