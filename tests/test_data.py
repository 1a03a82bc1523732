"""Texts in, labelled token streams out: no document on both sides, and batches that depend on (seed, step) alone."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data import installed, sources
from moesaic.data.arithmetic import TEMPLATES, word_problems
from moesaic.data.domain import Domain, drop_near_duplicates, split_documents
from moesaic.data.installed import INSTALLED_DOMAINS, installed_domain
from moesaic.data.sources import load_domains, parse_domain
from moesaic.data.tokens import DomainTokens, TokenBatches, tokenize_domains
from moesaic.errors import MissingExtraError, MoesaicError

# -- splitting --------------------------------------------------------------------------------------------------------


@given(st.sets(st.text(st.characters(codec="utf-8"), min_size=1), min_size=2), st.randoms())
def test_no_document_is_lost_doubled_or_on_both_sides(texts, random):
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        return
    shuffled = [*texts, texts[0]]
    random.shuffle(shuffled)
    domain = split_documents("d", shuffled)
    assert sorted(domain.train + domain.validation) == sorted(texts)
    assert domain.train and domain.validation
    assert domain == split_documents("d", texts), "the order of the documents must not matter"
    assert domain.bytes == sum(len(text.encode()) for text in texts)


def test_a_document_stays_on_its_side_whatever_else_is_in_the_domain():
    texts = [f"document number {i}" for i in range(400)]
    whole, half = split_documents("d", texts), split_documents("d", texts[::2])
    assert set(half.validation) == set(whole.validation) & set(texts[::2])
    assert len(whole.validation) == pytest.approx(40, abs=15)


def test_few_documents_still_fill_both_sides():
    for count in (2, 3):
        domain = split_documents("d", [f"text {i}" for i in range(count)], validation_share=0.0)
        assert (len(domain.train), len(domain.validation)) == (count - 1, 1)
        domain = split_documents("d", [f"text {i}" for i in range(count)], validation_share=1.0)
        assert (len(domain.train), len(domain.validation)) == (1, count - 1)


def test_near_duplicates_are_dropped_and_others_kept_in_order():
    words = [f"word{i}" for i in range(100)]
    text, other = " ".join(words), " ".join(reversed(words))
    changed = " ".join(["changed", *words[1:]])  # 92 of 93 shingles are the same
    half = " ".join(words[:40] + [f"new{i}" for i in range(60)])  # a third is
    assert list(drop_near_duplicates([text, changed, other, half])) == [text, other, half]


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_word_problems_are_seeded_and_right():
    texts = list(word_problems(40, seed=3))
    assert texts == list(word_problems(40, seed=3)) and texts != list(word_problems(40, seed=4))
    equations = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", "\n".join(texts))
    assert len(equations) == 40 * 8 * 2
    for left, sign, right, result in equations:
        assert {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right)) == int(result)
    kinds = ("gives away", "boxes with", "share", "cents each")
    assert all(any(kind in text for text in texts) for kind in kinds) and len(kinds) == len(TEMPLATES)


# -- installed domains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSTALLED_DOMAINS)
def test_installed_domain(name):
    domain = installed_domain(name, 300_000)
    assert domain == installed_domain(name, 300_000), "the same machine gives the same text"
    assert 20_000 < domain.bytes < 300_000 + 2 * installed.MAX_DOCUMENT_CHARS
    held_out = sum(len(text.encode()) for text in domain.validation) / domain.bytes
    assert 0 < held_out < 0.4, "what is taken must not depend on what is held out"


def test_installed_domains_are_about_what_they_say():
    marks = {"python": "def ", "c": "#include", "licence": "copyright", "arithmetic": "Answer:"}
    for name, mark in marks.items():
        domain = installed_domain(name, 100_000)
        texts = domain.train + domain.validation
        assert sum(mark in text.lower() or mark in text for text in texts) > len(texts) / 2, name


def test_readmes_taken_are_not_those_held_out(monkeypatch):
    bodies = [f"package {i} does something useful. " * 20 for i in range(200)]
    distributions = [SimpleNamespace(metadata=SimpleNamespace(get_payload=lambda body=body: body)) for body in bodies]
    monkeypatch.setattr(installed.importlib.metadata, "distributions", lambda: distributions)
    monkeypatch.setattr(installed, "_site_folders", list)
    monkeypatch.setattr(installed, "drop_near_duplicates", lambda texts: texts)
    domain = installed_domain("readme", 50_000)
    assert len(domain.train) > 3 * len(domain.validation) > 0


def test_unknown_installed_domain_is_refused():
    with pytest.raises(MoesaicError, match="no installed domain 'fortran'; there are: python, c"):
        installed_domain("fortran")


# -- specifications ---------------------------------------------------------------------------------------------------


def documents(domain: Domain) -> set[str]:
    return set(domain.train + domain.validation)


@given(st.text(st.sampled_from("ab\n"), max_size=300), st.integers(1, 40))
def test_cutting_at_blank_lines_loses_nothing(text, at_least):
    pieces = list(sources._blank_line_documents(text, at_least))
    assert "\n\n".join(pieces) == text
    assert all(len(piece) >= at_least for piece in pieces[:-1])


def test_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i} " + "x" * 1990 for i in range(6)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    domain = parse_domain(f"a={tmp_path / 'a.txt'}")
    assert domain.name == "a"
    assert "\n\n".join(sorted(documents(domain))) == "\n\n".join(paragraphs)


def test_jsonl(tmp_path):
    texts = ["with a\u2028separator", "two\nlines", "ünï"]
    rows = [
        json.dumps({"text": texts[0]}, ensure_ascii=False),
        "",
        json.dumps(texts[1]),
        json.dumps({"text": texts[2]}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert documents(parse_domain(f"a={tmp_path / 'a.jsonl'}")) == set(texts)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{nope", "line 2 is not JSON"), ('{"body": "x"}', "line 2: expected"), ("[1]", "line 2: expected")],
)
def test_bad_jsonl_names_the_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(MoesaicError, match=message):
        parse_domain(f"a={tmp_path / 'a.jsonl'}")


def test_folder_takes_texts_of_all_depths_and_nothing_else(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "one.py").write_text("print(1)")
    (tmp_path / "deep" / "two.md").write_text("# two")
    (tmp_path / "deep" / "deeper" / "three.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert documents(parse_domain(f"a={tmp_path}")) == {"print(1)", "# two", "three", "four"}


def test_max_bytes_stops_reading(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(f"{i:010d}") for i in range(50)))
    assert len(documents(parse_domain(f"a={tmp_path / 'a.jsonl'}", max_bytes=95))) == 10
    assert len(documents(parse_domain(f"a={tmp_path / 'a.jsonl'}"))) == 50


class FakeDatasets:
    """Stands for the `datasets` package; remembers what was asked for and how far it was read."""

    def __init__(self, rows):
        self.rows, self.read, self.asked = rows, 0, None

    def load_dataset(self, *args, **kwargs):
        self.asked = (args, kwargs)
        if self.rows is None:
            raise ConnectionError("no route to the hub")
        return self._rows()

    def _rows(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_hf_dataset_is_streamed_only_as_far_as_needed(monkeypatch):
    fake = FakeDatasets([{"body": f"{i:020d}"} for i in range(1000)])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    domain = parse_domain("web=hf:allenai/c4:en#body", max_bytes=200)
    assert len(documents(domain)) == 10 and fake.read <= 11
    assert fake.asked == (("allenai/c4", "en"), {"split": "train", "streaming": True})


def test_hf_errors_are_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"body": "x"}]))
    with pytest.raises(MoesaicError, match="no text column 'text'; it has: body"):
        parse_domain("web=hf:some/set")
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(None))
    with pytest.raises(MoesaicError, match="cannot open the dataset 'some/set': no route"):
        parse_domain("web=hf:some/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moesaic\[data\]'"):
        parse_domain("web=hf:some/set")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fortran", "no installed domain 'fortran'"),
        ("code=", "expected name=path"),
        ("=path", "expected name=path"),
        ("code=/nowhere/at/all", "no file or folder"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(MoesaicError, match=message):
        load_domains(["arithmetic", spec], max_bytes=2_000)


def test_the_default_is_all_installed_domains_in_order(monkeypatch):
    monkeypatch.setattr(sources, "installed_domain", lambda name, max_bytes: Domain(name, ("a",), ("b",)))
    assert [domain.name for domain in load_domains()] == list(INSTALLED_DOMAINS)
    assert [domain.name for domain in load_domains(["prose", "c"])] == ["prose", "c"]


# -- tokens -----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one id a character: its code point."""

    def __init__(self, bos=None, eos=None):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens, "boundaries are ours to set, once a document"
        return {"input_ids": [[ord(character) for character in one] for one in text]}


@pytest.mark.parametrize(
    ("tokenizer", "head"), [(Letters(bos=1, eos=2), [1]), (Letters(eos=2), [2]), (Letters(), [])]
)  # fmt: skip
def test_streams_mark_document_boundaries(tokenizer, head):
    (stream,) = tokenize_domains([Domain("d", ("ab", "c"), ("äé",))], tokenizer)
    assert stream.train.tolist() == [*head, 97, 98, *head, 99]
    assert stream.validation.tolist() == [*head, ord("ä"), ord("é")]
    assert stream.bytes_per_token == 2.0, "four bytes in two tokens; boundaries carry no text"


def stream(name="d", train=100, validation=50, first=0) -> DomainTokens:
    """Token i of the training stream is `first + i`, so that every window tells where it came from."""
    numbers = np.arange(first, first + train, dtype=np.int32)
    return DomainTokens(name, numbers, np.arange(validation, dtype=np.int32), 1.0)


def test_windows_do_not_overlap_and_are_spread_evenly():
    tokens = stream(validation=105)
    assert tokens.windows(10, 100).tolist() == [list(range(s, s + 10)) for s in range(0, 100, 10)]
    assert tokens.windows(10, 4)[:, 0].tolist() == [0, 30, 60, 90], "first and last included"
    assert tokens.windows(50, 1, "train").tolist() == [list(range(50))]
    assert tokens.windows(10, 3).dtype == torch.int64


@given(st.integers(2, 30), st.integers(1, 12), st.integers(30, 200))
def test_windows_are_distinct_whatever_the_sizes(length, limit, tokens):
    starts = stream(validation=tokens).windows(length, limit)[:, 0].tolist()
    assert len(set(starts)) == len(starts) == min(limit, tokens // length)
    assert all(start % length == 0 for start in starts)


@pytest.mark.parametrize(
    ("length", "limit", "message"),
    [(51, 3, "50 validation tokens, fewer than one window of 51"), (10, 0, "0 windows"), (1, 3, "of 1 tokens")],
)
def test_impossible_windows_are_refused(length, limit, message):
    with pytest.raises(MoesaicError, match=message):
        stream().windows(length, limit)


# -- batches ----------------------------------------------------------------------------------------------------------

THREE = (stream("a", 100, first=0), stream("b", 60, first=1000), stream("c", 40, first=2000))


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_batch_depends_on_seed_and_step_alone():
    batches = TokenBatches(THREE, 4, 8, seed=5)
    late_first = [batches.batch(step) for step in (7, 0, 7)]
    fresh = TokenBatches(THREE, 4, 8, seed=5)
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(late_first[0], fresh.batch(7)) and same(late_first[2], late_first[0])
    assert not same(late_first[0], late_first[1]) and not same(late_first[0], TokenBatches(THREE, 4, 8).batch(7))


def test_rows_are_windows_of_the_labelled_domain():
    seen = {domain.name: set() for domain in THREE}
    for step in range(400):
        batch = TokenBatches(THREE, 4, 8).batch(step)
        assert batch["input_ids"].shape == (4, 8) and batch["input_ids"].dtype == torch.int64
        for row, label in zip(batch["input_ids"], batch["domain"].tolist(), strict=True):
            assert row.tolist() == list(range(int(row[0]), int(row[0]) + 8))
            assert int(row[0]) // 1000 == int(row[-1]) // 1000 == label
            seen[THREE[label].name].update(row.tolist())
    missing = {domain.name: set(domain.train.tolist()[:-1]) - seen[domain.name] for domain in THREE}
    assert not any(missing.values()), "every part of a domain is drawn sooner or later"


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7])
def test_domains_take_turns(batch_size):
    counts = np.array([TokenBatches(THREE, batch_size, 8).batch(s)["domain"].bincount(minlength=3) for s in range(300)])
    assert (counts.max(1) - counts.min(1)).max() <= 1, "within a batch, as even as its size allows"
    assert counts.sum(0) == pytest.approx([100 * batch_size] * 3, rel=0.15), "and over batches nobody is preferred"


def test_weights_set_the_mixture():
    batches = TokenBatches(THREE, 8, 8, weights=(3.0, 1.0, 0.0))
    counts = sum(batches.batch(step)["domain"].bincount(minlength=3) for step in range(200))
    assert counts[2] == 0 and counts[0] / counts.sum() == pytest.approx(0.75, abs=0.04)


def test_fingerprint_changes_with_everything_that_changes_a_batch():
    base = TokenBatches(THREE, 4, 8)
    other_text = (*THREE[:2], stream("c", 40, first=2001))
    variants = [
        TokenBatches(THREE, 5, 8),
        TokenBatches(THREE, 4, 9),
        TokenBatches(THREE, 4, 8, seed=1),
        TokenBatches(THREE, 4, 8, weights=(1.0, 1.0, 1.0)),
        TokenBatches(THREE[::-1], 4, 8),
        TokenBatches(other_text, 4, 8),
    ]
    prints = [variant.fingerprint for variant in [base, *variants]]
    assert len(set(prints)) == len(prints)
    assert TokenBatches(THREE, 4, 8).fingerprint == prints[0]


def test_a_domain_shorter_than_a_window_is_named():
    with pytest.raises(MoesaicError, match="domain 'c' has 40 training tokens, not more than one window of 40"):
        TokenBatches(THREE, 4, 40)
