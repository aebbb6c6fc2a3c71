"""The encoder and decoder: its dates, its padding, its greedy decoding."""

import datetime
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import encoder_decoder as program

MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun"]
MONTHS += ["Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
END = program.END


@pytest.fixture(scope="module")
def pairs():
    """Training and held-out phrases with their dates."""
    return [list(zip(*program.draw_texts(1000, side))) for side in (False, True)]


def test_numbers_and_ordinals():
    numbers = {7: "seven", 10: "ten", 19: "nineteen", 20: "twenty", 87: "eighty-seven"}
    assert {n: program.NUMBERS[n] for n in numbers} == numbers
    ordinals = {1: "first", 3: "third", 12: "twelfth", 20: "twentieth"}
    ordinals |= {21: "twenty-first", 29: "twenty-ninth", 31: "thirty-first"}
    assert {n: program.NTHS[n] for n in ordinals} == ordinals
    assert (len(program.NUMBERS), len(program.NTHS)) == (100, 32)


def days_of(iso):
    """The days of an ISO 8601 text; the end of an interval has no year."""
    first, slash, last = iso.partition("/")
    days = [first, *([f"{first[:5]}{last}"] if slash else [])]
    return [datetime.date.fromisoformat(day) for day in days]


def day_number(word):
    is_digits = word[0].isdigit()
    return int(re.sub("[a-z]", "", word)) if is_digits else program.NTHS.index(word)


def test_a_date_says_what_its_phrase_says(pairs):
    nths = "|".join(sorted(program.NTHS[1:], key=len, reverse=True))
    for phrase, iso in pairs[0]:
        days = days_of(iso)
        months = re.findall("|".join(MONTHS), phrase)
        assert [MONTHS.index(month) + 1 for month in months] == [d.month for d in days]
        numbers = re.findall(rf"\b(\d\d?(?:st|nd|rd|th)?|{nths})\b", phrase)
        assert [day_number(number) for number in numbers] == [d.day for d in days]
        weekdays = re.findall(r"\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b", phrase)
        assert {*weekdays} <= {f"{day:%a}" for day in days}
        (year,) = re.findall(r"\d{4}|(?:nineteen|twenty) [a-z-]+", phrase)
        century, _, rest = year.partition(" ")
        spoken = [program.NUMBERS.index(word) for word in (century, rest) if rest]
        expected = [*divmod(days[0].year, 100)] if rest else [days[0].year]
        assert (spoken or [int(year)]) == expected


def test_a_day_has_several_phrases_and_an_interval_runs_forwards(pairs):
    intervals = [days_of(iso) for _, iso in pairs[0] if "/" in iso]
    assert 400 < len(intervals) < 600
    assert all(first < last for first, last in intervals)
    shapes = {re.sub(r"[A-Z]?[a-z-]{3,}|\d+", "x", phrase) for phrase, _ in pairs[0]}
    assert len(shapes) > 50


def test_no_day_is_on_both_sides_of_the_split(pairs):
    sides = [{day for _, iso in side for day in days_of(iso)} for side in pairs]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 800


def test_the_longest_phrase_fits_into_an_array():
    days = [datetime.date(2023, 1, 1) + datetime.timedelta(n) for n in range(365)]
    words = {day: program.NTHS[day.day] for day in days}
    said = [
        form.format(day, word=words[day], nth=f"{day.day}th")
        for day in days
        for form in program.DAYS
    ]
    year = f"{program.NUMBERS[19]} {max(program.NUMBERS, key=len)}"
    day = max(said, key=len)
    names = {"first": day, "last": day, "year": year}
    longest = max(len(form.format(**names)) for form in program.PHRASES)
    assert longest <= program.LONGEST_PHRASE <= longest + 8


def test_texts_are_filled_with_ends():
    array = program.as_array(("1987", "a"), 5)
    assert array.tolist() == [[*b"1987", END], [*b"a", END, END, END, END]]


def test_the_linear_baseline_sees_trigrams_and_not_their_order():
    train = ["abc--", "--abc", "xyz--", "--xyz"] * 5
    dates = program.as_array(["1", "1", "2", "2"] * 5, program.LONGEST_DATE)
    predicted = program.linear_baseline(train, dates, ["-xyz-", "-abc-"])
    np.testing.assert_array_equal(predicted, dates[[2, 0]])


@pytest.fixture(scope="module")
def small():
    """A model that writes various symbols, and phrases with their dates."""
    phrases, dates = program.draw_texts(6, True)
    phrases = program.as_array(phrases, program.LONGEST_PHRASE)
    dates = program.as_array(dates, program.LONGEST_DATE)
    model = program.Translator()
    params = jax.jit(model.init)(jax.random.key(0), phrases, dates)
    # An untrained decoder repeats one symbol; larger weights make it write more.
    return model, jax.tree.map(lambda x: 3 * x, params), phrases, dates


def translate(model, params, phrases):
    return jax.jit(program.translate, static_argnums=0)(model, params, phrases)


def test_wider_padding_changes_nothing(small):
    model, params, phrases, _ = small
    written, weights = translate(model, params, phrases)
    wider = np.pad(phrases, ((0, 0), (0, 9)))
    wider_written, wider_weights = translate(model, params, wider)
    np.testing.assert_array_equal(wider_written, written)
    np.testing.assert_allclose(wider_weights[..., :-9], weights, atol=1e-4)
    assert not wider_weights[..., -9:].any()


def test_the_decoder_sees_zeros_at_padding(small):
    model, params, phrases, _ = small
    encode = jax.jit(lambda params: model.apply(params, phrases, method="encode"))
    _, memory, mask = encode(params)
    np.testing.assert_array_equal(mask, phrases != END)
    assert not np.asarray(memory)[~mask].any()
    assert np.asarray(memory)[mask].any(-1).all()


def test_attention_is_a_distribution_over_the_phrase(small):
    model, params, phrases, _ = small
    _, weights = translate(model, params, phrases)
    assert weights.shape == (6, program.LONGEST_DATE, program.LONGEST_PHRASE)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    at_padding = jnp.where(phrases[:, None] == END, weights, 0)
    assert not at_padding.any()


def test_step_by_step_it_writes_what_is_likeliest_in_all_steps_at_once(small):
    model, params, phrases, _ = small
    written = np.asarray(translate(model, params, phrases)[0])
    before = np.pad(written[:, :-1], ((0, 0), (1, 0)))
    logits = jax.jit(model.apply)(params, phrases, before)
    ended = np.cumsum(before[:, 1:] == END, axis=1) > 0
    is_open = np.pad(~ended, ((0, 0), (1, 0)), constant_values=True)
    assert len({*written[is_open]}) > 3
    np.testing.assert_array_equal(written[is_open], logits.argmax(-1)[is_open])


def test_nothing_is_written_after_the_end():
    """With logits that want an END at the second step and text after it."""
    script = jnp.array([ord("a"), END, *[ord("b")] * program.LONGEST_DATE])

    def apply(params, *arguments, method):
        if method == "encode":
            return jnp.zeros(2, int), None, None
        step = arguments[0]
        logits = jax.nn.one_hot(script[step], program.SYMBOLS)[:, None]
        return step + 1, logits, jnp.zeros((2, 1, 3))

    model = SimpleNamespace(apply=apply)
    written, _ = program.translate(model, {}, np.ones((2, 3), int))
    assert written[:, 0].tolist() == [ord("a")] * 2
    assert not written[:, 1:].any()


def test_the_loss_is_the_mean_up_to_the_first_end(small):
    model, params, phrases, dates = small
    before = np.pad(dates[:, :-1], ((0, 0), (1, 0)))
    logits = jax.jit(model.apply)(params, phrases, before)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, dates)
    ends = [row.tolist().index(END) + 1 for row in dates]
    assert {*ends} == {11, 17}
    counted = np.concatenate([row[:end] for row, end in zip(np.asarray(losses), ends)])
    loss = jax.jit(program.mean_loss, static_argnums=0)(model, params, phrases, dates)
    assert loss == pytest.approx(counted.mean(), rel=1e-4)


@pytest.mark.slow
def test_dates_are_translated_far_better_than_by_the_baseline(tmp_path):
    result = program.main(out=tmp_path)
    assert result["translator"] > 0.98
    assert result["baseline"] < 0.8
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
