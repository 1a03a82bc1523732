/** The last minute of the server's counters: rates are differences of them over the server's own clock. */

const KEPT = 61; // one state a second
const WINDOW_S = 5; // rates are means over this time

export class History {
  constructor() {
    this.states = [];
    this.series = {}; // name -> values, oldest first
  }

  /** A server that started again counts from zero: what was before is forgotten. */
  add(state) {
    const last = this.states.at(-1);
    if (last && (state.uptime_s < last.uptime_s || state.model !== last.model)) {
      this.states = [];
      this.series = {};
    }
    this.states.push(state);
    if (this.states.length > KEPT) this.states.shift();
  }

  #before() {
    const now = this.states.at(-1).uptime_s;
    return this.states.findLast((old) => old.uptime_s <= now - WINDOW_S + 0.5) ?? this.states[0];
  }

  /** What `read(state)` grew by in the window. */
  growth(read) {
    return read(this.states.at(-1)) - read(this.#before());
  }

  /** Growth per second; 0 until there are two states. */
  rate(read) {
    const time = this.growth((state) => state.uptime_s);
    return time > 0 ? this.growth(read) / time : 0;
  }

  /** Remembers `value` as the newest of `name` and returns them all. */
  remember(name, value) {
    const values = (this.series[name] ??= []);
    values.push(value);
    if (values.length > KEPT) values.shift();
    return values;
  }
}
