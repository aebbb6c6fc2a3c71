"""The video example: its films, and the packing of their frames."""

import jax
import numpy as np
import pytest

import _moving_digits
import video
from _batches import take
from _moving_digits import CANVAS, LONGEST, SHORTEST, SIZE, WAYS

HIDDEN = 3


@pytest.fixture(scope="module")
def sides():
    return _moving_digits.moving_digits()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def image(rng):
    return rng.uniform(1, 255, (SIZE, SIZE))


def place(frame):
    """The row and the column where the image begins, which has no black pixel."""
    rows, columns = (np.flatnonzero(frame.any(axis)) for axis in (1, 0))
    assert (frame > 0).sum() == len(rows) * len(columns) == SIZE**2
    return np.array([rows[0], columns[0]])


@pytest.mark.parametrize("length", [SHORTEST, 4, LONGEST])
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_film_shows_all_of_the_image_on_its_way(way, length, rng):
    direction = np.array([*WAYS.values()][way])
    speeds, starts = set(), set()
    for _ in range(200):
        frames = _moving_digits.film(rng, image(rng), way, length)
        assert frames.shape == (length, CANVAS, CANVAS)
        places = np.stack([place(frame) for frame in frames])
        (speed,) = {*(np.diff(places, axis=0) @ direction)}
        assert (np.diff(places, axis=0) == speed * direction).all()
        speeds.add(int(speed))
        starts.add(int(places[0] @ np.abs(direction)))
    room = CANVAS - SIZE
    fastest = min(_moving_digits.FASTEST, room // (length - 1))
    assert speeds == {*range(1, fastest + 1)}
    reach = {*range(room - (length - 1) + 1)}
    assert starts == (reach if direction.sum() > 0 else {room - x for x in reach})


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
    monkeypatch.setattr(_moving_digits, "LOST", 0)
    # The same image has the same pixels, wherever it is.
    sides = [
        {tuple(np.sort(frames[0].ravel())) for frames in films.frames}
        for films in _moving_digits.moving_digits()
    ]
    assert [len(images) for images in sides] == [1500, 297]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("label", "name"), [(0, "0↑"), (3, "0→"), (4 * 7 + 2, "7←"), (39, "9→")]
)
def test_a_label_is_a_digit_and_a_way(label, name):
    assert _moving_digits.label_name(label) == name


@pytest.fixture(scope="module")
def batch(sides):
    return take(sides[0], slice(6))


@pytest.fixture(scope="module", params=[True, False])
def reader(request, batch):
    """A model with a GRU or a mean, and its parameters."""
    model = video.FilmReader(HIDDEN, in_order=request.param)
    init = jax.jit(model.init)
    return model, init(jax.random.key(0), batch.frames, batch.lengths)


def close(a, b):
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_packed_model_gives_the_answers_of_the_padded_one(reader, batch):
    model, params = reader
    capacity = int(batch.lengths.sum())
    assert capacity < 6 * LONGEST
    padded = video.logits(model, params, batch)
    packed = video.logits(model.clone(capacity=capacity), params, batch)
    assert close(packed, padded)
    too_small = video.logits(model.clone(capacity=capacity - 1), params, batch)
    assert np.isnan(too_small).any()


def test_the_frames_after_the_last_have_no_part_in_an_answer(reader, batch):
    there = np.arange(LONGEST) < batch.lengths[:, None]
    frames = np.where(there[..., None, None], batch.frames, np.nan)
    expected = video.logits(*reader, batch)
    assert close(video.logits(*reader, batch._replace(frames=frames)), expected)


def test_only_the_model_with_a_gru_tells_a_film_from_one_run_backwards(reader, batch):
    frames = batch.frames.copy()
    for film, length in zip(frames, batch.lengths):
        film[:length] = film[:length][::-1].copy()
    expected = video.logits(*reader, batch)
    backwards = video.logits(*reader, batch._replace(frames=frames))
    assert close(backwards, expected) is not reader[0].in_order
