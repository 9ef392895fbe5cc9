"""Shared helpers: the scripts are imported from the folder above, and run in temporary folders."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["MUJOCO_GL"] = "disable"  # nothing is rendered here, whatever the shell asks for
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np
import pytest
import torch
from dm_control import suite
from dm_control.suite import walker

SCRIPTS = sorted(path.stem for path in ROOT.glob("mop_*.py"))
EXAMPLES = ["naive_multitask_pbrl", "distill_reweighted"]  # that train

# a shell's background job ignores Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads only add waiting. A script may have set other things."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(False)


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    """Run a script's main() in tmp_path with the given command line.

    Returns what it printed to standard output or, where it stopped, (exit code, error text). Unless
    --threads is given it is 1: episodes then run in this process, where a test can replace things.
    """
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        argv = [f"{module.__name__}.py", *map(str, args)]
        if hasattr(module.Args, "threads") and "--threads" not in argv:
            argv += ["--threads", "1"]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        try:
            module.main()
        except SystemExit as end:
            text = capsys.readouterr().err
            if isinstance(end.code, str):  # Python prints such a code and exits with 1
                return 1, end.code + text
            return end.code, text
        return capsys.readouterr().out

    return run


@pytest.fixture
def no_episodes(monkeypatch):
    """Evaluation takes most of a tiny run's time, and changes no weight. Episode e returns e."""

    def run_episodes(policy, task, seeds, workers, **options):
        episodes = []
        for e in range(len(seeds)):
            observations = np.eye(1000, 24, dtype=np.float32)
            episodes.append({"observations": observations, "rewards": np.full(1000, e / 1000)})
        return episodes

    for name in SCRIPTS + EXAMPLES:
        monkeypatch.setattr(importlib.import_module(name), "run_episodes", run_episodes)


@pytest.fixture
def short_episodes(monkeypatch):
    """Episodes of the walker's tasks have 100 steps instead of 1000, in this process."""

    def forget_environments():
        for name in SCRIPTS + EXAMPLES:
            importlib.import_module(name).make_env.cache_clear()

    for make in (walker.stand, walker.walk, walker.run):
        monkeypatch.setattr(make, "__defaults__", (2.5, None, None))  # the time limit in seconds
    forget_environments()
    yield
    forget_environments()


def assert_stopped(outcome, message):
    """The outcome of run_main is exit code 1 and one line with this message."""
    code, text = outcome
    assert code == 1
    assert message in text
    assert len(text.strip().splitlines()) == 1, text


def script(name: str, *args, cwd, **kwargs) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs
    )


def make_arrays(n=200, obs_dim=24, action_dim=6, state_dim=18, seed=0) -> dict:
    """Random arrays in the dataset format: episodes of 100 rows, with a state after the last."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((n, obs_dim)).astype(np.float32)
    timeouts = np.arange(1, n + 1) % 100 == 0
    next_obs = np.roll(obs, -1, axis=0)
    next_obs[timeouts] = rng.standard_normal((timeouts.sum(), obs_dim))
    return {
        "observations": obs,
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.uniform(0, 1, n).astype(np.float32),
        "next_observations": next_obs,
        "terminals": np.zeros(n, bool),
        "timeouts": timeouts,
        "physics": rng.standard_normal((n, state_dim)),
    }


def own_rewards(arrays: dict, task: str) -> dict:
    """The arrays with the rewards that dm_control gives for their physics states."""
    domain, name = task.split("-")
    env = suite.load(domain, name)
    rewards = []
    for state, action in zip(arrays["physics"], arrays["actions"], strict=True):
        with env.physics.reset_context():
            env.physics.set_state(state)
            env.physics.set_control(action)
        rewards.append(env.task.get_reward(env.physics))
    return arrays | {"rewards": np.array(rewards, np.float32)}


def write_dataset(path, task="walker-stand", arrays=None, **metadata):
    """Write a dataset, by default one that relabelling accepts; metadata replaces the plain one."""
    if arrays is None:
        arrays = own_rewards(make_arrays(), task)
    plain = {
        "schema_version": 1,
        "task": task,
        "level": "medium",
        "episode_returns": [10.0],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays, metadata=np.array(json.dumps(plain | metadata)))
    return path


def write_teacher(
    path,
    task="walker-stand",
    kind="teacher",
    obs_dim=24,
    action_dim=6,
    hidden=8,
    seed=0,
    log_std=None,
    **changes,
):
    """Write a checkpoint of an untrained policy with critics; changes replace the plain fields."""
    import mop_pbrl_teacher as pbrl

    torch.manual_seed(seed)
    out_dim = 2 * action_dim if log_std else action_dim
    checkpoint = {
        "schema_version": 1,
        "kind": kind,
        "tasks": [task],
        "level": "medium",
        "args": {},
        "step": 1,
        "sizes": {
            "in_dim": obs_dim,
            "obs_dim": obs_dim,
            "action_dim": action_dim,
            "hidden": hidden,
            "num_critics": 2,
            "log_std": log_std,
            "layer_norm": False,
        },
        "returns": {task: [100.0, 200.0]},
        "actor": pbrl.Actor(obs_dim, out_dim, hidden).state_dict(),
        "critics": pbrl.Critics(2, obs_dim, action_dim, hidden).state_dict(),
        "versions": {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint | changes, path)
    return path
