"""docs/own_task.md: a task that the suite does not have, examples/walker_stand_still.py."""

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

EXAMPLE = ROOT / "examples/walker_stand_still.py"
TASK = "walker-stand_still"


@pytest.fixture(scope="module")
def env():
    walker.SUITE.allow_overriding_keys = True  # once more in this process
    runpy.run_path(str(EXAMPLE))  # registers the task
    return suite.load("walker", "stand_still", {"random": 1}, {"flat_observation": True})


def expected_reward(physics) -> float:
    """Another formula: 0.1**x**2 is 1 at 0 and 0.1 at the margin; speed is that of the mass."""
    jacobian = np.zeros((3, physics.model.nv))
    torso = physics.model.name2id("torso", "body")
    mujoco.mj_jacSubtreeCom(physics.model.ptr, physics.data.ptr, jacobian, torso)
    speed = jacobian[0] @ physics.velocity()
    too_low = max(0, 1.2 - physics.torso_height()) / 0.6
    standing = (3 * 0.1**too_low**2 + (1 + physics.torso_upright()) / 2) / 4
    return standing * 0.1**speed**2


def test_reward(env):
    rng = np.random.default_rng(0)
    env.reset()
    rewards = []
    for _ in range(300):
        rewards.append(env.step(rng.uniform(-1, 1, 6)).reward)
        assert rewards[-1] == pytest.approx(expected_reward(env.physics), rel=1e-9)
    assert np.ptp(rewards) > 0.1


@pytest.mark.parametrize(
    "speed, share", [(0, 1), (0.5, 0.1**0.25), (1, 0.1), (-1, 0.1), (2, 0.1**4)]
)
def test_forwards_and_backwards_cost_the_same(env, speed, share):
    with env.physics.reset_context():
        env.physics.data.qvel[1] = speed  # upright, at the height of the model's rest
    standing = suite.load("walker", "stand").task.get_reward(env.physics)
    assert standing > 0.9
    assert env.task.get_reward(env.physics) == pytest.approx(share * standing, rel=1e-6)


def test_relabelling(env):
    """Rewards computed from stored physics states are those of the episode."""
    import mop_ds

    rng = np.random.default_rng(1)
    env.reset()
    states = []
    actions = []
    rewards = []
    for _ in range(50):
        actions.append(rng.uniform(-1, 1, 6))
        rewards.append(env.step(actions[-1]).reward)
        states.append(env.physics.get_state())
    found = mop_ds.compute_rewards(TASK, np.array(states), np.array(actions))
    np.testing.assert_allclose(found, rewards, rtol=1e-6)


def test_scripts_know_the_task_in_their_worker_processes(tmp_path):
    """The cross-task table of the bundled walk teacher: walking is no way to stand still."""
    teacher = ROOT / "pretrained/walker-walk-medium-teacher.pt"
    command = [sys.executable, EXAMPLE, ROOT / "mop_measure.py", "--run-dir", "run"]
    command += ["--tasks", "walker-stand", TASK, "--teachers", teacher]
    command += ["--cross-episodes", "2", "--threads", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "run/measure.json").read_text())["cross_task"]
    assert row["returns"][TASK]["mean"] < 200 < row["returns"]["walker-stand"]["mean"]
