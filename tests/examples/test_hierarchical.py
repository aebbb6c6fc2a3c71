"""The hierarchical example: its functions, and padding at both levels."""

import jax
import numpy as np
import pytest

import _functions
import hierarchical
import tdjax
from _functions import LINES, STEPS, VOCABULARY, WORDS, Documents
from _sequences import NO_LABEL

SOURCE = '''\
import x
class A:
    @property
    def f(self, a=1):  # a comment
        """Text
        of two lines."""
        for i in range(3):

            if a[i:]:
                def inner(): pass
                g(a,
                  i)
        return 'é'
    async def short(self):
        return 1
def last():
    if x: return
    with y:
        while z:
            with y:
                pass
    end()
'''
IN, SAME, OUT, OUT2, OUT3 = range(len(STEPS))


@pytest.fixture(scope="module")
def found():
    return [*_functions.functions(SOURCE)]


def test_functions_are_found_with_what_is_inside_and_without_short_ones(found):
    assert [lines[0].text for lines in found] == [
        "def f(self, a=1):  # a comment",
        "def last():",
    ]
    assert [len(lines) for lines in found] == [7, 7]


def test_a_logical_line_has_its_words_and_no_comment(found):
    words = [line.words for line in found[0]]
    assert " ".join(words[0]) == "def f ( self , a = <number> ) :"
    assert words[1] == ["<string>"]
    assert " ".join(words[5]) == "g ( a , i )"
    assert " ".join(words[6]) == "return <string>"
    assert found[0][5].text == "g(a,"


def test_steps_are_the_changes_of_depth(found):
    first, last = ([line.depth for line in lines] for lines in found)
    assert first == [1, 2, 2, 3, 4, 4, 2]
    assert _functions.steps(first).tolist() == [IN, SAME, IN, IN, SAME, OUT2]
    assert _functions.steps(last).tolist() == [IN, SAME, IN, IN, IN, OUT3]
    assert _functions.steps([5, 1, 2, 1]).tolist() == [OUT3, IN, OUT]


def test_indenting_undoes_steps(found):
    for lines in found:
        depths = np.array([line.depth for line in lines])
        indented = _functions.indent(_functions.steps([*depths]))
        np.testing.assert_array_equal(indented, depths - depths[0])
    assert _functions.indent(np.array([OUT, IN])).tolist() == [0, 0, 1]


def test_the_vocabulary_has_the_most_frequent_words(found, monkeypatch):
    monkeypatch.setattr(_functions, "VOCABULARY", 4)
    ids = _functions.vocabulary(found)
    assert ids == {":": 1, "(": 2, ")": 3}


def test_documents_are_padded_at_both_levels(found):
    ids = _functions.vocabulary(found[:1])
    made = _functions.documents(found, ids)
    assert made.words.shape == (2, LINES, WORDS)
    assert made.line_counts.tolist() == [7, 7]
    assert made.word_counts[0, :8].tolist() == [10, 1, 8, 7, 6, 6, 2, 0]
    assert made.words[0, 0, :10].tolist() == [ids[w] for w in found[0][0].words]
    assert made.labels[0, :8].tolist() == [
        *(NO_LABEL, IN, SAME, IN, IN, SAME, OUT2, NO_LABEL)
    ]
    assert found[1][2].words == ["with", "y", ":"]
    assert made.words[1, 2, :4].tolist() == [0, 0, ids[":"], 0]


def test_a_long_line_keeps_its_start_and_its_end():
    words = [f"w{i}" for i in range(100)]
    line = _functions.Line(words, 0, "")
    ids = {word: i for i, word in enumerate(words)}
    kept = _functions.documents([[line]], ids).words[0, 0].tolist()
    last = _functions.LAST_WORDS
    assert kept == [*range(WORDS - last), *range(100 - last, 100)]


@pytest.fixture(scope="module")
def batch():
    """Random functions with padding at both levels; one has no line but the first."""
    rng = np.random.default_rng(0)
    words = rng.integers(VOCABULARY, size=(3, 5, 4), dtype=np.int32)
    line_counts = np.array([5, 1, 3], np.int32)
    counts = rng.integers(1, 5, size=(3, 5), dtype=np.int32)
    counts *= np.arange(5) < line_counts[:, None]
    labels = np.where(counts > 0, rng.integers(len(STEPS), size=(3, 5)), NO_LABEL)
    return Documents(words, counts, line_counts, labels.astype(np.int32))


def models(capacity):
    return [hierarchical.Indenter(4, capacity), hierarchical.TwoLines()]


@pytest.fixture(scope="module")
def params(batch):
    return [
        jax.jit(model.init)(jax.random.key(0), batch)
        for model in models(int(batch.line_counts.sum()))
    ]


def with_other_padding(batch):
    words_there = np.arange(4) < batch.word_counts[..., None]
    lines_there = np.arange(5) < batch.line_counts[:, None]
    words = np.where(words_there, batch.words, (batch.words + 1) % VOCABULARY)
    counts = np.where(lines_there, batch.word_counts, 4)
    return batch._replace(words=words, word_counts=counts)


@pytest.mark.parametrize("which", [0, 1])
def test_padding_words_and_lines_change_nothing(which, batch, params):
    model = models(9)[which]
    there = np.arange(5) < batch.line_counts[:, None]
    loss, logits = hierarchical.mean_loss(model, params[which], batch)
    other = with_other_padding(batch)
    assert (other.words != batch.words).any()
    same_loss, same = hierarchical.mean_loss(model, params[which], other)
    np.testing.assert_array_equal(same[there], logits[there])
    assert same_loss == loss


def test_more_capacity_and_more_padding_change_nothing(batch, params):
    there = np.arange(5) < batch.line_counts[:, None]
    _, logits = hierarchical.mean_loss(models(9)[0], params[0], batch)
    wide = [(0, 0), (0, 3)]
    padded = batch._replace(
        words=np.pad(batch.words, [*wide, (0, 2)]),
        word_counts=np.pad(batch.word_counts, wide),
        labels=np.pad(batch.labels, wide, constant_values=NO_LABEL),
    )
    _, same = hierarchical.mean_loss(models(24)[0], params[0], padded)
    np.testing.assert_allclose(same[:, :5][there], logits[there], rtol=1e-5, atol=1e-6)


def test_the_flat_baseline_sees_a_line_and_the_one_before(batch, params):
    counts = np.ones(batch.word_counts.shape, np.int32)

    def logits(words):
        given = batch._replace(words=words, word_counts=counts)
        return hierarchical.TwoLines().apply(params[1], given)

    seen = tdjax.step_influence(logits, batch.words)
    np.testing.assert_array_equal(seen, np.eye(5) + np.eye(5, k=-1) > 0)


def test_every_line_counts_for_every_step(batch, params):
    full = np.full(3, 5, np.int32)

    def logits(words):
        given = batch._replace(words=words, line_counts=full)
        return hierarchical.Indenter(4, 15).apply(params[0], given)

    assert tdjax.step_influence(logits, batch.words).all()


def test_lines_are_encoded_one_by_one(batch, params):
    encoder = tdjax.linen.TimeDistributed(hierarchical.LineEncoder(4), method="fold")
    counts = np.full((3, 5), 4, np.int32)
    variables = encoder.init(jax.random.key(0), batch.words, counts)
    seen = tdjax.step_influence(
        lambda words: encoder.apply(variables, words, counts), batch.words
    )
    np.testing.assert_array_equal(seen, np.eye(5, dtype=bool))


def test_scores_are_of_labelled_lines(batch):
    labels = np.array([[NO_LABEL, IN, OUT, OUT2], [NO_LABEL, SAME, NO_LABEL, NO_LABEL]])
    given = batch._replace(labels=labels)
    steps = np.array([[OUT, IN, OUT, SAME], [SAME, SAME, OUT, OUT]])
    assert hierarchical.score(steps, given) == {
        "lines": "75.0%",
        "lines that come out": "50.0%",
        "whole functions": "50.0%",
    }
