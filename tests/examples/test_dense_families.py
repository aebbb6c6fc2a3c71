"""The Dense families example: its data, its errors, and what it says of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dense_families
import tdjax

FAMILIES, TARGETS = tuple(dense_families.FAMILIES), dense_families.TARGETS
NOISE = 0.1
# Which targets each layer can express.
EXPRESSES = {
    "Dense": TARGETS[:1],
    "PerStepDense": TARGETS[:2],
    "FlattenDense": TARGETS,
}


@pytest.fixture(scope="module")
def days():
    return dense_families.weather(3, 1000)


@pytest.fixture(scope="module")
def params():
    """Random, biases too, and different for each target."""
    key, x = jax.random.key(0), jnp.ones((1, 24, 3))
    return {
        name: jax.tree.map(
            lambda leaf: jax.random.normal(key, (3, *leaf.shape)),
            jax.eval_shape(model.init, key, x),
        )
        for name, model in dense_families.FAMILIES.items()
    }


def least_squares_errors(x, y):
    """With a bias; `(n, features)` and `(n, targets)`."""
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], axis=1)
    residual = y - x @ np.linalg.lstsq(x, np.float64(y))[0]
    return np.sqrt(np.sum(residual**2, axis=0) / (len(y) - x.shape[1]))


@pytest.mark.parametrize("target", range(3))
def test_only_the_layers_that_should_can_express_a_target(days, target):
    x, targets = days
    y, hours = targets[target, ..., 0], range(24)
    errors = {
        "Dense": least_squares_errors(x.reshape(-1, 3), y.reshape(-1, 1)),
        "PerStepDense": [least_squares_errors(x[:, t], y[:, [t]]) for t in hours],
        "FlattenDense": least_squares_errors(x.reshape(len(x), -1), y),
    }
    for family, by_hour in errors.items():
        if TARGETS[target] in EXPRESSES[family]:
            np.testing.assert_allclose(by_hour, NOISE, rtol=0.15)
        else:
            assert np.sqrt(np.mean(np.square(by_hour))) > 5 * NOISE


def test_the_weather_has_one_variance_and_each_day_is_its_own(days):
    sensors, _ = days
    np.testing.assert_allclose(sensors.std(0), 1, atol=0.15)
    np.testing.assert_allclose(sensors.mean(0), 0, atol=0.15)
    other, _ = dense_families.weather(4, 1000)
    assert not np.isin(other[:, 0, 0], sensors[:, 0, 0]).any()


def test_errors_are_of_the_layer_and_target_that_they_are_named_after(days, params):
    x, targets = (np.float64(array) for array in days)
    errors = dense_families.squared_errors(params, days)
    assert errors.shape == (3, 3)
    for i in range(3):
        kernels = [np.float64(params[name]["params"]["kernel"][i]) for name in FAMILIES]
        biases = [np.float64(params[name]["params"]["bias"][i]) for name in FAMILIES]
        outputs = [
            x @ kernels[0] + biases[0],
            np.einsum("dti,tif->dtf", x, kernels[1]) + biases[1],
            (x.reshape(len(x), -1) @ kernels[2] + biases[2])[..., None],
        ]
        for row, y in enumerate(outputs):
            expected = np.mean((y - targets[i]) ** 2)
            assert errors[row, i] == pytest.approx(expected, rel=1e-4)


def test_the_baseline_is_the_mean_of_each_hour_of_training(days):
    held_out = dense_families.weather(5, 50)
    errors = dense_families.mean_of_the_hour(days, held_out)
    for target, error in enumerate(errors):
        wrong = [
            held_out[1][target, :, t, 0] - days[1][target, :, t, 0].mean()
            for t in range(24)
        ]
        assert error == pytest.approx(np.sqrt(np.mean(np.square(wrong))), rel=1e-5)


def test_the_layers_are_compared_as_they_are(days, params, capsys):
    dense_families.compare(params, days[0][:2])
    said = capsys.readouterr().out
    assert "TimeDistributed(Dense), same parameters: differs by 0.0" in said
    assert "72 of its 1728 weights are not zero" in said
    assert "Dense, 48 hours: (1, 48, 1)" in said
    for family in FAMILIES[1:]:
        assert f"{family}, 48 hours: ValueError: x must have the timesteps" in said


def test_influence_is_what_the_docstring_says(params):
    expected = dict(zip(FAMILIES, [np.eye(24), np.eye(24), np.ones((24, 24))]))
    sizes = dict(zip(FAMILIES, [4, 96, 1752]))
    for name, model in dense_families.FAMILIES.items():
        own = dense_families.first(params[name])
        seen = tdjax.step_influence(model.apply, own, jnp.ones((1, 24, 3)), argnums=1)
        np.testing.assert_array_equal(seen, expected[name])
        assert sum(leaf.size for leaf in jax.tree.leaves(own)) == sizes[name]


@pytest.mark.slow
def test_the_narrowest_layer_that_can_express_a_target_is_the_best(tmp_path):
    errors = dense_families.main(out=tmp_path)
    baseline = errors.pop("baseline, mean of the hour")
    for target, best in zip(TARGETS, FAMILIES):
        assert min(errors, key=lambda name: errors[name][target]) == best
        assert errors[best][target] < 0.15 * baseline[target]
        assert errors[best][target] < 1.5 * NOISE
    assert (
        errors["FlattenDense"]["same formula"] > 1.25 * errors["Dense"]["same formula"]
    )
    assert errors["Dense"]["other hours"] > 0.5
    assert (tmp_path / "families.png").stat().st_size > 10_000
