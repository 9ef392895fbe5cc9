"""Shared helpers: the scripts are imported from the folder above, and run in temporary folders."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "disable")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

SCRIPTS = sorted(path.stem for path in ROOT.glob("mop_*.py"))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads only add waiting."""
    torch.set_num_threads(1)


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    """Run a script's main() in tmp_path with the given command line; returns its RESULT, or (exit code, error text)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C is for pytest

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        try:
            module.main()
        except SystemExit as end:
            return end.code, str(end.code) + capsys.readouterr().err
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("RESULT "), last
        return json.loads(last.removeprefix("RESULT "), parse_constant=pytest.fail)

    return run


def script(name: str, *args, cwd, **kwargs) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


def make_arrays(n=200, obs_dim=24, action_dim=6, state_dim=18, seed=0) -> dict:
    """Random arrays in the dataset format."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.standard_normal((n, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.uniform(0, 1, n).astype(np.float32),
        "next_observations": rng.standard_normal((n, obs_dim)).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 100 == 0,
        "physics": rng.standard_normal((n, state_dim)),
    }


def own_rewards(arrays: dict, task: str) -> dict:
    """The arrays with the rewards that dm_control gives for their physics states."""
    import mop_ds as ds

    return arrays | {"rewards": ds.compute_rewards(task, arrays["physics"], arrays["actions"])}


def write_dataset(path, task="walker-stand", arrays=None, **metadata):
    """Write a dataset file, by default one that relabelling accepts; metadata overrides the plain one."""
    arrays = own_rewards(make_arrays(), task) if arrays is None else arrays
    metadata = {"schema_version": 1, "task": task, "level": "medium", "episode_returns": [10.0], **metadata}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays, metadata=np.array(json.dumps(metadata)))
    return path


def write_teacher(
    path, task="walker-stand", kind="teacher", obs_dim=24, action_dim=6, hidden=8, seed=0, log_std=None, **changes
):
    """Write a checkpoint of an untrained policy with critics; changes override the plain fields."""
    import mop_pbrl_teacher as pbrl

    torch.manual_seed(seed)
    sizes = {"in_dim": obs_dim, "obs_dim": obs_dim, "action_dim": action_dim, "hidden": hidden, "layer_norm": False}
    checkpoint = {"schema_version": 1, "kind": kind, "tasks": [task], "level": "medium", "args": {}, "step": 1}
    checkpoint |= {"sizes": {**sizes, "num_critics": 2, "log_std": log_std}, "returns": {task: [100.0]}, "versions": {}}
    checkpoint["actor"] = pbrl.Actor(obs_dim, action_dim * (2 if log_std else 1), hidden).state_dict()
    checkpoint["critics"] = pbrl.Critics(2, obs_dim, action_dim, hidden).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, **changes}, path)
    return path
