"""The video example: its films, its BatchNorm under a mask, its packing."""

import jax
import numpy as np
import pytest
from flax import nnx

import video
from video import CANVAS, LONGEST, SHORTEST, SIZE, WAYS


def films_of(images, digits, monkeypatch, lost=0):
    monkeypatch.setattr(video, "LOST", lost)
    return video.make_films(np.random.default_rng(0), images, digits)


@pytest.fixture
def images():
    """Without a black pixel, and each different from all others."""
    return np.random.default_rng(1).uniform(0.1, 1, (200, SIZE, SIZE))


def places(film):
    """`(length, 2)`: where the image begins in each frame, all of which shows."""
    assert ((film > 0).sum((1, 2)) == SIZE**2).all()
    return np.stack([film.any(axis).argmax(1) for axis in (2, 1)], axis=1)


def test_a_film_shows_all_of_its_image_going_the_way_of_its_label(images, monkeypatch):
    digits = np.arange(200) % 10
    frames, lengths, labels = films_of(images, digits, monkeypatch)
    seen = {length: set() for length in range(SHORTEST, LONGEST + 1)}
    for row, (film, length, label) in enumerate(zip(frames, lengths, labels)):
        digit, way = divmod(label, len(WAYS))
        assert digit == digits[row // len(WAYS)]
        direction = [*WAYS.values()][way]
        assert video.LABELS[label] == f"{digit}{[*WAYS][way]}"
        moves = np.diff(places(film[:length]), axis=0)
        speed = np.abs(moves).max()
        assert (moves == speed * np.array(direction)).all()
        shown = film[0][film[0] > 0].reshape(SIZE, SIZE)
        np.testing.assert_array_equal(shown, np.float32(images[row // len(WAYS)]))
        seen[length].add(int(speed))
    # The fastest that stay on the canvas, but no more than 3 pixels for a frame.
    expected = {2: 3, 3: 3, 4: 2, 5: 2, 6: 1, 7: 1, 8: 1, 9: 1}
    assert {length: max(speeds) for length, speeds in seen.items()} == expected
    assert all(min(speeds) == 1 for speeds in seen.values())


def test_every_image_goes_every_way(images, monkeypatch):
    labels = films_of(images, np.full(200, 7), monkeypatch)[2]
    assert (labels.reshape(200, 4) == [28, 29, 30, 31]).all()


def test_a_fifth_of_the_pixels_is_lost_and_the_padding_is_nan(images, monkeypatch):
    frames, lengths, _ = films_of(images, np.zeros(200, int), monkeypatch, lost=0.2)
    there = np.arange(LONGEST) < lengths[:, None]
    assert np.isnan(frames[~there]).all()
    assert not np.isnan(frames[there]).any()
    shown = (frames[there] > 0).sum() / (there.sum() * SIZE**2)
    assert shown == pytest.approx(0.8, abs=0.01)


def test_training_and_held_out_films_share_no_image(monkeypatch):
    monkeypatch.setattr(video, "LOST", 0)
    # The same image has the same pixels, wherever it is.
    sides = [
        {tuple(np.sort(film[0].ravel())) for film in frames}
        for frames, _, _ in video.moving_digits()
    ]
    assert [len(images) for images in sides] == [1500, 297]
    assert not sides[0] & sides[1]


@pytest.fixture(scope="module")
def films():
    """Six films of random frames, padded with NaN."""
    lengths = np.array([9, 2, 5, 3, 7, 2])
    frames = np.random.default_rng(0).random((6, LONGEST, CANVAS, CANVAS), np.float32)
    frames[np.arange(LONGEST) >= lengths[:, None]] = np.nan
    return frames, lengths


@pytest.fixture(scope="module")
def reader():
    return video.FilmReader(nnx.Rngs(0))


def statistics(model):
    return jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))


def close(a, b):
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


def trained_once(reader, frames, lengths):
    """Logits and statistics of a call in training."""
    model = nnx.clone(reader)
    model.train()
    return video.run(model, frames, lengths), statistics(model)


def test_padding_changes_neither_logits_nor_statistics(reader, films):
    frames, lengths = films
    expected = trained_once(reader, frames, lengths)
    assert np.isfinite(expected[0]).all()
    for value in (0, 1e30, np.inf):
        padded = np.nan_to_num(frames, nan=value, posinf=np.inf)
        given = trained_once(reader, padded, lengths)
        jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_statistics_are_those_of_the_valid_frames_of_all_films(reader, films):
    frames, lengths = films
    _, after = trained_once(reader, frames, lengths)
    valid = frames[np.arange(LONGEST) < lengths[:, None]]
    x = np.asarray(reader.frame_net.conv(valid[..., None]))
    assert len(x) == lengths.sum()
    moments = after["frame_net"]["conv_norm"]
    for name, before, moment in (
        ("mean", 0, x.mean((0, 1, 2))),
        ("var", 1, x.var((0, 1, 2))),
    ):
        expected = 0.9 * before + 0.1 * moment
        np.testing.assert_allclose(moments[name][...], expected, rtol=1e-4, atol=1e-6)


def test_nan_in_the_padding_never_reaches_the_gradient(reader, films):
    frames, lengths = films
    labels = np.arange(6)
    ends = []
    for padded in (frames, np.nan_to_num(frames)):
        model = nnx.clone(reader)
        model.train()
        optimizer = nnx.Optimizer(model, video.optax.sgd(1.0), wrt=nnx.Param)
        video.train_step(model, optimizer, None, padded, lengths, labels)
        ends.append(jax.tree.map(np.asarray, nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ends))


def test_packed_answers_are_the_padded_ones(reader, films):
    model = nnx.clone(reader)
    video.run(model, *films)  # moves the running averages
    model.eval()
    padded = video.run(model, *films)
    capacity = int(films[1].sum())
    assert capacity < 6 * LONGEST
    assert close(video.run(model, *films, capacity), padded)
    assert np.isnan(video.run(model, *films, capacity - 1)).any()


@pytest.mark.parametrize("in_order", [True, False])
def test_only_the_model_with_a_gru_tells_a_film_from_one_run_backwards(in_order, films):
    frames, lengths = films
    backwards = frames.copy()
    for film, length in zip(backwards, lengths):
        film[:length] = film[:length][::-1].copy()
    model = video.FilmReader(nnx.Rngs(0), in_order)
    model.eval()
    same = close(video.run(model, backwards, lengths), video.run(model, *films))
    assert same is not in_order


@pytest.mark.slow
def test_the_gru_reads_films_that_the_mean_cannot(tmp_path):
    right = video.main(out=tmp_path)
    assert right["GRU"] > 0.9
    assert right["mean"] < 0.55
    assert right["majority class"] < 0.05
    assert (tmp_path / "films.png").exists()
