"""examples/distill_reweighted.py: the weights against formulas, the draws, and a run of each."""

import csv
import zlib
from pathlib import Path

import distill_reweighted as reweighted
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import mop_pbrl_teacher as pbrl
from conftest import make_arrays, write_dataset, write_teacher


def test_value_of_the_behaviour():
    """A behaviour that goes round four states; its value is a geometric series."""
    num_rows = 400
    state = np.arange(num_rows) % 4
    reward = np.array([0.0, 1.0, 0.5, 0.0])
    data = {
        "observations": np.eye(4, dtype=np.float32)[state],
        "actions": np.zeros((num_rows, 1), np.float32),
        "rewards": reward[state].astype(np.float32),
        "terminals": np.zeros(num_rows, bool),
        "timeouts": np.arange(1, num_rows + 1) % 100 == 0,
    }
    args = reweighted.Args(weight_steps=3000, gamma=0.5)
    torch.manual_seed(0)
    found = reweighted.behavior_values(data, args).numpy()
    for start in range(4):
        expected = sum(0.5**k * reward[(start + k) % 4] for k in range(60))
        np.testing.assert_allclose(found[start::4], expected, atol=0.03)


def test_value_of_the_behaviour_at_a_terminal():
    """Nothing follows it, so its value is its reward: 1; and 1 + 0.5 one row before."""
    num_rows = 100
    data = {
        "observations": np.eye(2, dtype=np.float32)[np.arange(num_rows) % 2],
        "actions": np.zeros((num_rows, 1), np.float32),
        "rewards": np.ones(num_rows, np.float32),
        "terminals": np.arange(num_rows) % 2 == 1,
        "timeouts": np.zeros(num_rows, bool),
    }
    args = reweighted.Args(weight_steps=2000, gamma=0.5)
    torch.manual_seed(0)
    found = reweighted.behavior_values(data, args).numpy()
    np.testing.assert_allclose(found[0::2], 1.5, atol=0.03)
    np.testing.assert_allclose(found[1::2], 1.0, atol=0.03)


def test_density_ratio_of_two_normal_distributions():
    """N(1, 1) over N(0, 1) is exp(x - 1/2)."""
    torch.manual_seed(0)
    obs = torch.randn(50_000, 1)
    teacher_obs = torch.randn(50_000, 1) + 1
    args = reweighted.Args(weight_steps=3000)
    found = reweighted.density_ratio(obs, teacher_obs, args).log()
    near = obs[:, 0].abs() < 2
    error = found[near] - (obs[near, 0] - 0.5)
    assert error.abs().mean() < 0.1


def test_draws_follow_the_weights():
    weights = torch.tensor([1.0, 0.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    torch.manual_seed(0)
    index = reweighted.draw(weights.cumsum(dim=0), 60_000)
    counts = np.bincount(index, minlength=5)
    assert counts[1] == counts[4] == 0
    assert chisquare(counts[[0, 2, 3]], [10_000, 30_000, 20_000]).pvalue > 0.001


def test_a_run_draws_by_the_weights(run_main, monkeypatch, no_episodes, tmp_path):
    """One state of each task has all the weight: the first loss is that of this state."""
    rows = {"walker-stand": 5, "walker-walk": 7}

    def weights_of_one(data, teacher, teacher_obs, args):
        weights = torch.zeros(200)
        weights[rows[teacher["tasks"][0]]] = 200
        return weights

    monkeypatch.setattr(reweighted, "state_weights", weights_of_one)
    teachers = []
    data = []
    for i, task in enumerate(rows):
        teachers.append(write_teacher(tmp_path / f"{task}.pt", task, seed=i))
        data.append(write_dataset(tmp_path / f"{task}.npz", task, make_arrays(seed=i)))
    flags = ["--data", *data, "--teachers", *teachers, "--hidden", 8, "--device", "cpu"]
    flags += ["--gradient-steps", 1, "--final-eval-episodes", 1]
    run_main(reweighted, *flags, "--run-dir", "run")
    with open("run/losses.csv") as file:
        losses = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    torch.manual_seed(zlib.crc32(b"1 student"))
    student = reweighted.Actor(25, 6, 8)
    for i, (task, row) in enumerate(rows.items()):
        obs = torch.from_numpy(make_arrays(seed=i)["observations"][row])
        teacher = reweighted.load_actor(torch.load(teachers[i], weights_only=True))
        difference = teacher(obs) - student(torch.cat([obs, torch.tensor([float(i)])]))
        expected = difference.square().sum().item()
        assert losses[f"loss/mse/{task}"] == pytest.approx(expected, rel=1e-4)
    with open("run/weights.csv") as file:
        shares = [float(row["effective_share"]) for row in csv.DictReader(file)]
    assert shares == pytest.approx([1 / 200] * 2)


def test_weights_by_density():
    """Where the teacher's states are denser than the data's the weight is higher, 1 on average."""
    torch.manual_seed(0)
    obs = torch.randn(2000, 1).numpy()
    args = reweighted.Args(weights="density", weight_steps=500, device="cpu")
    teacher_obs = torch.randn(3000, 1).numpy() + 1
    weights = reweighted.state_weights({"observations": obs}, {}, teacher_obs, args)
    assert weights.shape == (2000,) and weights.mean().item() == pytest.approx(1.0)
    assert np.corrcoef(weights.log(), obs[:, 0])[0, 1] > 0.9


@pytest.mark.parametrize("log_std", [None, [-5.0, 2.0]])
def test_weights_by_value(log_std, monkeypatch, tmp_path):
    """min_k Q_k(s, pi(s)) where positive, over Q^B(s, a) in q-ratio, then divided by their mean.

    pi(s) is a Gaussian teacher's mean.
    """
    path = write_teacher(tmp_path / "a.pt", log_std=log_std, seed=8)
    teacher = torch.load(path, weights_only=True)
    data = make_arrays()
    behavior = torch.linspace(0, 1, 200)
    monkeypatch.setattr(reweighted, "behavior_values", lambda *args: behavior)
    actor = reweighted.load_actor(teacher)
    critics = pbrl.Critics(2, 24, 6, 8)
    critics.load_state_dict(teacher["critics"])
    expected = []
    for obs in torch.from_numpy(data["observations"]):
        q = [critics(obs[None], actor(obs[None])[:, :6])[k].item() for k in range(2)]
        expected.append(max(min(q), 0))
    assert 0 < np.count_nonzero(expected) < 200
    expected = {"none": np.ones(200), "value": np.array(expected)}
    expected["q-ratio"] = expected["value"] / np.maximum(behavior.numpy(), 0.1)
    for name, weights in expected.items():
        args = reweighted.Args(weights=name)
        found = reweighted.state_weights(data, teacher, None, args)
        np.testing.assert_allclose(found, weights / weights.mean(), rtol=1e-4, atol=1e-6)
    teacher["critics"]["b3"] -= 1000  # no value is positive
    with pytest.raises(SystemExit, match="--weights value: every state has weight 0"):
        reweighted.state_weights(data, teacher, None, reweighted.Args(weights="value"))


def test_a_teacher_without_critics(run_main, no_episodes):
    gaussian = ["--loss", "kl", "--weights", "value", "--device", "cpu"]  # the bundled ones
    outcome = run_main(reweighted, *gaussian)
    message = "teacher-gaussian.pt: has no critics, as --loss kl --weights value needs"
    assert outcome[0] == 1 and message in outcome[1]


def test_share_of_the_teacher():
    """Two of the episodes of 100 rows are in the teacher's own: 30 of a weight of 100."""
    timeouts = np.arange(1, 1001) % 100 == 0
    data = {"timeouts": timeouts, "metadata": {"policy": "a.pt", "policy_episodes": 2}}
    weights = torch.full((1000,), 70 / 800)
    weights[:200] = 30 / 200
    share = reweighted.teacher_share(data, weights, "folder/a.pt")
    assert share == pytest.approx((0.2, 0.3), rel=1e-5)
    assert np.isnan(reweighted.teacher_share(data, weights, "b.pt")).all()


@pytest.mark.parametrize("weights", ["none", "value", "q-ratio", "density"])
def test_run(weights, run_main, no_episodes, tmp_path):
    """A run in two parts ends with the same weights of the network as one in one go."""
    data = []
    teachers = []
    for task in ("walker-stand", "walker-walk"):
        teacher = write_teacher(tmp_path / f"checkpoints/{task}-medium-teacher.pt", task=task)
        for mix, num_policy_episodes in (("random90", 1), ("online", 2)):
            path = Path(f"data/{task}-medium-teacher-{mix}.npz")
            arrays = make_arrays(seed=num_policy_episodes)
            facts = {"policy": teacher.name, "policy_episodes": num_policy_episodes}
            write_dataset(tmp_path / path, task, arrays, **facts)
        data.append(f"data/{task}-medium-teacher-random90.npz")
        teachers.append(teacher)
    tiny = ["--weights", weights, "--data", *data, "--hidden", 8, "--batch-size", 16]
    tiny += ["--weight-steps", 20, "--final-eval-episodes", 2, "--eval-episodes", 2]
    tiny += ["--eval-every", 5]
    outcome = run_main(reweighted, *tiny, "--teacher-data", data[0])
    assert outcome[0] == 1 and "--teacher-data: expected one file per task" in outcome[1]
    out = run_main(reweighted, *tiny, "--gradient-steps", 10, "--run-dir", "whole")
    assert out.count("of the teacher's own episodes: 50.0% of the states") == 2
    online = ["--teacher-data"]
    for task in ("walker-stand", "walker-walk"):
        online.append(f"data/{task}-medium-teacher-online.npz")
    run_main(reweighted, *tiny, "--gradient-steps", 5, "--run-dir", "parts", *online)
    weights_before = Path("parts/weights.csv").read_text()
    for flag, value in (("--states", "online"), ("--weight-steps", 30), ("--gamma", 0.5)):
        outcome = run_main(reweighted, "--resume", "parts", flag, value)
        assert outcome[0] == 1 and f"--resume: expected the same {flag}" in outcome[1]
    assert Path("parts/weights.csv").read_text() == weights_before
    run_main(reweighted, "--resume", "parts", "--gradient-steps", 10, *online)
    with open("whole/weights.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["walker-stand", "walker-walk"]
    for row in rows:
        assert float(row["teacher_share"]) == 0.5
        assert 0 < float(row["effective_share"]) <= 1
    if weights == "none":
        assert float(rows[0]["teacher_weight"]) == 0.5
        assert float(rows[0]["effective_share"]) == 1
    whole = torch.load("whole/student.pt", weights_only=True)["actor"]
    parts = torch.load("parts/student.pt", weights_only=True)["actor"]
    for name, values in whole.items():
        assert torch.equal(values, parts[name]), name
