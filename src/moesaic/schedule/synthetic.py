"""Traces that are made: arrivals of a chosen process, lengths, and routes with locality in time and between layers.

A token keeps all experts of the token before with probability `stay`; otherwise it draws new ones, layer by layer:

    layer 0   K experts of p = popularity * theta,  popularity_e ~ 1 / rank^skew,  theta ~ Dirichlet(concentration)
    layer l   the same with a popularity and theta of its own, or, with `sharpness`, of the mean row of a Markov matrix
              P_l at the experts before, P_l[a] ~ Dirichlet(sharpness * E * popularity): the smaller, the more certain

A request has one topic, and theta belongs to it. K different experts are the first K of exponential times with rates p,
which is drawing without replacement.
Shapes: R requests, N tokens, E experts, K slots, T topics. Same seed, same bytes.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MoesaicError
from moesaic.schedule.card import Blocks, Card, choices
from moesaic.schedule.trace import Trace

Arrival = Literal["poisson", "gamma", "uniform", "burst"]
Array = NDArray[Any]

CHUNK = 1 << 16  # tokens drawn at once: bounds the noise to CHUNK * E numbers


@dataclass(frozen=True)
class Synthetic:
    """What to make.

    rate:           requests per second in the mean.
    arrival:        "poisson"; "gamma": gaps of coefficient of variation `cv`; "uniform": equal gaps; "burst": `burst`
                    requests at once, the bursts a Poisson process.
    prompt, output: mean tokens of a log-normal with `prompt_sigma`, `output_sigma` in the logarithm; 0 = all equal.
    route_layers:   1: the choice holds in every layer; or `layers`.
    topics:         0 = none; `concentration` of each topic's Dirichlet, the smaller, the fewer experts a topic uses.
    sharpness:      None: layers are independent given the topic.
    shared:         share of a dense FFN's channels that all experts own, the others belong to one expert each; None =
                    whole experts of `ffn` channels, nothing shared.

    Raises MoesaicError, with the option's name, if an option is out of range.
    """

    requests: int = 100
    rate: float = 1.0
    arrival: Arrival = "poisson"
    cv: float = 2.0
    burst: int = 8
    prompt: float = 128.0
    prompt_sigma: float = 0.8
    output: float = 32.0
    output_sigma: float = 0.8
    layers: int = 8
    route_layers: int = 1
    experts: int = 8
    k: int = 1
    stay: float = 0.5
    skew: float = 0.0
    topics: int = 0
    concentration: float = 0.5
    sharpness: float | None = None
    known_at: str = "request"
    d: int = 512
    ffn: int = 1024
    matrices: int = 3
    weight_bytes: float = 2.0
    shared: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "burst", "layers", "experts", "k", "d", "ffn", "matrices"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name in ("rate", "cv", "concentration", "weight_bytes", "sharpness"):
            value = getattr(self, name)
            if name != "sharpness" or value is not None:
                self._need(name, math.isfinite(value) and value > 0, "a finite number above 0")
        for name in ("prompt_sigma", "output_sigma", "skew"):
            value = getattr(self, name)
            self._need(name, math.isfinite(value) and value >= 0, "a finite number of at least 0")
        self._need("prompt", 1 <= self.prompt < math.inf, "a finite number of at least 1")
        self._need("output", 0 <= self.output < math.inf, "a finite number of at least 0")
        self._need("stay", 0 <= self.stay <= 1, "a probability")
        self._need("shared", self.shared is None or 0 <= self.shared <= 1, "a share from 0 to 1")
        self._need("topics", self.topics >= 0, "at least 0")
        self._need("seed", self.seed >= 0, "at least 0")
        self._need("k", self.k <= self.experts, f"at most the {self.experts} experts")
        self._need("experts", self.experts < 1 << 15, f"fewer than {1 << 15}")
        self._need("route_layers", self.route_layers in (1, self.layers), f"1 or the {self.layers} layers")
        self._need("arrival", self.arrival in get_args(Arrival), choices(str(self.arrival), get_args(Arrival)))

    def _need(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise MoesaicError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def card(self) -> Card:
        """The model such routes would come from; heads of 64 and a vocabulary of 32,000."""
        heads = max(1, self.d // 64)
        shape = {"heads": heads, "kv_heads": heads, "head_dim": max(1, self.d // heads), "vocab": 32_000}
        return Card(
            model="synthetic",
            layers=self.layers,
            experts=self.experts,
            top_k=self.k,
            known_at=self.known_at,
            d=self.d,
            ffn=self.ffn,
            matrices=self.matrices,
            weight_bytes=self.weight_bytes,
            blocks=self._blocks(),
            **shape,
        )

    def _blocks(self) -> Blocks | None:
        if self.shared is None:
            return None
        common = round(self.shared * self.ffn)
        own, more = divmod(self.ffn - common, self.experts)  # the first `more` experts get one channel more
        widths = [(own + (e < more), (e,)) for e in range(self.experts)]
        row = tuple((width, owners) for width, owners in [(common, tuple(range(self.experts))), *widths] if width)
        self._need("shared", common > 0 or own > 0, f"so that each expert owns one of the {self.ffn} channels")
        return (row,) * self.layers


def synthesize(options: Synthetic) -> Trace:
    """The trace of `options`; nothing else decides a byte of it."""
    rng = np.random.default_rng(options.seed)
    arrival = _arrivals(options, rng)
    prompt = np.maximum(_lengths(options.prompt, options.prompt_sigma, options.requests, rng), 1)
    output = _lengths(options.output, options.output_sigma, options.requests, rng)
    decode = np.maximum(output - 1, 0)
    first = np.cumsum(prompt + decode) - (prompt + decode)
    return Trace(
        arrival_s=arrival,
        prompt_tokens=prompt,
        output_tokens=output,
        routes=_routes(options, prompt + decode, rng),
        prompt_row=first,
        prompt_rows=prompt,
        decode_row=first + prompt,
        decode_rows=decode,
        card=options.card(),
        meta={"source": "synthetic", "options": asdict(options), "seed": options.seed},
    )


def _arrivals(options: Synthetic, rng: np.random.Generator) -> Array:
    """(R,) seconds; the first request comes at 0."""
    count, mean = options.requests, 1 / options.rate
    times: Array
    if options.arrival == "burst":
        bursts = rng.exponential(mean * options.burst, -(-count // options.burst))
        times = np.repeat(np.cumsum(bursts), options.burst)[:count]
    elif options.arrival == "uniform":
        times = np.arange(count) * mean
    else:
        shape = 1.0 if options.arrival == "poisson" else options.cv**-2  # cv of a gamma is 1 / sqrt(shape)
        times = np.cumsum(rng.gamma(shape, mean / shape, count))
    return times - times[0]


def _lengths(mean: float, sigma: float, count: int, rng: np.random.Generator) -> Array:
    """(R,) whole tokens, log-normal of that mean."""
    if mean == 0:
        return np.zeros(count, dtype=np.int64)
    return np.rint(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)).astype(np.int64)


def _routes(options: Synthetic, tokens: Array, rng: np.random.Generator) -> Array:
    """(N, L', K) int16 for requests of `tokens` (R,) tokens."""
    total = int(tokens.sum())
    fresh = rng.random(total) >= options.stay
    fresh[np.cumsum(tokens) - tokens] = True
    topic = np.repeat(rng.integers(0, max(options.topics, 1), len(tokens)), tokens)[fresh]
    drawn = np.empty((len(topic), options.route_layers, options.k), dtype=np.int16)
    for layer in range(options.route_layers):
        popularity = _popularity(options, rng)
        markov = layer > 0 and options.sharpness is not None
        table = _transitions(options, popularity, rng) if markov else _topics(options, popularity, rng)
        for start in range(0, len(topic), CHUNK):
            part = slice(start, start + CHUNK)
            p = table[drawn[part, layer - 1]].mean(1) if markov else table[topic[part]]
            drawn[part, layer] = _draw(p, options.k, rng)
    return drawn[np.cumsum(fresh) - 1]


def _popularity(options: Synthetic, rng: np.random.Generator) -> Array:
    """(E,) Zipf over ranks in random order."""
    p = np.arange(1, options.experts + 1) ** -options.skew
    return np.asarray(rng.permutation(np.maximum(p / p.sum(), 1e-12)))  # a Dirichlet takes no 0


def _topics(options: Synthetic, popularity: Array, rng: np.random.Generator) -> Array:
    """(T, E); one row of the popularity itself where there are no topics."""
    if not options.topics:
        return popularity[None]
    p = popularity * rng.dirichlet([options.concentration] * options.experts, options.topics)
    return np.asarray(p / p.sum(1, keepdims=True))


def _transitions(options: Synthetic, popularity: Array, rng: np.random.Generator) -> Array:
    """(E, E): from the expert before to the next layer's."""
    assert options.sharpness is not None
    return rng.dirichlet(options.sharpness * options.experts * popularity, options.experts)


def _draw(p: Array, k: int, rng: np.random.Generator) -> Array:
    """K different experts per row of (n, E) probabilities, the first the one drawn first."""
    times = rng.standard_exponential(p.shape) / np.maximum(p, 1e-30)  # probability 0 only where k needs it
    if k == 1:
        return times.argmin(1)[:, None]
    found = np.argpartition(times, k - 1, axis=1)[:, :k]
    order = np.argsort(np.take_along_axis(times, found, 1), axis=1)
    return np.take_along_axis(found, order, 1)
