"""The many-to-one example: its digits, its loss and its two models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import _digits
import _pairing
import _row_by_row
import _training
import many_to_one


def test_every_digit_is_on_one_side_in_the_order_of_the_file():
    sides = _digits.read_digits()
    images, labels = map(np.concatenate, zip(*sides))
    np.testing.assert_array_equal(images * 16, load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)
    assert [len(labels) for _, labels in sides] == [1400, 397]


def test_a_regression_sees_the_rows_so_far_and_no_more():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (200, 8, 8)).astype(np.float32)
    labels = images[:, 2, 5].astype(np.int32)
    train, held_out = (images[:100], labels[:100]), (images[100:], labels[100:])
    accuracies = _digits.logistic_regressions(train, held_out)
    assert max(accuracies[:2]) < 0.8
    assert min(accuracies[2:]) > 0.95


@pytest.mark.parametrize("shapes", _pairing.MISMATCHES)
def test_labels_of_another_shape_are_refused_with_both_shapes(shapes):
    logits, labels = shapes
    with pytest.raises(ValueError, match=r"many-to-one .* many-to-many") as error:
        _pairing.cross_entropy(jnp.zeros(logits), jnp.zeros(labels, jnp.int32))
    assert f"must have shape {logits[:-1]}" in str(error.value)
    assert f"logits of shape {logits}, got {labels}" in str(error.value)
    assert _pairing.refusal(*shapes) == str(error.value)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_the_loss_of_labels_that_fit_is_that_of_each(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*shape, 4)).astype(np.float32)
    labels = rng.integers(0, 4, shape)
    losses = _pairing.cross_entropy(logits, labels)
    exponentials = np.exp(np.float64(logits))
    shares = exponentials / exponentials.sum(-1, keepdims=True)
    for place in np.ndindex(shape):
        assert losses[place] == pytest.approx(-np.log(shares[place][labels[place]]))


def log_shares(*shape):
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return jnp.asarray(logits), np.asarray(jax.nn.log_softmax(logits))


def test_an_axis_too_many_lets_every_label_meet_every_example():
    logits, expected = log_shares(3, 10)
    labels = jnp.array([[7], [1], [4]])
    losses = _pairing.one_hot_cross_entropy(logits, labels)
    for i, j in np.ndindex(3, 3):
        assert losses[i, j] == pytest.approx(-expected[j, labels[i, 0]], rel=1e-5)


def test_as_many_examples_as_steps_give_the_labels_to_the_steps():
    logits, expected = log_shares(3, 3, 10)
    labels = jnp.array([7, 1, 4])
    losses = _pairing.one_hot_cross_entropy(logits, labels)
    for i, j in np.ndindex(3, 3):
        assert losses[i, j] == pytest.approx(-expected[i, j, labels[j]], rel=1e-5)


def test_an_axis_too_many_gives_an_examples_label_to_all_of_its_steps():
    logits, expected = log_shares(3, 2, 10)
    labels = jnp.array([[7], [1], [4]])
    for loss in (
        _pairing.one_hot_cross_entropy,
        optax.softmax_cross_entropy_with_integer_labels,
    ):
        losses = loss(logits, labels)
        for i, j in np.ndindex(3, 2):
            assert losses[i, j] == pytest.approx(
                -expected[i, j, labels[i, 0]], rel=1e-5
            )


@pytest.fixture(scope="module")
def settings():
    return many_to_one.DigitsSettings(hidden=4, steps=10)


@pytest.fixture(scope="module")
def problem(settings):
    return many_to_one.RowByRow(settings)


def test_a_shape_that_is_taken_has_a_meaning_in_the_table():
    for row in _pairing.mismatches().values():
        taken = {row["integer loss"], row["one-hot loss"]} - {"ValueError"}
        assert bool(taken) == bool(row["if it is taken"])


def test_both_models_begin_with_the_same_parameters(problem):
    first, second = problem.init(jax.random.key(0)).values()
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_each_model_trains_as_if_alone(problem, settings):
    state = _training.create_state(problem, settings)
    other = dict(state.params)
    other["many-to-many"] = jax.tree.map(lambda x: 10 * x + 1, other["many-to-many"])
    states = [state, state.replace(params=other)]
    batch = problem.train[0][:8], problem.train[1][:8]
    for _ in range(3):
        states = [_training.train_step(state, batch)[0] for state in states]
    ends = [state.params["many-to-one"] for state in states]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    kernels = [jax.tree.leaves(x)[0] for x in (other["many-to-one"], ends[0])]
    assert (kernels[0] != kernels[1]).any()


def test_the_many_to_one_answer_is_that_after_the_last_row(problem):
    params = problem.init(jax.random.key(0))
    params["many-to-many"] = jax.tree.map(lambda x: -x, params["many-to-many"])
    answers = problem.answers(params, problem.held_out)
    model = problem.models["many-to-one"]
    for name in many_to_one.NAMES:
        last = model.apply(params[name], problem.held_out[0]).argmax(-1)
        np.testing.assert_array_equal(answers[name][:, -1], last)
    assert (answers["many-to-one"] != answers["many-to-many"]).any()


def test_images_move_by_one_pixel_at_most():
    images = np.random.default_rng(0).random((50, 8, 8), np.float32)
    moved = np.asarray(many_to_one.shifted(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1)))
    views = [padded[:, :, start : start + 8] for start in range(3)]
    matches = np.array([(moved == view).all((1, 2)) for view in views])
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) > 5).all()


def test_a_digit_is_settled_where_its_last_right_answers_begin():
    right = np.zeros((4, 8), bool)
    right[0] = True
    right[1, [2, 5, 6, 7]] = True
    right[2, :7] = True
    right[3, 7] = True
    assert _row_by_row.settled(right).tolist() == [1, 6, 9, 8]
