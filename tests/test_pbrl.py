"""PBRL's losses against a plain loop written from the formulas, and the wiring of an update."""

import zlib
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

import mop_pbrl_teacher as pbrl
from conftest import make_arrays, write_dataset

K, B, OBS, ACT, N_OOD = 4, 6, 5, 2, 3


def plain_critic(critics, k, obs, action):
    """Critic k on one row, layer by layer, from its stacked weights."""
    h = (torch.cat([obs, action]) @ critics.w1[k] + critics.b1[k, 0]).clamp(min=0)
    h = (h @ critics.w2[k] + critics.b2[k, 0]).clamp(min=0)
    return (h @ critics.w3[k] + critics.b3[k, 0])[0]


@pytest.fixture
def setup():
    torch.manual_seed(0)
    actor, target_actor = pbrl.Actor(OBS, ACT, 16), pbrl.Actor(OBS, ACT, 16)
    critics, target_critics = pbrl.Critics(K, OBS, ACT, 16), pbrl.Critics(K, OBS, ACT, 16)
    terminal = torch.tensor([0.0, 0, 0, 1, 0, 0])
    batch = torch.randn(B, OBS), torch.rand(B, ACT) * 2 - 1, torch.rand(B), torch.randn(B, OBS), terminal
    noise = torch.randn(B, ACT), torch.randn(N_OOD, 2 * B, ACT)
    args = pbrl.Args(num_critics=K, num_ood=N_OOD, gamma=0.9, beta_in=0.5, ood_noise=0.4, noise_clip=0.3)
    return actor, target_actor, critics, target_critics, batch, noise, args


def test_critic_loss_equals_a_plain_loop(setup):
    actor, target_actor, critics, target_critics, batch, noise, args = setup
    with torch.no_grad():
        critics.b3 += 0.3  # so that max(., 0) cuts some of the OOD targets and not others
    loss, metrics = pbrl.pbrl_critic_loss(critics, target_critics, actor, target_actor, batch, noise, 1.5, args)

    in_loss, ood_loss, cut, uncut, uncertainties = 0.0, 0.0, 0, 0, []
    obs, action, reward, next_obs, terminal = batch
    for b in range(B):
        eps = np.clip(args.policy_noise * noise[0][b].numpy(), -0.3, 0.3)
        next_action = np.clip(target_actor(next_obs[b : b + 1])[0].detach().numpy() + eps, -1, 1)
        next_action = torch.from_numpy(next_action)
        q_next = np.array([plain_critic(target_critics, k, next_obs[b], next_action).item() for k in range(K)])
        u_next = np.sqrt(((q_next - q_next.mean()) ** 2).sum() / (K - 1))
        for k in range(K):
            y = reward[b].item() + 0.9 * (1 - terminal[b].item()) * (q_next[k] - 0.5 * u_next)
            in_loss += (plain_critic(critics, k, obs[b], action[b]).item() - y) ** 2 / B
        for j in range(N_OOD):
            for state, eps in ((obs[b], noise[1][j, b]), (next_obs[b], noise[1][j, B + b])):
                ood = (actor(state[None])[0].detach() + (0.4 * eps).clamp(-0.3, 0.3)).clamp(-1, 1)
                q = np.array([plain_critic(critics, k, state, ood).item() for k in range(K)])
                uncertainties.append(q.std(ddof=1))
                for k in range(K):
                    y = max(q[k] - 1.5 * q.std(ddof=1), 0.0)
                    cut, uncut = cut + (y == 0), uncut + (y > 0)
                    ood_loss += (q[k] - y) ** 2 / (2 * B * N_OOD)
    assert cut and uncut
    assert metrics["loss/in_distribution"].item() == pytest.approx(in_loss, rel=1e-5)
    assert metrics["loss/ood"].item() == pytest.approx(ood_loss, rel=1e-5)
    assert metrics["uncertainty/ood"].item() == pytest.approx(np.mean(uncertainties), rel=1e-5)
    assert loss.item() == pytest.approx(in_loss + ood_loss, rel=1e-5)


def test_ood_target_is_a_constant(setup):
    """The gradient equals the one with the targets held fixed as numbers (by finite differences on one weight)."""
    actor, target_actor, critics, target_critics, batch, noise, args = setup
    critics.double(), target_critics.double(), actor.double(), target_actor.double()
    batch, noise = [x.double() for x in batch], [x.double() for x in noise]
    loss, _ = pbrl.pbrl_critic_loss(critics, target_critics, actor, target_actor, batch, noise, 0.2, args)
    loss.backward()
    gradient = critics.b3.grad[1, 0, 0].item()
    with torch.no_grad():  # d/db3_k of mean (Q_k - y)^2 with y fixed is 2 mean (Q_k - y)
        obs, action, reward, next_obs, terminal = batch
        next_action = (target_actor(next_obs) + (args.policy_noise * noise[0]).clamp(-0.3, 0.3)).clamp(-1, 1)
        q_next = target_critics(next_obs, next_action)
        y = reward + 0.9 * (1 - terminal) * (q_next - 0.5 * q_next.std(0))
        states = torch.cat([obs, next_obs])
        ood = (actor(states) + (0.4 * noise[1]).clamp(-0.3, 0.3)).clamp(-1, 1).reshape(-1, ACT)
        q = critics(states.repeat(N_OOD, 1), ood)
        shift = q - (q - 0.2 * q.std(0)).clamp(min=0)
        expected = 2 * (critics(obs, action) - y)[1].mean() + 2 * shift[1].mean()
    assert gradient == pytest.approx(expected.item(), rel=1e-9)


def test_actor_loss_is_minus_the_mean_of_the_lowest_critic(setup):
    actor, _, critics, _, batch, _, _ = setup
    values = [min(plain_critic(critics, k, o, actor(o[None])[0]).item() for k in range(K)) for o in batch[0]]
    assert pbrl.pbrl_actor_loss(actor, critics, batch[0], batch[1]).item() == pytest.approx(-np.mean(values), rel=1e-5)


def test_behaviour_cloning_term(setup):
    actor, _, critics, _, batch, _, _ = setup
    policy = [actor(o[None])[0].detach() for o in batch[0]]
    rows = list(zip(batch[0], policy, strict=True))
    values = [min(plain_critic(critics, k, o, p).item() for k in range(K)) for o, p in rows]
    clone = np.mean([((p - a) ** 2).sum().item() for p, a in zip(policy, batch[1], strict=True)])
    expected = -np.mean(values) / np.mean(np.abs(values)) + 0.7 * clone
    assert pbrl.pbrl_actor_loss(actor, critics, batch[0], batch[1], 0.7).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_what_is_trained_and_nothing_else(setup):
    actor, target_actor, critics, target_critics, batch, noise, args = setup
    pbrl.pbrl_critic_loss(critics, target_critics, actor, target_actor, batch, noise, 1.0, args)[0].backward()
    assert all(p.grad.flatten(1).abs().sum(dim=1).gt(0).all() for p in critics.parameters())  # every one of the K
    assert all(p.grad is None for m in (actor, target_actor, target_critics) for p in m.parameters())
    pbrl.pbrl_actor_loss(actor, critics, batch[0], batch[1]).backward()
    assert all(p.grad.abs().sum() > 0 for p in actor.parameters())


def test_target_networks_are_read(setup):
    """The author's code updates target critics and never reads them; here each target network changes the loss."""
    actor, target_actor, critics, target_critics, batch, noise, args = setup
    losses = [pbrl.pbrl_critic_loss(critics, target_critics, actor, target_actor, batch, noise, 1.0, args)[0].item()]
    for network in (target_critics, target_actor):
        with torch.no_grad():
            network.get_parameter("w3" if network is target_critics else "net.4.weight").mul_(2)
        losses.append(
            pbrl.pbrl_critic_loss(critics, target_critics, actor, target_actor, batch, noise, 1.0, args)[0].item()
        )
    assert len(set(losses)) == 3


def test_networks_equal_plain_ones():
    """Actor and critics layer by layer; the GPU's batched products and the CPU's loop over critics are one function."""
    actor, critics = pbrl.Actor(OBS, ACT, 16), pbrl.Critics(3, OBS, ACT, 16)
    obs, action, (w1, b1, w2, b2, w3, b3) = torch.randn(9, OBS), torch.randn(9, ACT), actor.parameters()
    hidden = ((obs @ w1.T + b1).clamp(min=0) @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(actor(obs), (hidden @ w3.T + b3).tanh())
    values = [[plain_critic(critics, k, o, a) for o, a in zip(obs, action, strict=True)] for k in range(3)]
    torch.testing.assert_close(critics(obs, action), torch.stack([torch.stack(row) for row in values]))
    x = torch.cat([obs, action, torch.ones(9, 1)], dim=1).expand(3, 9, OBS + ACT + 1)
    torch.testing.assert_close(critics(obs, action), critics.network(x, *critics.parameters()))
    assert all((critics.w1[i] != critics.w1[j]).any() for i in range(3) for j in range(i))


def test_gaussian_policy_samples_its_distribution():
    """Bounds of the log std; samples have the mean and std that gaussian() states; one generator, one sequence."""
    torch.manual_seed(0)
    for bounds in ((-5.0, 0.0), (-1.0, 1.0)):
        actor, obs = pbrl.Actor(OBS, 2 * ACT, 16), 100 * torch.randn(500, OBS)
        _, log_std = pbrl.gaussian(actor(obs), bounds)
        assert bounds[0] <= log_std.min() < bounds[0] + 0.3 and bounds[1] - 0.3 < log_std.max() <= bounds[1]
    actor, obs, bounds = pbrl.Actor(OBS, 2 * ACT, 16), torch.randn(1, OBS), (-5.0, 0.0)
    mean, log_std = (value.detach() for value in pbrl.gaussian(actor(obs), bounds))
    samples = pbrl.act(actor, torch.Generator().manual_seed(1), bounds, None, obs.expand(40_000, -1)).detach()
    error = log_std.exp() / 200
    assert ((samples.mean(0) - mean).abs() < 5 * error).all() and samples.abs().max() <= 1
    torch.testing.assert_close(samples.std(0), log_std.exp()[0], rtol=0.03, atol=0)
    assert torch.equal(actor(obs)[:, :ACT], mean)  # what evaluate takes: the mean
    again = pbrl.act(actor, torch.Generator().manual_seed(1), bounds, None, obs.expand(40_000, -1))
    assert torch.equal(samples, again)


def test_the_std_is_free_to_shrink():
    """Maximising a Q that is highest at one action drives the std to its bound; the author's tanh keeps it at 1/e."""
    for bounds in ((-5.0, 0.0), (-1.0, 1.0)):
        torch.manual_seed(0)
        actor, generator = pbrl.Actor(OBS, 2 * ACT, 16), torch.Generator().manual_seed(0)
        optimizer, obs = torch.optim.Adam(actor.parameters(), lr=1e-2), torch.randn(64, OBS)
        for _ in range(300):
            policy = partial(pbrl.act, actor, generator, bounds, None)
            loss = pbrl.pbrl_actor_loss(policy, lambda o, a: -(a - 0.3).square().sum(1)[None], obs, obs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean, log_std = pbrl.gaussian(actor(obs), bounds)
        assert (mean - 0.3).abs().mean() < 0.05 and log_std.mean().item() < bounds[0] + 0.5
        assert log_std.exp().min() > np.exp(bounds[0]) * 0.999


def short_run(run_main, tmp_path, *options, steps=6):
    """PBRL for a few updates on random data of both tasks; returns RESULT and the resume point."""
    for i, task in enumerate(("walker-stand", "walker-walk")):
        write_dataset(tmp_path / f"data/{task}-medium.npz", task, make_arrays(seed=i))
    sizes = ["--gradient-steps", steps, "--eval-every", 2, "--hidden", 8, "--batch-size", 8, "--threads", 1]
    sizes += ["--eval-episodes", 1, "--final-eval-episodes", 1, "--run-dir", f"run{steps}", "--overwrite"]
    result = run_main(pbrl, *sizes, *options)
    return result, torch.load(tmp_path / f"run{steps}/resume.pt", weights_only=True)


def test_naive_actor_keeps_learning_after_step_one(run_main, tmp_path):
    """In the author's code the actor moved in the very first update and never again. One optimiser, one actor here."""
    tasks = ["--tasks", "walker-stand", "walker-walk"]
    points = [short_run(run_main, tmp_path, *tasks, steps=steps)[1] for steps in (1, 3, 5)]
    for name in points[0]["actor"]:
        weights = [point["actor"][name] for point in points]
        assert all((b - a).abs().max() > 1e-5 for a, b in pairwise(weights)), name
    first = points[0]["actor"]["net.0.weight"]
    torch.manual_seed(zlib.crc32("1 teacher {0} from {0}".format("+".join(tasks[1:])).encode()))
    assert first.shape == (8, 25) and not torch.equal(first, pbrl.Actor(25, 6, 8).state_dict()["net.0.weight"])
    steps = [point["actor_optimizer"]["state"][0]["step"].item() for point in points]
    assert steps == [2, 4, 6]  # every second step, once per task


def test_naive_tasks_have_critics_of_their_own(run_main, tmp_path):
    result, point = short_run(run_main, tmp_path, "--tasks", "walker-stand", "walker-walk")
    assert result["files"] == ["checkpoints/walker-stand+walker-walk-medium-naive.pt"]
    assert set(result["returns"]) == {"walker-stand", "walker-walk"}
    for name in ("critics", "target_critics"):
        assert all(not torch.equal(point[f"{name}_0"][k], point[f"{name}_1"][k]) for k in ("w1", "w2", "w3"))
    checkpoint = torch.load(tmp_path / result["files"][0], weights_only=True)
    assert checkpoint["kind"] == "naive" and checkpoint["tasks"] == ["walker-stand", "walker-walk"]
    assert len(checkpoint["critics"]) == 2 and checkpoint["sizes"]["in_dim"] == 25


@pytest.mark.parametrize("actor, low", [("gaussian", -5.0), ("gaussian-tanh", -1.0)])
def test_gaussian_teacher_runs_and_resumes(run_main, tmp_path, actor, low):
    options = ["--task", "walker-walk", "--actor", actor]
    result, point = short_run(run_main, tmp_path, *options)
    assert result["files"] == [f"checkpoints/walker-walk-medium-teacher-{actor}.pt"]
    checkpoint = torch.load(tmp_path / result["files"][0], weights_only=True)
    assert checkpoint["kind"] == "teacher" and checkpoint["sizes"]["log_std"][0] == low
    assert checkpoint["actor"]["net.4.weight"].shape == (12, 8)
    short_run(run_main, tmp_path, *options, steps=4)
    run_main(pbrl, "--resume", "run4", "--gradient-steps", 6)
    again = torch.load(tmp_path / "run4/resume.pt", weights_only=True)
    assert all(torch.equal(again["actor"][name], value) for name, value in point["actor"].items())
