"""The language model example: its text, its baselines, what it writes."""

import itertools
import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import _english
import _text_baselines
import language_model


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_no_paragraph_is_on_both_sides_of_the_split():
    train, held_out = _english.english_split()
    assert not paragraphs(train) & paragraphs(held_out)
    assert 0.07 < len(held_out) / len(train) < 0.25
    assert (train + held_out).isascii()


def test_plain_quotes_and_dashes():
    assert _english.to_ascii("“it’s” – …é") == '"it\'s" - ...?'  # noqa: RUF001


def test_windows_have_each_character_but_the_first_once_to_predict():
    windows = _english.windows("abcdefgh", 3)
    texts = [_english.to_text(window) for window in windows]
    assert texts == ["abcd", "defg"]
    assert _english.windows("abcd", 3).shape == (1, 4)
    with pytest.raises(ValueError, match="a text of 3 has no window of 3"):
        _english.windows("abc", 3)


def test_n_grams_by_hand():
    # P(a) = (2 + 2 / 4) / (3 + 2); after "a", once "a" and once "b", it is mixed in.
    first = (2 + 2 / 4) / 5
    second = (1 + 2 * first) / 4
    bits = _text_baselines.n_gram_bits("aab", "aa", 1, 4)
    assert bits == pytest.approx(-(np.log2(first) + np.log2(second)) / 2)


def test_probabilities_of_all_texts_sum_to_one():
    texts = map("".join, itertools.product("abc", repeat=4))
    bits = [_text_baselines.n_gram_bits("abacabb", text, 2, 3) for text in texts]
    assert sum(2 ** (-4 * x) for x in bits) == pytest.approx(1)


def test_compression_bits_per_character():
    letters = np.random.default_rng(0).choice(list(string.ascii_lowercase), 8000)
    train, other = "".join(letters[:4000]), "".join(letters[4000:])
    assert _text_baselines.lzma_bits(train, train) < 0.2
    # No code is shorter than log2(26) = 4.7 bits for random letters.
    assert 4.7 < _text_baselines.lzma_bits(train, other) < 5.5


def test_spans_are_parts_of_their_windows_from_the_first_to_the_last_place():
    windows = jnp.arange(40).reshape(2, 20)
    keys = jax.random.split(jax.random.key(0), 200)
    spans = jax.vmap(lambda key: language_model.random_spans(key, windows, 17))(keys)
    starts = np.asarray(spans[..., 0] - windows[:, 0])
    assert {*starts.flat} == {0, 1, 2, 3}
    assert (starts[:, 0] != starts[:, 1]).any()
    np.testing.assert_array_equal(spans - spans[..., :1], [[[*range(17)]] * 2] * 200)
    whole = language_model.random_spans(keys[0], windows, 20)
    np.testing.assert_array_equal(whole, windows)


@pytest.fixture(scope="module")
def trained():
    """A model whose logits are far apart, as after training."""
    model = language_model.CharacterGRU(8)
    keys = jax.random.split(jax.random.key(1))
    gru = jax.jit(model.init)(keys[0], jnp.zeros((1, 3), int))["params"]
    kernel = 3 * jax.random.normal(keys[1], (8, _english.SYMBOLS))
    head = {"kernel": kernel, "bias": jnp.linspace(-1, 1, _english.SYMBOLS)}
    return model, {"gru": gru, "head": head}


def logits_of(model, params, symbols):
    _, hidden = model.apply({"params": params["gru"]}, symbols)
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def test_the_loss_is_that_of_each_character_after_those_before_it(trained):
    model, params = trained
    windows = _english.windows("To be, or not to be", 6)
    logits = logits_of(model, params, windows[:, :-1])
    labels = jnp.asarray(windows[:, 1:])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    each = language_model.losses_of_characters(model, params, windows)
    np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-5)
    mean = language_model.losses(model, params, windows, "mean")
    assert mean == pytest.approx(float(expected.mean()), rel=1e-4)


def write(trained, seed, prompt, count, *temperatures):
    key, begin = jax.random.key(seed), _english.to_symbols(prompt)
    how = count, jnp.array(temperatures)
    return np.asarray(language_model.generate(*trained, key, begin, *how))


def test_without_heat_the_likeliest_character_is_written_at_every_step(trained):
    (text,) = write(trained, 0, "To be", 12, 1e-6)
    assert len({*text}) > 2
    whole = np.concatenate([_english.to_symbols("To be"), text])
    likeliest = logits_of(*trained, whole[None, :-1]).argmax(-1)[0]
    np.testing.assert_array_equal(text, likeliest[4:])


def test_characters_are_drawn_as_often_as_the_temperature_says(trained):
    temperatures = jnp.full(4000, 2.0)
    texts = write(trained, 0, "x", 1, *temperatures)
    logits = logits_of(*trained, _english.to_symbols("x")[None])[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 2))
    drawn = np.bincount(texts[:, 0], minlength=_english.SYMBOLS) / len(texts)
    deviation = np.sqrt(expected / len(texts)) + 1e-3
    assert (np.abs(drawn - expected) < 5 * deviation).all()


def test_a_text_is_of_its_key_and_its_prompt(trained):
    texts = [
        write(trained, seed, prompt, 30, 0.7, 0.7)
        for seed, prompt in ((0, "ab"), (0, "ab"), (1, "ab"), (0, "yz"))
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()
    assert (texts[0] != texts[3]).any()
    assert (texts[0][0] != texts[0][1]).any()


def test_another_prompt_is_the_same_run_with_another_text(
    trained, tmp_path, capsys, monkeypatch
):
    texts = "To be, or not to be. " * 20, "that is the question. " * 10
    monkeypatch.setattr(language_model, "english_split", lambda: texts)
    same = {"hidden": 8, "window": 64, "length": 8}
    other = {"prompt": "Nobody", "temperature": (0.25,), "characters": 5}
    settings = language_model.LanguageSettings(**same, **other)
    assert settings.identity() == language_model.LanguageSettings(**same).identity()
    problem = language_model.LanguageModel(settings)
    problem.report(trained[1], Console(), tmp_path)
    output = capsys.readouterr().out
    assert "Nobody" in output
    assert output.count(" temperature ") == output.count(" temperature 0.25 ") == 1


def test_unusable_options_are_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert language_model.main([*out, "--length", "9", "--window", "8"]) == 2
    message = "error: --length must be at most --window, which is 8, got 9"
    assert message in capsys.readouterr().err
    assert language_model.main([*out, "--window", "10000000"]) == 2
    assert "has no window of 10000000" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        language_model.main([*out, "--prompt", ""])
    assert "must have at least one character" in capsys.readouterr().err
