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
    this.last = undefined; // expert of the token before
  }

  /** One piece of text that `experts` (ids, most often one) ran. A piece without text only counts. */
  add(text, experts, waiting = []) {
    for (const expert of experts) this.counts.set(expert, (this.counts.get(expert) ?? 0) + 1);
    const first = this.size + 1;
    this.size += Math.max(experts.length, experts.length ? 0 : 1);
    const all = [...waiting, ...experts];
    if (!text) return;
    const expert = all[0];
    const who = all.length ? [...new Set(all)].map((id) => titleOf(id, this.names())).join(", ") : "not known";
    const start = expert !== this.last ? " first" : "";
    const token = make(
      "span",
      { className: `token ${lookOf(expert)}${start}`, tabIndex: this.box.childElementCount ? -1 : 0 },
      visible(text),
      { role: "option", "aria-selected": "false", "aria-label": `${spoken(text)}, expert ${who}` },
    );
    if (expert !== undefined) token.dataset.letter = letter(expert);
    token.dataset.experts = all.join(" ");
    this.last = expert;
    this.known.set(token, `Token ${first} ${quoted(text)}: expert ${who}`);
    this.box.append(token);
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
