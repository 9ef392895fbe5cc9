"""The chain collect -> teacher, ds -> distill, oqs -> measure: each reads what others wrote."""

import csv
import importlib
import json
import shutil

import numpy as np
import pytest
import torch

from conftest import own_rewards, script

TASKS = ["walker-stand", "walker-walk"]
SIZES = ["--hidden", 16, "--batch-size", 32, "--eval-episodes", 1, "--final-eval-episodes", 2]
SIZES += ["--threads", 1, "--device", "cpu"]
TD3 = [*SIZES, "--total-timesteps", 2000, "--eval-every", 1000, "--learning-starts", 1900]
TD3 += ["--medium-step", 1000, "--num-transitions", 2000]
STEPS = [*SIZES, "--gradient-steps", 20, "--eval-every", 10]


def load(path):
    return torch.load(path, weights_only=True)


def run_as_user(folder, name, *args):
    process = script(name, *args, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no warnings, no progress bar where the output is no terminal
    assert process.stdout.splitlines()[-1].startswith("wrote ")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One pass of three scripts in processes of their own, with default file names."""
    folder = tmp_path_factory.mktemp("chain")
    task = ["--task", "walker-stand"]
    run_as_user(folder, "mop_td3_collect", *TD3, *task, "--run-dir", "runs/td3")
    run_as_user(folder, "mop_pbrl_teacher", *STEPS, *task, "--run-dir", "runs/pbrl")
    student = ["--tasks", "walker-stand", "--run-dir", "runs/distill"]
    run_as_user(folder, "mop_distill", *STEPS, *student)
    return folder


@pytest.fixture
def folder(chain, tmp_path):
    """A new folder with the data and checkpoints of the chain."""
    shutil.copytree(chain / "data", tmp_path / "data")
    shutil.copytree(chain / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def test_files(chain):
    """All that was written, and nothing else."""
    found = []
    for path in chain.rglob("*"):
        if path.is_file() and "tfevents" not in path.name:
            found.append(str(path.relative_to(chain)))
    expected = [
        "checkpoints/walker-stand-expert-behavior.pt",
        "checkpoints/walker-stand-medium-behavior.pt",
        "checkpoints/walker-stand-medium-teacher.pt",
        "data/walker-stand-expert.npz",
        "data/walker-stand-medium-replay.npz",
        "data/walker-stand-medium.npz",
        "runs/distill/student.pt",
        "runs/distill/tau.csv",
    ]
    for run in ("td3", "pbrl", "distill"):
        for name in ("losses.csv", "resume.pt", "returns.csv"):
            expected.append(f"runs/{run}/{name}")
        assert list(chain.glob(f"runs/{run}/events*"))
    assert sorted(found) == sorted(expected)


ROWS = [("medium", 2000), ("expert", 2000), ("medium-replay", 1000)]


@pytest.mark.parametrize(("level", "rows"), ROWS)
def test_datasets(chain, level, rows):
    with np.load(chain / f"data/walker-stand-{level}.npz", allow_pickle=False) as file:
        data = dict(file)
    metadata = json.loads(str(data.pop("metadata")))
    assert metadata["task"] == "walker-stand"
    assert metadata["level"] == level
    sums = data["rewards"].reshape(-1, 1000).sum(axis=1)
    np.testing.assert_allclose(metadata["episode_returns"], sums, rtol=1e-4)
    kinds = {name: (array.shape, str(array.dtype)) for name, array in data.items()}
    assert kinds == {
        "observations": ((rows, 24), "float32"),
        "actions": ((rows, 6), "float32"),
        "rewards": ((rows,), "float32"),
        "next_observations": ((rows, 24), "float32"),
        "terminals": ((rows,), "bool"),
        "timeouts": ((rows,), "bool"),
        "physics": ((rows, 18), "float64"),
    }
    assert np.flatnonzero(data["timeouts"]).tolist() == list(range(999, rows, 1000))
    assert not data["terminals"].any()
    same = (data["next_observations"][:-1] == data["observations"][1:]).all(axis=1)
    assert (same | data["timeouts"][:-1]).all()
    some = {name: array[::97] for name, array in data.items()}
    rewards = own_rewards(some, "walker-stand")["rewards"]
    np.testing.assert_allclose(rewards, some["rewards"], atol=1e-6)


CHECKPOINTS = [
    ("behavior", "checkpoints/walker-stand-medium-behavior.pt", "td3", 1000),
    ("teacher", "checkpoints/walker-stand-medium-teacher.pt", "pbrl", 20),
    ("student", "runs/distill/student.pt", "distill", 20),
]


@pytest.mark.parametrize(("kind", "path", "run", "step"), CHECKPOINTS)
def test_checkpoints_describe_themselves(chain, kind, path, run, step):
    checkpoint = load(chain / path)
    assert checkpoint["kind"] == kind
    assert checkpoint["tasks"] == ["walker-stand"]
    assert checkpoint["schema_version"] == 1
    assert checkpoint["step"] == step
    assert checkpoint["args"]["hidden"] == checkpoint["sizes"]["hidden"] == 16
    assert checkpoint["versions"]["torch"]
    returns = checkpoint["returns"]["walker-stand"]
    assert len(returns) == 2
    if kind != "behavior":  # a behaviour is evaluated after training
        with open(chain / "runs" / run / "returns.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["step"] == str(step)]
        assert [float(row["return"]) for row in rows] == returns


def test_two_tasks_through_every_script(folder, run_main, short_episodes):
    """Also Gaussian teachers and naive multi-task PBRL."""
    short = [*STEPS, "--eval-every", 20, "--final-eval-episodes", 1]

    def run(name, *args):
        printed = run_main(importlib.import_module(name), *args)
        assert isinstance(printed, str), printed
        assert printed.splitlines()[-1].startswith("wrote ")

    run("mop_td3_collect", *TD3, "--task", "walker-walk", "--datasets", "medium")
    run("mop_pbrl_teacher", *short, "--task", "walker-walk")
    for task in TASKS:
        run("mop_pbrl_teacher", *short, "--task", task, "--actor", "gaussian")
    run("naive_multitask_pbrl", *short, "--tasks", *TASKS)
    run("mop_distill", *short, "--loss", "q", "--regularizer", "listwise")
    run("mop_distill", *short, "--loss", "kl", "--run-dir", "runs/kl")
    for task, other in (TASKS, TASKS[::-1]):
        run("mop_ds", *short, "--task", task)
        run("mop_ds", *short, "--task", task, "--sources", other)
    run("mop_distill", *short, "--states", "shared")
    run("mop_oqs", *short, "--run-dir", "runs/oqs")

    measure = ["--episodes", 2, "--cross-episodes", 1, "--num-states", 500]
    naive = "checkpoints/walker-stand+walker-walk-medium-naive.pt"
    for path in (naive, "runs/kl/student.pt"):
        run("mop_measure", *measure, "--student", path)
    table = [f"checkpoints/{task}-medium-ds-teacher.pt" for task in TASKS]
    table += ["checkpoints/walker-walk-from-walker-stand-medium-teacher.pt"]
    table += ["checkpoints/walker-walk-medium-behavior.pt"]
    measure += ["--student", "runs/oqs/student.pt", "--teachers", *table]
    measure += ["--shift", "data/walker-stand-medium.npz", "data/walker-walk-medium.npz"]
    run("mop_measure", *measure, "--run-dir", "runs/measure")
    report = json.loads((folder / "runs/measure/measure.json").read_text())
    assert list(report["returns"]) == TASKS
    assert len(report["cross_task"]) == 4


COLLECTED = [
    ("behavior", "noise", "walker-stand-medium-noise", range(999, 10_000, 1000)),
    ("teacher", "online", "walker-stand-medium-teacher-online", [999, 1499]),  # one is cut short
]


@pytest.mark.parametrize(("kind", "mix", "name", "ends"), COLLECTED)
def test_collecting_with_a_policy(folder, run_main, kind, mix, name, ends):
    td3 = importlib.import_module("mop_td3_collect")
    policy = f"checkpoints/walker-stand-medium-{kind}.pt"
    rows = ends[-1] + 1
    run_main(td3, "--policy", policy, "--mix", mix, "--num-transitions", rows)
    with np.load(folder / f"data/{name}.npz") as data:
        assert len(data["rewards"]) == rows
        assert np.flatnonzero(data["timeouts"]).tolist() == list(ends)
        assert len(json.loads(str(data["metadata"]))["episode_returns"]) == len(ends)
