"""PBRL's losses by hand and against plain loops, and Gaussian teachers."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import mop_pbrl_teacher as pbrl
from conftest import make_arrays, write_dataset


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


def test_only_the_critics_get_a_gradient_from_their_loss():
    torch.manual_seed(0)
    networks = [pbrl.Critics(3, 24, 6, 8), pbrl.Critics(3, 24, 6, 8)]
    networks += [pbrl.Actor(24, 6, 8), pbrl.Actor(24, 6, 8)]
    arrays = make_arrays(20)
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    loss, _ = pbrl.pbrl_critic_loss(*networks, batch, 1.0, pbrl.Args())
    loss.backward()
    for p in networks[0].parameters():
        assert p.grad.flatten(1).abs().sum(dim=1).gt(0).all()  # every one of the K
    for network in networks[1:]:
        assert all(p.grad is None for p in network.parameters())


def test_actor_loss_by_hand():
    """s = 1 and -2, pi = 0.5: the lower critics are 0.5 and -2.5; a = 0 and 1."""
    obs = torch.tensor([[1.0], [-2.0]])
    action = torch.tensor([[0.0], [1.0]])
    loss = pbrl.pbrl_actor_loss(constant(0.5), by_hand, obs, action, bc_coef=0.0)
    assert loss.item() == pytest.approx(1.0)
    loss = pbrl.pbrl_actor_loss(constant(0.5), by_hand, obs, action, bc_coef=0.7)
    assert loss.item() == pytest.approx(1 / 1.5 + 0.7 * 0.25)


def test_uncertainty_is_the_unbiased_std():
    q = torch.randn(5, 30)
    np.testing.assert_allclose(pbrl.uncertainty(q), np.std(q.numpy(), axis=0, ddof=1), rtol=1e-5)


def test_clipped_noise():
    torch.manual_seed(0)
    noise = pbrl.clipped_noise(torch.zeros(5000, 2), 0.2, 0.3).numpy().ravel()
    inside = noise[np.abs(noise) < 0.3]
    assert inside.size / noise.size == pytest.approx(0.866, abs=0.02)  # 1.5 std
    assert np.abs(noise).max() == pytest.approx(0.3)
    unclipped = pbrl.clipped_noise(torch.zeros(5000, 2), 0.2, 10.0).numpy().ravel()
    assert kstest(unclipped / 0.2, "norm").pvalue > 0.01


def test_gaussian_policy_samples_its_distribution():
    """The bounds of the log std are reached; samples have the mean and std that are stated."""
    torch.manual_seed(0)
    for low, high in ((-5.0, 0.0), (-1.0, 1.0)):
        output = torch.tensor([[0.5, -0.5, -1.0, 1.0]])
        mean, log_std = pbrl.gaussian(output, (low, high))
        assert mean.tolist() == [[0.5, -0.5]] and log_std.tolist() == [[low, high]]
    actor = pbrl.Actor(5, 4, 16)
    obs = torch.randn(1, 5)
    mean, log_std = pbrl.gaussian(actor(obs), (-5.0, 0.0))
    samples = pbrl.act(actor, (-5.0, 0.0), obs.expand(20_000, -1)).detach().numpy()
    assert np.abs(samples).max() <= 1
    for j in range(2):
        normal = torch.distributions.Normal(mean[0, j], log_std[0, j].exp())
        inside = np.abs(samples[:, j]) < 1
        values = torch.from_numpy(samples[inside, j])
        low, high = normal.cdf(torch.tensor([-1.0, 1.0])).tolist()
        uniform = (normal.cdf(values).detach().numpy() - low) / (high - low)
        assert kstest(uniform, "uniform").pvalue > 0.01
    assert torch.equal(pbrl.act(actor, None, obs), actor(obs))


@pytest.mark.parametrize("actor, low", [("gaussian", -5.0), ("gaussian-tanh", -1.0)])
def test_gaussian_teacher_runs_and_resumes(run_main, tmp_path, actor, low):
    write_dataset(tmp_path / "data/walker-walk-medium.npz", "walker-walk", make_arrays())
    sizes = ["--eval-every", 4, "--hidden", 8, "--batch-size", 8, "--eval-episodes", 1]
    sizes += ["--final-eval-episodes", 1, "--actor", actor, "--overwrite"]
    points = []
    for folder, steps in (("whole", 6), ("part", 4)):
        text = run_main(pbrl, *sizes, "--run-dir", folder, "--gradient-steps", steps)
        assert f"checkpoints/walker-walk-medium-teacher-{actor}.pt" in text
    run_main(pbrl, "--resume", "part", "--gradient-steps", 6)
    for folder in ("whole", "part"):
        points.append(torch.load(tmp_path / folder / "resume.pt", weights_only=True))
    for name, value in points[0]["actor"].items():
        assert torch.equal(points[1]["actor"][name], value)
    path = tmp_path / f"checkpoints/walker-walk-medium-teacher-{actor}.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["sizes"]["log_std"][0] == low and checkpoint["step"] == 6
    assert checkpoint["actor"]["net.4.weight"].shape == (12, 8)
