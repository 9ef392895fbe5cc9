"""TD3's losses against a plain loop, its wiring, the medium rule and the dataset mixes."""

import types

import numpy as np
import pytest
import torch

import mop_td3_collect as td3


def small(seed=0, hidden=16):
    torch.manual_seed(seed)
    actor, target_actor = td3.Actor(5, 2, hidden, True), td3.Actor(5, 2, hidden, True)
    critics, target_critics = td3.Critics(2, 5, 2, hidden, True), td3.Critics(2, 5, 2, hidden, True)
    batch = torch.randn(7, 5), torch.rand(7, 2) * 2 - 1, torch.rand(7), torch.randn(7, 5)
    return actor, critics, target_actor, target_critics, batch, torch.randn(7, 2)


def plain_critic(critics, k, obs, action):
    """Critic k on one row, layer by layer, from its stacked weights."""
    x = torch.cat([obs, action])
    h = x @ critics.w1[k] + critics.b1[k, 0]
    if critics.layer_norm:
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
    for layer_norm in (False, True):
        critics = td3.Critics(3, 5, 2, 16, layer_norm)
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


def run_medium(returns, **kwargs):
    """Feed update_medium one evaluation per step; the actor's weight records the step."""
    args, medium = td3.Args(**kwargs), None
    for step, value in enumerate(returns, start=1):
        actor = types.SimpleNamespace(state_dict=lambda step=step: {"w": torch.tensor(float(step))})
        medium = td3.update_medium(medium, step, value, actor, args)
    return medium


def test_medium_by_return_is_the_closest_up_to_the_first_that_reaches_it():
    assert run_medium([100, 440, 900, 463], medium_return=463)["step"] == 2  # 440 is closer than 900; 463 came later
    assert run_medium([100, 300, 470, 463], medium_return=463)["step"] == 3
    assert run_medium([100, 440, 200], medium_return=463)["final"] is False  # never reached
    assert run_medium([100, 440, 900], medium_return=463)["actor"]["w"] == 2  # its weights, not the last ones


def test_medium_by_step():
    medium = run_medium([1, 2, 3, 4], medium_step=3)
    assert (medium["step"], medium["final"], medium["actor"]["w"].item()) == (3, True, 3.0)
    assert run_medium([1, 2], medium_step=3) is None


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
    actor = td3.Actor(24, 6, 16)
    arrays, returns, count = td3.collect(actor, "walker-walk", mix, 970, 8, 3, torch.device("cpu"), 1)
    assert count == plain and len(returns) == 20 and all(len(v) == 970 for v in arrays.values())
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
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [*range(49, 950, 50), 969]
    assert not arrays["terminals"].any()
    same = ~arrays["timeouts"][:-1]
    np.testing.assert_array_equal(arrays["observations"][1:][same], arrays["next_observations"][:-1][same])
    velocities = arrays["physics"][:, 9:].astype(np.float32)  # of the state after the action
    np.testing.assert_array_equal(velocities, arrays["next_observations"][:, 15:])


def test_the_collected_data_do_not_depend_on_the_number_of_lockstep_environments(monkeypatch):
    shorten_episodes(monkeypatch, 20)
    actor = td3.Actor(24, 6, 16)
    a, b = (td3.collect(actor, "walker-stand", "online", 100, n, 3, torch.device("cpu"), 1)[0] for n in (2, 5))
    np.testing.assert_allclose(a["observations"], b["observations"], atol=1e-4)
