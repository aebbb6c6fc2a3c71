"""The actor-critic example: its maze, its model and its masks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import actor_critic
import tdjax
from actor_critic import State

MAZE = ["#####U", "#####.", "......", "#####.", "#####L"]  # U, L: the two doors
FLOOR = [
    (row, column) for row in range(5) for column in range(6) if MAZE[row][column] == "."
]
UP, DOWN, LEFT, RIGHT = range(4)
STARTS = [(2, column) for column in range(5)]
BATCH = 2000
step = jax.jit(actor_critic.step)
rollout = jax.jit(lambda params, key: actor_critic.rollout(params, key, BATCH))
apply = jax.jit(actor_critic.ActorCritic().apply)
loss_and_gradient = jax.jit(jax.value_and_grad(actor_critic.loss))
COLOURS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # of the cue and of the upper door


def walk(cell, action):
    """Where an action leads, by the drawing."""
    row, column = np.add(cell, [(-1, 0), (1, 0), (0, -1), (0, 1)][action])
    is_inside = 0 <= row < 5 and 0 <= column < 6
    return (row, column) if is_inside and MAZE[row][column] != "#" else cell


def rewards_of(cell, cue, upper, actions):
    """The rewards of the actions up to the end of the episode."""
    state, rewards = State(jnp.array(cell), cue, upper, True), []
    for action in actions:
        state, reward, done = step(state, action)
        rewards.append(float(reward))
        if done:
            return rewards
    raise AssertionError("the episode is not over")


def part(episodes, steps=slice(None), columns=slice(None)):
    return jax.tree.map(lambda x: x[steps, columns], episodes)


def init(key):
    batch = jax.vmap(actor_critic.reset)(jax.random.split(key, 2))
    observations = jax.vmap(actor_critic.observe)(batch)
    observations = jax.tree.map(lambda x: x[None], observations)
    memory = jnp.zeros((2, actor_critic.HIDDEN))
    model = actor_critic.ActorCritic()
    return jax.jit(model.init)(key, observations, jnp.ones((1, 2), bool), memory)


@pytest.fixture(scope="module")
def params():
    return init(jax.random.key(3))


@pytest.fixture(scope="module")
def episodes(params):
    """Six columns, shortest first; one does not end in time."""
    episodes = rollout(params, jax.random.key(5))
    lengths = np.asarray(episodes[3]).sum(axis=0)
    columns = np.argsort(lengths)[[0, 1, 2, 3, 4, -1]]
    assert lengths[columns[:5]].max() < actor_critic.TIMESTEPS == lengths[columns[-1]]
    return part(episodes, columns=columns)


def test_moves_and_ends_are_those_of_the_drawing():
    for cell, action in itertools.product(FLOOR, range(4)):
        state, _, done = step(State(jnp.array(cell), 0, 0, True), action)
        row, column = walk(cell, action)
        assert state.cell.tolist() == [row, column]
        assert done == (MAZE[row][column] in "UL")


@pytest.mark.parametrize(("cue", "upper"), COLOURS)
def test_only_the_door_of_the_cue_gives_a_reward(cue, upper):
    for turn, colour in [(UP, upper), (DOWN, 1 - upper)]:
        for row, column in STARTS:
            actions = [RIGHT] * (5 - column) + [turn] * 2
            rewards = rewards_of((row, column), cue, upper, actions)
            assert rewards == [0.0] * (6 - column) + [float(colour == cue)]


def test_reset_reaches_every_start_and_colour():
    keys = jax.random.split(jax.random.key(0), 400)
    states = jax.vmap(actor_critic.reset)(keys)
    found = {tuple(row) for row in np.column_stack(states[:3]).tolist()}
    assert found == {(*cell, *colours) for cell in STARTS for colours in COLOURS}


def test_the_cue_is_in_the_first_observation_and_in_no_other():
    state = State(jnp.array([2, 1]), jnp.array(1), jnp.array(0), jnp.array(True))
    first = actor_critic.observe(state)
    assert first["cue"].tolist() == [0, 1]
    shown = np.argwhere(np.asarray(first["grid"]))
    assert shown.tolist() == [[0, 5, 1], [2, 1, 0], [4, 5, 2]]  # door 0, agent, door 1
    later = state._replace(is_first=jnp.array(False))
    other = later._replace(cue=jnp.array(0))
    for a, b in zip(*map(jax.tree.leaves, map(actor_critic.observe, (later, other)))):
        assert a.tolist() == b.tolist()


def test_no_policy_without_memory_is_right_more_than_half_of_the_time():
    """All that take one action in each cell, and the best first action for each cue."""
    policies = np.array(list(itertools.product(range(4), repeat=len(FLOOR))))
    cells = [*FLOOR, (0, 5), (4, 5)]
    table = np.array(
        [[cells.index(walk(cell, action)) for action in range(4)] for cell in FLOOR]
    )
    doors = np.full((len(policies), 2), [len(FLOOR), len(FLOOR) + 1])
    ends = np.hstack([table[np.arange(len(FLOOR)), policies], doors])
    for _ in range(4):  # two moves, four, eight, sixteen
        ends = np.take_along_axis(ends, ends, axis=1)
    right = np.zeros(len(policies))
    for door, cell in itertools.product(doors[0], STARTS):
        after_first = table[FLOOR.index(cell)]
        right += (ends[:, after_first] == door).any(axis=1) / (2 * len(STARTS))
    assert right.max() == pytest.approx(0.5)


def test_equal_logits_give_the_return_of_a_random_walk(params):
    cells = [*FLOOR, (0, 5), (4, 5)]
    chance = np.array([cell in STARTS for cell in cells]) / len(STARTS)
    move = np.eye(len(cells))
    for row, cell in enumerate(FLOOR):
        move[row] = np.mean(
            [np.eye(len(cells))[cells.index(walk(cell, a))] for a in range(4)], axis=0
        )
    chance = chance @ np.linalg.matrix_power(move, actor_critic.TIMESTEPS)
    expected = chance[-2:].sum() / 2  # either door, and the right one of two
    uniform = jax.tree.map(jnp.zeros_like, params)
    found = actor_critic.mean_return(rollout(uniform, jax.random.key(1)))
    assert abs(found - expected) < 4 * (expected * (1 - expected) / BATCH) ** 0.5


def test_a_rollout_masks_what_is_after_the_first_door(params):
    episodes = rollout(params, jax.random.key(2))
    observations, actions, rewards, mask = jax.device_get(
        part(episodes, columns=slice(100))
    )
    assert (rewards * mask).any()
    for column in range(100):
        cell = tuple(np.argwhere(observations["grid"][0, column, ..., 0])[0])
        doors, cue = observations["grid"][0, column], observations["cue"][0, column]
        for t in range(mask[:, column].sum()):
            assert mask[t, column]
            assert MAZE[cell[0]][cell[1]] == "."
            cell = walk(cell, actions[t, column])
            assert rewards[t, column] == doors[*cell, 1:] @ cue
        assert t == actor_critic.TIMESTEPS - 1 or MAZE[cell[0]][cell[1]] in "UL"


def test_acting_step_by_step_is_the_model_of_the_whole_rollout(params, episodes):
    observations, _, _, mask = episodes
    memory = jnp.zeros((mask.shape[1], actor_critic.HIDDEN))
    logits, values, last = apply(params, observations, mask, memory)
    assert not logits[~mask].any()
    assert not values[~mask].any()
    for t in range(len(mask)):
        now = part((observations, mask), slice(t, t + 1))
        *outputs, memory = apply(params, *now, memory)
        np.testing.assert_allclose(outputs[0][0], logits[t], atol=1e-5)
        np.testing.assert_allclose(outputs[1][0], values[t], atol=1e-5)
    np.testing.assert_allclose(memory, last, atol=1e-5)


def test_no_step_sees_a_later_one(params, episodes):
    observations = part(episodes[0], slice(3), slice(1))
    mask, memory = jnp.ones((3, 1), bool), jnp.zeros((1, actor_critic.HIDDEN))
    model = lambda observations: apply(params, observations, mask, memory)[0]
    tdjax.assert_causal(model, observations, in_axes=0, out_axes=0)


def test_the_last_step_remembers_the_cue(params, episodes):
    observations, mask = episodes[0], jnp.ones_like(episodes[3])
    memory = jnp.zeros((mask.shape[1], actor_critic.HIDDEN))
    other_cue = observations | {"cue": observations["cue"][..., ::-1]}
    both = [apply(params, x, mask, memory)[0][-1] for x in (observations, other_cue)]
    assert (jnp.abs(both[0] - both[1]).max(axis=1) > 1e-5).all()


def test_lambda_returns_less_the_values_are_discounted_sums_of_errors():
    """Equation 16 of Schulman et al. (2016), for each episode alone."""
    lengths, rng = np.array([5, 3, 1]), np.random.default_rng(0)
    mask = np.asarray(tdjax.lengths_to_mask(lengths, 5, time_major=True))
    rewards, values = rng.normal(size=(2, 5, 3)) * mask
    expected = np.zeros((5, 3))
    for column, length in enumerate(lengths):
        v = np.append(values[:length, column], 0)
        errors = rewards[:length, column] + actor_critic.DISCOUNT * v[1:] - v[:-1]
        decay = (actor_critic.DISCOUNT * actor_critic.TRACE) ** np.arange(length)
        for t in range(length):
            expected[t, column] = (decay[: length - t] * errors[t:]).sum()
    found = actor_critic.lambda_returns(jnp.array(rewards), jnp.array(values)) - values
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_after_the_end_changes_neither_loss_nor_gradient(params, episodes):
    observations, actions, rewards, mask = episodes
    assert not mask.all()

    def fill(x, value):
        valid = mask.reshape(mask.shape + (1,) * (x.ndim - 2))
        return jnp.where(valid, x, value)

    expected = loss_and_gradient(params, episodes)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(expected))
    observations = jax.tree.map(lambda x: fill(x, jnp.nan), observations)
    filled = observations, fill(actions, 1000), fill(rewards, jnp.nan), mask
    found = loss_and_gradient(params, filled)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_each_episode_counts_by_its_length(params, episodes):
    lengths = np.asarray(episodes[3]).sum(axis=0)
    columns = [part(episodes, columns=np.full(6, column)) for column in range(6)]
    parts = [loss_and_gradient(params, copies) for copies in columns]
    weigh = lambda *x: sum(a * length for a, length in zip(x, lengths)) / sum(lengths)
    found, expected = loss_and_gradient(params, episodes), jax.tree.map(weigh, *parts)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, found, expected)


@pytest.mark.slow
def test_the_gradient_is_that_of_an_episode_cut_at_its_end(params, episodes):
    copies = part(episodes, columns=np.zeros(6, int))
    cut = part(copies, slice(int(copies[3][:, 0].sum())))
    assert cut[3].all()
    assert len(cut[3]) < len(copies[3])
    results = [loss_and_gradient(params, x) for x in (cut, copies)]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, *results)


@pytest.mark.slow
def test_the_trained_agent_beats_every_policy_without_memory(tmp_path):
    returns = actor_critic.main(out=tmp_path)
    assert returns["actor-critic"] > 0.95
    assert returns["best without memory"] == 0.5
    assert returns["random"] < 0.13
    assert (tmp_path / "return.png").stat().st_size > 10_000
