"""examples/naive_multitask_pbrl.py: resuming and mistakes; its loop is in test_loops.py."""

import numpy as np
import pytest
import torch

from test_loops import TASKS, load, naive, use_world, write_data

OPTIONS = ["--tasks", *TASKS, "--level", "medium", "expert", "--run-dir", "run", "--overwrite"]
OPTIONS += ["--hidden", 8, "--batch-size", 8, "--eval-every", 100, "--final-eval-episodes", 1]


@pytest.fixture
def world(run_main, monkeypatch):
    """run_main in test_loops.py's World, with a dataset per task."""
    use_world(monkeypatch)
    write_data(TASKS)
    return run_main


def test_resumed_run_ends_with_the_same_weights(world):
    world(naive, *OPTIONS, "--gradient-steps", 6)
    whole = load("run/resume.pt")
    world(naive, *OPTIONS, "--gradient-steps", 3)
    world(naive, "--resume", "run", "--gradient-steps", 6)
    resumed = load("run/resume.pt")
    assert resumed["step"] == whole["step"] == 6
    for name in ("actor", "critics_0", "critics_1", "target_actor"):
        for key, expected in whole[name].items():
            assert torch.equal(resumed[name][key], expected)
    checkpoint = load("checkpoints/toy-up+toy-down-medium+expert-naive.pt")
    assert checkpoint["kind"] == "naive" and checkpoint["level"] == "medium+expert"
    assert checkpoint["tasks"] == list(TASKS)
    assert checkpoint["sizes"]["in_dim"] == 4
    assert checkpoint["sizes"]["task_encoding"] == "number"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "toy-up"], "two or more distinct tasks"),
        (["--tasks", "toy-up", "toy-up"], "two or more distinct tasks"),
        (["--level", "medium", "medium", "expert"], "one level, or one per task"),
        (["--data", "a.npz"], "one file per task"),
        (["--num-critics", 1], "2 or more"),
    ],
)
def test_mistakes(world, options, message):
    code, error = world(naive, *OPTIONS, *options)
    assert code == 1 and message in error


def test_weights_that_are_not_finite_are_not_saved(world, tmp_path, monkeypatch):
    """Every critic's, also in a list."""

    def damage(target, network, rate):
        list(network.parameters())[-1].data.fill_(torch.inf)

    monkeypatch.setattr(naive, "move_target", damage)
    monkeypatch.setattr(naive, "run_episodes", lambda *_, **__: [{"rewards": np.ones(9)}])
    code, error = world(naive, *OPTIONS, "--gradient-steps", 1)
    assert code == 1 and "critics of toy-up: b3: NaN or infinite" in error
    assert not list(tmp_path.glob("checkpoints/*"))
