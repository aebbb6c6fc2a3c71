"""The example that comes from Keras: its examples, its comparison, its way to Flax."""

import jax
import keras
import numpy as np
import pytest

import from_keras
import tdjax.keras

LENGTHS = np.array([6, 2, 5, 1])


@pytest.fixture(scope="module")
def windows():
    """As `tagging` makes them; the tag of an id is whether it is odd."""
    is_valid = np.arange(6) < LENGTHS[:, None]
    ids = np.random.default_rng(0).integers(0, 9, (4, 6)) * is_valid
    return ids[..., None].astype(np.int32), ids % 2, LENGTHS


@pytest.fixture(scope="module")
def examples(windows):
    return from_keras.keras_examples(*windows)


@pytest.fixture(scope="module")
def models():
    wrappers = keras.layers.TimeDistributed, tdjax.keras.TimeDistributed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_keras, "HIDDEN", 3)
        first, second = (from_keras.build_tagger(x, 9, 2, 5) for x in wrappers)
    second.set_weights(first.get_weights())
    return {"keras": first, "tdjax": second}


def test_the_id_of_padding_is_zero_and_no_other_is(windows, examples):
    ids, labels = examples
    valid = ids != 0
    assert [np.flatnonzero(row).tolist() for row in valid] == [
        list(range(length)) for length in LENGTHS
    ]
    np.testing.assert_array_equal(ids[valid] - 1, windows[0][..., 0][valid])
    np.testing.assert_array_equal((ids[valid] - 1) % 2, labels[valid])


def test_a_batch_has_ids_and_labels_of_the_same_rows():
    ids = np.arange(20)[:, None]
    drawn = from_keras.draw_batches(np.random.default_rng(0), (ids, 3 * ids), 2)
    assert drawn[0].shape == (2 * from_keras.BATCH, 1)
    np.testing.assert_array_equal(3 * drawn[0], drawn[1])
    assert len(np.unique(drawn[0])) > 10


def test_both_wrappers_take_the_same_steps(models, examples, monkeypatch):
    monkeypatch.setattr(from_keras, "BATCH", 2)
    before = models["keras"].get_weights()
    seconds = from_keras.compare(models, examples)
    assert [*seconds] == [*models]
    assert all(model.optimizer.iterations == 2 for model in models.values())
    after = [model.get_weights() for model in models.values()]
    for old, one, other in zip(before, *after):
        assert np.abs(old - one).max() > 1e-3
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_padding_and_its_labels_do_not_change_the_loss(models, examples):
    ids, labels = (np.pad(array, ((0, 0), (0, 2))) for array in examples)
    expected = models["tdjax"].evaluate(*examples, verbose=0)
    result = models["tdjax"].evaluate(ids, np.where(ids, labels, 1), verbose=0)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_the_flax_loss_and_accuracy_are_those_of_keras(models, examples):
    module, variables = tdjax.keras.to_flax(models["tdjax"])
    result = jax.jit(from_keras.make_loss(module))(variables["params"], *examples)
    expected = models["tdjax"].evaluate(*examples, verbose=0)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_what_flax_learns_goes_back_to_keras(models, examples):
    model = models["tdjax"]
    before, _ = model.evaluate(*examples, verbose=0)
    sides, rng = (examples, examples), np.random.default_rng(0)
    module, variables = tdjax.keras.to_flax(model)
    trained, in_flax = from_keras.train_in_flax(module, variables, *sides, 30, rng)
    assert model.evaluate(*examples, verbose=0)[0] == before
    tdjax.keras.from_flax(trained, model)
    loss, accuracy = model.evaluate(*examples, verbose=0)
    assert loss < before - 0.01
    assert accuracy == pytest.approx(in_flax)


def test_a_difference_is_relative_to_the_largest_number():
    assert from_keras.difference(np.array([1.5, -4]), np.array([1, -4])) == 0.125


@pytest.mark.slow
def test_a_whole_run_beats_the_majority_class(tmp_path):
    result = from_keras.main(out=tmp_path)
    assert result["keras"] > result["baseline"] + 0.69
    assert result["flax"] > result["keras"]
    assert max(result["differences"]) < 1e-5
    assert (tmp_path / "seconds.png").stat().st_size > 10_000
