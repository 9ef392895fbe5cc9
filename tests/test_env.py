"""LockstepEnv against dm_control itself."""

import numpy as np
import pytest
import torch
from dm_control import suite

import mop_distill as distill
import mop_td3_collect as td3

WALKER = ["walker-stand", "walker-walk", "walker-run"]
OTHERS = ["cheetah-run", "cartpole-swingup", "ball_in_cup-catch"]


@pytest.mark.parametrize("task", WALKER + OTHERS)
def test_equals_dm_control_bit_for_bit(task):
    n, steps, rng = 3, 300 if task in WALKER else 50, np.random.default_rng(0)
    env = td3.LockstepEnv(task, n, threads=2)
    seeds = [5, 2**31 + 7, 123]
    ours = env.reset(seeds)
    domain, name = task.split("-")
    theirs = [suite.load(domain, name, {"random": s}, {"flat_observation": True}) for s in seeds]
    for i, other in enumerate(theirs):
        np.testing.assert_array_equal(ours[i], other.reset().observation["observations"].astype(np.float32))
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (n, env.action_dim)).astype(np.float32)
        observations, reward, states = env.step(actions)
        assert observations.dtype == reward.dtype == np.float32
        for i, other in enumerate(theirs):
            expected = other.step(actions[i])
            np.testing.assert_array_equal(observations[i], expected.observation["observations"].astype(np.float32))
            assert reward[i] == np.float32(expected.reward)
            np.testing.assert_array_equal(states[i], other.physics.get_state())


def test_a_second_episode_starts_afresh():
    env = td3.LockstepEnv("walker-walk", 2, threads=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 2, 6)).astype(np.float32)
    runs = []
    for _ in range(2):
        env.reset([1, 2])
        runs.append([env.step(a)[0] for a in actions])
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("task", ["walker-stand", "cheetah-run"])
@pytest.mark.parametrize("module", [td3, distill])
def test_evaluate_sums_whole_episodes_from_fixed_seeds(task, module):
    """Against a plain loop over dm_control environments; the policy rounds nothing, as contacts amplify a last bit."""
    envs = td3.LockstepEnv(task, 2, threads=1) if module is td3 else distill.make_envs(task, 2)
    returns = module.evaluate(lambda obs: obs[:, :8].clamp(-1, 1), envs, torch.device("cpu"))  # 6 of the 8 count
    for e in range(2):
        domain, name = task.split("-")
        other = suite.load(domain, name, {"random": 2**31 + e}, {"flat_observation": True})
        step, total, count = other.reset(), 0.0, 0
        while not step.last():
            step = other.step(step.observation["observations"].astype(np.float32)[:6].clip(-1, 1))
            total, count = total + step.reward, count + 1
        assert count == 1000 and step.discount == 1.0  # a timeout, not a termination
        assert returns[e] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("task", ["walker-fly", "walkerstand", "lqr-lqr_2_1", "quadruped-walk", ""])
def test_tasks_that_cannot_run_are_refused(task):
    with pytest.raises(SystemExit, match=r"task .*: expected"):
        td3.LockstepEnv(task, 1)
