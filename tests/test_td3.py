"""TD3's losses by hand, the CUDA form of the critics, the medium rule and the datasets' mixes."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from dm_control import suite

import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import write_teacher


def by_hand(obs, action):
    """Two critics, s + a and s - a."""
    return torch.stack([(obs + action)[:, 0], (obs - action)[:, 0]])


def test_losses_by_hand():
    """s = 1, a = 0.5, r = 2, s' = 3; pi- = 5 is clipped to 1, so Q- is 4 and 2, y = 2 + 0.9 * 2."""
    obs = torch.tensor([[1.0]])
    batch = (obs, torch.tensor([[0.5]]), torch.tensor([2.0]), torch.tensor([[3.0]]))
    args = td3.Args(gamma=0.9, policy_noise=0.0)
    loss = td3.td3_critic_loss(by_hand, by_hand, lambda obs: 0 * obs + 5, batch, args)
    assert loss.item() == pytest.approx((1.5 - 3.8) ** 2 + (0.5 - 3.8) ** 2)
    actor_loss = td3.td3_actor_loss(lambda obs: 0 * obs + 0.25, by_hand, obs)
    assert actor_loss.item() == pytest.approx(-1.25)


def test_only_the_critics_get_a_gradient_from_their_loss():
    torch.manual_seed(0)
    critics = td3.Critics(2, 5, 2, 8)
    target_critics = td3.Critics(2, 5, 2, 8)
    target_actor = td3.Actor(5, 2, 8, layer_norm=True)
    batch = (torch.randn(7, 5), torch.rand(7, 2), torch.rand(7), torch.randn(7, 5))
    td3.td3_critic_loss(critics, target_critics, target_actor, batch, td3.Args()).backward()
    for p in critics.parameters():
        assert p.grad.flatten(1).abs().sum(dim=1).gt(0).all()
    for network in (target_critics, target_actor):
        assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("module", [pbrl, td3])
def test_the_critics_form_for_cuda_equals_the_one_for_a_cpu(module, monkeypatch):
    critics = module.Critics(3, 5, 2, 16)
    obs = torch.randn(9, 5)
    action = torch.randn(9, 2)
    with torch.no_grad():
        for p in critics.parameters():
            p += 0.1 * torch.randn_like(p)  # a LayerNorm's scale and shift, too
        expected = critics(obs, action)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # read by the forward pass only
        found = critics(obs, action)
    monkeypatch.undo()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for k in range(3):
        other = (k + 1) % 3
        assert (expected[k] != expected[other]).all()


# -------------------------------------------------------------------------- short real episodes
@cache
def short_env(task):
    """dm_control's environment with episodes of 50 steps."""
    domain, name = task.split("-")
    env = suite.load(domain, name, environment_kwargs={"flat_observation": True})
    env._step_limit = 50
    return env


@pytest.fixture
def short(monkeypatch, run_main):
    """run_main with episodes of 50 steps."""
    monkeypatch.setattr(td3, "make_env", short_env)
    return run_main


CASES = {
    "the first that reaches it": (["--medium-return", 300], {"medium": 100, "expert": 200}),
    "by step": (["--medium-step", 150], {"medium": 150, "expert": 200}),
    "never reached": (["--medium-return", 500], {"expert": 200}),
}


@pytest.mark.parametrize("case", CASES)
def test_which_policy_is_the_medium_one(short, tmp_path, monkeypatch, case):
    returns = iter([100.0, 350.0, 310.0, 400.0, 0.0, 0.0])

    def run_episodes(policy, task, seeds, workers):
        return [{"rewards": np.array([value])} for value in [next(returns)] * len(seeds)]

    monkeypatch.setattr(td3, "run_episodes", run_episodes)
    flags, steps = CASES[case]
    sizes = ["--total-timesteps", 200, "--eval-every", 50, "--learning-starts", 200, "--hidden", 8]
    outcome = short(td3, *sizes, "--datasets", "medium-replay", *flags)
    found = {}
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        found[path.stem.split("-")[2]] = torch.load(path, weights_only=True)["step"]
    assert found == steps
    if case == "never reached":
        assert outcome[0] == 1 and "--medium-return 500.0: was never reached" in outcome[1]
    else:
        with np.load(tmp_path / "data/walker-walk-medium-replay.npz") as data:
            assert len(data["rewards"]) == steps["medium"]


def collected(short, tmp_path, *flags):
    """A dataset that is collected with these flags -> arrays and metadata."""
    short(td3, "--output", "d.npz", "--overwrite", *flags)
    with np.load(tmp_path / "d.npz") as data:
        arrays = dict(data)
    return arrays, json.loads(str(arrays.pop("metadata")))


@pytest.mark.parametrize(
    "mix, plain, episodes",
    [("online", 20, 20), ("noise", 2, 20), ("random90", 2, 20), ("random99", 1, 100)],
)
def test_datasets(short, tmp_path, mix, plain, episodes):
    """Shares of whole episodes, and how the rows fit together."""
    policy = write_teacher(tmp_path / "p.pt", "walker-walk")
    n = 50 * episodes
    flags = ["--policy", policy, "--mix", mix, "--num-transitions", n]
    arrays, metadata = collected(short, tmp_path, *flags)
    assert {name: array.dtype.name for name, array in arrays.items()} == td3.DATASET
    assert all(len(array) == n for array in arrays.values())
    actor = td3.load_actor(torch.load(policy, weights_only=True))
    expected = actor(torch.from_numpy(arrays["observations"])).numpy()
    error = np.abs(arrays["actions"] - expected).max(axis=1)
    assert error[: 50 * plain].max() < 1e-6
    assert np.all(error[50 * plain :] > 1e-6)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == list(range(49, n, 50))
    assert not arrays["terminals"].any()
    same_episode = ~arrays["timeouts"][:-1]
    before = arrays["next_observations"][:-1][same_episode]
    np.testing.assert_array_equal(arrays["observations"][1:][same_episode], before)
    velocity = arrays["physics"][:, 9:].astype(np.float32)  # of the state after the action
    np.testing.assert_array_equal(velocity, arrays["next_observations"][:, 15:])
    assert metadata["policy_episodes"] == plain and metadata["mix"] == mix
    returns = arrays["rewards"].reshape(episodes, 50).sum(axis=1)
    assert metadata["episode_returns"] == pytest.approx(returns, rel=1e-5)


def test_the_last_episode_may_be_cut_short(short, tmp_path):
    policy = write_teacher(tmp_path / "p.pt", "walker-walk")
    arrays, metadata = collected(short, tmp_path, "--policy", policy, "--num-transitions", 120)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [49, 99, 119]
    assert len(arrays["rewards"]) == 120 and len(metadata["episode_returns"]) == 3


def test_no_two_tasks_or_mixes_start_from_the_same_states(short, tmp_path):
    starts = []
    for task, mix, seed in (
        ("walker-stand", "online", 1),
        ("walker-stand", "noise", 1),
        ("walker-walk", "noise", 1),
        ("walker-walk", "noise", 2),
        ("walker-walk", "noise", 2),
    ):
        policy = write_teacher(tmp_path / f"{task}.pt", task)
        flags = ["--policy", policy, "--mix", mix, "--seed", seed, "--num-transitions", 500]
        arrays, _ = collected(short, tmp_path, *flags)
        starts.append(arrays["observations"][::50])
    np.testing.assert_array_equal(starts[3], starts[4])
    assert len(np.unique(np.concatenate(starts), axis=0)) == 40
