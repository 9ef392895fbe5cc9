"""run_episodes against a plain loop over dm_control."""

import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from dm_control import suite
from scipy.stats import kstest, truncnorm

import mop_distill as distill
import mop_td3_collect as td3
from conftest import ROOT, assert_stopped, write_teacher


class Policy(torch.nn.Module):
    """Actions that are numbers of the state: nothing is rounded, as contacts amplify a last bit."""

    def forward(self, x):
        return torch.cat([x[:, -1:], x[:, :15]], dim=1).clamp(-1, 1)  # more than any action takes


class Zeros(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 6)


LOW = np.array([-1, -1, -0.8] * 4)  # of a quadruped's actions: yaw, lift and extend of each leg
HIGH = np.array([1, 1.1, 0.8] * 4)


def plain_episode(task, seed, code=()):
    """An episode by Policy as a plain loop: arrays as from run_episode."""
    domain, name = task.split("-")
    env = suite.load(domain, name, {"random": seed}, {"flat_observation": True})
    size = env.action_spec().shape[0]
    time_step = env.reset()
    obs = time_step.observation["observations"].astype(np.float32)
    names = ["observations", "actions", "rewards", "next_observations", "physics"]
    episode = {name: [] for name in names}
    while not time_step.last():
        episode["observations"].append(obs)
        x = torch.tensor([*obs, *code])[None]
        action = Policy()(x)[0].numpy()[:size]
        if task == "quadruped-walk":
            time_step = env.step(LOW + (HIGH - LOW) * (action.astype(np.float64) + 1) / 2)
        else:
            time_step = env.step(action)
        obs = time_step.observation["observations"].astype(np.float32)
        episode["next_observations"].append(obs)
        episode["actions"].append(action)
        episode["rewards"].append(time_step.reward)
        episode["physics"].append(env.physics.get_state())
    assert len(episode["rewards"]) == 1000 and time_step.discount == 1  # a timeout, not an end
    return {name: np.array(values) for name, values in episode.items()}


def assert_same(found, expected):
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], name)


@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run", "quadruped-walk"])
def test_episodes_equal_a_plain_loop(task):
    """Of a quadruped, too, whose own actions are not in [-1, 1] as those of policies are."""
    seeds = [2**31, 5]
    expected = [plain_episode(task, seed) for seed in seeds]
    for episode, plain in zip(td3.run_episodes(Policy(), task, seeds, 1), expected, strict=True):
        assert episode.keys() == plain.keys()
        assert_same(episode, plain)
    for episode, plain in zip(
        distill.run_episodes(Policy(), task, seeds, 1), expected, strict=True
    ):
        assert episode.keys() == {"observations", "rewards"}
        assert_same(episode, plain)


def test_the_number_of_workers_and_of_episodes_does_not_matter():
    """Nor what the environment did before; the workers know a class that no script has."""
    codes = [0.25]
    seeds = [3, 4, 5]
    episodes = distill.run_episodes(Policy(), "walker-stand", seeds, 2, code=codes)
    distill.make_workers(2).shutdown()
    distill.make_workers.cache_clear()
    for episode, seed in zip(episodes, seeds, strict=True):
        (alone,) = distill.run_episodes(Policy(), "walker-stand", [seed], 1, code=codes)
        assert_same(episode, alone)
    assert_same(episodes[0], plain_episode("walker-stand", 3, codes))
    assert len(np.unique([episode["rewards"].sum() for episode in episodes])) == 3


def test_workers_compute_as_this_process_does():
    """With its precision of matrix products; one thread each, as there are several of them."""
    torch.set_float32_matmul_precision("medium")
    workers = distill.make_workers(1)
    assert workers.submit(torch.get_float32_matmul_precision).result() == "medium"
    assert workers.submit(torch.get_num_threads).result() == 1
    workers.shutdown()
    distill.make_workers.cache_clear()


ON_ONE_CORE = """
import torch
import mop_distill
args = mop_distill.parse_args()[0]
mop_distill.run_episodes(mop_distill.Actor(24, 6, 8), "walker-stand", [1], args.threads)
print(args.threads, torch.get_num_threads(), mop_distill.make_workers.cache_info().currsize)
"""


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_threads_are_those_that_this_process_may_use():
    """On one core of several: one thread, and episodes in the process itself, not in workers."""
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), sys.executable, "-c", ON_ONE_CORE]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("OMP_NUM_THREADS", None)  # it would win
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.stdout == "1 1 0\n", process.stderr


def test_the_policy_itself_is_not_touched():
    """run_episodes takes a copy: a network in training keeps its gradients."""
    actor = distill.Actor(24, 6, 8)
    actor(torch.zeros(1, 24)).sum().backward()
    gradients = [p.grad for p in actor.parameters()]
    distill.run_episodes(actor, "walker-stand", [1], 1)
    assert all(p.requires_grad for p in actor.parameters())
    assert all(p.grad is g for p, g in zip(actor.parameters(), gradients, strict=True))


def test_mixes():
    """noise: clipped N(0, 1) around the policy's action; random: uniform; a stream per seed."""
    actions = {}
    for mix in ("online", "noise", "random90", "random99"):
        episode = td3.run_episode(pickle.dumps(Zeros()), "walker-walk", 7, mix=mix)
        again = td3.run_episode(pickle.dumps(Zeros()), "walker-walk", 7, mix=mix)
        assert_same(episode, again)
        assert episode["actions"].dtype == np.float32
        actions[mix] = episode["actions"]
    assert np.all(actions["online"] == 0)
    inside = actions["noise"][np.abs(actions["noise"]) < 1]
    assert inside.size / actions["noise"].size == pytest.approx(0.683, abs=0.03)
    assert kstest(inside, truncnorm(-1, 1).cdf).pvalue > 0.01
    assert kstest(actions["random90"].ravel(), "uniform", (-1, 2)).pvalue > 0.01
    np.testing.assert_array_equal(actions["random90"], actions["random99"])
    other = td3.run_episode(pickle.dumps(Zeros()), "walker-walk", 8, mix="noise")
    assert not np.array_equal(other["actions"], actions["noise"])
    noisy = td3.run_episode(pickle.dumps(Policy()), "walker-walk", 7, mix="noise")
    plain = Policy()(torch.from_numpy(noisy["observations"]))[:, :6].numpy()
    noise = np.random.default_rng(7).standard_normal((1000, 6))
    np.testing.assert_allclose(noisy["actions"], np.clip(plain + noise, -1, 1), atol=1e-6)


@pytest.mark.parametrize("task", ["walker-fly", "walkerstand", "walk", ""])
def test_tasks_that_do_not_exist_are_refused(task):
    with pytest.raises(SystemExit, match=r"task .*: not one of the dm_control suite"):
        td3.make_env(task)


def test_sizes_of_tasks():
    assert td3.task_sizes("walker-stand") == (24, 6)
    assert td3.task_sizes("cheetah-run") == (17, 6)


@pytest.fixture
def unstable_env(monkeypatch):
    """cartpole-balance of this process: its fifth step begins with a velocity beyond all bounds."""
    env = distill.make_env("cartpole-balance")
    before_step = env.task.before_step
    steps = []

    def unstable_before_step(action, physics):
        before_step(action, physics)
        steps.append(action)
        if len(steps) == 5:
            physics.data.qvel[:] = 1e12

    monkeypatch.setattr(env.task, "before_step", unstable_before_step)
    monkeypatch.setattr(td3, "make_env", lambda task: env)


def test_an_unstable_state_ends_the_episode_as_it_stands(unstable_env):
    """The four steps before it count."""
    policy = torch.nn.Linear(5, 1)
    (episode,) = distill.run_episodes(policy, "cartpole-balance", [0], 1)
    assert len(episode["rewards"]) == len(episode["observations"]) == 4


def test_an_episode_that_ends_early_stops_td3(monkeypatch, run_main):
    """A task of one's own that ends in a terminal state: what follows would be another episode."""
    env = distill.make_env("cartpole-balance")
    monkeypatch.setattr(env.task, "get_termination", lambda physics: 0.0)
    monkeypatch.setattr(td3, "make_env", lambda task: env)
    outcome = run_main(td3, "--task", "cartpole-balance", "--scale", "laptop", "--hidden", 8)
    assert_stopped(outcome, "error: step 1: expected episodes of 1000 steps")


def test_an_unstable_state_stops_td3(unstable_env, run_main):
    """There is no next state to learn from."""
    outcome = run_main(td3, "--task", "cartpole-balance", "--scale", "laptop", "--hidden", 8)
    assert_stopped(outcome, "error: step 5: cartpole-balance: Physics state is invalid.")


def test_an_unstable_state_is_in_no_dataset(unstable_env, run_main, tmp_path):
    path = write_teacher(tmp_path / "t.pt", "cartpole-balance", obs_dim=5, action_dim=1)
    flags = ["--policy", path, "--num-transitions", 1000, "--output", "d.npz"]
    outcome = run_main(td3, *flags)
    assert_stopped(outcome, "t.pt: expected episodes of 1000 steps; the physics may be unstable")
    assert not (tmp_path / "d.npz").exists()
