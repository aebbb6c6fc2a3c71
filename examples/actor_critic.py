"""Trains an actor-critic with memory, on rollouts in time-major layout.

    python examples/actor_critic.py

The maze is a T: a corridor, with a red and a blue door at the ends of its crossbar. A
cue, seen at the first step only, tells which door gives the reward of 1. The agent is a
conv net at every step, a GRU over time, and Dense at every step for policy and value.
It takes less than a minute on two CPU cores, and leaves a picture in runs/actor_critic.

After the first step the cue is gone. A policy without memory then chooses its door in
the same way under either cue, so its mean return is at most 0.5.

Observations are a dict of `(time, batch, ...)`, and steps after the end of an episode
are masked. To copy:

- `TimeDistributed(Encoder(), in_axes=0, out_axes=0)` applies one encoder to every step
  of the dict. The same model acts, on sequences of one step.
- `mask=`, `(time, batch)`: masked steps give zeros and no gradient. Zero is the value
  of an episode that is over, so `lambda_returns` needs no mask.
- `tdjax.masked_mean` leaves masked steps out of the loss.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import tdjax.linen

HEIGHT, WIDTH, TIMESTEPS = 5, 6, 20
HIDDEN, BATCH, STEPS = 64, 128, 250
DISCOUNT, TRACE, ENTROPY = 0.95, 0.95, 0.02
MOVES = (-1, 0), (1, 0), (0, -1), (0, 1)  # rows and columns


class State(NamedTuple):
    cell: jax.Array  # row, column
    cue: jax.Array  # the colour of the right door
    upper: jax.Array  # the colour of the upper door
    is_first: jax.Array


def reset(key):
    """Colours by chance, and the agent anywhere in the corridor."""
    column, cue, upper = jax.random.randint(key, 3, 0, jnp.array([WIDTH - 1, 2, 2]))
    return State(jnp.array([HEIGHT // 2, column]), cue, upper, True)


def step(state, action):
    """The next state, the reward, and whether the episode is over."""
    cell = state.cell + jnp.array(MOVES)[action]
    cell = jnp.clip(cell, 0, jnp.array([HEIGHT - 1, WIDTH - 1]))
    is_floor = (cell[0] == HEIGHT // 2) | (cell[1] == WIDTH - 1)
    cell = jnp.where(is_floor, cell, state.cell)
    done = cell[0] % (HEIGHT - 1) == 0
    colour = jnp.where(cell[0] == 0, state.upper, 1 - state.upper)
    reward = jnp.where(done & (colour == state.cue), 1.0, 0.0)
    return state._replace(cell=cell, is_first=False), reward, done


def observe(state):
    """The agent and the two doors on a grid; the cue, or zeros after the first step."""
    grid = jnp.zeros((HEIGHT, WIDTH, 3)).at[*state.cell, 0].set(1)
    grid = grid.at[0, -1, 1 + state.upper].set(1).at[-1, -1, 2 - state.upper].set(1)
    return {"grid": grid, "cue": jax.nn.one_hot(state.cue, 2) * state.is_first}


class Encoder(nn.Module):
    """One step: a dict of `(batch, ...)` to `(batch, features)`."""

    @nn.compact
    def __call__(self, observation):
        x = nn.relu(nn.Conv(8, (3, 3))(observation["grid"]))
        x = jnp.concatenate([x.reshape(x.shape[0], -1), observation["cue"]], axis=-1)
        return nn.relu(nn.Dense(HIDDEN)(x))


class ActorCritic(nn.Module):
    """A dict of `(time, batch, ...)` to logits, values and the GRU's last state."""

    @nn.compact
    def __call__(self, observations, mask, memory):
        encoder = tdjax.linen.TimeDistributed(Encoder(), in_axes=0, out_axes=0)
        core = nn.RNN(nn.GRUCell(HIDDEN), time_major=True, return_carry=True)
        dense = nn.Dense(len(MOVES) + 1)
        head = tdjax.linen.TimeDistributed(dense, in_axes=0, out_axes=0)
        memory, x = core(encoder(observations, mask=mask), initial_carry=memory)
        outputs = head(x, mask=mask)
        return outputs[..., :-1], outputs[..., -1], memory


def rollout(params, key, batch=BATCH):
    """One episode in each column: observations, actions, rewards and mask."""

    def act(carry, key):
        states, mask, memory = carry
        observations = jax.vmap(observe)(states)
        one_step = jax.tree.map(lambda x: x[None], (observations, mask))
        logits, _, memory = ActorCritic().apply(params, *one_step, memory)
        actions = jax.random.categorical(key, logits[0])
        states, rewards, dones = jax.vmap(step)(states, actions)
        return (states, mask & ~dones, memory), (observations, actions, rewards, mask)

    reset_key, act_key = jax.random.split(key)
    states = jax.vmap(reset)(jax.random.split(reset_key, batch))
    carry = states, jnp.ones(batch, bool), jnp.zeros((batch, HIDDEN))
    return jax.lax.scan(act, carry, jax.random.split(act_key, TIMESTEPS))[1]


def mean_return(episodes):
    *_, rewards, mask = episodes
    return jnp.where(mask, rewards, 0).sum(axis=0).mean()


def lambda_returns(rewards, values):
    """What values should be; less `values`, generalised advantage estimates."""

    def back(later, now):
        reward, next_value = now
        target = reward + DISCOUNT * ((1 - TRACE) * next_value + TRACE * later)
        return target, target

    steps = rewards, jnp.pad(values[1:], ((0, 1), (0, 0)))
    return jax.lax.scan(back, jnp.zeros_like(values[0]), steps, reverse=True)[1]


def loss(params, episodes):
    observations, actions, rewards, mask = episodes
    memory = jnp.zeros((mask.shape[1], HIDDEN))
    logits, values, _ = ActorCritic().apply(params, observations, mask, memory)
    baseline = jax.lax.stop_gradient(values)
    targets = lambda_returns(jnp.where(mask, rewards, 0), baseline)
    policy = optax.softmax_cross_entropy_with_integer_labels(logits, actions)
    critic = optax.l2_loss(values, targets)
    entropy = optax.softmax_cross_entropy(logits, jax.nn.softmax(logits))
    losses = policy * (targets - baseline) + critic - ENTROPY * entropy
    return tdjax.masked_mean(losses, mask)


def main(steps=STEPS, out=Path("runs/actor_critic")):
    """Trains, reports and draws; returns the mean returns."""
    optimizer = optax.adam(optax.linear_schedule(5e-3, 0, steps))

    @jax.jit
    def train_step(params, state, key):
        episodes = rollout(params, key)
        updates, state = optimizer.update(jax.grad(loss)(params, episodes), state)
        return optax.apply_updates(params, updates), state, mean_return(episodes)

    key = jax.random.key(0)
    first = jax.tree.map(lambda x: x[None, None], observe(reset(key)))
    inputs = first, jnp.ones((1, 1), bool), jnp.zeros((1, HIDDEN))
    params = jax.jit(ActorCritic().init)(key, *inputs)
    state, curve, start = optimizer.init(params), [], time.perf_counter()
    for i in range(1, steps + 1):
        params, state, value = train_step(params, state, jax.random.fold_in(key, i))
        curve.append(float(value))
        if i % -(-steps // 10) == 0 or i == steps:
            spent = time.perf_counter() - start
            print(f"step {i:4}/{steps}  return {value:.3f}  {spent:.0f} s", flush=True)

    play = jax.jit(lambda params: mean_return(rollout(params, key, batch=10_000)))
    returns = {
        "actor-critic": float(play(params)),
        "best without memory": 0.5,
        "random": float(play(jax.tree.map(jnp.zeros_like, params))),  # equal logits
    }
    for name, value in returns.items():
        print(f"mean return, {name}: {value:.3f}")
    print("picture:", draw(curve, returns, out))
    return returns


def draw(curve, returns, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, ax = plt.subplots()
    ax.plot(range(1, len(curve) + 1), curve, color="C0", marker="")
    ax.hlines(list(returns.values())[1:], 0, len(curve), colors=["C1", "C2"])
    for (name, value), color in zip(returns.items(), ["C0", "C1", "C2"]):
        ax.text(len(curve), value - 0.02, name, color=color, ha="right", va="top")
    ax.set(ylim=(0, 1.02), xlim=(0, len(curve)), xlabel="training steps")
    final = returns["actor-critic"]
    ax.set_title(f"A mean return of {final:.2f} with memory, at most 0.5 without")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "return.png")
    return out / "return.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/actor_critic"))
    main(**vars(parser.parse_args()))
