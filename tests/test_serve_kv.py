"""Slots of keys and values: what is written is read, bytes are counted, prefixes are found and given up."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.serve.arena import PAGE
from moesaic.serve.kv import KVPool, KVShape

SHAPES = [KVShape(2, 8, torch.bfloat16), KVShape(3, 4, torch.float32)]


def write(pool: KVPool, slot: int, first: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slots, positions = torch.full((count,), slot), torch.arange(first, first + count)
    rows = []
    for layer, shape in enumerate(pool.shapes):
        keys, values = (torch.randn(count, shape.heads, shape.width, generator=generator).to(shape.dtype) for _ in "kv")
        pool.write(layer, pool.places(shape.heads, slots, positions), keys, values)
        rows += [keys, values]
    return rows


def read(pool: KVPool, slot: int, length: int) -> list[torch.Tensor]:
    return [matrix.transpose(0, 1) for layer in range(len(pool.shapes)) for matrix in pool.read(layer, slot, length)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_is_written_is_read_and_slots_do_not_touch() -> None:
    pool = KVPool(SHAPES, 3, 50)
    slots = [pool.acquire(list(range(10 * n, 10 * n + 50)), 50)[0] for n in range(3)]
    written = {slot: write(pool, slot, 0, 50, seed=slot) for slot in slots}
    assert sorted(slots) == [0, 1, 2]
    assert all(same(read(pool, slot, 50), written[slot]) for slot in slots)
    pool.free(slots[1], 50, keep=False)
    assert all(same(read(pool, slot, 50), written[slot]) for slot in (slots[0], slots[2]))
    assert all(not matrix.any() for matrix in read(pool, slots[1], 50))


def test_bytes_are_whole_pages() -> None:
    pool = KVPool(SHAPES, 2, 1000)
    assert pool.bytes_for(1) == 2 * (2 + 3) * PAGE  # 16 bytes a token in every head
    assert pool.bytes_for(256) == 2 * (2 + 3) * PAGE
    assert pool.bytes_for(257) == 2 * 2 * (2 + 3) * PAGE


def test_a_prefix_is_taken_over_or_copied() -> None:
    pool = KVPool(SHAPES, 3, 64)
    prompt = list(range(20))
    slot, cached = pool.acquire(prompt, 40)
    assert cached == 0
    rows = write(pool, slot, 0, 20)
    pool.extend(slot, prompt)
    other, cached = pool.acquire([*range(15), 99], 40)  # the first one runs: a copy
    assert other != slot
    assert cached == 15
    assert same(read(pool, other, 15), [row[:15] for row in rows])
    pool.free(slot, 20, keep=True)
    again, cached = pool.acquire([*prompt, 50], 40)
    assert (again, cached) == (slot, 20)
    assert same(read(pool, again, 20), rows)
    pool.free(again, 20, keep=True)
    assert pool.acquire(prompt, 40)[1] == 19, "the last token is left to run"


@given(st.data())
def test_bytes_taken_are_those_of_reservations_and_prefixes(data: st.DataObject) -> None:
    pool = KVPool(SHAPES, 3, 64)
    running: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            slot = data.draw(st.sampled_from(sorted(running)))
            pool.free(slot, len(running.pop(slot)), keep=data.draw(st.booleans()))
        elif pool.free_slots:
            ids = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=20))
            slot, cached = pool.acquire(ids, len(ids) + data.draw(st.integers(0, 30)))
            assert 0 <= cached < len(ids)
            write(pool, slot, cached, len(ids) - cached)
            pool.extend(slot, ids[cached:])
            running[slot] = ids
        else:
            pool.trim(data.draw(st.integers(0, pool.taken)))
        assert pool.taken == sum(slot.reserved for slot in pool._slots)
        assert pool.running <= pool.taken
    for slot, ids in running.items():
        pool.free(slot, len(ids), keep=True)
    pool.trim(0)
    assert pool.taken == pool.running == 0
    assert all(not matrix.any() for slot in range(3) for matrix in read(pool, slot, 64))
