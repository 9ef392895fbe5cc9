"""Distillation and ranking losses against independent values, their wiring, and short runs of every variant."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

import mop_distill as distill
from conftest import ROOT, make_arrays, write_dataset, write_teacher


def test_mse_loss_equals_a_plain_loop():
    torch.manual_seed(0)
    student, teachers = distill.Actor(6, 2, 16), [distill.Actor(5, 2, 8) for _ in range(3)]
    states = torch.randn(3, 7, 5)
    total = 0.0
    for i, teacher in enumerate(teachers):
        for s in states[i]:
            error = teacher(s[None])[0] - student(torch.cat([s, torch.tensor([float(i)])])[None])[0]
            total += (error**2).sum().item() / (3 * 7)
    x = torch.cat([distill.add_task(states[i], i) for i in range(3)])
    targets = torch.cat([t(states[i]) for i, t in enumerate(teachers)]).detach()
    loss = distill.mse_loss(student, x, targets).mean()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for t in teachers for p in t.parameters())


def test_the_student_fits_its_teachers(run_main, tmp_path):
    """Two teachers that disagree, datasets of unequal sizes: the student learns both, told apart by the id."""
    arrays = make_arrays(300), make_arrays(150, seed=1)
    data = [write_dataset(tmp_path / f"d{i}.npz", task, arrays[i]) for i, task in enumerate(distill.Args.tasks)]
    teachers = [write_teacher(tmp_path / f"t{i}.pt", task, seed=i) for i, task in enumerate(distill.Args.tasks)]
    options = ["--data", *data, "--teachers", *teachers, "--run-dir", "run", "--gradient-steps", 600, "--hidden", 64]
    options += ["--learning-rate", 1e-3, "--eval-every", 600, "--eval-episodes", 1, "--final-eval-episodes", 2]
    options += ["--threads", 1]
    result = run_main(distill, *options, "--batch-size", 128)
    assert result["files"][0] == "run/student.pt"
    checkpoint = distill.load_checkpoint(tmp_path / "run/student.pt", ("student",))
    student = distill.load_network(distill.Actor, checkpoint, "student")
    for i in range(2):
        obs = torch.from_numpy(arrays[i]["observations"])
        teacher = distill.load_network(distill.Actor, torch.load(teachers[i], weights_only=True), "teacher")
        with torch.no_grad():
            error = (teacher(obs) - student(distill.add_task(obs, i))).square().sum(1).mean()
            wrong = (teacher(obs) - student(distill.add_task(obs, 1 - i))).square().sum(1).mean()
        assert error < 2e-3 < wrong
    assert result["returns"]["walker-walk"]["teacher"] == 100.0
    assert len(checkpoint["returns"]["walker-stand"]) == 2
    rows = (tmp_path / "run/returns.csv").read_text().splitlines()
    assert rows[0] == "step,task,episode,return" and len(rows) == 3
    assert np.isfinite(float(rows[1].split(",")[3]))


def test_an_unknown_loss_is_refused(run_main):
    code, text = run_main(distill, "--loss", "bc")
    assert code == 2 and "bc" in text


def test_kl_loss_equals_torch_distributions():
    torch.manual_seed(0)
    student, bounds = distill.Actor(6, 6, 16).double(), (-4.0, 1.0)
    x, said = torch.randn(9, 6).double(), torch.rand(9, 6).double() * 2 - 1  # a teacher's means and unscaled log stds
    student_normal, teacher_normal = (
        torch.distributions.Normal(out[:, :3], (-4 + 2.5 * (out[:, 3:] + 1)).exp()) for out in (student(x), said)
    )
    expected = torch.distributions.kl_divergence(student_normal, teacher_normal).sum(dim=1)
    loss = distill.kl_loss(student, x, said, bounds)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    loss.mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert distill.kl_loss(student, x, student(x), bounds).abs().max() < 1e-12


def test_q_loss_equals_a_plain_loop():
    torch.manual_seed(0)
    student, critics = distill.Actor(6, 2, 16), [distill.Critics(3, 5, 2, 8) for _ in range(2)]
    states = torch.randn(2, 7, 5)
    x = torch.cat([distill.add_task(states[i], i) for i in range(2)])
    expected = []
    for i in range(2):
        for s in states[i]:
            action = student(torch.cat([s, torch.tensor([float(i)])])[None])
            expected.append(-min(critics[i](s[None], action)[k].item() for k in range(3)))
    loss = distill.q_loss(student, x, [c.requires_grad_(False) for c in critics], 5)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    loss.mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for c in critics for p in c.parameters())


def test_ndcg_by_hand_and_against_scikit_learn():
    """Scores (3, 2, 3, 0, 1, 2) in this order: DCG 3 + 2/log2(3) + 3/2 + 1/log2(6) + 2/log2(7), ideal 3,3,2,2,1,0."""
    x, y = torch.tensor([[6.0, 5, 4, 3, 2, 1]]), torch.tensor([[3.0, 2, 3, 0, 1, 2]])
    log = np.log2
    dcg = 3 + 2 / log(3) + 3 / log(4) + 0 + 1 / log(6) + 2 / log(7)
    ideal = 3 + 3 / log(3) + 2 / log(4) + 2 / log(5) + 1 / log(6)
    assert distill.ndcg_loss(x, y).item() == pytest.approx(-dcg / ideal, rel=1e-6)
    x, y = torch.randn(20, 33, dtype=torch.double), torch.rand(20, 33, dtype=torch.double)
    expected = [-ndcg_score(b[None].numpy(), a[None].numpy(), ignore_ties=True) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(distill.ndcg_loss(x, y).numpy(), expected, rtol=1e-10)
    assert distill.ndcg_loss(y, y).numpy() == pytest.approx(-1)


def test_the_gradient_of_ndcg_flows_through_y_only():
    x, y = (torch.rand(4, 9, dtype=torch.double, requires_grad=True) for _ in range(2))
    distill.ndcg_loss(x, y).sum().backward()
    assert x.grad is None and y.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda scores: distill.ndcg_loss(x.detach(), scores), y)


def test_listwise_loss_equals_a_plain_loop():
    x, y = (torch.randn(5, 7, dtype=torch.double) for _ in range(2))
    expected = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        p, q = (np.exp(v) / np.exp(v).sum() for v in (a, b))
        expected.append(-sum(q[i] * np.log(p[i]) for i in range(7)))
    np.testing.assert_allclose(distill.listwise_loss(x, y).numpy(), expected, rtol=1e-10)


def test_pairwise_loss_equals_a_plain_loop_and_so_does_its_gradient():
    torch.manual_seed(0)
    x, y = (torch.randn(19, 6, dtype=torch.double, requires_grad=True) for _ in range(2))  # more rows than one part
    a, b = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    expected = []
    for r in range(19):
        terms = [
            torch.log(1 + torch.exp(-(a[r, i] - a[r, j]) * (b[r, i] - b[r, j]))) for i in range(6) for j in range(6)
        ]
        expected.append(sum(terms))
    loss, weights = distill.pairwise_loss(x, y), torch.rand(19, dtype=torch.double)
    torch.testing.assert_close(loss, torch.stack(expected))
    (loss * weights).sum().backward()
    (torch.stack(expected) * weights).sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(y.grad, b.grad)


def test_kendall_tau_by_definition_and_against_scipy():
    """With ties, rows in several parts, and a constant row: tau-a 0, tau-b undefined."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 11, generator=generator).clamp(min=0)  # as after a ReLU
    y = torch.randint(-3, 3, (70, 11), generator=generator).float()
    x[5] = 0
    tau_a, tau_b = distill.kendall_tau(x, y)
    expected = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i in range(11) for j in range(i)]
        expected.append(2 * sum(signs) / (11 * 10))
    np.testing.assert_allclose(tau_a.numpy(), expected, rtol=1e-12)
    expected = [kendalltau(a, b)[0] for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(tau_b.numpy(), expected, rtol=1e-10)
    assert tau_b.isnan().nonzero().tolist() == [[5]] and tau_a[5] == 0
    assert distill.kendall_tau(y, y)[1].tolist() == pytest.approx([1.0] * 70)


def test_layer_taus_compare_each_layer_with_every_other_id():
    student, obs = distill.Actor(4 + 3, 2, 8), torch.randn(6, 4)
    taus = distill.layer_taus(student, obs, 1, 3, 3)
    assert len(taus) == 2
    for layer, found in enumerate(taus):
        own, *others = (distill.hidden_layers(student, distill.add_task(obs, i, 3))[layer] for i in (1, 0, 2))
        tau_a, tau_b = (torch.cat(tau) for tau in zip(*(distill.kendall_tau(own, o) for o in others), strict=True))
        expected = tau_a.mean().item(), tau_a.std().item(), np.nanmean(tau_b.numpy())
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ndcg", "pairwise", "listwise"])
def test_regularizer_sums_layers_and_averages_the_other_tasks(name):
    torch.manual_seed(0)
    student, states = distill.Actor(4 + 3, 2, 8), torch.randn(3, 5, 4)
    x = torch.cat([distill.add_task(states[i], i, 3) for i in range(3)])
    others = [torch.cat([distill.add_task(states[i], (i + k) % 3, 3) for i in range(3)]) for k in (1, 2)]
    value = distill.ranking_regularizer(getattr(distill, f"{name}_loss"), student, x, others)
    expected = []
    for i in range(3):
        for s in states[i]:
            rows = [distill.hidden_layers(student, distill.add_task(s[None], j, 3)) for j in range(3)]
            pairs = [(rows[i][layer], rows[j][layer]) for j in range(3) if j != i for layer in range(2)]
            expected.append(sum(getattr(distill, f"{name}_loss")(a, b).item() for a, b in pairs) / 2)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-4)
    value.mean().backward()
    gradients = [p.grad for p in student.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[:4])  # both hidden layers
    assert all(g is None for g in gradients[4:])  # the output layer has no part in it


def test_pairwise_at_width_512_and_batch_256_fits_in_2_gib_and_a_half():
    """Two tasks, both layers, forward and backward, in a process of its own."""
    code = """
import resource, sys, torch, mop_distill as d
sys.argv = ["mop_distill.py"]
d.parse_args(d.Args, d.LAPTOP)  # the allocator's settings
student, obs = d.Actor(25, 6, 512), torch.randn(512, 24)
x, other = (torch.cat([d.add_task(obs[:256], i), d.add_task(obs[256:], 1 - i)]) for i in (0, 1))
d.ranking_regularizer(d.pairwise_loss, student, x, [other]).mean().backward()
assert student.net[0].weight.grad.abs().sum() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 2.5  # all (512, 512, 512) terms at once would take 0.5 GiB a tensor, several of them


def test_task_id_as_number_and_as_flags():
    obs = torch.randn(3, 2)
    assert torch.equal(distill.add_task(obs, 2), torch.cat([obs, torch.full((3, 1), 2.0)], dim=1))
    assert torch.equal(distill.add_task(obs, 1, 3), torch.cat([obs, torch.tensor([[0.0, 1, 0]] * 3)], dim=1))


def test_hidden_layers_are_those_of_the_forward_pass():
    student, x, seen = distill.Actor(5, 2, 8), torch.randn(4, 5), []
    for module in student.net:
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    student(x)
    first, second = seen.copy()
    layers = distill.hidden_layers(student, x)
    assert torch.equal(layers[0], first) and torch.equal(layers[1], second)


def tiny_run(run_main, tmp_path, *options, tasks=("walker-stand", "walker-walk"), log_std=None, steps=40):
    """A short run on random data with untrained teachers, in the folder `run`; returns RESULT and the student."""
    arrays = make_arrays(300)
    data = [write_dataset(tmp_path / f"d{i}.npz", task, arrays) for i, task in enumerate(tasks)]
    teachers = [write_teacher(tmp_path / f"t{i}.pt", t, seed=i, log_std=log_std) for i, t in enumerate(tasks)]
    files = ["--teachers", *teachers] if "--states" in options else ["--data", *data, "--teachers", *teachers]
    sizes = ["--gradient-steps", steps, "--eval-every", steps, "--hidden", 16, "--batch-size", 32, "--threads", 1]
    sizes += ["--learning-rate", 1e-3, "--eval-episodes", 1, "--final-eval-episodes", 1, "--run-dir", "run"]
    result = run_main(distill, "--tasks", *tasks, *files, *sizes, *options)
    return result, torch.load(tmp_path / result["files"][0], weights_only=True)


@pytest.mark.parametrize("options", [["--loss", "q"], ["--loss", "kl"], ["--regularizer", "ndcg"]])
def test_runs_with_other_losses(run_main, tmp_path, options):
    log_std = (-5.0, 0.0) if "kl" in options else None
    result, student = tiny_run(run_main, tmp_path, *options, log_std=log_std)
    found = student["sizes"]["log_std"]
    assert (found and tuple(found)) == log_std and len(result["tau"]["walker-walk"]) == 2
    actor = distill.load_network(distill.Actor, student, "student")
    assert actor(torch.zeros(3, 25)).shape == (3, 12 if log_std else 6)


def test_three_tasks_with_flags(run_main, tmp_path):
    tasks = "walker-stand", "walker-walk", "walker-run"
    result, student = tiny_run(
        run_main, tmp_path, "--task-encoding", "onehot", "--regularizer", "listwise", tasks=tasks
    )
    assert student["sizes"]["in_dim"] == 27 and student["sizes"]["task_encoding"] == "onehot"
    assert list(result["returns"]) == list(tasks)


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
def test_a_regularizer_raises_tau(run_main, tmp_path, name):
    """Pairwise ranking raises tau, as the thesis reports (Fig. 6.5b); listwise at least in one layer."""
    plain, _ = tiny_run(run_main, tmp_path, "--run-dir", "plain", steps=300)
    ranked, _ = tiny_run(run_main, tmp_path, "--regularizer", name, "--reg-lambda", 1, steps=300)
    before, after = (np.mean([r["tau"][t] for t in r["tau"]], axis=0) for r in (plain, ranked))
    assert (after > before + 0.02).any() if name == "listwise" else (after > before + 0.05).all()


def test_tau_of_the_visited_states(run_main, tmp_path):
    """tau.csv holds the mean over all states of the evaluation: recomputed from the final student with scipy."""
    _, checkpoint = tiny_run(run_main, tmp_path)
    lines = (tmp_path / "run/tau.csv").read_text().splitlines()
    assert lines[0] == "step,task,layer,tau_a_mean,tau_a_std,tau_b_mean" and len(lines) == 1 + 4
    actor, envs = distill.load_network(distill.Actor, checkpoint, "s"), distill.make_envs("walker-walk", 1)
    states = []
    distill.evaluate(lambda obs: (states.append(obs), actor(distill.add_task(obs, 1)))[1], envs, torch.device("cpu"))
    states = torch.cat(states)
    for layer in range(2):
        x, y = (distill.hidden_layers(actor, distill.add_task(states, i))[layer].numpy() for i in (1, 0))
        tau_b = np.nanmean([kendalltau(a, b)[0] for a, b in zip(x, y, strict=True)])
        sign = [np.sign(a[:, None] - a) * np.sign(b[:, None] - b) for a, b in zip(x, y, strict=True)]
        tau_a = [s.sum() / (16 * 15) for s in sign]
        row = next(line.split(",") for line in lines if line.startswith(f"40,walker-walk,{layer + 1},"))
        assert len(tau_a) == distill.TAU_STATES == 1000
        assert [float(v) for v in row[3:]] == pytest.approx([np.mean(tau_a), np.std(tau_a, ddof=1), tau_b], abs=1e-6)


def test_tau_of_a_sample_of_the_visited_states(run_main, tmp_path, monkeypatch):
    """TAU_STATES of the states, each at most once, the same ones of an evaluation in every run."""
    seen, layer_taus = [], distill.layer_taus
    spy = lambda student, obs, *ids: (seen.append(obs), layer_taus(student, obs, *ids))[1]  # noqa: E731
    monkeypatch.setattr(distill, "layer_taus", spy)
    monkeypatch.setattr(distill, "TAU_STATES", 50)
    for i in range(2):
        tiny_run(run_main, tmp_path, "--run-dir", f"run{i}")
    assert [len(obs.unique(dim=0)) for obs in seen] == [50] * 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert (tmp_path / "run0/tau.csv").read_text() == (tmp_path / "run1/tau.csv").read_text()


def test_states_of_other_files(run_main, tmp_path):
    """--states PATH: the student fits the teachers on those states, whatever task they come from."""
    other = make_arrays(100, seed=5)
    paths = [write_dataset(tmp_path / f"states{i}.npz", "walker-run", other) for i in range(2)]
    _, checkpoint = tiny_run(run_main, tmp_path, "--states", *paths, steps=1500)
    actor, obs = distill.load_network(distill.Actor, checkpoint, "s"), torch.from_numpy(other["observations"])
    elsewhere = torch.from_numpy(make_arrays(100, seed=9)["observations"])
    teacher = distill.load_network(distill.Actor, torch.load(tmp_path / "t1.pt", weights_only=True), "t")
    errors = [(teacher(s) - actor(distill.add_task(s, 1))).square().sum(1).mean().item() for s in (obs, elsewhere)]
    assert errors[0] < 0.5 * errors[1]


def test_states_online_reads_the_teachers_trajectories(run_main, tmp_path):
    _, text = run_main(distill, "--states", "online", "--tasks", "walker-stand")
    assert "data/walker-stand-medium-teacher-online.npz: not found" in text
    assert "--mix online" in text and "walker-stand-medium-teacher.pt" in text
    for i, task in enumerate(("walker-stand", "walker-walk")):
        write_dataset(tmp_path / f"data/t{i}-online.npz", task)
    result, _ = tiny_run(run_main, tmp_path, "--states", "online")
    assert result["returns"]["walker-stand"]["teacher"] == 100.0
