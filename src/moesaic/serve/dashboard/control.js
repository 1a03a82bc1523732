/** Which experts a prompt may use: allow, deny and pin boxes that cannot contradict each other. */

import { byId, make, setText } from "./dom.js";
import { letter, lookOf, titleOf } from "./looks.js";

export class Control {
  constructor() {
    this.names = [];
    byId("control-rows").addEventListener("change", (event) => this.#settle(event.target));
    byId("control-clear").addEventListener("click", () => this.#uncheck(() => true));
  }

  /** Shows a row per expert; nothing where the model has none to choose from. */
  show(names) {
    if (names.length === this.names.length && names.every((name, i) => name === this.names[i])) return;
    this.names = names;
    byId("control").hidden = names.length === 0;
    byId("control-rows").replaceChildren(...names.map((name, expert) => this.#row(expert)));
    this.#summarise();
  }

  /** What to send as `experts`, undefined where anything goes. */
  chosen() {
    const experts = { allow: this.#ids("allow"), deny: this.#ids("deny") };
    const [pin] = this.#ids("pin");
    if (pin !== undefined) return { pin };
    for (const name of ["allow", "deny"]) if (!experts[name].length) delete experts[name];
    return Object.keys(experts).length ? experts : undefined;
  }

  #row(expert) {
    const title = titleOf(expert, this.names);
    const box = (what, label) =>
      make("td", {}, [
        make("input", { type: "checkbox", name: what, value: expert }, [], { "aria-label": `${label} ${title}` }),
      ]);
    return make("tr", {}, [
      make("th", { scope: "row" }, [
        make("span", { className: `swatch ${lookOf(expert)}`, textContent: letter(expert) }),
        ` ${this.names[expert]}`,
      ]),
      box("allow", "Allow only"),
      box("deny", "Deny"),
      box("pin", "Pin to"),
    ]);
  }

  #boxes(name) {
    return [...byId("control-rows").querySelectorAll(name ? `input[name="${name}"]` : "input")];
  }

  #ids(name) {
    return this.#boxes(name)
      .filter((box) => box.checked)
      .map((box) => Number(box.value));
  }

  /** A pin excludes all else, and no expert is both allowed and denied. */
  #settle(changed) {
    if (changed.checked && changed.name === "pin") this.#uncheck((box) => box !== changed);
    else if (changed.checked) {
      this.#uncheck((box) => box.name === "pin" || (box.value === changed.value && box !== changed));
    }
    this.#summarise();
  }

  #uncheck(which) {
    for (const box of this.#boxes()) if (which(box)) box.checked = false;
    this.#summarise();
  }

  #summarise() {
    const said = Object.entries({ allow: "only", deny: "never", pin: "pinned to" }).flatMap(([name, words]) => {
      const ids = this.#ids(name);
      return ids.length ? [`${words} ${ids.map((id) => titleOf(id, this.names)).join(", ")}`] : [];
    });
    setText(byId("control-summary"), said.join("; ") || "any");
  }
}
