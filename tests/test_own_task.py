"""docs/own_task.md: a task that the suite does not have, examples/walker_stand_still.py, through the scripts."""

import json
import runpy
import subprocess
import sys

import mujoco
import numpy as np
import pytest
from dm_control import suite
from dm_control.suite import walker

from conftest import ROOT

LAUNCHER, TASK = ROOT / "examples/walker_stand_still.py", "walker-stand_still"


@pytest.fixture(scope="module")
def env():
    walker.SUITE.allow_overriding_keys = True  # once more in this process
    runpy.run_path(str(LAUNCHER))  # registers the task in this process
    return suite.load("walker", "stand_still", {"random": 1}, {"flat_observation": True})


def expected_reward(physics) -> float:
    """A formula of its own: 0.1 ** x**2 falls from 1 to 0.1 over a margin; speed = d(centre of mass) / dt."""
    model, data, jacobian = physics.model.ptr, physics.data.ptr, np.zeros((3, physics.model.nv))
    mujoco.mj_jacSubtreeCom(model, data, jacobian, physics.model.name2id("torso", "body"))
    speed = jacobian[0] @ physics.velocity()
    too_low = max(0, 1.2 - physics.torso_height()) / 0.6
    return (3 * 0.1**too_low**2 + (1 + physics.torso_upright()) / 2) / 4 * 0.1**speed**2


def test_reward(env):
    """Along random episodes, and at speeds set by hand: forwards and backwards cost the same."""
    rng, step, found = np.random.default_rng(0), env.reset(), []
    for _ in range(300):
        step = env.step(rng.uniform(-1, 1, 6))
        found.append(step.reward)
        assert step.reward == pytest.approx(expected_reward(env.physics), rel=1e-9)
    assert np.ptp(found) > 0.1
    for speed, share in ((0, 1), (0.5, 0.1**0.25), (1, 0.1), (-1, 0.1), (2, 0.1**4)):
        with env.physics.reset_context():
            env.physics.data.qvel[1] = speed  # of rootx; upright, at the height of the model's rest
        standing = suite.load("walker", "stand").task.get_reward(env.physics)
        assert standing > 0.9 and env.task.get_reward(env.physics) == pytest.approx(share * standing, rel=1e-6)


def test_relabelling(env):
    """Rewards computed from stored physics states, as mop_ds.py and mop_oqs.py do, are those of the episode."""
    import mop_ds

    env.reset()
    rng, states, actions, rewards = np.random.default_rng(1), [], [], []
    for _ in range(50):
        actions.append(rng.uniform(-1, 1, 6))
        rewards.append(env.step(actions[-1]).reward)
        states.append(env.physics.get_state())
    found = mop_ds.compute_rewards(TASK, np.array(states), np.array(actions))
    np.testing.assert_allclose(found, rewards, rtol=1e-6)


def test_the_launcher(tmp_path):
    """The cross-task table of the bundled walk teacher; tests/test_docs.py runs the other scripts this way."""
    command = [sys.executable, LAUNCHER, ROOT / "mop_measure.py", "--tasks", "walker-stand", TASK, "--teachers"]
    command += [ROOT / "pretrained/walker-walk-medium-teacher.pt", "--cross-episodes", 2, "--threads", 1, "--no-gif"]
    done = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))["cross_task"]
    walk = {task: found["mean"] for task, found in row["returns"].items()}
    assert walk[TASK] < 200 < walk["walker-stand"]  # walking is no way to stand still
