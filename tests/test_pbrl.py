"""PBRL's losses and the weights of its cloning, by hand; test_loops.py has its loop."""

import math

import numpy as np
import pytest
import torch

import mop_pbrl_teacher as pbrl


def by_hand(obs, action):
    """Two critics, s + a and s - a."""
    return torch.stack([(obs + action)[:, 0], (obs - action)[:, 0]])


def constant(value):
    return lambda obs: torch.full((len(obs), 1), value)


@pytest.mark.parametrize("terminal", [False, True])
def test_critic_loss_by_hand(terminal):
    """s = 1, a = 0.5, r = 2, s' = 3; pi = -1, and pi- = 5, which is clipped to 1."""
    batch = {
        "observations": torch.tensor([[1.0]]),
        "actions": torch.tensor([[0.5]]),
        "rewards": torch.tensor([2.0]),
        "next_observations": torch.tensor([[3.0]]),
        "terminals": torch.tensor([terminal]),
    }
    args = pbrl.Args(gamma=0.9, beta_in=0.5, policy_noise=0.0, ood_noise=0.0)
    loss, metrics = pbrl.pbrl_critic_loss(
        by_hand, by_hand, constant(-1.0), constant(5.0), batch, 1.0, args
    )
    # Q- of (3, 1) is 4 and 2, their std with K - 1 is sqrt(2); Q of (1, 0.5) is 1.5 and 0.5
    y1 = 2 if terminal else 2 + 0.9 * (4 - 0.5 * np.sqrt(2))
    y2 = 2 if terminal else 2 + 0.9 * (2 - 0.5 * np.sqrt(2))
    in_loss = (1.5 - y1) ** 2 + (0.5 - y2) ** 2
    # Q of (1, -1) is 0 and 2, of (3, -1) 2 and 4; a target is sqrt(2) lower, but not below 0
    ood_loss = (0 + 2) / 2 + (2 + 2) / 2
    assert loss.item() == pytest.approx(in_loss + ood_loss, rel=1e-5)
    expected = {
        "loss/in_distribution": in_loss,
        "loss/ood": ood_loss,
        "value/q_data": (1.5 + 0.5) / 2,
        "value/q_ood": (0 + 2 + 2 + 4) / 4,
        "uncertainty/data": np.sqrt(0.5),
        "uncertainty/ood": np.sqrt(2),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_actor_loss_by_hand():
    """s = 1 and -2, pi = 0.5: the lower critics are 0.5 and -2.5; a = 0 and -0.5."""
    obs = torch.tensor([[1.0], [-2.0]])
    action = torch.tensor([[0.0], [-0.5]])
    weight = torch.tensor([2.0, 0.25])
    loss = pbrl.pbrl_actor_loss(constant(0.5), by_hand, obs, action, weight, bc_coef=0.0)
    assert loss.item() == pytest.approx(1.0)
    loss = pbrl.pbrl_actor_loss(constant(0.5), by_hand, obs, action, weight, bc_coef=0.7)
    cloning = (2 * 0.5**2 + 0.25 * 1.0**2) / 2
    assert loss.item() == pytest.approx(1 / 1.5 + 0.7 * cloning)


def test_cloning_weights_by_hand():
    """Episodes of 2, 3, 1 and 1 transitions with returns 2, 6, 4 and 1; the last one is open."""
    rewards = torch.tensor([0.5, 1.5, 0.5, 3.5, 2.0, 4.0, 1.0])
    ends = torch.tensor([0, 1, 0, 0, 1, 1, 0]).bool()
    # 90% quantile of the returns: 0.7 of the way from 4 to 6
    e = [math.exp((value - 5.4) / (0.5 * 5.4)) for value in (2, 5.4, 4, 1)]
    expected = np.array([e[0], e[0], e[1], e[1], e[1], e[2], e[3]])
    weights = pbrl.cloning_weights(rewards, ends, 0.5)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-6)
    # the lower the temperature, the more goes to the best: all of it in the end
    weights = pbrl.cloning_weights(rewards, ends, 1e-4)
    np.testing.assert_allclose(weights, np.array([0, 0, 1, 1, 1, 0, 0]) * 7 / 3, rtol=1e-6)
    # costs: returns -2, -6, -4 and -1, the quantile is -1.3
    weights = pbrl.cloning_weights(-rewards, ends, 0.5)
    e = [math.exp((value + 1.3) / (0.5 * 1.3)) for value in (-2, -6, -4, -1.3)]
    expected = np.array([e[0], e[0], e[1], e[1], e[1], e[2], e[3]])
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-6)


def test_one_lucky_episode_counts_no_more_than_others():
    rewards = torch.ones(50)
    rewards[7] = 100.0
    ends = torch.ones(50, dtype=torch.bool)
    assert pbrl.cloning_weights(rewards, ends, 0.05).tolist() == [1.0] * 50


def test_cloning_weights_of_alike_episodes_are_one():
    rewards = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 3.0])
    ends = torch.tensor([0, 1, 1, 0, 0, 1]).bool()  # returns 3, 3, 3
    assert pbrl.cloning_weights(rewards, ends, 0.1).tolist() == [1.0] * 6
    one_episode = torch.zeros(6, dtype=torch.bool)
    assert pbrl.cloning_weights(rewards, one_episode, 0.1).tolist() == [1.0] * 6
    other_ends = torch.tensor([1, 1, 1, 1, 1, 1]).bool()
    assert pbrl.cloning_weights(rewards, other_ends, math.inf).tolist() == [1.0] * 6
