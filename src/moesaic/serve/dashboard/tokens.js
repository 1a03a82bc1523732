/** Text as a list of tokens, each with the look of its expert, which pointing at it or focusing it tells. */

import { make, roam, setText } from "./dom.js";
import { letter, lookOf, titleOf } from "./looks.js";

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

export class Tokens {
  /** `box` holds the tokens; `detail` says what is known of the one in question; `names` are those of the experts. */
  constructor(box, detail, names) {
    this.box = box;
    this.detail = detail;
    this.names = names;
    this.clear();
    box.addEventListener("focusin", (event) => this.#tell(event.target));
    box.addEventListener("mouseover", (event) => this.#tell(event.target));
    roam(box, ".token", (item, key) => this.#neighbour(item, key));
  }

  clear() {
    this.box.replaceChildren();
    this.known = new Map(); // element -> what its line says
    this.counts = new Map(); // expert -> tokens
    this.size = 0;
    this.held = []; // experts of tokens whose text has not come
    this.last = undefined; // expert of the token before
  }

  /** The text of the tokens that `experts` ran: ids, null for a token that none has. Without text they wait for it:
   * the server holds back half characters and what may become a stop string. */
  add(text, experts) {
    this.held.push(...experts);
    if (!text) return;
    const ids = this.held.filter(Number.isInteger);
    const first = this.size + 1;
    this.size += Math.max(1, this.held.length);
    this.held = [];
    for (const id of ids) this.counts.set(id, (this.counts.get(id) ?? 0) + 1);
    this.#append(text, ids, first);
  }

  #append(text, ids, first) {
    const who = this.#who(ids);
    const start = ids[0] !== this.last ? " first" : "";
    const token = make(
      "span",
      { className: `token ${lookOf(ids[0])}${start}`, tabIndex: this.box.childElementCount ? -1 : 0 },
      visible(text),
      { role: "option", "aria-selected": "false", "aria-label": `${spoken(text)}, ${who}` },
    );
    token.dataset.letter = ids.length ? letter(ids[0]) : "–";
    token.dataset.experts = ids.join(" ");
    this.last = ids[0];
    this.known.set(token, `Token ${first} ${quoted(text)}: ${who}`);
    this.box.append(token);
  }

  #who(ids) {
    if (ids.length) return `expert ${[...new Set(ids)].map((id) => titleOf(id, this.names())).join(", ")}`;
    return this.names().length ? "no expert, as the answer ended before it ran" : "expert not known";
  }

  #tell(target) {
    const token = target.closest(".token");
    if (!token) return;
    for (const old of this.box.querySelectorAll('[aria-selected="true"]')) old.setAttribute("aria-selected", "false");
    token.setAttribute("aria-selected", "true");
    setText(this.detail, this.known.get(token));
  }

  #neighbour(item, key) {
    if (key === "Home") return this.box.firstElementChild;
    if (key === "End") return this.box.lastElementChild;
    if (STEPS[key] === 1) return item.nextElementSibling;
    if (STEPS[key] === -1) return item.previousElementSibling;
    return undefined;
  }
}

/** A line end shows as a mark before it breaks the line. */
function visible(text) {
  const parts = text.split("\n");
  return parts.flatMap((part, i) =>
    i ? [make("span", { className: "mark", textContent: "↵" }), `\n${part}`] : [part],
  );
}

const spoken = (text) => text.trim() || (text.includes("\n") ? "line end" : "space");

const quoted = (text) => `“${text.replaceAll("\n", "↵")}”`;
