/** The map of resident experts: a cell per layer and expert, shaded by the share of its bytes that is resident. */

import { byId, make, roam, setText } from "./dom.js";
import { percent } from "./format.js";
import { letter, titleOf } from "./looks.js";

export class Residency {
  constructor() {
    this.map = byId("map");
    this.table = byId("residency-table");
    this.names = [];
    this.shares = [];
    for (const kind of ["focusin", "mouseover"]) this.map.addEventListener(kind, (event) => this.#tell(event.target));
    roam(this.map, "td", (cell, key) => this.#neighbour(cell, key));
    byId("residency-text").addEventListener("toggle", () => this.#write());
  }

  show(state) {
    const [layers, experts] = this.#shape(this.shares);
    const same = layers === state.resident.length && experts === (state.resident[0]?.length ?? 0);
    this.shares = state.resident;
    if (!same || (state.expert_names ?? []).join() !== this.names.join()) {
      this.names = state.expert_names ?? [];
      this.#build();
    }
    this.#write();
  }

  #shape(shares) {
    return [shares.length, shares[0]?.length ?? 0];
  }

  #build() {
    for (const table of [this.map, this.table]) {
      for (const part of table.querySelectorAll("thead, tbody")) part.remove();
      table.append(this.#head(), this.#body(table === this.map));
    }
  }

  #head() {
    const [, experts] = this.#shape(this.shares);
    const heading = (e) => make("th", { scope: "col", textContent: this.#column(e), title: this.#expert(e) });
    return make("thead", {}, [
      make("tr", {}, [
        make("th", { scope: "col", textContent: "Layer" }),
        ...Array.from({ length: experts }, (_, e) => heading(e)),
      ]),
    ]);
  }

  #body(isMap) {
    return make(
      "tbody",
      {},
      this.shares.map((row, layer) =>
        make("tr", {}, [
          make("th", { scope: "row", textContent: layer }),
          ...row.map((_, e) => make("td", isMap ? { tabIndex: layer || e ? -1 : 0 } : {})),
        ]),
      ),
    );
  }

  /** Experts with names have letters too; those that each layer has for itself have numbers. */
  #column(expert) {
    return this.names.length ? letter(expert) : String(expert);
  }

  #expert(expert) {
    return this.names.length ? titleOf(expert, this.names) : `expert ${expert}`;
  }

  #sentence(layer, expert) {
    return `Layer ${layer}, ${this.#expert(expert)}: ${percent(this.shares[layer][expert])} resident`;
  }

  #write() {
    const withTable = byId("residency-text").open;
    for (const [layer, row] of this.shares.entries()) {
      for (const [expert, share] of row.entries()) {
        const cell = this.map.tBodies[0].rows[layer].cells[expert + 1];
        const value = `${100 * share}%`;
        if (cell.style.getPropertyValue("--share") !== value) {
          cell.style.setProperty("--share", value);
          cell.setAttribute("aria-label", this.#sentence(layer, expert));
        }
        if (withTable) setText(this.table.tBodies[0].rows[layer].cells[expert + 1], percent(share).replace(" %", ""));
      }
    }
    if (this.told?.isConnected) this.#tell(this.told);
  }

  #tell(cell) {
    if (cell.tagName !== "TD") return;
    this.told = cell;
    setText(byId("cell"), this.#sentence(cell.parentElement.sectionRowIndex, cell.cellIndex - 1));
  }

  #neighbour(cell, key) {
    const rows = this.map.tBodies[0].rows;
    const layer = cell.parentElement.sectionRowIndex;
    const place = cell.cellIndex;
    const at = {
      ArrowRight: [layer, place + 1],
      ArrowLeft: [layer, place - 1],
      ArrowDown: [layer + 1, place],
      ArrowUp: [layer - 1, place],
      Home: [layer, 1],
      End: [layer, rows[0].cells.length - 1],
    }[key];
    const to = at && rows[at[0]]?.cells[at[1]];
    return to?.tagName === "TD" ? to : undefined;
  }
}
