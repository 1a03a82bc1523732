/** The playground: sends a prompt and shows prompt and answer, as they come, coloured by expert. */

import { Control } from "./control.js";
import { byId, make, setText } from "./dom.js";
import { seconds } from "./format.js";
import { letter, lookOf, titleOf } from "./looks.js";
import { call, events } from "./stream.js";
import { Tokens } from "./tokens.js";

const ENDINGS = { stop: "the model ended it", length: "it reached the limit of tokens" };

export class Playground {
  constructor() {
    this.control = new Control();
    this.names = [];
    const names = () => this.names;
    this.prompt = new Tokens(byId("prompt-tokens"), byId("token"), names);
    this.answer = new Tokens(byId("answer-tokens"), byId("token"), names);
    this.running = null; // AbortController of the request under way
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("letters").addEventListener("change", (event) =>
      byId("result").classList.toggle("lettered", event.target.checked),
    );
    document.addEventListener("keydown", (event) => this.#shortcut(event));
  }

  /** Takes the names of the experts from the server's state. */
  show(state) {
    this.names = state.expert_names ?? [];
    this.control.show(this.names);
  }

  stop() {
    this.running?.abort();
  }

  async send() {
    if (this.running || !byId("ask").reportValidity()) return;
    this.running = new AbortController();
    this.#begin();
    const start = performance.now();
    try {
      const { path, body } = this.#request();
      const response = await call(path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: this.running.signal,
      });
      await this.#read(response);
      const took = seconds((performance.now() - start) / 1000);
      this.#say(
        `Done: ${this.usage?.completion_tokens ?? this.answer.size} tokens in ${took}; ${ENDINGS[this.reason] ?? this.reason}.`,
      );
    } catch (error) {
      if (error.name === "AbortError") this.#say(`Stopped after ${this.answer.size} tokens.`);
      else this.#say(`Not answered: ${error.message}`, true);
    } finally {
      this.running = null;
      this.#buttons();
    }
  }

  #shortcut(event) {
    if (event.key === "Escape" && this.running) {
      event.preventDefault();
      this.stop();
    } else if (event.key === "Enter" && event.ctrlKey) {
      event.preventDefault();
      this.send();
    }
  }

  #request() {
    const text = byId("prompt").value;
    const body = {
      model: this.model,
      max_tokens: Number(byId("max-tokens").value),
      temperature: Number(byId("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
      return_experts: true,
    };
    if (byId("seed").value) body.seed = Number(byId("seed").value);
    const experts = this.control.chosen();
    if (experts) body.experts = experts;
    if (byId("mode").value === "completion") return { path: "v1/completions", body: { ...body, prompt: text } };
    return { path: "v1/chat/completions", body: { ...body, messages: [{ role: "user", content: text }] } };
  }

  async #read(response) {
    this.reason = "";
    this.usage = null;
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      this.#prompt(chunk.moesaic);
      const [choice] = chunk.choices ?? [];
      if (choice) this.#answer(choice, chunk.moesaic);
      this.usage = chunk.usage ?? this.usage;
      if (choice?.finish_reason) this.reason = choice.finish_reason;
      this.#legend();
    }
  }

  #prompt(extra) {
    for (const [i, text] of (extra?.prompt_tokens ?? []).entries()) {
      const expert = extra.prompt_experts?.[i];
      this.prompt.add(text, [expert]);
    }
  }

  #answer(choice, extra) {
    const text = choice.text ?? choice.delta?.content ?? "";
    this.answer.add(text, extra?.experts ?? []);
    if (text) this.#say("Answering.");
    byId("plain").append(text);
  }

  #begin() {
    this.prompt.clear();
    this.answer.clear();
    byId("plain").replaceChildren();
    byId("token").textContent = "\u00a0";
    byId("result").hidden = false;
    this.#legend();
    this.#say("Waiting for the first token.");
    this.#buttons();
  }

  /** Send stays focusable while it is off, so that the keyboard does not lose its place. */
  #buttons() {
    byId("send").setAttribute("aria-disabled", String(Boolean(this.running)));
    byId("stop").disabled = !this.running;
  }

  #legend() {
    const counts = new Map();
    for (const { counts: some } of [this.prompt, this.answer]) {
      for (const [expert, n] of some) counts.set(expert, (counts.get(expert) ?? 0) + n);
    }
    const items = [...counts]
      .sort(([a], [b]) => a - b)
      .map(([expert, n]) =>
        make("li", {}, [
          make("span", { className: `swatch ${lookOf(expert)}`, textContent: letter(expert) }),
          ` ${this.names[expert] ?? titleOf(expert, [])} `,
          make("span", { className: "quiet", textContent: `${n} ${n === 1 ? "token" : "tokens"}` }),
        ]),
      );
    if (!items.length && this.answer.size)
      items.push(make("li", { textContent: "not known: this model routes layer by layer" }));
    byId("legend").replaceChildren(...items);
  }

  #say(text, bad = false) {
    setText(byId("status"), text);
    byId("status").classList.toggle("bad", bad);
  }
}
