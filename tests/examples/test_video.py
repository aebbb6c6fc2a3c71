"""The video example: its films, and the packing of their frames."""

import jax
import numpy as np
import pytest

import _moving_digits
import video
from _batches import take
from _moving_digits import CANVAS, LONGEST, SHORTEST, WAYS

HIDDEN = 3


@pytest.fixture(scope="module")
def sides():
    return _moving_digits.moving_digits()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def image(rng):
    return rng.uniform(1, 255, (8, 8))


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_film_goes_one_way_and_comes_back_on_the_other_side(way, rng):
    frames = _moving_digits.film(rng, image(rng), way, LONGEST)
    assert frames.shape == (LONGEST, CANVAS, CANVAS)
    steps = [*WAYS.values()]
    speeds = [
        speed
        for speed in range(1, _moving_digits.FASTEST + 1)
        for direction in steps
        if all(
            (np.roll(a, speed * np.array(direction), (0, 1)) == b).all()
            for a, b in zip(frames, frames[1:])
        )
        and direction == steps[way]
    ]
    assert len(speeds) == 1
    assert {frame.sum() for frame in frames} == {frames[0].sum()}


def test_a_share_of_the_pixels_is_lost_and_the_others_stay(rng):
    frames = rng.uniform(1, 255, (50, CANVAS, CANVAS))
    left = _moving_digits.lose_pixels(rng, frames)
    lost = left == 0
    np.testing.assert_array_equal(left[~lost], frames[~lost])
    assert lost.mean() == pytest.approx(_moving_digits.LOST, abs=0.02)
    assert lost.any(axis=0).mean() > 0.9


def test_every_image_goes_every_way(sides):
    for films in sides:
        digits, ways = np.divmod(films.labels.reshape(-1, len(WAYS)), len(WAYS))
        assert (digits == digits[:, :1]).all()
        assert (ways == np.arange(len(WAYS))).all()
        assert {*films.lengths} == {*range(SHORTEST, LONGEST + 1)}
    train, held_out = (len(films.labels) for films in sides)
    assert (train + held_out) // len(WAYS) == 1797


def test_frames_after_the_last_are_black(sides):
    for films in sides:
        there = films.frames.any(axis=(2, 3))
        expected = np.arange(LONGEST) < films.lengths[:, None]
        np.testing.assert_array_equal(there, expected)


def test_training_and_held_out_films_share_no_image(monkeypatch):
    count = 400
    images = np.zeros((count, 64))
    images[np.arange(count), np.arange(count) % 64] = np.arange(count) + 1
    monkeypatch.setattr(_moving_digits, "LOST", 0)
    monkeypatch.setattr(
        _moving_digits,
        "load_digits",
        lambda return_X_y: (images * 255 / count, np.arange(count) % 10),
    )
    # One pixel of each image is on, at another place or brightness: 255 at most, so
    # neighbours are told apart by where it is.
    train, held_out = _moving_digits.moving_digits()
    assert len(held_out.labels) == _moving_digits.HELD_OUT_IMAGES * len(WAYS)
    assert len(train.labels) == (count - _moving_digits.HELD_OUT_IMAGES) * len(WAYS)


@pytest.mark.parametrize(
    ("label", "name"), [(0, "0↑"), (3, "0→"), (4 * 7 + 2, "7←"), (39, "9→")]
)
def test_a_label_is_a_digit_and_a_way(label, name):
    assert _moving_digits.label_name(label) == name


@pytest.fixture(scope="module")
def reader(sides):
    model = video.FilmReader(HIDDEN)
    batch = take(sides[0], slice(6))
    params = jax.jit(model.init)(jax.random.key(0), batch.frames, batch.lengths)
    return model, params, batch


@pytest.mark.parametrize("in_order", [True, False])
def test_the_packed_model_gives_the_answers_of_the_padded_one(in_order, reader):
    model, params, batch = reader
    model = model.clone(in_order=in_order)
    params = jax.jit(model.init)(jax.random.key(0), batch.frames, batch.lengths)
    padded = video.logits(model, params, batch)
    capacity = video.most_frames(batch.lengths, [np.arange(6)])
    assert capacity == batch.lengths.sum() < 6 * LONGEST
    packed = video.logits(model.clone(capacity=capacity), params, batch)
    np.testing.assert_allclose(packed, padded, rtol=1e-4, atol=1e-5)
    too_small = video.logits(model.clone(capacity=capacity - 1), params, batch)
    assert np.isnan(too_small).any()


@pytest.mark.parametrize("in_order", [True, False])
def test_the_frames_after_the_last_have_no_part_in_an_answer(in_order, reader):
    model, _, batch = reader
    model = model.clone(in_order=in_order)
    params = jax.jit(model.init)(jax.random.key(0), batch.frames, batch.lengths)
    there = np.arange(LONGEST) < batch.lengths[:, None]
    frames = np.where(there[..., None, None], batch.frames, np.nan)
    expected = video.logits(model, params, batch)
    given = video.logits(model, params, batch._replace(frames=frames))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_order_gives_a_reversed_film_the_same_answer(reader):
    model, _, batch = reader
    model = model.clone(in_order=False)
    params = jax.jit(model.init)(jax.random.key(0), batch.frames, batch.lengths)
    reversed_frames = batch.frames.copy()
    for frames, length in zip(reversed_frames, batch.lengths):
        frames[:length] = frames[:length][::-1]
    answers = video.logits(model, params, batch)
    backwards = video.logits(model, params, batch._replace(frames=reversed_frames))
    np.testing.assert_allclose(backwards, answers, rtol=1e-4, atol=1e-5)


def test_most_frames_is_of_the_batch_that_has_the_most():
    lengths = np.array([1, 2, 3, 4])
    assert video.most_frames(lengths, [np.array([0, 3]), np.array([2, 3, 0])]) == 8
    assert video.most_frames(lengths, [np.array([3, 3]), np.array([1, 2])]) == 8


def test_the_capacity_holds_for_every_batch_of_a_run():
    settings = video.VideoSettings(steps=7, batch_size=5, seed=3, hidden=HIDDEN)
    problem = video.Video(settings)
    totals = [
        problem.train.lengths[problem._rows(settings, step)].sum() for step in range(7)
    ]
    assert problem.capacity == max(totals)


def test_the_baseline_trains_as_if_alone(reader):
    problem = video.Video(video.VideoSettings(steps=2, batch_size=6, hidden=HIDDEN))
    params = problem.init(jax.random.key(0))
    optimizer = problem.optimizer(problem_settings := video.VideoSettings(steps=2))
    alone = super(video.Video, problem).optimizer(problem_settings)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: 100 * rng.normal(size=x.shape), params)
    updates = optimizer.update(gradients, optimizer.init(params))[0]
    for name in params:
        expected = alone.update(gradients[name], alone.init(params[name]))[0]
        jax.tree.map(np.testing.assert_allclose, updates[name], expected)
