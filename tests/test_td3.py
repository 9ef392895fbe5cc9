"""TD3's losses against a plain loop, its wiring, the medium rule and the dataset mixes."""

import json

import numpy as np
import pytest
import torch

import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import write_teacher


def small(seed=0, hidden=16):
    torch.manual_seed(seed)
    actor, target_actor = td3.Actor(5, 2, hidden, True), td3.Actor(5, 2, hidden, True)
    critics, target_critics = td3.Critics(2, 5, 2, hidden), td3.Critics(2, 5, 2, hidden)
    batch = torch.randn(7, 5), torch.rand(7, 2) * 2 - 1, torch.rand(7), torch.randn(7, 5)
    return actor, critics, target_actor, target_critics, batch, torch.randn(7, 2)


def plain_critic(critics, k, obs, action):
    """Critic k on one row, layer by layer, from its stacked weights."""
    x = torch.cat([obs, action])
    h = x @ critics.w1[k] + critics.b1[k, 0]
    if hasattr(critics, "scale"):
        h = (h - h.mean()) / torch.sqrt(h.var(unbiased=False) + 1e-5) * critics.scale[k, 0] + critics.shift[k, 0]
        h = torch.tanh(h)
    else:
        h = h.clamp(min=0)
    h = (h @ critics.w2[k] + critics.b2[k, 0]).clamp(min=0)
    return (h @ critics.w3[k] + critics.b3[k, 0])[0]


def test_critic_loss_equals_a_plain_loop():
    actor, critics, target_actor, target_critics, batch, noise = small()
    args = td3.Args(policy_noise=0.4, noise_clip=0.3, gamma=0.9)
    expected = 0.0
    for k in range(2):
        for o, a, r, o2, e in zip(*batch, noise, strict=True):
            next_action = (target_actor(o2[None])[0] + (0.4 * e).clamp(-0.3, 0.3)).clamp(-1, 1)
            value = min(plain_critic(target_critics, j, o2, next_action).item() for j in range(2))
            expected += (plain_critic(critics, k, o, a).item() - (r.item() + 0.9 * value)) ** 2 / 7
    loss = td3.td3_critic_loss(critics, target_critics, target_actor, batch, noise, args)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    expected = -np.mean([plain_critic(critics, 0, o, actor(o[None])[0]).item() for o in batch[0]])
    assert td3.td3_actor_loss(actor, critics, batch[0]).item() == pytest.approx(expected, rel=1e-5)


def test_batched_critics_equal_the_loop_over_critics():
    """The GPU's batched products and the CPU's loop are one function; the batched form runs on a CPU, too."""
    for module in (pbrl, td3):  # without and with LayerNorm
        critics = module.Critics(3, 5, 2, 16)
        obs, action = torch.randn(9, 5), torch.randn(9, 2)
        x = torch.cat([obs, action, torch.ones(9, 1)], dim=1).expand(3, 9, 8)
        torch.testing.assert_close(
            critics(obs, action), critics.network(x, *critics.parameters()), atol=1e-6, rtol=1e-5
        )


def test_every_trained_parameter_gets_a_gradient_and_targets_get_none():
    actor, critics, target_actor, target_critics, batch, noise = small()
    td3.td3_critic_loss(critics, target_critics, target_actor, batch, noise, td3.Args()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critics.parameters())
    assert all(p.grad is None for m in (actor, target_actor, target_critics) for p in m.parameters())
    td3.td3_actor_loss(actor, critics, batch[0]).backward()
    assert all(p.grad.abs().sum() > 0 for p in actor.parameters())


def test_each_critic_starts_different():
    critics = td3.Critics(5, 24, 6, 32)
    assert all((critics.w1[i] != critics.w1[j]).any() for i in range(5) for j in range(i))


@pytest.mark.parametrize(
    "flags, steps",
    [
        (["--medium-return", 300], {"medium": 2000, "expert": 4000}),  # the first that reaches it, not the closest
        (["--medium-step", 3000], {"medium": 3000, "expert": 4000}),
        (["--medium-return", 500], {"expert": 4000}),  # never reached
    ],
)
def test_which_policy_is_the_medium_one(run_main, tmp_path, monkeypatch, flags, steps):
    returns = iter([100.0, 350.0, 310.0, 400.0, *[0.0] * 2])
    monkeypatch.setattr(td3, "evaluate", lambda *_: [next(returns)] * 2)
    options = ["--total-timesteps", 4000, "--eval-every", 1000, "--learning-starts", 4000, "--hidden", 8]
    run_main(td3, *options, "--datasets", "expert", "--num-transitions", 1000, *flags)
    paths = {path.stem.split("-")[2]: path for path in (tmp_path / "checkpoints").glob("*.pt")}
    assert {level: torch.load(path, weights_only=True)["step"] for level, path in paths.items()} == steps


def shorten_episodes(monkeypatch, length):
    original = td3.LockstepEnv.__init__

    def init(self, *args):
        original(self, *args)
        self.episode_length = length

    monkeypatch.setattr(td3.LockstepEnv, "__init__", init)


@pytest.mark.parametrize("mix, plain", [("online", 20), ("noise", 2), ("random90", 2), ("random99", 1)])
def test_mixes(mix, plain, monkeypatch):
    """Shares of whole trajectories, and what the other trajectories are, at a shortened episode length."""
    shorten_episodes(monkeypatch, 50)
    torch.manual_seed(0)
    actor, generator = td3.Actor(24, 6, 16, False), np.random.default_rng(3)
    env = td3.LockstepEnv("walker-walk", 8)
    arrays = td3.collect(actor, env, np.arange(20), plain, mix, generator, torch.device("cpu"))
    assert all(len(v) == 1000 for v in arrays.values())
    assert {name: (a.dtype, a.ndim) for name, a in arrays.items()} == {
        k: (np.dtype(d), n) for k, (d, n) in td3.DATASET.items()
    }
    with torch.no_grad():
        expected = actor(torch.from_numpy(arrays["observations"])).numpy()
    residual = arrays["actions"] - expected
    assert np.abs(residual[: plain * 50]).max() < 1e-6
    other = arrays["actions"][plain * 50 :]
    if mix == "noise":
        inside = np.abs(other) < 1
        assert 0.2 < inside.mean() < 0.9 and np.abs(other).max() == 1  # clipped
        clipped_std = np.clip(np.random.default_rng(0).standard_normal(10**5), -1, 1).std()
        assert residual[plain * 50 :].std() == pytest.approx(clipped_std, rel=0.1)
    elif mix != "online":
        assert other.std() == pytest.approx(1 / np.sqrt(3), rel=0.05) and abs(other.mean()) < 0.05
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [*range(49, 1000, 50)]
    assert not arrays["terminals"].any()
    same = ~arrays["timeouts"][:-1]
    np.testing.assert_array_equal(arrays["observations"][1:][same], arrays["next_observations"][:-1][same])
    velocities = arrays["physics"][:, 9:].astype(np.float32)  # of the state after the action
    np.testing.assert_array_equal(velocities, arrays["next_observations"][:, 15:])


def test_the_collected_data_do_not_depend_on_the_number_of_lockstep_environments(monkeypatch):
    shorten_episodes(monkeypatch, 20)
    torch.manual_seed(0)
    actor, seeds = td3.Actor(24, 6, 16, False), np.arange(5)
    a, b = (
        td3.collect(actor, td3.LockstepEnv("walker-stand", n), seeds, 5, "online", None, torch.device("cpu"))
        for n in (2, 5)
    )
    np.testing.assert_allclose(a["observations"], b["observations"], atol=1e-4)


def first_states(tmp_path, run_main, *flags):
    """The first observation of every episode of a dataset collected with these flags."""
    result = run_main(td3, "--num-transitions", 10_000, "--output", "d.npz", "--overwrite", *flags)
    data = np.load(tmp_path / result["files"][0])
    return data["observations"][::1000], json.loads(str(data["metadata"]))


def test_no_two_tasks_or_mixes_start_from_the_same_states(tmp_path, run_main):
    """And a mix has its share of plain episodes, said in the metadata."""
    found = []
    for task, mix in (("walker-stand", "online"), ("walker-stand", "noise"), ("walker-walk", "noise")):
        policy = write_teacher(tmp_path / f"{task}.pt", task)
        states, metadata = first_states(tmp_path, run_main, "--policy", policy, "--mix", mix)
        assert metadata["policy_episodes"] == (10 if mix == "online" else 1)
        found.append(states)
    again, _ = first_states(tmp_path, run_main, "--policy", policy, "--mix", mix)
    np.testing.assert_array_equal(again, found[-1])
    other_seed, _ = first_states(tmp_path, run_main, "--policy", policy, "--mix", mix, "--seed", 2)
    rows = np.concatenate([*found, other_seed])
    assert len(np.unique(rows, axis=0)) == len(rows) == 40


@pytest.mark.parametrize(
    "mix, n, least", [("noise", 4000, 10_000), ("random90", 15_000, 10_000), ("random99", 50_000, 100_000)]
)
def test_sizes_that_cannot_hold_a_mix_are_refused(tmp_path, run_main, mix, n, least):
    policy = write_teacher(tmp_path / "p.pt")
    code, text = run_main(td3, "--policy", policy, "--mix", mix, "--num-transitions", n)
    assert code and "--num-transitions" in text and f"multiple of {least}" in text and str(n) in text
    assert not list((tmp_path / "data").glob("*.npz"))
