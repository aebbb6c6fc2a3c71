"""The Dense families example: its data, and what its table and picture say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _influence_picture
import _station
import _training
import dense_families

ALL_HOURS = np.arange(24)
# Which hours' sensors, and whose days, a family has to tell hour t from.
CAN = {
    "shared": {_station.SAME},
    "per step": {_station.SAME, _station.OWN},
    "flattened": {_station.SAME, _station.OWN, _station.OTHERS},
}


def least_squares_error(x, y):
    """With a bias; `(n, features)` and `(n,)`."""
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], axis=1)
    residual = y - x @ np.linalg.lstsq(x, np.float64(y))[0]
    return float(np.sqrt(np.sum(residual**2) / (len(y) - x.shape[1])))


@pytest.fixture(scope="module")
def days():
    return _station.read_days(3, 1000)


@pytest.mark.parametrize("target", _station.TARGETS)
def test_only_the_families_that_should_can_tell_a_target(days, target):
    x, y = days.sensors, days.targets[target][..., 0]
    errors = {
        "shared": [least_squares_error(x.reshape(-1, 3), y.reshape(-1))],
        "per step": [least_squares_error(x[:, t], y[:, t]) for t in ALL_HOURS],
        "flattened": [
            least_squares_error(x.reshape(len(x), -1), y[:, t]) for t in ALL_HOURS
        ],
    }
    for family, by_hour in errors.items():
        if target in CAN[family]:
            np.testing.assert_allclose(by_hour, _station.NOISE, rtol=0.15)
        else:
            assert np.sqrt(np.mean(np.square(by_hour))) > 5 * _station.NOISE


def test_the_weather_has_one_variance_and_each_day_is_its_own(days):
    np.testing.assert_allclose(days.sensors.std(0), 1, atol=0.15)
    np.testing.assert_allclose(days.sensors.mean(0), 0, atol=0.15)
    other = _station.read_days(4, 1000)
    assert not np.isin(other.sensors[:, 0, 0], days.sensors[:, 0, 0]).any()


@pytest.fixture(scope="module")
def settings():
    return dense_families.DenseSettings(days=20, steps=10)


@pytest.fixture(scope="module")
def problem(settings):
    return dense_families.DenseFamilies(settings)


@pytest.fixture(scope="module")
def params(problem):
    """With biases that are not zero."""
    return jax.tree.map(lambda x: x + 0.1, problem.init(jax.random.key(0)))


@pytest.mark.parametrize("family", dense_families.FAMILIES)
def test_each_model_trains_as_if_alone(problem, settings, family):
    state = _training.create_state(problem, settings)
    others = jax.tree.map(lambda x: 10 * x + 1, state.params)
    own = state.params[_station.OWN][family]
    others[_station.OWN][family] = own
    states = [state, state.replace(params=others)]
    batch = problem.train
    for _ in range(3):
        states = [_training.train_step(state, batch)[0] for state in states]
    ends = [state.params[_station.OWN][family]["params"] for state in states]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert (ends[0]["kernel"] != own["params"]["kernel"]).any()


def test_the_baseline_is_the_mean_of_each_hour(problem):
    for target, error in problem.mean_errors.items():
        wrong = []
        for t in ALL_HOURS:
            mean = problem.train.targets[target][:, t].mean()
            wrong.extend((problem.held_out.targets[target][:, t, 0] - mean).tolist())
        assert error == pytest.approx(np.std(wrong), rel=0.05)


def test_errors_are_of_the_family_and_target_that_they_are_named_after(problem, params):
    errors = problem.errors(params, problem.held_out)
    for family, model in dense_families.FAMILIES.items():
        for target, y in problem.held_out.targets.items():
            own = model.apply(params[target][family], problem.held_out.sensors)
            expected = np.sqrt(np.mean((np.asarray(own) - y) ** 2))
            assert errors[family][target] == pytest.approx(expected, rel=1e-5)


def test_a_longer_day_is_for_the_shared_family_alone(params):
    said = {
        family: dense_families.longer_day(model, params[_station.SAME][family])
        for family, model in dense_families.FAMILIES.items()
    }
    assert said["shared"] == "output (1, 48, 1)"
    for family in ("per step", "flattened"):
        assert said[family].startswith("ValueError: x must have the timesteps")
        assert "float32[1,48,3]" in said[family]


def test_the_wider_families_hold_the_same_function(problem, params):
    rows = dense_families.same_function(params, problem.held_out.sensors)
    assert {name: row["parameters"] for name, row in rows.items()} == {
        "shared as Dense": "4 -> 4",
        "shared as per step": "4 -> 96",
        "shared as flattened": "4 -> 1,752",
        "per step as flattened": "96 -> 1,752",
    }
    for row in rows.values():
        assert float(row["largest difference"]) < 1e-5
    own = params[_station.SAME]["shared"]["params"]
    x = problem.held_out.sensors
    wide = dense_families.wider({"params": own}, "flattened")
    y = dense_families.FAMILIES["flattened"].apply(wide, x)
    expected = np.float64(x) @ np.float64(own["kernel"]) + np.float64(own["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_influence_is_what_the_picture_says(params):
    families, own = dense_families.FAMILIES, params[_station.OTHERS]
    influence = {
        family: _influence_picture.influence(model, own[family])
        for family, model in families.items()
    }
    np.testing.assert_array_equal(influence["shared"], np.eye(24))
    np.testing.assert_array_equal(influence["per step"], np.eye(24))
    np.testing.assert_array_equal(influence["flattened"], np.ones((24, 24)))
    wide = dense_families.wider(own["per step"], "flattened")
    narrow = _influence_picture.influence(families["flattened"], wide)
    np.testing.assert_array_equal(narrow, np.eye(24))


def test_learned_weights_stand_at_their_output_and_input_hour():
    kernel = jnp.zeros((72, 24)).at[3 * 5 + 1, 9].set(-3.0).at[3 * 5 + 2, 9].set(4.0)
    weights = _influence_picture.learned({"params": {"kernel": kernel}})
    assert weights[9, 5] == 5
    assert np.count_nonzero(weights) == 1
