"""The encoder and decoder example: its dates, its padding, its greedy decoding."""

import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _dates
import _text_pairs
import _trigrams
import encoder_decoder

FEW = 2000


@pytest.fixture(scope="module")
def texts():
    """Training and held-out pairs."""
    return [_dates.draw_pairs(side, FEW, seed=0) for side in _dates.split_dates()]


@pytest.mark.parametrize(
    ("number", "ordinal"),
    [
        (1, "first"),
        (2, "second"),
        (8, "eighth"),
        (12, "twelfth"),
        (13, "thirteenth"),
        (20, "twentieth"),
        (21, "twenty-first"),
        (30, "thirtieth"),
    ],
)
def test_ordinals(number, ordinal):
    assert _dates.ordinal_in_words(number) == ordinal


@pytest.mark.parametrize(
    ("year", "names"),
    [
        (1900, ["nineteen hundred"]),
        (1905, ["nineteen hundred and five", "nineteen oh five"]),
        (1987, ["nineteen hundred and eighty-seven", "nineteen eighty-seven"]),
        (2000, ["two thousand"]),
        (2010, ["two thousand and ten", "twenty ten"]),
    ],
)
def test_years(year, names):
    assert _dates.years_in_words(year) == names


def dates_of(iso):
    """The dates in an ISO 8601 text, also the abbreviated end of an interval."""
    first, slash, last = iso.partition("/")
    return [first, *([f"{first[:5]}{last}"] if slash else [])]


def test_no_date_is_on_both_sides_of_the_split(texts):
    sides = [{date for _, iso in side for date in dates_of(iso)} for side in texts]
    assert not sides[0] & sides[1]
    assert all({len(date) for date in side} == {4, 7, 10} for side in sides)


def test_dates_exist_and_intervals_run_forwards(texts):
    for _, iso in texts[0]:
        days = [date for date in dates_of(iso) if len(date) == 10]
        parsed = [datetime.date.fromisoformat(day) for day in days]
        assert parsed == sorted(set(parsed))


def test_phrases_are_whole_and_name_the_weekday_of_their_date(texts):
    named = 0
    for phrase, iso in texts[0]:
        assert "{" not in phrase
        assert phrase.isascii()
        assert 4 <= len(phrase) <= _dates.LONGEST_PHRASE
        first = phrase[:3]
        if first in {"Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"}:
            assert datetime.date.fromisoformat(iso).strftime("%a") == first
            named += 1
    assert named > FEW / 20


def test_digits_in_a_phrase_are_in_its_date(texts):
    for phrase, iso in texts[0]:
        words = phrase.replace(",", " ").split()
        numbers = {word.rstrip("dhnrst") for word in words if word[0].isdigit()}
        parts = iso.replace("/", "-").split("-")
        assert numbers <= {part.lstrip("0") for part in parts}


def test_a_phrasing_has_a_fixed_meaning():
    words = {"year": "1987", "first": "3 March", "last": "5 April"}
    expanded = {
        _dates._expand("{an interval}", words, np.random.default_rng(seed))
        for seed in range(50)
    }
    assert expanded == {
        "3 March to 5 April 1987",
        "from 3 March to 5 April, 1987",
        "between 3 March and 5 April, 1987",
        "in 1987, from 3 March to 5 April",
    }


def test_texts_are_padded_with_ends_and_come_back():
    texts = [("May 1987", "1987-05"), ("in 2001", "2001")]
    pairs = _text_pairs.as_pairs(texts, 10, 8)
    assert pairs.sources.shape == (2, 10)
    assert pairs.source_lengths.tolist() == [8, 7]
    assert pairs.target_lengths.tolist() == [8, 5]
    assert pairs.targets[1].tolist() == [*b"2001", 0, 0, 0, 0]
    assert [_text_pairs.as_text(row) for row in pairs.targets] == ["1987-05", "2001"]


def test_the_linear_baseline_sees_trigrams_and_not_their_order():
    texts = [("abc--", "1"), ("--abc", "1"), ("xyz--", "2"), ("--xyz", "2")]
    pairs = _text_pairs.as_pairs(texts * 5, 5, 2)
    new = _text_pairs.as_pairs([("-abc-", "1"), ("-xyz-", "2")], 5, 2)
    known = pairs.sources, pairs.targets
    predicted = _trigrams.linear_baseline(*known, new.sources, 128)
    assert predicted.tolist() == new.targets.tolist()
    orders = _text_pairs.as_pairs([("a--b", "1"), ("b--a", "2")], 4, 2)
    counts = _trigrams._present(orders.sources, 128).sum(axis=1)
    assert counts.tolist() == [2, 2]


@pytest.fixture(scope="module")
def problem():
    settings = encoder_decoder.TranslationSettings(examples=20, hidden=8)
    problem = encoder_decoder.Translation(settings)
    params = problem.init(jax.random.key(0))
    # An untrained decoder repeats one symbol; larger weights make it write more.
    return problem, jax.tree.map(lambda x: 4 * x, params)


def test_padding_of_a_phrase_never_reaches_the_dates(problem):
    problem, params = problem
    pairs = _text_pairs.Pairs(*(array[:4] for array in problem.held_out))
    padding = np.arange(_dates.LONGEST_PHRASE) >= pairs.source_lengths[:, None]
    assert padding.any(axis=1).all()
    dirty = pairs._replace(sources=np.where(padding, ord("x"), pairs.sources))
    clean = encoder_decoder.predict(problem.model, params, pairs)
    for got, want in zip(encoder_decoder.predict(problem.model, params, dirty), clean):
        np.testing.assert_array_equal(got, want)


def test_step_by_step_the_decoder_writes_what_all_steps_at_once_find_likeliest(problem):
    problem, params = problem
    pairs = _text_pairs.Pairs(*(array[:8] for array in problem.held_out))
    _, written = encoder_decoder.predict(problem.model, params, pairs)
    before = encoder_decoder.previous(written)
    arguments = pairs.sources, pairs.source_lengths, before
    logits = jax.jit(problem.model.apply)({"params": params}, *arguments)
    ended = np.cumsum(np.asarray(before[:, 1:]) == 0, axis=1) > 0
    open_steps = np.pad(~ended, ((0, 0), (1, 0)), constant_values=True)
    assert len({*np.asarray(written)[open_steps]}) > 3
    np.testing.assert_array_equal(
        np.where(open_steps, written, -1), np.where(open_steps, logits.argmax(-1), -1)
    )


def test_nothing_is_written_after_the_end(problem):
    """With logits that want an end at the second step and text after it."""
    script = jnp.array([ord("a"), 0, ord("b"), ord("c")])

    class Scripted:
        def apply(self, variables, *arguments, method):
            if method == "encode":
                return None, jnp.zeros(2, jnp.int32)
            step = arguments[0]
            return step + 1, jax.nn.one_hot(script[step], 128)[:, None]

    pairs = _text_pairs.as_pairs([("x", "abc"), ("y", "abc")], 3, 4)
    written = encoder_decoder.translate(Scripted(), {}, pairs)
    assert written.tolist() == [[ord("a"), 0, 0, 0]] * 2


def test_the_loss_is_the_mean_up_to_the_ends():
    pairs = _text_pairs.as_pairs([("x", "ab"), ("y", "")], 1, 4)
    losses = jnp.array([[1.0, 2.0, 3.0, jnp.nan], [6.0, jnp.inf, 50.0, 60.0]])
    assert encoder_decoder.mean_loss(losses, pairs) == (1 + 2 + 3 + 6) / 4
