"""Data sharing and the Q-switch: relabelled rewards, and a world where the answer is known.

tests/test_loops.py compares both with plain loops; tests/test_files.py stops and resumes them.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dm_control import suite

import mop_distill as distill
import mop_ds as ds
import mop_oqs as oqs
from conftest import (
    ROOT,
    assert_stopped,
    make_arrays,
    own_rewards,
    write_dataset,
    write_teacher,
)
from test_loops import World, load

BUNDLED = [ROOT / f"pretrained/{task}-medium.npz" for task in ("walker-stand", "walker-walk")]


# ---------------------------------------------------------------------------------- relabelling
@pytest.mark.parametrize("task", ["walker-stand", "walker-walk", "walker-run"])
@pytest.mark.parametrize("path", BUNDLED)
def test_relabelled_rewards_are_those_of_dm_control(task, path):
    with np.load(path) as data:
        arrays = {"physics": data["physics"][::97], "actions": data["actions"][::97]}
    expected = own_rewards(arrays, task)["rewards"]
    found = ds.compute_rewards(task, **arrays)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.std() > 0.01


@pytest.mark.parametrize("task", ["cheetah-run", "cartpole-balance", "quadruped-run"])
def test_relabelled_rewards_are_those_of_an_episode(task):
    """Of other domains, too; cartpole-balance rewards small actions, so R(s, a, s') reads a."""
    domain, name = task.split("-")
    env = suite.load(domain, name, task_kwargs={"random": 1})
    env.reset()
    low = env.action_spec().minimum
    high = env.action_spec().maximum
    actions = np.random.default_rng(0).uniform(-1, 1, (60, len(low)))
    rewards = []
    states = []
    for action in actions:
        rewards.append(env.step(low + (high - low) * (action + 1) / 2).reward)
        states.append(env.physics.get_state())
    found = ds.compute_rewards(task, np.array(states), actions)
    np.testing.assert_allclose(found, rewards, atol=1e-6)
    assert found.std() > 1e-3
    without_actions = ds.compute_rewards(task, np.array(states), 0 * actions)
    depends_on_action = np.abs(without_actions - rewards).max() > 1e-3
    assert depends_on_action == (task == "cartpole-balance")


def test_tasks_with_a_goal_of_each_episode_are_refused():
    """The target of reacher-easy is no part of the physics state: a reset draws it."""
    states = np.random.default_rng(0).uniform(-1, 1, (300, 4))
    with pytest.raises(SystemExit, match=r"task reacher-easy: .* on what a reset draws"):
        ds.compute_rewards("reacher-easy", states, np.zeros((300, 2)))


def test_a_goal_that_no_reward_shows_is_refused():
    """The finger touches none of the targets that are drawn: all rewards are 0."""
    with pytest.raises(SystemExit, match=r"task reacher-easy: .* on what a reset draws"):
        ds.compute_rewards("reacher-easy", np.zeros((1, 4)), np.zeros((1, 2)))


class GoalWorld(World):
    """Its task keeps a goal for itself."""

    def reset(self):
        self.goal = self.random.uniform()
        return super().reset()

    def get_reward(self, physics):
        return abs(physics.state[0] - self.goal)


def test_a_goal_that_no_position_shows_is_refused(monkeypatch):
    monkeypatch.setattr(ds, "make_env", GoalWorld)
    with pytest.raises(SystemExit, match=r"task toy-up: .* on what a reset draws"):
        ds.compute_rewards("toy-up", np.zeros((5, 3)), np.zeros((5, 2)))


# -------------------------------------------------------------------- a line with two targets
class LineWorld(World):
    """s' = s + 0.25 a on [-1, 1], 20 steps from near 0; the reward grows towards one end."""

    def reset(self):
        self.state = self.random.uniform(-0.1, 0.1, 1)
        self.time = 0
        return self.time_step()

    def step(self, action):
        self.state = np.clip(self.state + 0.25 * np.asarray(action, np.float64), -1, 1)
        self.time += 1
        return self.time_step()

    def get_reward(self, physics):
        return line_reward(self.name, physics.state)[0]

    def get_state(self):
        return self.state[:1].copy()

    def observation_spec(self):
        return {"observations": SimpleNamespace(shape=(1,))}

    def action_spec(self):
        return SimpleNamespace(shape=(1,))


def line_reward(task, s):
    sign = {"line-right": 1, "line-left": -1}[task]
    return (1 + sign * s) / 2


BEST = sum((1 + min(0.25 * t, 1)) / 2 for t in range(1, 21))  # straight to the target, from 0
OTHER = {"line-right": "line-left", "line-left": "line-right"}
STUDENT = ["--gradient-steps", 400, "--hidden", 32, "--batch-size", 128, "--learning-rate", 3e-3]
STUDENT += ["--eval-every", 400, "--final-eval-episodes", 4, "--device", "cpu"]
TEACHER = [*STUDENT, "--gamma", 0.9, "--tau", 0.05, "--actor-tau", 0.05, "--policy-noise", 0.05]
TEACHER += ["--num-ood", 1, "--num-critics", 3, "--beta-ood-decay", 0.99]


@pytest.fixture
def line(tmp_path, monkeypatch, run_main):
    """Runs a script where each task's own data goes the wrong way only, the other's the right one;
    what it wrote."""
    rng = np.random.default_rng(0)
    for module in (distill, ds, oqs):
        monkeypatch.setattr(module, "make_env", cache(LineWorld))
    for task, sign in (("line-right", -1), ("line-left", 1)):
        arrays = make_arrays(2000, 1, 1, 1)
        s = rng.uniform(-1, 1, (2000, 1))
        action = sign * rng.uniform(0.2, 1, (2000, 1))
        next_s = np.clip(s + 0.25 * action, -1, 1)
        arrays["observations"] = s.astype(np.float32)
        arrays["actions"] = action.astype(np.float32)
        arrays["next_observations"] = next_s.astype(np.float32)
        arrays["timeouts"][:] = True  # every row an episode, so that states can be drawn alone
        arrays["physics"] = next_s
        arrays["rewards"] = line_reward(task, next_s)[:, 0].astype(np.float32)
        write_dataset(tmp_path / f"data/{task}-medium.npz", task, arrays)

    def run(module, path, *args):
        printed = run_main(module, *args)
        assert isinstance(printed, str), printed
        return load(path)

    return run


def test_data_sharing_finds_what_the_own_data_lacks(line):
    for task in OTHER:
        options = [*TEACHER, "--task", task, "--sources", *OTHER]
        teacher = line(ds, f"checkpoints/{task}-medium-ds-teacher.pt", *options)
        assert teacher["data_tasks"] == list(OTHER)
        assert np.mean(teacher["returns"][task]) > 0.9 * BEST
    options = [*STUDENT, "--tasks", *OTHER, "--states", "shared", "--run-dir", "run"]
    student = line(distill, "run/student.pt", *options)
    for task in OTHER:
        assert np.mean(student["returns"][task]) > 0.9 * BEST


def test_q_switch_prefers_the_teacher_from_the_other_tasks_data(line, tmp_path):
    for task, source in OTHER.items():
        path = tmp_path / f"checkpoints/{task}-medium-teacher.pt"
        write_teacher(path, task, obs_dim=1, action_dim=1)  # untrained: it values all near 0
        options = [*TEACHER, "--task", task, "--sources", source]
        teacher = line(ds, f"checkpoints/{task}-from-{source}-medium-teacher.pt", *options)
        assert teacher["data_tasks"] == [source]
        assert np.mean(teacher["returns"][task]) > 0.9 * BEST
    student = line(oqs, "run/student.pt", *STUDENT, "--tasks", *OTHER, "--run-dir", "run")
    for task, source in OTHER.items():
        assert np.mean(student["returns"][task]) > 0.9 * BEST
        for states in OTHER:
            shares = student["switch"][task][states]
            assert shares[f"from {source}"] > 0.9
            assert sum(shares.values()) == pytest.approx(1)


# -------------------------------------------------------------------------------- wrong files
@pytest.mark.parametrize("states", ["before the actions", "of another model"])
def test_physics_states_that_do_not_give_the_rewards(run_main, tmp_path, states):
    """The rewards under another task would be wrong."""
    arrays = own_rewards(make_arrays(), "walker-stand")
    if states == "before the actions":
        arrays["physics"] = np.roll(arrays["physics"], 1, axis=0)
    else:
        arrays["physics"] = arrays["physics"][:, :1]
    write_dataset(tmp_path / "d.npz", arrays=arrays)
    outcome = run_main(ds, "--task", "walker-walk", "--sources", "walker-stand", "--data", "d.npz")
    assert_stopped(outcome, "d.npz: expected physics states")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_tasks": ["walker-run"]}, "a.pt: expected a teacher from walker-stand, found"),
        ({}, "a.pt: expected a teacher from walker-walk, found ['walker-stand']"),  # the second
        ({"log_std": (-5.0, 0.0)}, "a.pt: found a Gaussian teacher"),
        ({"task": "walker-walk"}, "a.pt: expected (task, obs, actions) (['walker-stand'], 24, 6)"),
    ],
)
def test_teachers_that_do_not_fit(run_main, tmp_path, changes, message):
    write_teacher(tmp_path / "a.pt", **changes)
    assert_stopped(run_main(oqs, "--teachers", *["a.pt"] * 4), message)


def test_a_teacher_without_critics(run_main, tmp_path):
    write_teacher(tmp_path / "a.pt")
    teacher = load(tmp_path / "a.pt")
    del teacher["critics"]
    torch.save(teacher, "a.pt")
    outcome = run_main(oqs, "--teachers", *["a.pt"] * 4)
    assert_stopped(outcome, "a.pt: has no critics, as the switch needs")
