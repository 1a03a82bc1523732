"""What serving a model takes, before anything is loaded: the budget split into weights, buffers, experts and keys.

Everything follows from config.json and the headers of the checkpoint; torch is not needed. The rule, in order:

1. Weights that always stay, the buffers of a step, one request of the least context, and the largest expert of a layer
   (a step runs expert by expert where no more fits). Less than that is an error. The least context is the given one;
   if none is given, LEAST_CONTEXT, or the model's own where that is shorter.
2. Experts take the rest until all are in memory.
3. What then is left goes to keys and values: if no context was given a longer one, doubled up to the model's own, then
   more requests. The engine lends keys what experts hold, and takes it back: this is where it starts.
4. Kernels that are compiled as steps of new sizes come grow into the spare rest. Where that is too small for all of
   them nothing is taken from others, but the plan says by how much the process can outgrow the budget.

Bytes throughout, memory in whole pages as the engine takes it. N tokens of a step, T context, V vocabulary.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.experts.buckets import LEAST, PLAIN_LEAST, bucket
from moesaic.experts.lowbit_sizes import bits_of, matrix_bytes
from moesaic.files import human_bytes
from moesaic.schedule.work import Layout
from moesaic.serve.lowbit_entries import HEADS, quantized, served_entries
from moesaic.serve.machine_memory import available_bytes, device_bytes
from moesaic.serve.model_files import BITS, CONFIG, ModelFiles, Parts, expert_entries, read_json
from moesaic.simulate.system import size

PAGE = mmap.PAGESIZE
# The process beside a model's weights. Measured with torch 2.13 and transformers 5.23: 409 MiB with a model loaded, and
# 15 MiB for HTTP and grammars.
BASE = 432 * 2**20
# oneDNN compiles a product for every number of rows and shape of weights it meets, and keeps the last 1024. Measured
# with torch 2.13 on an AVX-512 CPU: 0.6 MiB each up to there, 0.9 GiB in all after 4096 of them.
KERNEL, KERNELS = 2**20, 1024
PASSING = 16 * 2**20  # bytes of main memory, beyond the largest entry, that entries pass through to a device
# Of a device, for libraries: cuBLAS takes 32 MiB on an H200 for each of two streams, cuBLASLt likewise. Steps of single
# tokens are captured for every power of two up to 64: logits of 127 rows in all, activations of the largest.
LIBRARIES, CAPTURED = 160 * 2**20, 128
# Partial sums of 64 tokens in float32: of attention, a query's width for each of 64 parts of a context; of an FFN, 512
# programs by 128 columns, which are 1024 numbers for each such part.
SUMS = 4 * 64 * 64
SHARE = 0.8  # of the available memory, where no budget is given
LEAST_CONTEXT = 2048  # tokens
AT_ONCE = 2**24  # bytes of numbers in between while matrices are made small, see experts.lowbit
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for each use; dense + buffers + experts + kv <= budget.

    dense:         weights that always stay. buffers: the process, activations, logits, packing.
    experts:       what the engine keeps in memory at first; least_experts: the largest one of a layer.
    kv:            keys and values at first, for `requests` requests of full context; kv_full: for max_requests.
    kernels:       what compiled kernels grow to at most, part of the buffers.
    weights:       what matrices are kept in.
    device:        where all this is, "" = main memory. host: main memory for experts, if there is a device.
    least_budget:  less cannot work with this context, these experts and this dtype.
    problems:      what does not fit though it works; advice: what to change.
    """

    model: str
    dtype: str
    budget: int
    dense: int
    buffers: int
    experts: int
    kv: int
    all_experts: int
    least_experts: int
    kv_token: int
    kv_request: int
    kv_full: int
    context: int
    model_context: int | None
    max_requests: int
    kernels: int
    least_budget: int
    weights: str = "stored"
    device: str = ""
    host: int = 0
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many requests of full context run beside these experts; more where they are shorter."""
        return min(self.max_requests, self.kv // self.kv_request)

    @property
    def spare(self) -> int:
        """Bytes of the budget that neither weights nor keys nor buffers need."""
        return self.budget - self.dense - self.buffers - self.experts - self.kv


@dataclass(frozen=True)
class Needs:
    """What a model takes whatever the budget.

    heads:     of each layer with keys, the pre-gate's after the backbone's, how many heads and the bytes of one token's
               key in one; values take the same.
    fixed:     buffers that do not depend on the context; context_token: those that grow by every token of it.
    packs:     what packed copies of all experts take, alone and together; worth having, never needed.
    loading:   everything while the backbone is loaded, where that is more than it takes later.
    paging:    what entries take in main memory beyond their bytes, behind a device.
    """

    dense: int
    fixed: int
    context_token: int
    heads: tuple[tuple[int, int], ...]
    kernels: int
    packs: int
    all_experts: int
    least_experts: int
    model_context: int | None
    loading: int = 0
    paging: int = 0

    def kv(self, context: int) -> int:
        """Keys and values of one request: a slot's pages, by head, in every layer."""
        return sum(2 * count * pages(row * context) for count, row in self.heads)

    def buffers(self, context: int) -> int:
        """Everything that is neither weights nor keys."""
        return self.fixed + self.context_token * context

    def beside_experts(self, context: int) -> int:
        """The least that has to be there beside experts: one request of full context can run."""
        return self.dense + self.buffers(context) + self.kv(context)


def plan(
    folder: str | Path,
    *,
    memory: int | str | None = None,
    experts: int | float | str | None = None,
    context: int | None = None,
    max_requests: int = 32,
    max_tokens: int = 512,
    dtype: str = "auto",
    weights: str = "stored",
    device: str | None = None,
    host_memory: int | str | None = None,
) -> MemoryPlan:
    """Choose sizes for serving the model in `folder`, by the rule above. The arguments are those of EngineOptions.

    memory None: SHARE of what is available, but not more than is useful; host_memory None: likewise.

    Raises MoesaicError if the model cannot be served or the budget is below the minimum, which the message names.
    """
    if max_requests < 1 or max_tokens < 1:
        raise MoesaicError(f"max_requests {max_requests}, max_tokens {max_tokens}: expected at least 1")
    if device is not None and bits_of(weights) is not None:
        raise MoesaicError(f"weights {weights} on {device}: only CPUs have these products; leave out one of both")
    files = ModelFiles(folder)
    config = read_json(files.folder / CONFIG)
    dtype = served_dtype(config, dtype)
    needs = needs_of(config, files, dtype, max_requests, max_tokens, device, weights)
    first = _least_context(needs, context)
    longest = context or max(needs.model_context or 0, first)
    fixed = _fixed_experts(needs, experts)
    wanted = needs.all_experts if fixed is None else fixed
    least = needs.beside_experts(first) + (needs.least_experts if fixed is None else fixed)
    least = max(least, needs.loading)
    useful = needs.beside_experts(longest) + wanted + (max_requests - 1) * needs.kv(longest) + needs.packs
    budget = _budget(memory, max(useful, needs.loading), device)
    savings = _savings(files, config, dtype, weights, needs, first)
    if budget < least:
        if fixed is not None and fixed > needs.least_experts:
            savings = [(f"--experts {needs.least_experts}", fixed - needs.least_experts), *savings]
        raise MoesaicError(_too_small(budget, least, memory is None, savings))
    given = min(wanted, budget - needs.beside_experts(first))
    chosen = _longest_context(needs, budget - given, first, longest)
    full = max_requests * needs.kv(chosen)
    kv = min(full, budget - needs.dense - needs.buffers(chosen) - given)
    if device is not None:  # whole slots, which are there from the beginning
        kv = kv // needs.kv(chosen) * needs.kv(chosen)
    result = MemoryPlan(
        model=str(files.folder),
        dtype=dtype,
        budget=budget,
        dense=needs.dense,
        buffers=needs.buffers(chosen),
        experts=given,
        kv=kv,
        all_experts=needs.all_experts,
        least_experts=needs.least_experts,
        kv_token=2 * sum(count * row for count, row in needs.heads),
        kv_request=needs.kv(chosen),
        kv_full=full,
        context=chosen,
        model_context=needs.model_context,
        max_requests=max_requests,
        kernels=needs.kernels,
        least_budget=least,
        weights=weights,
        device=device or "",
        host=0 if device is None else _host(host_memory, needs, needs.all_experts - given),
    )
    return _with_comments(result, needs, savings, given_context=context is not None, given_experts=fixed is not None)


def _longest_context(needs: Needs, room: int, first: int, longest: int) -> int:
    """The longest of `first`, its doubles and `longest` for which one request fits into `room` beside experts."""
    while first < longest and needs.beside_experts(min(2 * first, longest)) <= room:
        first = min(2 * first, longest)
    return first


def _fixed_experts(needs: Needs, experts: int | float | str | None) -> int | None:
    """What experts shall have, None if that is left to the plan."""
    if experts is None:
        return None
    fixed = min(_size("experts", experts, needs.all_experts), needs.all_experts)
    if fixed < needs.least_experts:
        raise MoesaicError(
            f"experts: {human_bytes(fixed)} is less than the largest expert of a layer takes: expected at least "
            f"{needs.least_experts} bytes ({human_bytes(needs.least_experts)})"
        )
    return fixed


def pages(count: int) -> int:
    """`count` bytes in whole pages."""
    return -(-count // PAGE) * PAGE


def _size(name: str, value: int | float | str, whole: int | None = None) -> int:
    try:
        return size(value, whole)
    except MoesaicError as error:
        raise MoesaicError(f"{name}: {error}") from None


def _budget(memory: int | str | None, useful: int, device: str | None) -> int:
    if memory is not None:
        return _size("memory", memory)
    return min(int(SHARE * (available_bytes() if device is None else device_bytes(device))), useful)


def _host(memory: int | str | None, needs: Needs, beyond: int) -> int:
    """Main memory for experts: for all of them, or for `beyond` bytes that the device does not hold, as there is room.

    Besides, what passes through; and nothing else where the device holds all.
    """
    if memory is not None:
        return _size("host memory", memory)
    passing, room = needs.least_experts + PASSING, int(SHARE * available_bytes()) - BASE
    if not beyond:
        return passing
    whole = needs.all_experts + needs.paging + passing
    return whole if room >= whole else max(min(room, beyond + passing), passing)


def _least_context(needs: Needs, context: int | None) -> int:
    most = needs.model_context
    if context is None:
        return min(LEAST_CONTEXT, most or LEAST_CONTEXT)
    if context < 2 or (most is not None and context > most):
        least = "at least 2" if most is None else f"2 to {most}, the positions that the model has"
        raise MoesaicError(f"a context of {context} tokens: expected {least}")
    return context


# -- what the model needs ---------------------------------------------------------------------------------------------
def needs_of(
    config: Mapping[str, Any],
    files: ModelFiles,
    dtype: str,
    max_requests: int,
    max_tokens: int,
    device: str | None = None,
    weights: str = "stored",
) -> Needs:
    """What the model takes, with steps of `max_tokens` tokens and the logits of `max_requests`.

    On a device: the driver, whose memory nobody can bound, is not counted.
    """
    item = ITEM_BYTES[dtype]
    layout, parts = expert_entries(config, files, item)
    base, bits = text_config(config), bits_of(weights)
    least = max(sum(layout.bytes[key] for key in keys) for keys in layout.entries.values())
    dense, largest = _dense(base, files, parts, item)
    shape = AttentionShape.of(base)
    hidden, vocab = _number(base, "hidden_size", "n_embd", "d_model"), _number(base, "vocab_size")
    # An expert has at least two matrices, so it is at most this wide.
    width = least // (2 * hidden * item)
    # Of one token: six hidden states (residual, normed, sorted by expert and back), queries and keys before and after
    # their rotation, values, output, and three states of an expert. In a stock mixture the outputs of all its experts.
    chosen = 0 if config.get("layouts") else _optional(base, "num_experts_per_tok") or 1
    token = ((6 + 2 * chosen) * hidden + 4 * shape.query + 4 * shape.keys + 3 * width) * item
    # Of one row: logits as computed, and in float32 with their probabilities and an order of them with its places.
    row = vocab * (item + 4 + 4 + 4 + 8)
    pregate = config.get("pregate") or {}
    gate_heads: list[tuple[int, int]] = []
    gate_token = 0
    if pregate:
        gate_width = _number(pregate, "width")
        count = _number(pregate, "heads")
        gate_heads = [(count, 4 * gate_width // count)] * _number(pregate, "layers")
        gate_token = 4 * (8 * gate_width + _number(pregate, "mlp_width"))  # it reads a prompt at once, in float32
    paging = kernels = base_bytes = packs = loading = 0
    if device is None:
        base_bytes, paging = BASE, _paging(layout, parts, files, item, least)
        kernels = _kernels(layout, parts, files, dtype, max_tokens)
        if dtype == "bfloat16":
            packs = sum(layout.bytes[key] for keys in layout.entries.values() for key in keys)
            packs += layout.total_bytes if config.get("layouts") else 0  # a layer's experts in one piece
    else:
        base_bytes = LIBRARIES + CAPTURED * (token + vocab * item) + SUMS * (shape.query + 1024)
    if bits is not None:
        loading, packs = BASE + dense + largest, 0
        # While an expert is made small it lies there as stored, in one piece, filled up, and small twice.
        paging = 5 * least + AT_ONCE
        dense, largest = _dense(base, files, parts, item, bits)
        largest = 2 * largest + AT_ONCE
        if bits == 8:  # matrices are made anew for prompts
            largest = max(
                largest, max_tokens * token + max_requests * row + _anew(base, files, parts, item, shape, least)
            )
        else:
            kernels = _kernels_beside(base, files, parts, max_tokens)
        layout, _ = served_entries(config, files, weights, item)
        least = max(layout.bytes.values())
    # A chunk's mask over the context, and keys and values repeated for the heads that share them.
    mask = max_tokens * (1 + item) + (2 * shape.query * item if shape.query != shape.keys else 0)
    return Needs(
        dense=dense,
        fixed=base_bytes + kernels + max(largest, max_tokens * token + max_requests * row) + paging,
        context_token=mask + gate_token,
        heads=(*[(shape.heads, shape.keys // shape.heads * item)] * shape.layers, *gate_heads),
        kernels=kernels,
        packs=packs,
        all_experts=layout.total_bytes,
        least_experts=least,
        model_context=_model_context(base),
        loading=loading,
        paging=0 if device is None else _paging(layout, parts, files, item, least),
    )


def served_dtype(config: Mapping[str, Any], wanted: str) -> str:
    """The dtype to compute in: as stored, but float16 as bfloat16, for which CPUs have fast paths."""
    if wanted == "auto":
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        wanted = "bfloat16" if stored == "float16" else stored
    if wanted not in ITEM_BYTES:
        raise MoesaicError(f"dtype {wanted!r} is not served: expected auto, {' or '.join(ITEM_BYTES)}")
    return wanted


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own config inside that of a wrapper or of a model with several parts."""
    for name in ("base_config", "text_config"):
        inner = config.get(name)
        config = inner if isinstance(inner, dict) else config
    return config


def _number(config: Mapping[str, Any], *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        raise MoesaicError(f"{CONFIG} has no {' or '.join(names)} of at least 1: it is no decoder that can be planned")
    return value


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value >= 1), None)


@dataclass(frozen=True)
class AttentionShape:
    """Numbers of one token in one layer: `keys` of them in its keys, of all `heads`, and as many in its values."""

    layers: int
    query: int
    keys: int
    heads: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "AttentionShape":
        """Of a decoder's config. Raises MoesaicError for layers whose state is not keys and values of all tokens."""
        kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention", "chunked_attention"}
        if config.get("kv_lora_rank") or kinds:
            raise MoesaicError(
                f"{CONFIG} describes {', '.join(sorted(kinds)) or 'latent attention'}: serving takes decoders whose "
                "layers all attend to keys and values"
            )
        layers = _number(config, "num_hidden_layers", "n_layer", "n_layers")
        heads = _number(config, "num_attention_heads", "n_head", "n_heads")
        width = _optional(config, "head_dim") or _number(config, "hidden_size", "n_embd", "d_model") // heads
        shared = 1 if config.get("multi_query") else heads
        groups = _optional(config, "num_key_value_heads", "num_kv_heads") or shared
        return cls(layers, heads * width, width * groups, groups)


def _model_context(config: Mapping[str, Any]) -> int | None:
    return _optional(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def _dense(
    config: Mapping[str, Any], files: ModelFiles, parts: Parts, item: int, bits: int | None = None
) -> tuple[int, int]:
    """Bytes of all weights but experts, linear layers in `bits` a weight, and of the largest one."""
    experts = {part.tensor for ranges in parts.values() for part in ranges}
    sizes = []
    for name, place in files.tensors.items():
        if name not in experts:
            each = BITS[place.dtype]
            if name.startswith("pregate."):
                each = 32  # whatever the rest is
            elif place.dtype in FLOATS:
                each = 8 * item
            if bits is not None and quantized(name, place, config):
                sizes.append(matrix_bytes(place.shape, bits, item))
            else:
                sizes.append(place.elements * each // 8)
    if not any(name.endswith(HEADS) for name in files.tensors):
        # The output head shares the embedding's weights, but is packed into an order of its own.
        shape = _number(config, "vocab_size"), _number(config, "hidden_size", "n_embd", "d_model")
        sizes.append(shape[0] * shape[1] * item if bits is None else matrix_bytes(shape, bits, item))
    return sum(sizes), max(sizes)


def _paging(layout: Layout, parts: Parts, files: ModelFiles, item: int, least: int) -> int:
    """What pages that hold an entry's first and last row take beyond the entry, at most."""
    extra = 0
    for ranges in parts.values():
        for part in ranges:
            place = files.tensors[part.tensor]
            first, last = ((at - place.start) * 8 // BITS[place.dtype] * item for at in (part.start, part.stop))
            extra += pages(last) - first // PAGE * PAGE - (last - first)
    tensors = {part.tensor for ranges in parts.values() for part in ranges}
    whole = sum(pages(files.tensors[name].elements * item) for name in tensors)
    return min(extra, whole - least)  # pages that entries share count once


def _kernels(layout: Layout, parts: Parts, files: ModelFiles, dtype: str, max_tokens: int) -> int:
    """Bytes of compiled products: one for every shape of weights and number of rows, see experts.buckets.

    In float32 only packed weights are compiled for, which experts are not.
    """
    stored = {part.tensor for ranges in parts.values() for part in ranges}
    dense = {place.shape for name, place in files.tensors.items() if name not in stored and len(place.shape) == 2}
    experts = {sum(layout.bytes[key] for key in keys) for keys in layout.entries.values()}  # as many as widths
    packed, plain = (len({bucket(rows, least) for rows in range(1, max_tokens + 1)}) for least in (LEAST, PLAIN_LEAST))
    kernels = len(dense) * packed + (2 * len(experts) * plain if dtype == "bfloat16" else 0)
    return KERNEL * min(KERNELS, kernels)


def _anew(
    config: Mapping[str, Any], files: ModelFiles, parts: Parts, item: int, shape: AttentionShape, expert: int
) -> int:
    """Bytes of the largest matrix that a product of prompts makes anew: never the head's."""
    stored = {part.tensor for ranges in parts.values() for part in ranges}
    sizes = [
        place.elements * item
        for name, place in files.tensors.items()
        if name not in stored and not name.endswith(HEADS) and quantized(name, place, config)
    ]
    stacked = _number(config, "hidden_size", "n_embd", "d_model") * (shape.query + 2 * shape.keys) * item
    return max(*sizes, stacked, expert)


def _kernels_beside(config: Mapping[str, Any], files: ModelFiles, parts: Parts, max_tokens: int) -> int:
    """The same where most matrices are kept in few bits: nothing is compiled for those."""
    stored = {part.tensor for ranges in parts.values() for part in ranges}
    rest = ((name, place) for name, place in files.tensors.items() if name not in stored and len(place.shape) == 2)
    shapes = {place.shape for name, place in rest if not quantized(name, place, config)}
    return KERNEL * min(KERNELS, len(shapes) * len({bucket(rows) for rows in range(1, max_tokens + 1)}))


# -- what to say ------------------------------------------------------------------------------------------------------
def _savings(
    files: ModelFiles, config: Mapping[str, Any], dtype: str, weights: str, needs: Needs, context: int
) -> list[tuple[str, int]]:
    """Options that lower the minimum, and the bytes each saves; the first saves most."""
    found = []
    if context > 512:
        shorter = max(context // 4, 512)
        found.append((f"--context {shorter}", needs.beside_experts(context) - needs.beside_experts(shorter)))
    others = [("--dtype bfloat16", "bfloat16", weights)] * (dtype == "float32")
    others += [("--weights int8", dtype, "int8")] * (weights == "stored")
    same = needs_of(config, files, dtype, 1, 1, weights=weights)
    for option, other_dtype, other_weights in others:
        try:
            less = needs_of(config, files, other_dtype, 1, 1, weights=other_weights)
        except MoesaicError:  # experts of another build: loading will say so
            continue
        saved = same.beside_experts(context) + same.all_experts - less.beside_experts(context) - less.all_experts
        found.append((option, saved))
    return sorted((option for option in found if option[1] > 0), key=lambda option: -option[1])


def _saves(savings: Sequence[tuple[str, int]]) -> list[str]:
    return [f"{option} saves {human_bytes(saved)}" for option, saved in savings]


def _too_small(budget: int, least: int, chosen: bool, savings: Sequence[tuple[str, int]]) -> str:
    what = f"{SHARE:.0%} of the available memory" if chosen else "the budget"
    return "; ".join(
        (
            f"{what}, {human_bytes(budget)}, is below the minimum of this model, {least} bytes ({human_bytes(least)}): "
            f"give it --memory {_mebibytes(least)}",
            *_saves(savings),
        )
    )


def _with_comments(
    result: MemoryPlan, needs: Needs, savings: Sequence[tuple[str, int]], given_context: bool, given_experts: bool
) -> MemoryPlan:
    problems, advice = [], []
    if result.experts < result.all_experts:
        everything = needs.beside_experts(result.context) + result.all_experts
        problems.append(
            f"{human_bytes(result.experts)} of {human_bytes(result.all_experts)} of experts stay in memory: the others "
            f"come from {'main memory and ' if result.device else ''}the disk when they are needed"
        )
        if given_experts:
            advice.append(f"without --experts, --memory {_mebibytes(everything)} keeps all of them in memory")
        else:
            advice += [f"--memory {_mebibytes(everything)} keeps all of them in memory", *_saves(savings)]
    if not given_context and result.model_context is not None and result.context < result.model_context:
        problems.append(f"requests end at {result.context} of the {result.model_context} tokens that the model knows")
    if result.requests < result.max_requests:
        give_way = "" if given_experts or result.device else ", and experts give way to them"
        problems.append(
            f"{result.requests} of {result.max_requests} requests of {result.context} tokens run at once beside these "
            f"experts; of shorter ones more do{give_way}"
        )
        everything = result.budget - result.kv + result.kv_full
        advice.append(
            f"--memory {_mebibytes(everything)} runs {result.max_requests} requests of {result.context} tokens beside "
            "these experts"
        )
    return replace(result, problems=problems, advice=advice)


def _mebibytes(count: int) -> str:
    """At least `count` bytes, as an option takes them."""
    return f"{-(-count // 2**20)}MiB"
