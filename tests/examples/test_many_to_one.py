"""The many-to-one example: its digits, its losses and its two models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import many_to_one
from many_to_one import MISFITS, Reader, cross_entropy, one_hot_cross_entropy


@pytest.fixture(scope="module")
def sides():
    return many_to_one.read_digits()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((5, 8, 8), np.float32)


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(Reader().init)(jax.random.key(0), images)


def apply(model, params, images):
    return np.asarray(jax.jit(model.apply)(params, images))


def test_every_digit_is_on_one_side_in_the_order_of_the_file(sides):
    images, labels = map(np.concatenate, zip(*sides))
    np.testing.assert_array_equal(images * 16, load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)
    assert [len(labels) for _, labels in sides] == [1400, 397]


def test_images_move_by_one_pixel_at_most():
    images = np.random.default_rng(0).random((50, 8, 8), np.float32)
    moved = np.asarray(many_to_one.shift(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1)))
    views = [padded[:, :, start : start + 8] for start in range(3)]
    matches = np.array([(moved == view).all((1, 2)) for view in views])
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) > 5).all()


def test_the_models_have_the_same_parameters_and_last_answers(params, images):
    every = Reader(at_every_step=True)
    others = jax.jit(every.init)(jax.random.key(0), images)
    jax.tree.map(np.testing.assert_array_equal, params, others)
    after_rows, last = apply(every, params, images), apply(Reader(), params, images)
    assert after_rows.shape == (5, 8, 10)
    np.testing.assert_allclose(after_rows[:, -1], last, rtol=1e-5, atol=1e-6)


def test_an_answer_depends_on_the_rows_read_and_no_later_ones(params, images):
    every = Reader(at_every_step=True)
    changed = images.copy()
    changed[:, 4] += 1
    before, after = (apply(every, params, x) for x in (images, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max((0, 2)) > 1e-3).all()


def test_accuracies_are_those_after_each_row(params, images):
    answers = apply(Reader(at_every_step=True), params, images).argmax(-1)
    labels = np.array([*answers[:2, 0], *answers[2:, 7]])
    expected = [np.mean([x == y for x, y in zip(row, labels)]) for row in answers.T]
    given = many_to_one.accuracies(params, images, labels)
    np.testing.assert_allclose(given, expected, rtol=1e-6)


def log_shares(*shape):
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    exponentials = np.exp(np.float64(logits))
    return logits, np.log(exponentials / exponentials.sum(-1, keepdims=True))


def test_each_model_learns_from_the_targets_of_its_shape(params, images):
    labels = np.array([3, 1, 4, 1, 5])
    rows = np.arange(5)
    last = jax.nn.log_softmax(apply(Reader(), params, images))
    every = jax.nn.log_softmax(apply(Reader(at_every_step=True), params, images))
    expected = {
        "many-to-one": np.mean([-last[i, labels[i]] for i in rows]),
        "many-to-many": np.mean([-every[i, :, labels[i]] for i in rows]),
        "wrong targets": np.mean([-last[i, labels[j]] for i in rows for j in rows]),
    }
    assert tuple(expected) == many_to_one.TASKS
    for task, value in expected.items():
        loss = jax.jit(many_to_one.loss, static_argnums=0)
        given = loss(task, params, images, labels)
        assert given == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_the_loss_of_labels_that_fit_is_that_of_each(shape):
    logits, expected = log_shares(*shape, 10)
    labels = np.random.default_rng(1).integers(0, 10, shape)
    losses = cross_entropy(logits, labels)
    for place in np.ndindex(shape):
        assert losses[place] == pytest.approx(-expected[place][labels[place]], rel=1e-5)


@pytest.mark.parametrize(
    "shapes", [*MISFITS, ((32, 8, 10), (32,)), ((32, 10), (32, 8))]
)
def test_labels_of_another_shape_are_refused_with_both_shapes(shapes):
    logits, labels = shapes
    with pytest.raises(ValueError, match=r"don't fit") as error:
        cross_entropy(jnp.zeros(logits), jnp.zeros(labels, int))
    assert f"labels of shape {labels}" in str(error.value)
    assert f"logits of shape {logits}: they must be {logits[:-1]}" in str(error.value)


@pytest.mark.parametrize("shapes", MISFITS)
def test_one_hot_labels_are_broadcast_as_the_program_says(shapes):
    logits, expected = log_shares(*shapes[0])
    labels = np.random.default_rng(1).integers(0, 10, shapes[1])
    losses = one_hot_cross_entropy(logits, labels)
    meanings = {
        "an example's label goes to all of its steps": lambda i, t: expected[
            i, t, labels[i, 0]
        ],
        "every label meets every example": lambda i, j: expected[j, labels[i, 0]],
        "the label of example i goes to step i of all": lambda j, i: expected[
            j, i, labels[i]
        ],
    }
    meaning = meanings[MISFITS[shapes]]
    for place in np.ndindex(losses.shape):
        assert losses[place] == pytest.approx(-meaning(*place), rel=1e-4)


@pytest.mark.parametrize("shapes", [((32, 8, 10), (32,)), ((32, 10), (32, 8))])
def test_the_targets_of_the_other_model_never_broadcast(shapes):
    logits, labels = (jnp.zeros(shape, int) for shape in shapes)
    losses = optax.softmax_cross_entropy_with_integer_labels
    for loss in (losses, one_hot_cross_entropy):
        with pytest.raises((TypeError, ValueError)):
            loss(logits.astype(float), labels)


def test_a_regression_sees_the_rows_so_far_and_no_more():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (200, 8, 8)).astype(np.float32)
    labels = images[:, 2, 5].astype(np.int32)
    train, held_out = (images[:100], labels[:100]), (images[100:], labels[100:])
    results = many_to_one.baselines(train, held_out)
    assert max(results["logistic regression"][:2]) < 0.8
    assert min(results["logistic regression"][2:]) > 0.95
    majority = np.mean(labels[100:] == (labels[:100].mean() > 0.5))
    assert results["majority class"].tolist() == [majority] * 8


@pytest.mark.slow
def test_the_models_beat_the_baselines_and_wrong_targets_teach_less(tmp_path):
    results = many_to_one.main(out=tmp_path)
    after_all = {name: values[-1] for name, values in results.items()}
    assert after_all["many-to-one"] > after_all["logistic regression"] + 0.02
    assert after_all["many-to-many"] > after_all["logistic regression"]
    assert results["many-to-many"][5] > results["many-to-one"][5] + 0.4
    assert after_all["wrong targets"] < after_all["many-to-one"] - 0.15
    assert after_all["majority class"] < 0.15
    assert (tmp_path / "row_by_row.png").exists()
