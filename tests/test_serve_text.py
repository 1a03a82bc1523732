"""From logits to text: samplers against transformers' own processors, and text that is never cut in a character."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import logits_process as reference

from moesaic.models.loading import load_tokenizer
from moesaic.pocket import pocket_path
from moesaic.serve.constraint import Grammars
from moesaic.serve.request import Generation, RequestError
from moesaic.serve.sampling import Sampler, sample
from moesaic.serve.text import Detokenizer
from serving import letters

V = 50


def sampler(seed: int = 0, prompt: tuple[int, ...] = (1, 2, 3), constraint=None, **options) -> Sampler:
    return Sampler(Generation(**options), prompt, seed, V, frozenset({0}), constraint)


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


# -- sampling ---------------------------------------------------------------------------------------------------------
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, V), st.floats(0.05, 1), st.floats(0, 0.5))
def test_drawn_tokens_survive_transformers_warpers(seed, temperature, top_k, top_p, min_p):
    scores = logits(seed)
    ids = torch.tensor([[1, 2, 3]])
    warped = reference.TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        warped = reference.TopKLogitsWarper(top_k)(ids, warped)
    if top_p < 1:
        warped = reference.TopPLogitsWarper(top_p)(ids, warped)
    if min_p:
        warped = reference.MinPLogitsWarper(min_p)(ids, warped)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    allowed = set(torch.isfinite(warped[0]).nonzero()[:, 0].tolist())
    drawn = {sample(scores.clone(), [sampler(number, **options)])[0].id for number in range(20)}
    assert drawn <= allowed


def test_frequencies_are_the_probabilities():
    scores = logits(3)
    one = sampler(7, temperature=1.3)
    counts = torch.zeros(V)
    for _ in range(4000):
        counts[sample(scores.clone(), [one])[0].id] += 1
    assert float((counts / 4000 - (scores[0] / 1.3).softmax(-1)).abs().max()) < 0.03


@given(st.integers(0, 10**6), st.floats(0.5, 2))
def test_repetition_penalty_is_transformers(seed, penalty):
    scores, prompt = logits(seed), (4, 4, 9)
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt]), scores.clone())
    one = sampler(prompt=prompt, temperature=0, repetition_penalty=penalty, logprobs=3)
    choice = sample(scores.clone(), [one])[0]
    assert choice.id == int(expected.argmax())
    assert choice.logprob == pytest.approx(float(expected.log_softmax(-1).max()), abs=1e-5)
    assert [token for token, _ in choice.top] == expected[0].topk(3).indices.tolist()


def test_presence_and_frequency_count_the_output_alone():
    scores = torch.zeros(1, V)
    scores[0, 5], scores[0, 6] = 1.0, 0.9
    one = sampler(prompt=(5, 5), temperature=0, presence_penalty=0.3, frequency_penalty=0.2)
    assert [sample(scores.clone(), [one])[0].id for _ in range(4)] == [5, 6, 5, 6]


def test_a_requests_tokens_ignore_its_batch_mates():
    rows = [logits(seed) for seed in range(6)]
    alone = [sample(row.clone(), [sampler(seed, temperature=1.0)])[0].id for seed, row in enumerate(rows)]
    mixed = [sampler(seed, temperature=1.0) for seed in range(6)]
    mates = [sampler(9, temperature=0), sampler(8, temperature=0, ignore_eos=True, logprobs=1)]
    together = sample(torch.cat([*rows, *rows[:2]]), [*mixed, *mates])
    assert [choice.id for choice in together[:6]] == alone
    assert together[6].id == int(rows[0].argmax())


def test_ignored_ends_are_never_sampled():
    scores = torch.zeros(2, V)
    scores[:, 0] = 100.0
    scores[:, 7] = 1.0
    plain, warm = sampler(temperature=0, ignore_eos=True), sampler(temperature=0.01, ignore_eos=True)
    assert [choice.id for choice in sample(scores, [plain, warm])] == [7, 7]


def test_damaged_logits_are_one_requests_error():
    rows = logits(1, 3)
    rows[1, 4] = math.nan
    choices = sample(rows, [sampler(temperature=0) for _ in range(3)])
    assert [choice.error is None for choice in choices] == [True, False, True]


def test_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(RequestError, match="token 99"):
        sampler(logit_bias={99: 1.0})
    with pytest.raises(RequestError, match="top_p is 2"):
        Generation(top_p=2)


# -- text -------------------------------------------------------------------------------------------------------------
def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece models are: a space belongs to the word after it; bytes where no piece fits."""
    words = ["<unk>", "</s>", "▁", "▁a", "b", "▁the", "é", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"letters": letters(), "pocket": load_tokenizer(pocket_path()), "metaspace": metaspace()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_pieces_add_up_to_the_text(name, data):
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(max_size=30))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(token) for token in ids]
    assert "".join([*parts, detokenizer.flush()]) == whole
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in whole


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_stop_strings_end_the_text_before_them(name, data):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(data.draw(st.text("ab cé", max_size=30)), add_special_tokens=False).input_ids
    stops = data.draw(st.lists(st.text("ab cé", min_size=1, max_size=4), max_size=3))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    detokenizer = Detokenizer(tokenizer, stops)
    sent = ""
    for token in ids:
        sent += detokenizer.push(token)
        if detokenizer.stopped is not None:
            break
    sent += detokenizer.flush()
    places = [whole.index(stop) for stop in stops if stop in whole]
    assert (detokenizer.stopped is not None) == bool(places)
    if places:
        assert whole.startswith(sent)
        assert all(stop not in sent for stop in stops)
    else:
        assert sent == whole


# -- structured output ------------------------------------------------------------------------------------------------
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars():
    pytest.importorskip("llguidance")
    return Grammars(TOKENIZERS["pocket"])


def generated(grammars: Grammars, spec: dict, seed: int, most: int = 200) -> tuple[str, bool]:
    """Random logits under a constraint: the text, and whether it came to its end."""
    tokenizer = TOKENIZERS["pocket"]
    vocab = len(tokenizer)
    one = Sampler(
        Generation(temperature=1.0), [1], seed, vocab, frozenset({tokenizer.eos_token_id}), grammars.compile(spec)
    )
    generator, ids = torch.Generator().manual_seed(seed), []
    for _ in range(most):
        choice = sample(torch.randn(1, vocab, generator=generator), [one])[0]
        assert choice.error is None
        ids.append(choice.id)
        if choice.id == tokenizer.eos_token_id or one.finished:
            return tokenizer.decode(ids, skip_special_tokens=True), True
    return tokenizer.decode(ids, skip_special_tokens=True), False


def test_random_weights_speak_valid_json(grammars):
    ended = [generated(grammars, {"type": "json_schema", "schema": SCHEMA}, seed) for seed in range(12)]
    texts = [text for text, end in ended if end]
    assert texts
    for text in texts:
        value = json.loads(text)
        assert set(value) == {"name", "n"}
        assert len(value["name"]) <= 5
        assert 0 <= value["n"] <= 99


def test_regex_and_choice(grammars):
    assert {generated(grammars, {"type": "choice", "choices": ["yes", "no"]}, seed)[0] for seed in range(8)} == {
        "yes",
        "no",
    }
    assert all(
        generated(grammars, {"type": "regex", "pattern": "[ab]{3}-[0-9]"}, seed)[0][3] == "-" for seed in range(4)
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "regex", "pattern": "(("},
        {"type": "json_schema", "schema": {"type": "nonsense"}},
        {"type": "json_schema"},
        {"type": "grammar", "lark": "start: undefined"},
        {"type": "regex", "pattern": "a" * 70_000},
    ],
)
def test_grammars_that_cannot_be_used_are_refused(grammars, spec):
    with pytest.raises(RequestError) as error:
        grammars.compile(spec)
    assert error.value.parameter == "grammar"
