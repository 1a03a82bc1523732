"""Attention of a step: what it computes, and that no bit of it depends on who else is in the step, on any thread."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.serve.attention import RaggedAttention, Scores, Segment
from moesaic.serve.kv import KVPool, KVShape

SCALE = 0.3


@pytest.fixture(autouse=True)
def two_threads():
    """Threads have scratch memory of their own: what depends on it shows with two of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def filled(groups: int, width: int, dtype: torch.dtype, slots: int = 5, length: int = 700) -> KVPool:
    """A pool whose slots are full of random keys."""
    pool = KVPool([KVShape(groups, width, dtype)], slots, length + 100)
    generator = torch.Generator().manual_seed(0)
    for slot in range(slots):
        rows = [torch.randn(length, groups, width, generator=generator).to(dtype) for _ in "kv"]
        pool.write(0, pool.places(groups, torch.full((length,), slot), torch.arange(length)), *rows)
    return pool


def step(pool: KVPool, segments: list[Segment], heads: int, scores: Scores = Scores(SCALE)) -> torch.Tensor:  # noqa: B008
    """The step's output; a token's query, key and value are its slot's and position's."""
    shape = pool.shapes[0]
    query, key, value = [], [], []
    for segment in segments:
        for position in range(segment.past, segment.past + segment.tokens):
            generator = torch.Generator().manual_seed(1000 * segment.slot + position)
            query.append(torch.randn(heads, shape.width, generator=generator))
            for rows in (key, value):
                rows.append(torch.randn(shape.heads, shape.width, generator=generator))
    rows = [torch.stack(each).to(shape.dtype) for each in (query, key, value)]
    return RaggedAttention(pool, segments).attend(0, *rows, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (12, 12), (6, 2), (8, 2), (4, 1), (10, 2)])
@pytest.mark.parametrize("past", [5, 130, 570])
def test_bits_do_not_depend_on_batch_mates(heads, groups, past, dtype):
    pool = filled(groups, 32, dtype)
    segments = [Segment(slot, slot, 1, past) for slot in range(5)]
    together = step(pool, segments, heads)
    for slot in range(5):
        assert torch.equal(step(pool, [Segment(slot, 0, 1, past)], heads)[0], together[slot])
    assert torch.equal(step(pool, segments[:3], heads), together[:3])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_step_is_plain_attention_of_each_request(data):
    groups = data.draw(st.sampled_from([1, 2, 3]))
    heads = groups * data.draw(st.sampled_from([1, 2, 3, 4]))
    window = data.draw(st.sampled_from([None, 7, 300]))
    pool = filled(groups, 8, torch.float32, length=80)
    slots = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
    segments, start = [], 0
    for slot in slots:
        tokens = data.draw(st.sampled_from([1, 1, 1, 4]))
        segments.append(Segment(slot, start, tokens, data.draw(st.integers(0, 70))))
        start += tokens
    scores = Scores(SCALE, window)
    found = step(pool, segments, heads, scores)
    for slot, first, tokens, past in segments:
        keys, values = (each.repeat_interleave(heads // groups, 0) for each in pool.read(0, slot, past + tokens))
        at, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)
        seen = (key <= at) & (key > at - (window or past + tokens))
        query = []
        for position in range(past, past + tokens):
            query.append(torch.randn(heads, 8, generator=torch.Generator().manual_seed(1000 * slot + position)))
        wanted = F.scaled_dot_product_attention(
            torch.stack(query, 1)[None], keys[None], values[None], attn_mask=seen, scale=SCALE
        )
        torch.testing.assert_close(found[first : first + tokens].transpose(0, 1), wanted[0], rtol=1e-4, atol=1e-5)
