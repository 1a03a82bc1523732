/** The dashboard: asks for the server's state once a second and hands it to the panels. */

import { byId, setText } from "./dom.js";
import { seconds } from "./format.js";
import { History } from "./history.js";
import { Panels } from "./panels.js";
import { Playground } from "./playground.js";
import { Residency } from "./residency.js";
import { ServerError, call, setKey } from "./stream.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000; // a state that takes longer counts as a lost server

const history = new History();
const playground = new Playground();
const panels = new Panels();
const residency = new Residency();
let lastSeen = null; // when the server last answered
let timer;

function health(state, text) {
  byId("health").dataset.state = state;
  setText(byId("health"), text);
}

/** An empty text takes the banner away. */
function banner(text) {
  byId("banner").hidden = !text;
  setText(byId("banner"), text);
  document.body.classList.toggle("stale", Boolean(text) && byId("health").dataset.state === "lost");
}

function show(state) {
  lastSeen = new Date();
  setText(byId("model"), state.model);
  document.title = `${state.model} – moesaic`;
  setText(byId("uptime"), `up ${seconds(state.uptime_s)}, context ${state.context} tokens`);
  playground.model = state.model;
  playground.show(state);
  history.add(state);
  panels.show(state, history);
  residency.show(state);
  if (state.ready) health("ready", "ready");
  else health("closed", "not ready");
  banner(state.ready ? "" : "The server takes no new prompts: it is starting, shutting down or has failed.");
}

function lost(error) {
  if (error instanceof ServerError && error.status === 401) {
    health("closed", "key needed");
    banner("The server wants an API key: enter it above.");
  } else if (error instanceof ServerError) {
    health("closed", `answers ${error.status}`);
    banner(`The server does not tell its state: ${error.message}`);
  } else {
    health("lost", "no connection");
    const since = lastSeen ? ` since ${lastSeen.toLocaleTimeString("en-GB")}; the numbers below are from then` : "";
    banner(`The server has not answered${since}. Trying again every second.`);
  }
}

async function poll() {
  try {
    const state = await ask();
    if (state) show(state);
  } finally {
    clearTimeout(timer);
    timer = setTimeout(poll, EVERY_MS);
  }
}

/** The server's state, undefined where there is none. */
async function ask() {
  try {
    const response = await call("v1/moesaic/state", { signal: AbortSignal.timeout(PATIENCE_MS) });
    return await response.json();
  } catch (error) {
    lost(error);
    return undefined;
  }
}

byId("key-form").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", (event) => {
  setKey(event.target.value);
  poll();
});
poll();
