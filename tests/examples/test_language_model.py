"""The language model: its text and words, its tied table, what it writes."""

import itertools
import random
import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import language_model as program

WORDS = [*map(chr, range(128)), "To", " be", ",", " or", " not", " to"]


def test_no_paragraph_is_on_both_sides_of_the_split():
    sides = program.read_chapters()
    train, held_out = (
        {" ".join(paragraph.split()) for paragraph in side.split("\n\n")}
        for side in sides
    )
    assert not train & held_out
    assert 0.07 < len(sides[1]) / len(sides[0]) < 0.25
    assert all(side.isascii() for side in sides)


def test_rare_words_are_spelled():
    text = "one two\n  one two.\n  one three ;\n  two"
    words = program.vocabulary(text)
    assert words[:128] == [*map(chr, range(128))]
    assert sorted(words[128:]) == ["\n  ", "one"]
    words = program.vocabulary(f"{text} two one one one")
    assert sorted(words[128:]) == ["\n  ", " one", " two", "one"]
    ids = program.encode("two one!\n  one", words)
    assert [words[id] for id in ids] == ["t", "w", "o", " one", "!", "\n  ", "one"]


def test_a_text_comes_back_from_its_ids():
    train, held_out = program.read_chapters()
    words = program.vocabulary(train)
    assert 1000 < len(words) == len({*words})
    for text in (train, held_out, string.printable):
        ids = program.encode(text, words)
        assert "".join(words[id] for id in ids) == text


def test_n_grams_by_hand():
    # P(a) = (2 + 2 / 128) / (3 + 2); after "a", once "a" and once "b", it is mixed in.
    first = (2 + 2 / 128) / 5
    second = (1 + 2 * first) / 4
    bits = program.n_gram_bits("aab", "aa", context=1)
    assert bits == pytest.approx(-(np.log2(first) + np.log2(second)) / 2)


def test_n_gram_probabilities_of_the_next_character_sum_to_one():
    def probability(text):
        return 2 ** -(program.n_gram_bits("abacabb", text, context=2) * len(text))

    texts = [f"ab{chr(code)}" for code in range(128)]
    assert sum(map(probability, texts)) == pytest.approx(probability("ab"))


def test_compression_bits_per_character():
    letters = random.Random(0).choices(string.ascii_lowercase, k=8000)
    train, other = "".join(letters[:4000]), "".join(letters[4000:])
    assert program.lzma_bits(train, train) < 0.2
    # No code is shorter than log2(26) = 4.7 bits for random letters.
    assert 4.7 < program.lzma_bits(train, other) < 5.5


@pytest.fixture(scope="module")
def trained():
    """A model whose logits are far apart, as after training."""
    model = program.LanguageModel(len(WORDS))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 3), int))["params"]
    table = 6 * params["embed"]["embedding"]
    bias = jnp.linspace(-1, 1, len(WORDS))
    return model, {**params, "embed": {"embedding": table}, "bias": bias}


def logits_of(model, params, ids, table):
    """With plain JAX from the table on."""
    _, hidden = jax.jit(model.apply)({"params": params}, ids)
    return hidden @ table.T + params["bias"]


def loss_by_optax(model, params, ids, table):
    logits = logits_of(model, params, ids[:, :-1], table)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return losses.mean()


def encoded(*texts):
    return jnp.stack([program.encode(text, WORDS) for text in texts])


def test_the_loss_is_that_of_each_word_after_those_before_it(trained):
    model, params = trained
    ids = encoded("To be, or not", "To not, or be")
    assert ids.shape == (2, 5)
    loss = jax.jit(program.mean_loss, static_argnums=0)(model, params, ids)
    expected = loss_by_optax(model, params, ids, params["embed"]["embedding"])
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_gradient_of_the_table_is_that_of_both_uses(trained, capsys):
    model, params = trained
    ids = encoded("To be, or not to be")
    program_gradient = jax.jit(jax.grad(program.mean_loss, 1), static_argnums=0)
    tied = program_gradient(model, params, ids)["embed"]["embedding"]
    optax_gradient = jax.jit(jax.grad(loss_by_optax, (1, 3)), static_argnums=0)
    rest, of_head = optax_gradient(model, params, ids, params["embed"]["embedding"])
    of_embedding = rest["embed"]["embedding"]
    assert np.linalg.norm(of_embedding) > 1e-3 < np.linalg.norm(of_head)
    np.testing.assert_allclose(tied, of_embedding + of_head, rtol=1e-3, atol=1e-6)
    # Words that are not read are rows without a gradient in the embedding alone.
    assert not of_embedding[ord("x")].any()
    assert tied[ord("x")].any()
    program.compare_gradients(model, params, ids)
    shown = [np.linalg.norm(x) for x in (of_embedding, of_head, tied)]
    output = capsys.readouterr().out
    assert all(f"{size:.3f} " in output for size in shown)


def test_a_word_depends_on_those_before_it_alone(trained):
    model, params = trained
    table = params["embed"]["embedding"]
    one, other = encoded("To be, or not", "To be, to be")
    logits = [logits_of(model, params, ids[None], table) for ids in (one, other)]
    np.testing.assert_array_equal(logits[0][:, :3], logits[1][:, :3])
    assert (logits[0][:, 3] != logits[1][:, 3]).any()


def test_dropout_is_on_in_training_alone(trained):
    model, params = trained
    ids = encoded("To be, or not to be")
    loss = jax.jit(program.mean_loss, static_argnums=0)
    keys = jax.random.key(0), jax.random.key(0), jax.random.key(1), None
    losses = [float(loss(model, params, ids, dropout_key=key)) for key in keys]
    assert losses[0] == losses[1]
    assert len({*losses}) == 3
    assert losses[3] == float(loss(model, params, ids))


def write(trained, seed, prompt, texts, temperature):
    prompts = jnp.tile(encoded(prompt), (texts, 1))
    written = jax.jit(program.write, static_argnums=0)
    return np.asarray(written(*trained, jax.random.key(seed), prompts, temperature))


def test_without_heat_the_likeliest_word_is_written_at_every_step(trained):
    (text,) = write(trained, 0, "To be", 1, 1e-6)
    assert text.shape == (program.WRITTEN,)
    assert len({*text}) > 2
    whole = np.concatenate([encoded("To be")[0], text])
    table = trained[1]["embed"]["embedding"]
    likeliest = logits_of(*trained, whole[None, :-1], table)[0].argmax(-1)
    np.testing.assert_array_equal(text, likeliest[1:])


def test_words_are_drawn_as_often_as_the_temperature_says(trained, monkeypatch):
    monkeypatch.setattr(program, "WRITTEN", 1)
    ids = write(trained, 0, "To be", 4000, 2.0)[:, 0]
    logits = logits_of(*trained, encoded("To be"), trained[1]["embed"]["embedding"])
    expected = np.asarray(jax.nn.softmax(logits[0, -1] / 2))
    drawn = np.bincount(ids, minlength=len(WORDS)) / len(ids)
    deviation = np.sqrt(expected / len(ids)) + 1e-3
    assert (np.abs(drawn - expected) < 5 * deviation).all()


def test_a_text_is_of_its_key_and_its_prompt(trained):
    options = itertools.product((0, 1), ("To be", "or, "))
    texts = [write(trained, *option, 2, 0.7) for option in options]
    np.testing.assert_array_equal(texts[0], write(trained, 0, "To be", 2, 0.7))
    assert (texts[0] != texts[1]).any()
    assert (texts[0] != texts[2]).any()
    assert (texts[0][0] != texts[0][1]).any()


@pytest.mark.slow
def test_it_needs_fewer_bits_than_a_compressor(tmp_path):
    result = program.main(out=tmp_path)
    assert result["words"] < result["LZMA"] - 0.03
    assert result["LZMA"] < result["n-grams"]
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
