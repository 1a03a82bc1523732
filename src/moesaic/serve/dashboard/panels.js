/** The panels of numbers: requests and rates, latency, step time, queue, memory, bytes moved. */

import { byId, make, makeSvg, setText } from "./dom.js";
import { bytes, count, percent, quantileText, rate, seconds, total } from "./format.js";
import { letter, lookOf } from "./looks.js";

/** Rows of a table body that is made once and afterwards only written to: rows = [[heading, ...cells], ...]. */
function fill(body, rows) {
  if (body.rows.length !== rows.length) {
    body.replaceChildren(
      ...rows.map((cells) => make("tr", {}, [make("th", { scope: "row" }), ...cells.slice(1).map(() => make("td"))])),
    );
  }
  for (const [i, cells] of rows.entries())
    for (const [k, text] of cells.entries()) setText(body.rows[i].cells[k], text);
}

/** A bar of shares [[name, value], ...] of `whole`, with the same swatches in the rows of `body`. */
function stack(bar, body, parts, whole, say) {
  const shown = whole > 0;
  if (bar.childElementCount !== parts.length) {
    bar.replaceChildren(...parts.map((_, i) => make("span", { className: `part part-${i}` })));
    body.replaceChildren(
      ...parts.map((_, i) =>
        make("tr", {}, [
          make("th", { scope: "row" }, [make("span", { className: `key part part-${i}` }), " ", make("span")]),
          make("td"),
          make("td"),
        ]),
      ),
    );
  }
  for (const [i, [name, value]] of parts.entries()) {
    const share = shown ? Math.max(0, value) / whole : 0;
    bar.children[i].style.width = `${100 * share}%`;
    setText(body.rows[i].cells[0].lastElementChild, name);
    setText(body.rows[i].cells[1], say(value));
    setText(body.rows[i].cells[2], shown ? percent(share) : "–");
  }
}

const SPARK = { width: 60, height: 20 };

/** A line of the last minute's values from 0 to the highest of them; the number beside it says the newest. */
function spark(line, values, most) {
  const top = most ?? Math.max(...values, 1e-9);
  const x = (i) => SPARK.width - (values.length - 1 - i) * (SPARK.width / 60);
  const y = (value) => SPARK.height - 1 - (value / top) * (SPARK.height - 2);
  line.setAttribute("points", values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" "));
}

/** One number with its name, a note and perhaps a line of its past. */
class Tile {
  constructor(list, name) {
    this.value = make("span", { className: "value" });
    this.note = make("span", { className: "quiet" });
    this.line = makeSvg("polyline", { points: "", "vector-effect": "non-scaling-stroke" });
    this.svg = makeSvg("svg", {
      viewBox: `0 0 ${SPARK.width} ${SPARK.height}`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
      class: "spark",
    });
    this.svg.append(this.line);
    list.append(
      make("div", { className: "tile" }, [
        make("dt", { textContent: name }),
        make("dd", {}, [this.value, this.svg, this.note]),
      ]),
    );
  }

  show(value, note, past, most) {
    setText(this.value, value);
    setText(this.note, note);
    this.svg.classList.toggle("absent", !past);
    if (past) spark(this.line, past, most);
  }
}

export class Panels {
  constructor() {
    const list = byId("tiles");
    this.tiles = Object.fromEntries(
      [
        "Running",
        "Waiting",
        "Ended",
        "Output tokens/s",
        "Prompt tokens/s",
        "Hit ratio",
        "Moved/s",
        "Steps/s",
        "Requests per step",
      ].map((name) => [name, new Tile(list, name)]),
    );
  }

  show(state, history) {
    this.#requests(state, history);
    this.#rates(state, history);
    fill(byId("latency"), latencyRows(state));
    stepTime(state);
    queue(state);
    memory(state);
    fill(byId("moved-rows"), movedRows(state));
  }

  #requests(state, history) {
    const ended = Object.values(state.finished).reduce((sum, n) => sum + n, 0);
    const reasons = Object.entries(state.finished).map(([reason, n]) => `${count(n)} ${reason}`);
    if (state.rejected) reasons.push(`${count(state.rejected)} refused`);
    const { running, waiting } = state;
    this.tiles.Running.show(count(running), "requests", history.remember("running", running));
    this.tiles.Waiting.show(count(waiting), "requests", history.remember("waiting", waiting));
    this.tiles.Ended.show(count(ended), reasons.join(", ") || "requests");
  }

  #rates(state, history) {
    const output = history.rate((s) => s.output_tokens);
    const prompt = history.rate((s) => s.prompt_tokens);
    const moved = history.rate((s) => s.demand_bytes + s.prefetch_bytes);
    const uses = history.growth((s) => s.uses);
    const recent = uses ? history.growth((s) => s.use_hits) / uses : undefined;
    const tiles = this.tiles;
    tiles["Output tokens/s"].show(
      rate(output),
      `${count(state.output_tokens)} in all`,
      history.remember("output", output),
    );
    tiles["Prompt tokens/s"].show(
      rate(prompt),
      `${count(state.prompt_tokens)} run, ${count(state.cached_tokens)} reused`,
      history.remember("prompt", prompt),
    );
    tiles["Hit ratio"].show(
      percent(state.hit_ratio),
      recent === undefined ? "no uses in the last 5 s" : `${percent(recent)} in the last 5 s`,
      history.remember("hits", recent ?? history.series.hits?.at(-1) ?? state.hit_ratio),
      1,
    );
    tiles["Moved/s"].show(bytes(moved), "expert bytes", history.remember("moved", moved));
    this.#steps(state, history);
  }

  #steps(state, history) {
    const steps = history.rate((s) => s.steps);
    const mean = (histogram) => (total(histogram) ? (histogram.sum / total(histogram)).toFixed(1) : "–");
    this.tiles["Steps/s"].show(rate(steps), `${count(state.steps)} in all`, history.remember("steps", steps));
    this.tiles["Requests per step"].show(mean(state.batch), `${mean(state.experts_per_step)} experts, on average`);
  }
}

function latencyRows(state) {
  const rows = [
    ["First token (TTFT)", state.ttft_s, "answers"],
    ["Each token after (TPOT)", state.tpot_s, "answers"],
    ["Wait before anything runs", state.wait_s, "requests"],
    ["Step", state.step_s, "steps"],
  ];
  return rows.map(([name, histogram, what]) => [
    name,
    quantileText(histogram, 0.5),
    quantileText(histogram, 0.95),
    `${count(total(histogram))} ${what}`,
  ]);
}

function stepTime(state) {
  const { busy_s, stall_s, overhead_s } = state;
  const parts = [
    ["Computing", Math.max(0, busy_s - stall_s - overhead_s)],
    ["Waiting for experts", stall_s],
    ["Batching and bookkeeping", overhead_s],
  ];
  stack(byId("step-bar"), byId("step-rows"), parts, busy_s, seconds);
}

function queue(state) {
  const names = state.expert_names ?? [];
  const queued = state.queued_tokens_by_expert;
  const body = byId("queue-rows");
  byId("queue").hidden = names.length === 0;
  byId("queue-none").hidden = names.length > 0;
  if (body.rows.length !== names.length || names.some((name, i) => body.rows[i].dataset.name !== name)) {
    body.replaceChildren(...names.map(queueRow));
  }
  const most = Math.max(1, ...queued);
  for (const [i, row] of [...body.rows].entries()) {
    const [bar, number] = row.cells[1].children;
    bar.style.width = `calc(${(queued[i] ?? 0) / most} * (100% - 4.5rem))`;
    bar.classList.toggle("absent", !queued[i]);
    setText(number, count(queued[i] ?? 0));
    setText(row.cells[2], count(state.tokens_by_expert[i] ?? 0));
  }
}

function queueRow(name, expert) {
  const row = make("tr", {}, [
    make("th", { scope: "row" }, [
      make("span", { className: `swatch ${lookOf(expert)}`, textContent: letter(expert) }),
      ` ${name}`,
    ]),
    make("td", {}, [make("span", { className: `bar ${lookOf(expert)}` }), make("span", { className: "number" })]),
    make("td"),
  ]);
  row.dataset.name = name;
  return row;
}

function memory({ memory: m }) {
  const parts = [
    ["Dense part of the model", m.dense],
    ["Buffers", m.buffers],
    ["Experts", m.experts],
    ["Keys and values", m.kv],
    ["Free", Math.max(0, m.budget - m.dense - m.buffers - m.experts - m.kv)],
  ];
  stack(byId("memory-bar"), byId("memory-rows"), parts, m.budget, bytes);
  const room = `Experts may take ${bytes(m.experts_capacity)}.`;
  const measured = `The process takes ${bytes(m.process)}, measured.`;
  setText(byId("memory-process"), `Budget ${bytes(m.budget)}. ${room} ${measured}`);
}

function movedRows(state) {
  return [
    ["Uses of an expert in a step", count(state.uses)],
    ["of them resident in time", count(state.use_hits)],
    ["Loads", count(state.loads)],
    ["Evictions", count(state.evictions)],
    ["Fetched on demand", bytes(state.demand_bytes)],
    ["Fetched ahead", bytes(state.prefetch_bytes)],
    ["of it evicted unused", bytes(state.wasted_bytes)],
  ];
}
