"""The dashboard in a real browser, on the real engine: what it shows is what the API tells, for every reader."""

import json
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import serving
from moesaic.serve.engine import Engine

selenium = pytest.importorskip("selenium")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402

from moesaic.serve.api.app import ApiOptions, create_app  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)",
)

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
PROMPT = "Once upon a time"
CONTRAST = 4.5  # WCAG 2.1, level AA, text
KEY = "a-secret-key"


class Live:
    """An app on a free port of this machine, which can stop and come back on the same port."""

    def __init__(self, app: Any) -> None:
        self.app = app
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, host="127.0.0.1", port=self.port, log_level="error", lifespan="off")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """Its first true value; a failure when none comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing within {seconds} s")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Half of its experts fit, so that entries come and go."""
    with serving.engine(serving.served_folder(tmp_path_factory.mktemp("served") / "tiny"), experts=0.5) as engine:
        yield engine


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[Live]:
    live = Live(create_app(engine, ApiOptions()))
    live.start()
    yield live
    live.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


class Page:
    """The dashboard as one reader sees it."""

    def __init__(self, driver: WebDriver, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, width: int = 1280, **media: str) -> "Page":
        """Load anew; `media` are media features with underscores, as prefers_color_scheme="dark"."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.url)
        wait_for(lambda: self.text("health") not in ("", "connecting"))
        return self

    def __call__(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, name: str) -> str:
        return str(self("return document.getElementById(arguments[0]).textContent", name))

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, held: str, key: str) -> None:
        webdriver.ActionChains(self.driver).key_down(held).send_keys(key).key_up(held).perform()

    def focused(self) -> str:
        """What has the focus: its id, else its name or text."""
        return str(self("const a = document.activeElement; return a.id || a.name || a.textContent.trim()"))

    def set(self, name: str, value: str | int) -> None:
        self("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def send(self, prompt: str = PROMPT, tokens: int = 8) -> str:
        """Ask by clicking and wait for the end; what the page says of it."""
        self.set("prompt", prompt)
        self.set("max-tokens", tokens)
        self.driver.find_element(By.ID, "send").click()
        wait_for(lambda: self.text("status").startswith(("Done", "Not answered", "Stopped")))
        return self.text("status")

    def tokens(self, name: str) -> list[dict[str, Any]]:
        """Text (without the marks of line ends), experts and label of each token in one of the two boxes."""
        found: list[dict[str, Any]] = self(
            """return [...document.getElementById(arguments[0]).children].map((token) => ({
                 text: [...token.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join(""),
                 experts: token.dataset.experts.split(" ").filter(Boolean).map(Number),
                 label: token.getAttribute("aria-label"),
                 look: getComputedStyle(token).backgroundColor + getComputedStyle(token).textDecorationStyle}))""",
            name,
        )
        return found

    def rows(self, name: str) -> list[list[str]]:
        """Cells of a table body."""
        rows: list[list[str]] = self(
            """return [...document.getElementById(arguments[0]).rows].map((row) =>
                 [...row.cells].map((cell) => cell.textContent.trim()))""",
            name,
        )
        return rows

    def tile(self, name: str) -> list[str]:
        """Number and note."""
        texts: list[str] = self(
            """const tile = [...document.querySelectorAll(".tile")].find((tile) =>
                 tile.querySelector("dt").textContent === arguments[0]);
               return [".value", ".quiet"].map((part) => tile.querySelector(part).textContent)""",
            name,
        )
        return texts


@pytest.fixture
def page(browser: WebDriver, live: Live) -> Page:
    return Page(browser, live.url).open()


def ask(live: Live, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The API itself, past the page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(live.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return dict(json.load(answer))


def completion(live: Live, prompt: str, tokens: int) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_experts": True}
    return ask(live, "v1/completions", {"model": ask(live, "v1/models")["data"][0]["id"], **body})


def letter(expert: int) -> str:
    return chr(ord("A") + expert)


# -- the page itself --------------------------------------------------------------------------------------------------


def test_loads_without_errors_and_talks_to_its_own_server_only(page: Page, live: Live) -> None:
    page.driver.get_log("browser"), page.driver.get_log("performance")  # what earlier pages logged
    page.open()
    page.send()
    assert page.driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {live.url, live.url + "dashboard.css", live.url + "v1/completions"} <= set(asked)
    assert [url for url in asked if not url.startswith(live.url)] == []


def test_its_policy_forbids_what_it_does_not_need(page: Page, live: Live) -> None:
    with urllib.request.urlopen(live.url, timeout=5) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    script = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    page(script + "; document.body.append(Object.assign(document.createElement('div'), {id: 'trap'}))")
    page("document.getElementById('trap').setAttribute('onclick', 'window.hacked = 1')")
    page("document.getElementById('trap').click()")
    assert page("return window.hacked") is None
    page.driver.get_log("browser")  # the refusals this asked for


# -- the playground ---------------------------------------------------------------------------------------------------


def test_tokens_show_the_experts_of_the_api(page: Page, live: Live, engine: Engine) -> None:
    wanted = completion(live, PROMPT, 24)
    assert page.send(tokens=24).startswith("Done: 24 tokens")
    choice = wanted["choices"][0]
    shown = page.tokens("answer-tokens")
    assert "".join(token["text"] for token in shown) == choice["text"] == page.text("plain")
    *ran, last = choice["moesaic"]["experts"]
    assert [e for token in shown for e in token["experts"]] == ran
    assert last is None and "no expert" in shown[-1]["label"]  # an answer ends with a token that nothing has run
    prompt = page.tokens("prompt-tokens")
    assert [token["text"] for token in prompt] == choice["moesaic"]["prompt_tokens"]
    assert [token["experts"] for token in prompt] == [[e] for e in choice["moesaic"]["prompt_experts"]]
    for token in prompt + shown[:-1]:
        assert f"expert {letter(token['experts'][0])} {engine.expert_names[token['experts'][0]]}" in token["label"]


def test_each_expert_looks_different_and_the_legend_counts_its_tokens(page: Page) -> None:
    page.send(tokens=24)
    looks: dict[int, set[str]] = {}
    counts: dict[int, int] = {}
    for token in page.tokens("prompt-tokens") + page.tokens("answer-tokens")[:-1]:
        looks.setdefault(token["experts"][0], set()).add(token["look"])
        for expert in token["experts"]:
            counts[expert] = counts.get(expert, 0) + 1
    assert len(looks) > 1
    assert all(len(some) == 1 for some in looks.values())
    assert len(set.union(*looks.values())) == len(looks)
    legend = page("return [...document.getElementById('legend').children].map((item) => item.textContent)")
    assert [line[0] for line in legend] == [letter(expert) for expert in sorted(counts)]
    assert [int(line.split()[-2]) for line in legend] == [counts[expert] for expert in sorted(counts)]


def test_forty_experts_differ_in_colour_or_underline_and_all_in_letter(page: Page) -> None:
    looks = page.driver.execute_async_script(
        """const done = arguments[0];
           import("./looks.js").then(({ lookOf, letter }) =>
             done([...Array(800).keys()].map((e) => [lookOf(e), letter(e)])))"""
    )
    computed = page(
        """return arguments[0].map((look) => {
             const sample = document.createElement("span");
             sample.className = `token ${look}`;
             document.body.append(sample);
             const { backgroundColor, textDecorationLine, textDecorationStyle } = getComputedStyle(sample);
             sample.remove();
             return [backgroundColor, textDecorationLine, textDecorationStyle].join(" "); })""",
        [look for look, _ in looks[:40]],
    )
    assert len(set(computed)) == 40 and all("underline" in look for look in computed)
    assert len({name for _, name in looks}) == 800
    assert [looks[e][1] for e in (0, 25, 26, 702)] == ["A", "Z", "AA", "AAA"]


def test_pointing_at_a_token_tells_its_expert(page: Page) -> None:
    page.send()
    token = page.driver.find_elements(By.CSS_SELECTOR, "#answer-tokens .token")[1]
    webdriver.ActionChains(page.driver).move_to_element(token).perform()
    expert = page.tokens("answer-tokens")[1]["label"].split("expert ")[-1]
    wait_for(lambda: page.text("token").endswith(f"expert {expert}"))


def test_a_pinned_expert_runs_every_token(page: Page) -> None:
    page.driver.find_element(By.CSS_SELECTOR, "#control summary").click()
    boxes = {
        kind: page.driver.find_elements(By.CSS_SELECTOR, f"#control input[name={kind}]")
        for kind in ("allow", "deny", "pin")
    }
    boxes["allow"][0].click()
    boxes["deny"][0].click()
    assert not boxes["allow"][0].is_selected() and boxes["deny"][0].is_selected()
    boxes["pin"][1].click()
    assert [box.is_selected() for kind in boxes for box in boxes[kind]].count(True) == 1
    page.send()
    assert {e for token in page.tokens("answer-tokens") for e in token["experts"]} == {1}
    page.driver.find_element(By.ID, "control-clear").click()
    boxes["deny"][1].click()
    page.send()
    assert 1 not in {e for token in page.tokens("answer-tokens") for e in token["experts"]}


def test_a_chat_message_shows_the_prompt_as_the_model_reads_it(page: Page) -> None:
    page.set("mode", "chat")
    assert page.send("tell me a story").startswith("Done")
    prompt = page.tokens("prompt-tokens")
    assert "tell me a story" in "".join(token["text"] for token in prompt)
    assert all(token["experts"] for token in prompt + page.tokens("answer-tokens")[:-1])


def test_hostile_text_stays_text(page: Page, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "expert_names", [HOSTILE, *engine.expert_names[1:]])
    page.open()
    page.send(HOSTILE)
    assert "".join(token["text"] for token in page.tokens("prompt-tokens")).strip() == HOSTILE
    assert HOSTILE in page.text("queue-rows") and HOSTILE in page.text("control-rows")
    page.send(HOSTILE, tokens=10**9)  # the refusal is shown too
    assert page("return document.querySelectorAll('img, main script').length") == 0
    assert page("return window.hacked") is None
    page.driver.get_log("browser")


def test_a_refusal_is_shown_in_the_servers_words(page: Page, engine: Engine) -> None:
    said = page.send("word " * (2 * engine.context))
    assert said.startswith("Not answered: ") and str(engine.context) in said
    page.driver.get_log("browser")  # the browser logs the refusal


# -- the keyboard -----------------------------------------------------------------------------------------------------


def test_everything_is_reached_by_tab_with_a_visible_focus(page: Page) -> None:
    page.send()
    page("document.querySelector('.skip').focus()")  # the first stop of a page just loaded
    reached = [page.focused()]
    for _ in range(60):
        page.press(Keys.TAB)
        where = page.focused()
        if page("return document.activeElement === document.body") or where == reached[0]:
            break
        reached.append(where)
        outline = page("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
        assert outline[0] == "solid" and float(outline[1].removesuffix("px")) >= 2, where
    for name in ("key", "prompt", "mode", "max-tokens", "temperature", "seed", "send", "letters"):
        assert name in reached, name
    assert "Experts for this prompt: any" in reached
    inside = page("return [...document.querySelectorAll('[tabindex=\"0\"]')].map((n) => n.closest('[id]').id)")
    assert {"prompt-tokens", "answer-tokens", "map"} <= set(inside)
    assert len(reached) < 30  # however many tokens and cells there are


def test_ctrl_enter_sends_arrows_walk_the_tokens_and_escape_stops(page: Page) -> None:
    page.driver.find_element(By.ID, "prompt").send_keys(" there")
    page.chord(Keys.CONTROL, Keys.ENTER)
    wait_for(lambda: page.text("status").startswith("Done"))
    tokens = page.tokens("answer-tokens")
    page("document.querySelector('#answer-tokens .token').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.text("token").endswith(tokens[1]["label"].split(", ")[-1])
    assert page("return document.querySelectorAll('#answer-tokens [tabindex=\"0\"]').length") == 1
    assert page("return document.activeElement.tabIndex") == 0  # where Tab comes back to
    page.press(Keys.END)
    assert page("return document.activeElement === document.getElementById('answer-tokens').lastElementChild")
    page.press(Keys.HOME)
    assert page("return document.activeElement === document.getElementById('answer-tokens').firstElementChild")


def test_escape_stops_and_the_server_hears_of_it(page: Page, live: Live, engine: Engine) -> None:
    before = engine.stats().finished.get("cancelled", 0)
    most = engine.context - 20
    page.set("max-tokens", most)
    page.driver.find_element(By.ID, "prompt").click()
    page.chord(Keys.CONTROL, Keys.ENTER)
    wait_for(lambda: len(page.tokens("answer-tokens")) > 1)
    page.press(Keys.ESCAPE)
    wait_for(lambda: page.text("status").startswith("Stopped after"))
    assert 0 < int(page.text("status").split()[2]) < most
    wait_for(lambda: engine.stats().finished.get("cancelled", 0) > before)
    assert page.send().startswith("Done")


def test_the_map_tells_each_cell_by_arrow_keys(page: Page, live: Live) -> None:
    resident = ask(live, "v1/moesaic/state")["resident"]
    page("document.querySelector('#map td').focus()")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert page.text("cell").startswith("Layer 1, B ")
    assert page.text("cell").endswith(f": {percent(resident[1][1])} resident")


# -- the numbers ------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f} %" if value == int(value) else f"{value:.1f} %"


def as_bytes(value: float) -> str:
    units = iter(["B", "KiB", "MiB", "GiB"])
    unit = next(units)
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.1f} {unit}" if unit != "B" and value < 100 else f"{value:.0f} {unit}"


def agree(live: Live, shown: Callable[[], Any], wanted: Callable[[dict[str, Any]], Any]) -> None:
    """The page comes to show what the state says; entries may still arrive after an answer has ended."""
    end = time.monotonic() + 15
    while shown() != wanted(ask(live, "v1/moesaic/state")) and time.monotonic() < end:
        time.sleep(0.1)
    assert shown() == wanted(ask(live, "v1/moesaic/state"))


def test_tiles_and_tables_show_the_numbers_of_the_state(page: Page, live: Live) -> None:
    page.send()
    agree(live, lambda: [page.tile(name) for name in ("Running", "Waiting", "Ended")], request_tiles)
    agree(live, lambda: [page.tile(name)[1] for name in ("Output tokens/s", "Prompt tokens/s")], token_notes)
    agree(live, lambda: page.tile("Hit ratio")[0], lambda state: percent(state["hit_ratio"]))
    agree(live, lambda: dict(page.rows("moved-rows")), moved_rows)
    agree(live, lambda: page.rows("queue-rows"), queue_rows)
    agree(live, lambda: page.rows("latency")[0][-1], lambda state: f"{sum(state['ttft_s']['counts']):,} answers")


def request_tiles(state: dict[str, Any]) -> list[list[str]]:
    ended = [f"{n:,} {reason}" for reason, n in state["finished"].items()]
    running, waiting = f"{state['running']:,}", f"{state['waiting']:,}"
    return [
        [running, "requests"],
        [waiting, "requests"],
        [f"{sum(state['finished'].values()):,}", ", ".join(ended)],
    ]


def token_notes(state: dict[str, Any]) -> list[str]:
    reused = f"{state['prompt_tokens']:,} run, {state['cached_tokens']:,} reused"
    return [f"{state['output_tokens']:,} in all", reused]


def moved_rows(state: dict[str, Any]) -> dict[str, str]:
    counts = {"Uses of an expert in a step": "uses", "of them resident in time": "use_hits"}
    counts |= {"Loads": "loads", "Evictions": "evictions"}
    sizes = {"Fetched on demand": "demand_bytes", "Fetched ahead": "prefetch_bytes"}
    sizes |= {"of it evicted unused": "wasted_bytes"}
    return {row: f"{state[name]:,}" for row, name in counts.items()} | {
        row: as_bytes(state[name]) for row, name in sizes.items()
    }


def queue_rows(state: dict[str, Any]) -> list[list[str]]:
    queued, run = state["queued_tokens_by_expert"], state["tokens_by_expert"]
    return [[f"{letter(e)} {name}", f"{queued[e]:,}", f"{run[e]:,}"] for e, name in enumerate(state["expert_names"])]


def test_rates_and_the_queue_are_live(page: Page, engine: Engine) -> None:
    """Requests past the page: its numbers move while they run, with bars as long as the queues."""
    prompt = engine.tokenizer.encode(PROMPT)
    for _ in range(100):
        serving.ask(engine, prompt, serving.greedy(engine.context - len(prompt)))
    wait_for(lambda: int(page.tile("Running")[0]) > 0)
    wait_for(lambda: float(page.tile("Output tokens/s")[0].replace(",", "")) > 0)
    script = """return [...document.getElementById("queue-rows").rows].map((row) =>
                  [Number(row.cells[1].textContent.replace(",", "")), row.querySelector(".bar").offsetWidth])"""
    bars = wait_for(lambda: [found for found in [page(script)] if any(n for n, _ in found)])[0]
    longest = max(bars)
    assert longest[0] > 0 and longest[1] > 50
    assert all(width == pytest.approx(longest[1] * n / longest[0], abs=3) for n, width in bars)
    wait_for(lambda: engine.stats().running == 0, seconds=60)


def test_memory_and_step_time_add_up(page: Page, live: Live) -> None:
    def wanted(state: dict[str, Any]) -> list[str]:
        memory = state["memory"]
        used = [memory[name] for name in ("dense", "buffers", "experts", "kv")]
        return [as_bytes(n) for n in [*used, max(0, memory["budget"] - sum(used))]]

    completion(live, PROMPT, 4)  # so that there are steps
    agree(live, lambda: [row[1] for row in page.rows("memory-rows")], wanted)
    memory = ask(live, "v1/moesaic/state")["memory"]
    assert f"Budget {as_bytes(memory['budget'])}." in page.text("memory-process")
    assert "measured" in page.text("memory-process") and memory["process"] > 0
    wait_for(lambda: "–" not in {row[2] for row in page.rows("step-rows")})
    shares = [float(row[2].strip("<> %")) for row in page.rows("step-rows")]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_the_map_and_its_table_show_every_share_as_experts_come_and_go(page: Page, live: Live) -> None:
    page.driver.find_element(By.CSS_SELECTOR, "#residency-text summary").click()

    def shown() -> list[Any]:
        return page(
            """const rows = (id) => [...document.getElementById(id).tBodies[0].rows];
               const cells = (row) => [...row.cells].slice(1);
               return [
                 rows("map").map((row) => cells(row).map((cell) => cell.ariaLabel.split(": ")[1])),
                 rows("map").map((row) => cells(row).map((cell) => parseFloat(cell.style.getPropertyValue("--share")))),
                 rows("residency-table").map((row) => cells(row).map((cell) => cell.textContent))]"""
        )

    def wanted(state: dict[str, Any]) -> list[Any]:
        words = [[percent(share) for share in row] for row in state["resident"]]
        return [
            [[f"{word} resident" for word in row] for row in words],
            [[100 * share for share in row] for row in state["resident"]],
            [[word.removesuffix(" %") for word in row] for row in words],
        ]

    seen = []
    for expert in (0, 2):
        body = {"model": ask(live, "v1/models")["data"][0]["id"], "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        ask(live, "v1/completions", {**body, "experts": {"pin": expert}})
        agree(live, shown, wanted)
        seen.append(shown())
    assert seen[0] != seen[1]


def test_quantiles_are_those_of_the_histogram(page: Page) -> None:
    histogram = {"bounds": [1, 2, 4], "counts": [0, 10, 10, 0], "sum": 0}
    script = """const [histogram, shares, done] = arguments;
                import("./format.js").then((f) => done(shares.map((share) => f.quantileText(histogram, share))))"""
    shares = [0.25, 0.5, 0.75, 0.95]
    assert page.driver.execute_async_script(script, histogram, shares) == ["1.5 s", "2.0 s", "3.0 s", "3.8 s"]
    histogram["counts"] = [0, 0, 0, 3]
    assert page.driver.execute_async_script(script, histogram, [0.5]) == ["> 4.0 s"]
    histogram["counts"] = [0, 0, 0, 0]
    assert page.driver.execute_async_script(script, histogram, [0.5]) == ["–"]


def test_rates_are_differences_and_forget_an_earlier_server(page: Page) -> None:
    """(uptime, tokens) of each state -> rate over the last 5 s."""
    script = """const [states, done] = arguments;
                import("./history.js").then(({ History }) => {
                  const history = new History();
                  for (const [uptime_s, tokens] of states) history.add({ uptime_s, tokens, model: "m" });
                  done(history.rate((state) => state.tokens)); })"""
    steady = [[t, 100 if t < 4 else 10 * t] for t in range(10)]
    assert page.driver.execute_async_script(script, steady) == pytest.approx(10)
    assert page.driver.execute_async_script(script, [[100, 500], [1, 6], [3, 10]]) == pytest.approx(2)
    assert page.driver.execute_async_script(script, [[100, 500]]) == 0


def test_event_streams_are_read_however_they_are_cut(page: Page) -> None:
    sent = 'data: {"text": "é\\n"}\r\n\r\n: a comment\n\ndata: {"text": "ü"}\n\n'
    script = """const [sent, done] = arguments;
                const stream = new ReadableStream({ start(to) {
                  for (const byte of new TextEncoder().encode(sent)) to.enqueue(Uint8Array.of(byte));
                  to.close(); } });
                import("./stream.js").then(async ({ events }) => {
                  const found = [];
                  try {
                    for await (const event of events(new Response(stream))) found.push(event.text);
                  } catch (error) { found.push(error.message); }
                  done(found); })"""
    whole = page.driver.execute_async_script(script, sent + "data: [DONE]\n\n")
    assert whole == ["é\n", "ü"]
    assert page.driver.execute_async_script(script, sent) == [*whole, "the answer ended before it was complete"]


# -- trouble ----------------------------------------------------------------------------------------------------------


def test_a_lost_server_shows_a_banner_that_goes_when_it_is_back(page: Page, live: Live) -> None:
    assert not page.driver.find_element(By.ID, "banner").is_displayed()
    live.stop()
    try:
        wait_for(lambda: "has not answered since" in page.text("banner"))
        assert page.driver.find_element(By.ID, "banner").is_displayed()
        assert page.text("health") == "no connection"
        assert page.send().startswith("Not answered")
    finally:
        live.start()
    wait_for(lambda: not page.driver.find_element(By.ID, "banner").is_displayed())
    assert page.text("health") == "ready"
    page.driver.get_log("browser")  # the browser logs every refused connection


def test_the_api_key_is_asked_for_and_kept_in_memory_only(browser: WebDriver, engine: Engine) -> None:
    guarded = Live(create_app(engine, ApiOptions(keys=(KEY,))))
    guarded.start()
    try:
        page = Page(browser, guarded.url).open()
        wait_for(lambda: "wants an API key" in page.text("banner"))
        page.driver.find_element(By.ID, "key").send_keys(KEY, Keys.TAB)
        wait_for(lambda: page.text("health") == "ready")
        assert page.send().startswith("Done")
        assert page("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert KEY not in page("return location.href + document.documentElement.outerHTML")
        page.driver.get("about:blank")
    finally:
        guarded.stop()
    browser.get_log("browser")


# -- readers ----------------------------------------------------------------------------------------------------------

# Contrast of every text with what is behind it: [contrast, text] of each, by WCAG 2.1's definition.
CONTRASTS = """
const parse = (colour) => { const m = colour.match(/[\\d.]+/g).map(Number); return [...m.slice(0, 3), m[3] ?? 1]; };
const light = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (let n = node; n; n = n.parentElement) {
    const colour = parse(getComputedStyle(n).backgroundColor);
    if (colour[3] === 1) return colour;
  }
  return [255, 255, 255, 1];
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest("noscript")) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), walk.currentNode.data.trim()]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_every_expert_has_contrast(page: Page, scheme: str) -> None:
    page.open(prefers_color_scheme=scheme)
    page.send()
    page("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page(  # all colours and underlines, and the banner, whatever this model has
        """for (const c of Array(8).keys()) {
             const sample = document.createElement("span");
             sample.className = `swatch look colour-${c}`;
             sample.textContent = `colour ${c}`;
             document.getElementById("result").append(sample);
           }
           document.getElementById("status").classList.add("bad");
           const banner = document.getElementById("banner").cloneNode();
           banner.hidden = false;
           banner.textContent = "a banner";
           document.body.prepend(banner);"""
    )
    found = page(CONTRASTS)
    assert {*(f"colour {c}" for c in range(8)), "a banner", "Playground", "Send", "Stop"} <= {text for _, text in found}
    assert [(round(contrast, 2), text) for contrast, text in found if contrast < CONTRAST] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_at_this_width(page: Page, width: int) -> None:
    page.open(width)
    page.send("w" * 300, tokens=24)
    page("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page("return document.documentElement.scrollWidth") <= width
    beyond = page(
        """return [...document.querySelectorAll("main *")].filter((node) => node.checkVisibility()
             && !node.closest(".scroll") && node.getBoundingClientRect().right > innerWidth).map((n) => n.outerHTML)"""
    )
    assert beyond == []


def test_less_motion_and_dark_pages_are_respected(page: Page) -> None:
    moving = "return getComputedStyle(document.querySelector('#map td')).transitionDuration"
    back = "return getComputedStyle(document.body).backgroundColor"
    page.open(prefers_reduced_motion="no-preference", prefers_color_scheme="light")
    assert page(moving) != "0s"
    bright = page(back)
    page.open(prefers_reduced_motion="reduce", prefers_color_scheme="dark")
    assert page(moving) == "0s"
    assert page(back) != bright


def test_what_happens_is_said_aloud(page: Page) -> None:
    roles = page(
        "return ['health', 'banner', 'status'].map((id) => document.getElementById(id).closest('[role]').role)"
    )
    assert roles == ["status", "alert", "status"]
    unnamed = page(
        """return [...document.querySelectorAll("input, select, textarea, button")].filter((node) =>
             !node.labels?.length && !node.ariaLabel && !node.textContent.trim()).map((node) => node.outerHTML)"""
    )
    assert unnamed == []
