/** The server's side of the conversation: requests with the API key, and server-sent events. */

let key = ""; // lives as long as the page and goes nowhere but into the Authorization header

export function setKey(value) {
  key = value.trim();
}

/** An answer that is not a success, with what the server says of it. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** fetch() with the key; raises ServerError for every status but success. Addresses are relative to the page. */
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (!response.ok) throw new ServerError(response.status, await complaint(response));
  return response;
}

async function complaint(response) {
  const text = await response.text();
  let said;
  try {
    said = JSON.parse(text).error?.message;
  } catch {
    said = undefined;
  }
  const retry = response.headers.get("Retry-After");
  return `${said ?? `the server answered ${response.status}`}${retry ? ` (try again in ${retry} s)` : ""}`;
}

/** The JSON objects of a server-sent event stream, up to `data: [DONE]`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer ended before it was complete");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
