"""TD3's losses by hand, all scripts' networks, the medium rule and the datasets' mixes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mop_td3_collect as td3
from test_loops import TRAINING, load, use_world, write_toy_teacher


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


# ------------------------------------------------------------------------- networks, of all scripts
@pytest.mark.parametrize("module", TRAINING.values())
def test_actor_equals_plain_layers(module):
    """Weights as torch draws them, their names, and what comes out."""
    first = [nn.ReLU()]
    options = {}
    if module is td3:
        first = [nn.LayerNorm(8), nn.Tanh()]
        options = {"layer_norm": True}
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), *first, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh()]
    expected = nn.Sequential(*layers)
    torch.manual_seed(0)
    actor = module.Actor(5, 2, 8, **options)
    weights = {f"net.{name}": weight for name, weight in expected.state_dict().items()}
    torch.testing.assert_close(dict(actor.state_dict()), weights, atol=0, rtol=0)
    x = torch.randn(9, 5)
    torch.testing.assert_close(actor(x), expected(x))


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("module", [TRAINING["pbrl"], TRAINING["ds"], TRAINING["naive"]])
def test_pbrls_critics_equal_plain_layers(module, on_cuda, monkeypatch):
    """Both forms of the forward pass, one of which runs on CUDA only."""
    torch.manual_seed(0)
    first = [nn.Linear(7, 8) for _ in range(3)]
    second = [nn.Linear(8, 8) for _ in range(3)]
    third = [nn.Linear(8, 1) for _ in range(3)]
    torch.manual_seed(0)
    critics = module.Critics(3, 5, 2, 8)
    obs = torch.randn(9, 5)
    action = torch.randn(9, 2)
    expected = []
    for k in range(3):
        h = first[k](torch.cat([obs, action], dim=1)).relu()
        h = second[k](h).relu()
        expected.append(third[k](h)[:, 0])
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_cuda)
    found = critics(obs, action)
    monkeypatch.undo()
    torch.testing.assert_close(found, torch.stack(expected))


def test_td3s_critics_equal_plain_layers():
    """From its weights alone, by numpy."""
    critics = td3.Critics(5, 2, 8)
    for weight in critics.parameters():
        nn.init.normal_(weight)  # those of a LayerNorm, too
    obs = torch.randn(9, 5)
    action = torch.randn(9, 2)
    expected = []
    for net in critics.nets:
        w1, b1, scale, shift, w2, b2, w3, b3 = [p.detach().numpy() for p in net.parameters()]
        h = np.concatenate([obs, action], axis=1) @ w1.T + b1
        h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + 1e-5)
        h = np.tanh(scale * h + shift)
        h = np.maximum(h @ w2.T + b2, 0)
        expected.append((h @ w3.T + b3)[:, 0])
    found = critics(obs, action).detach()
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------- the medium policy, and the datasets
CASES = {
    "the first that reaches it": (["--medium-return", 300], {"medium": 40, "expert": 80}),
    "the first that has it": (["--medium-return", 350], {"medium": 40, "expert": 80}),
    "by step": (["--medium-step", 60], {"medium": 60, "expert": 80}),
    "never reached": (["--medium-return", 500], {"expert": 80}),
}


@pytest.mark.parametrize("case", CASES)
def test_which_policy_is_the_medium_one(run_main, monkeypatch, tmp_path, case):
    returns = iter([100.0, 350.0, 310.0, 400.0, 0.0, 0.0])

    def run_episodes(policy, task, seeds, workers):
        spread = np.resize([-250.0, 250.0], len(seeds))  # the mean counts, no single episode
        return [{"rewards": np.array([value])} for value in next(returns) + spread]

    use_world(monkeypatch)
    monkeypatch.setattr(td3, "run_episodes", run_episodes)
    flags, steps = CASES[case]
    sizes = ["--total-timesteps", 80, "--eval-every", 20, "--learning-starts", 80, "--hidden", 8]
    sizes += ["--task", "toy-up", "--datasets", "medium-replay"]
    outcome = run_main(td3, *sizes, *flags)
    found = {}
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        found[path.stem.split("-")[2]] = load(path)["step"]
    assert found == steps
    if case == "never reached":
        assert outcome[0] == 1 and "no medium policy: no evaluation reached" in outcome[1]
    else:
        with np.load("data/toy-up-medium-replay.npz") as data:
            assert len(data["rewards"]) == steps["medium"]


def test_resumed_at_its_last_step(run_main, monkeypatch, tmp_path):
    """The expert is the policy at --total-timesteps; a medium policy that is chosen stays."""
    use_world(monkeypatch)
    sizes = ["--task", "toy-up", "--datasets", "medium-replay", "--learning-starts", 80]
    sizes += ["--eval-every", 20, "--medium-step", 20, "--hidden", 8, "--run-dir", "run"]
    run_main(td3, *sizes, "--total-timesteps", 40)
    (tmp_path / "checkpoints/toy-up-expert-behavior.pt").unlink()
    resume = ["--resume", "run", "--overwrite"]
    code, text = run_main(td3, *resume, "--medium-step", 40)
    assert code == 1 and "--medium_step: expected 20, as this run has its medium policy" in text
    code, text = run_main(td3, *resume, "--total-timesteps", 20)
    assert code == 1 and "--total-timesteps: 40 are already made" in text
    run_main(td3, *resume)
    steps = [load(f"checkpoints/toy-up-{x}-behavior.pt")["step"] for x in ("medium", "expert")]
    assert steps == [20, 40]
    torch.save(load("run/resume.pt") | {"policies": {}}, "run/resume.pt")
    code, text = run_main(td3, *resume, "--total-timesteps", 60)
    assert code == 1 and "--medium-step: expected more than the 40 made" in text


@pytest.fixture
def collect(run_main, monkeypatch):
    """Collects a dataset by a policy that was not trained -> arrays, metadata, the policy."""
    use_world(monkeypatch)

    def run(*flags, task="toy-up", level="medium"):
        policy = write_toy_teacher(task, task, level=level)
        run_main(td3, "--policy", policy, "--output", "d.npz", "--overwrite", *flags)
        with np.load("d.npz") as data:
            arrays = dict(data)
        return arrays, json.loads(str(arrays.pop("metadata"))), td3.load_actor(load(policy))

    return run


@pytest.mark.parametrize(
    "mix, plain, episodes",
    [("online", 20, 20), ("noise", 2, 20), ("random90", 2, 20), ("random99", 1, 100)],
)
def test_datasets(collect, mix, plain, episodes):
    """Shares of whole episodes, and how the rows fit together."""
    n = 20 * episodes
    arrays, metadata, actor = collect("--mix", mix, "--num-transitions", n, "--seed", 7)
    assert {name: array.dtype.name for name, array in arrays.items()} == td3.DATASET
    assert all(len(array) == n for array in arrays.values())
    expected = actor(torch.from_numpy(arrays["observations"])).numpy()
    error = np.abs(arrays["actions"] - expected).max(axis=1)
    assert error[: 20 * plain].max() < 1e-6
    assert np.all(error[20 * plain :] > 1e-6)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == list(range(19, n, 20))
    assert not arrays["terminals"].any()
    same_episode = ~arrays["timeouts"][:-1]
    before = arrays["next_observations"][:-1][same_episode]
    np.testing.assert_array_equal(arrays["observations"][1:][same_episode], before)
    after_the_action = arrays["physics"].astype(np.float32)
    np.testing.assert_array_equal(after_the_action, arrays["next_observations"])
    assert metadata["policy_episodes"] == plain and metadata["mix"] == mix
    assert metadata["policy"] == "toy-up.pt" and metadata["seed"] == 7
    returns = arrays["rewards"].reshape(episodes, 20).sum(axis=1)
    assert metadata["episode_returns"] == pytest.approx(returns, rel=1e-5)


def test_the_last_episode_may_be_cut_short(collect):
    arrays, metadata, _ = collect("--num-transitions", 48)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [19, 39, 47]
    assert len(arrays["rewards"]) == 48 and len(metadata["episode_returns"]) == 3


def test_no_two_tasks_levels_or_mixes_start_from_the_same_states(collect):
    starts = []
    for task, level, mix, seed in (
        ("toy-up", "medium", "online", 1),
        ("toy-up", "medium", "noise", 1),
        ("toy-up", "expert", "noise", 1),
        ("toy-down", "medium", "noise", 1),
        ("toy-down", "medium", "noise", 2),
        ("toy-down", "medium", "noise", 2),
    ):
        flags = ["--mix", mix, "--seed", seed, "--num-transitions", 200]
        arrays, _, _ = collect(*flags, task=task, level=level)
        starts.append(arrays["observations"][::20])
    np.testing.assert_array_equal(starts[4], starts[5])
    assert len(np.unique(np.concatenate(starts), axis=0)) == 50
