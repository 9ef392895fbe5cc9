"""examples/naive_multitask_pbrl.py: its loop against the same loop written out in plain torch."""

import importlib
import sys
import zlib
from copy import deepcopy

import numpy as np
import pytest
import torch

from conftest import ROOT, make_arrays, write_dataset

sys.path.append(str(ROOT / "examples"))
naive = importlib.import_module("naive_multitask_pbrl")

TASKS = ["walker-stand", "walker-walk"]
SIZES = [
    "--hidden",
    8,
    "--batch-size",
    8,
    "--learning-rate",
    0.003,
    "--num-critics",
    3,
    "--beta-ood-decay",
    0.5,
]
SIZES += ["--eval-episodes", 1, "--final-eval-episodes", 1, "--eval-every", 100, "--run-dir", "run"]
OUTPUT = "checkpoints/walker-stand+walker-walk-medium+expert-naive.pt"


@pytest.fixture
def tables(tmp_path):
    """A dataset per task, of other rows and levels."""
    tables = []
    for i, (task, level) in enumerate(zip(TASKS, ["medium", "expert"], strict=True)):
        tables.append(make_arrays(100 + 50 * i, seed=i))
        write_dataset(tmp_path / f"data/{task}-{level}.npz", task, tables[i])
    return tables


def noise_like(action, std):
    return (std * torch.randn(action.shape)).clamp(-0.5, 0.5)


def plain_loop(tables, log_std, steps):
    """The weights of all networks after some steps with SIZES, else the thesis's numbers."""
    torch.manual_seed(
        zlib.crc32(b"1 teacher walker-stand+walker-walk from walker-stand+walker-walk")
    )
    actor = naive.Actor(25, 12 if log_std else 6, 8)
    target_actor = deepcopy(actor)
    actor_adam = torch.optim.Adam(actor.parameters(), 0.003)
    critics = []
    critic_adams = []
    for _ in tables:
        critics.append(naive.Critics(3, 24, 6, 8))
        critic_adams.append(torch.optim.Adam(critics[-1].parameters(), 0.003))
    target_critics = deepcopy(critics)

    def act(network, obs, i):
        output = network(torch.cat([obs, torch.full((len(obs), 1), float(i))], dim=1))
        if log_std is None:
            return output
        low, high = log_std
        std = torch.exp(low + (high - low) * (output[:, 6:] + 1) / 2)
        return (output[:, :6] + std * torch.randn(len(obs), 6)).clamp(-1, 1)

    for step in range(1, steps + 1):
        for i, table in enumerate(tables):
            index = torch.randint(len(table["rewards"]), (8,)).numpy()
            batch = {name: torch.from_numpy(array[index]) for name, array in table.items()}
            obs = batch["observations"]
            next_obs = batch["next_observations"]
            with torch.no_grad():
                next_action = act(target_actor, next_obs, i)
                next_action = (next_action + noise_like(next_action, 0.2)).clamp(-1, 1)
                next_q = target_critics[i](next_obs, next_action)
                target = batch["rewards"] + 0.99 * (next_q - 0.001 * next_q.std(dim=0))
                ood_obs = torch.cat([obs, next_obs]).repeat(3, 1)
                ood_action = act(actor, ood_obs[:16], i).repeat(3, 1)
                ood_action = (ood_action + noise_like(ood_action, 0.01)).clamp(-1, 1)
            q = critics[i](obs, batch["actions"])
            ood_q = critics[i](ood_obs, ood_action)
            ood_target = ood_q - max(3 * 0.5**step, 0.1) * ood_q.std(dim=0)
            loss = (q - target).square().mean(dim=1).sum()
            loss += (ood_q - ood_target.detach().clamp(min=0)).square().mean(dim=1).sum()
            critic_adams[i].zero_grad()
            loss.backward()
            critic_adams[i].step()
            if step % 2 == 0:
                actor_adam.zero_grad()
                (-critics[i](obs, act(actor, obs, i)).min(dim=0).values.mean()).backward()
                actor_adam.step()
            for old, new in zip(
                target_critics[i].parameters(), critics[i].parameters(), strict=True
            ):
                old.data = 0.995 * old.data + 0.005 * new.data
        for old, new in zip(target_actor.parameters(), actor.parameters(), strict=True):
            old.data = 0.995 * old.data + 0.005 * new.data
    networks = {"actor": actor, "target_actor": target_actor}
    for i in range(len(tables)):
        networks[f"critics_{i}"] = critics[i]
        networks[f"target_critics_{i}"] = target_critics[i]
    return {name: network.state_dict() for name, network in networks.items()}


@pytest.mark.parametrize("actor", ["deterministic", "gaussian"])
def test_loop(run_main, tables, tmp_path, actor):
    options = ["--tasks", *TASKS, "--level", "medium", "expert", "--actor", actor]
    printed = run_main(naive, *SIZES, *options, "--gradient-steps", 5)
    assert f"wrote {OUTPUT}" in printed
    checkpoint = torch.load(tmp_path / OUTPUT, weights_only=True)
    resume_point = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    for name, weights in plain_loop(tables, naive.LOG_STD[actor], 5).items():
        for key, expected in weights.items():
            torch.testing.assert_close(resume_point[name][key], expected, atol=1e-5, rtol=0)
    for i in range(2):
        for key, expected in resume_point[f"critics_{i}"].items():
            assert torch.equal(checkpoint["critics"][i][key], expected)
    for key, expected in resume_point["actor"].items():
        assert torch.equal(checkpoint["actor"][key], expected)

    assert checkpoint["kind"] == "naive"
    assert (checkpoint["tasks"], checkpoint["level"]) == (TASKS, "medium+expert")
    assert checkpoint["sizes"]["in_dim"] == 25
    assert checkpoint["sizes"]["task_encoding"] == "number"
    policy = naive.Actor(25, 12 if actor == "gaussian" else 6, 8)
    policy.load_state_dict(checkpoint["actor"])
    for i, task in enumerate(TASKS):
        episodes = naive.run_episodes(policy, task, [naive.EVAL_SEED], 1, code=[float(i)])
        assert checkpoint["returns"][task] == [pytest.approx(episodes[0]["rewards"].sum())]


def test_resumed_run_ends_with_the_same_weights(run_main, tables, tmp_path):
    paths = [tmp_path / "data/walker-stand-medium.npz", tmp_path / "data/walker-walk-expert.npz"]
    options = [*SIZES, "--data", *paths, "--output", "whole.pt"]
    run_main(naive, *options, "--gradient-steps", 6)
    whole = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    run_main(naive, *options, "--gradient-steps", 3, "--overwrite")
    run_main(naive, "--resume", "run", "--gradient-steps", 6)
    resumed = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    assert resumed["step"] == whole["step"] == 6
    for name in ("actor", "critics_0", "critics_1", "target_actor"):
        for key, expected in whole[name].items():
            assert torch.equal(resumed[name][key], expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "walker-walk"], "two or more distinct tasks"),
        (["--tasks", "walker-walk", "walker-walk"], "two or more distinct tasks"),
        (["--level", "medium", "medium", "expert"], "one level, or one per task"),
        (["--data", "a.npz"], "one file per task"),
        (["--tasks", "walker-walk", "hopper-hop"], "same sizes"),
    ],
)
def test_mistakes(run_main, options, message):
    code, error = run_main(naive, *options)
    assert code == 1
    assert message in error


def test_weights_that_are_not_finite_are_not_saved(run_main, tables, tmp_path, monkeypatch):
    """Every critic's, also in a list."""

    def damage(target, network, rate):
        list(network.parameters())[-1].data.fill_(torch.inf)

    monkeypatch.setattr(naive, "move_target", damage)
    monkeypatch.setattr(naive, "run_episodes", lambda *_, **__: [{"rewards": np.ones(9)}])
    code, error = run_main(naive, *SIZES, "--level", "medium", "expert", "--gradient-steps", 1)
    assert code == 1
    assert "critics of walker-stand: b3: NaN or infinite" in error
    assert not (tmp_path / OUTPUT).exists()
