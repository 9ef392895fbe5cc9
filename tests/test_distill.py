"""Distillation and ranking losses against independent values, and what the student learns."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score
from torch.distributions import Normal, kl_divergence

import mop_distill as distill
from conftest import ROOT, make_arrays, write_dataset, write_teacher

TASKS = ("walker-stand", "walker-walk")


def test_mse_loss_by_hand():
    action = torch.tensor([[0.5, -1.0], [0.0, 0.0]])
    teacher_action = torch.tensor([[0.0, 1.0], [0.0, 0.25]])
    loss = distill.mse_loss(action, teacher_action)
    assert loss.tolist() == [0.5**2 + 2**2, 0.25**2]


def test_q_loss_takes_the_lowest_critic():
    def critics(obs, action):
        return torch.stack([obs[:, 0] + action[:, 0], obs[:, 0] - action[:, 0]])

    loss = distill.q_loss(torch.tensor([[0.5], [-0.25]]), torch.tensor([[1.0], [2.0]]), critics)
    assert loss.tolist() == [-0.5, -1.75]


def test_kl_loss_equals_torch_distributions():
    torch.manual_seed(0)
    output = torch.rand(9, 6).double() * 2 - 1  # means, and log stds from -4 to 1
    teacher_output = torch.rand(9, 6).double() * 2 - 1
    student = Normal(output[:, :3], (-4 + 2.5 * (output[:, 3:] + 1)).exp())
    teacher = Normal(teacher_output[:, :3], (-4 + 2.5 * (teacher_output[:, 3:] + 1)).exp())
    loss = distill.kl_loss(output, teacher_output, (-4.0, 1.0))
    torch.testing.assert_close(loss, kl_divergence(student, teacher).sum(dim=1))
    assert distill.kl_loss(output, output, (-4.0, 1.0)).abs().max() < 1e-12


def test_ndcg_by_hand_and_against_scikit_learn():
    """In the order of x the scores are 3, 2, 3, 0, 1, 2; the best order is 3, 3, 2, 2, 1, 0."""
    x = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    y = torch.tensor([[3.0, 2, 3, 0, 1, 2]])
    log = np.log2
    gain = 3 + 2 / log(3) + 3 / log(4) + 0 + 1 / log(6) + 2 / log(7)
    best_gain = 3 + 3 / log(3) + 2 / log(4) + 2 / log(5) + 1 / log(6)
    assert distill.ndcg_loss(x, y).item() == pytest.approx(-gain / best_gain, rel=1e-6)
    x = torch.randn(20, 33).double()
    y = torch.rand(20, 33).double()
    expected = []
    for row_x, row_y in zip(x.numpy(), y.numpy(), strict=True):
        expected.append(-ndcg_score([row_y], [row_x], ignore_ties=True))
    np.testing.assert_allclose(distill.ndcg_loss(x, y), expected, rtol=1e-10)
    assert distill.ndcg_loss(x, torch.zeros_like(y)).tolist() == [0] * 20  # a layer that is dead


def test_the_gradient_of_ndcg_flows_through_y_only():
    x = torch.rand(4, 9, dtype=torch.double, requires_grad=True)
    y = torch.rand(4, 9, dtype=torch.double, requires_grad=True)
    distill.ndcg_loss(x, y).sum().backward()
    assert x.grad is None and y.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(distill.ndcg_loss, (x.detach(), y))


def test_listwise_loss_is_the_cross_entropy():
    x = torch.randn(5, 7)
    y = torch.randn(5, 7)
    expected = torch.nn.functional.cross_entropy(x, y.softmax(dim=1), reduction="none")
    torch.testing.assert_close(distill.listwise_loss(x, y), expected)


def test_pairwise_loss_and_its_gradient_equal_a_plain_loop():
    torch.manual_seed(0)
    x = torch.randn(19, 6, dtype=torch.double, requires_grad=True)  # more rows than one part
    y = torch.randn(19, 6, dtype=torch.double, requires_grad=True)
    expected = 0
    for i in range(6):
        for j in range(6):
            product = (x[:, i] - x[:, j]) * (y[:, i] - y[:, j])
            expected = expected + torch.log(1 + torch.exp(-product))
    loss = distill.pairwise_loss(x, y)
    torch.testing.assert_close(loss, expected)
    weights = torch.rand(19)
    found = torch.autograd.grad((loss * weights).sum(), [x, y])
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), [x, y]))


def test_pairwise_at_width_512_and_batch_256_fits_in_2_gib():
    """Both layers, forward and backward, in a process of its own."""
    code = """
import resource, torch, mop_distill as distill
torch.set_num_threads(1)
student = distill.Actor(25, 6, 512)
x = torch.randn(256, 25)
loss = distill.ranking_regularizer(distill.pairwise_loss, student, x, torch.randn(256, 25))
loss.mean().backward()
assert student.net[0].weight.grad.abs().sum() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # KiB on Linux
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 2  # 2.3 where all terms exist at once


def test_kendall_tau_by_definition_and_against_scipy():
    """With ties, rows in several parts, and a constant row; scipy has tau-b, the same untied."""
    torch.manual_seed(0)
    x = torch.randn(70, 11).clamp(min=0)  # as after a ReLU
    y = torch.randint(-3, 3, (70, 11)).float()
    x[5] = 0
    tau = distill.kendall_tau(x, y)
    expected = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        total = 0
        for i in range(11):
            for j in range(i):
                total += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        expected.append(2 * total / (11 * 10))
    np.testing.assert_allclose(tau, expected, rtol=1e-12)
    assert tau[5] == 0
    x = torch.randn(70, 11)
    y = torch.randn(70, 11)
    expected = [kendalltau(a, b)[0] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(distill.kendall_tau(x, y), expected, rtol=1e-10)


def test_hidden_layers_are_those_of_the_forward_pass():
    student = distill.Actor(5, 2, 8)
    seen = []
    for module in student.net:
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(4, 5)
    student(x)
    first, second = seen
    layers = distill.hidden_layers(student, x)
    assert torch.equal(layers[0], first) and torch.equal(layers[1], second)


# ------------------------------------------------------------------------------------ short runs
def tiny_run(run_main, tmp_path, *options, steps=40, run_dir="run"):
    """A short run on random data with untrained teachers -> the student's checkpoint."""
    data = []
    teachers = []
    for i, task in enumerate(TASKS):
        arrays = make_arrays(300 - 150 * i, seed=i)
        data.append(write_dataset(tmp_path / f"d{i}.npz", task, arrays))
        teachers.append(write_teacher(tmp_path / f"t{i}.pt", task, seed=i))
    sizes = ["--gradient-steps", steps, "--hidden", 16, "--batch-size", 32]
    sizes += ["--learning-rate", 1e-3, "--final-eval-episodes", 1, "--run-dir", run_dir]
    run_main(distill, "--data", *data, "--teachers", *teachers, *sizes, *options)
    return torch.load(tmp_path / run_dir / "student.pt", weights_only=True)


def test_the_student_fits_its_teachers(run_main, tmp_path):
    """Two teachers that disagree: the student learns both, told apart by the id."""
    checkpoint = tiny_run(run_main, tmp_path, "--hidden", 64, "--batch-size", 128, steps=600)
    student = distill.load_actor(checkpoint)
    for i, task in enumerate(TASKS):
        with np.load(tmp_path / f"d{i}.npz") as data:
            obs = torch.from_numpy(data["observations"])
        teacher = distill.load_actor(distill.load_teacher(tmp_path / f"t{i}.pt", task, 24, 6))
        own = student(distill.add_code(obs, torch.tensor([float(i)])))
        other = student(distill.add_code(obs, torch.tensor([1.0 - i])))
        assert distill.mse_loss(own, teacher(obs)).mean() < 2e-3
        assert distill.mse_loss(other, teacher(obs)).mean() > 2e-3
    assert len(checkpoint["returns"]["walker-stand"]) == 1
    lines = (tmp_path / "run/returns.csv").read_text().splitlines()
    assert lines[0] == "step,task,episode,return" and len(lines) == 3
    for i, task in enumerate(TASKS):
        assert lines[1 + i] == f"600,{task},0,{checkpoint['returns'][task][0]}"


def last_taus(run_dir) -> dict:
    """{(task, layer): [mean, std]} of the last step in tau.csv."""
    taus = {}
    for line in (run_dir / "tau.csv").read_text().splitlines()[1:]:
        _, task, _, layer, mean, std = line.split(",")
        taus[task, int(layer)] = [float(mean), float(std)]
    return taus


def test_pairwise_ranking_raises_tau(run_main, tmp_path):
    """As the thesis reports (Fig. 6.5b)."""
    tiny_run(run_main, tmp_path, steps=300, run_dir="plain")
    options = ["--regularizer", "pairwise", "--reg-lambda", 1]
    tiny_run(run_main, tmp_path, *options, steps=300, run_dir="ranked")
    before = last_taus(tmp_path / "plain")
    after = last_taus(tmp_path / "ranked")
    for layer in (1, 2):
        gains = [after[task, layer][0] - before[task, layer][0] for task in TASKS]
        assert np.mean(gains) > 0.05


def test_tau_of_the_visited_states(run_main, tmp_path, monkeypatch):
    """tau.csv is recomputed with scipy from the student; all 1001 states of an episode count."""
    monkeypatch.setattr(distill, "TAU_STATES", 1001)
    checkpoint = tiny_run(run_main, tmp_path)
    lines = (tmp_path / "run/tau.csv").read_text().splitlines()
    assert lines[0] == "step,task,other_task,layer,tau_a_mean,tau_a_std" and len(lines) == 1 + 4
    assert lines[1].startswith("40,walker-stand,walker-walk,1,")
    student = distill.load_actor(checkpoint)
    taus = last_taus(tmp_path / "run")
    for i, task in enumerate(TASKS):
        code = torch.tensor([float(i)])
        (episode,) = distill.run_episodes(student, task, [2**31], 1, code=code)
        obs = torch.from_numpy(episode["observations"])
        own_layers = distill.hidden_layers(student, distill.add_code(obs, code))
        other_layers = distill.hidden_layers(student, distill.add_code(obs, 1 - code))
        for layer in (1, 2):
            x = own_layers[layer - 1].numpy()
            y = other_layers[layer - 1].numpy()
            expected = []
            for a, b in zip(x, y, strict=True):
                agreement = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
                expected.append(agreement.sum() / (16 * 15))
            mean_and_std = [np.mean(expected), np.std(expected, ddof=1)]
            assert taus[task, layer] == pytest.approx(mean_and_std, abs=1e-6)


def test_tau_of_a_sample_of_the_visited_states(run_main, tmp_path, monkeypatch):
    """TAU_STATES different ones, the same in every run."""
    seen = []
    layer_taus = distill.layer_taus

    def record(student, obs, code, other_code):
        seen.append(obs)
        return layer_taus(student, obs, code, other_code)

    monkeypatch.setattr(distill, "layer_taus", record)
    monkeypatch.setattr(distill, "TAU_STATES", 50)
    for run_dir in ("first", "second"):
        tiny_run(run_main, tmp_path, run_dir=run_dir)
    assert [len(obs.unique(dim=0)) for obs in seen] == [50] * 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


NAMES = {
    "offline": ["walker-stand-medium", "walker-walk-expert"],
    "online": ["t0-online", "t1-online"],
}


@pytest.mark.parametrize("states", NAMES)
def test_which_states_are_read(run_main, tmp_path, states):
    """Those of the levels' datasets, or those of the teachers' own episodes."""
    teachers = [write_teacher(tmp_path / f"t{i}.pt", task) for i, task in enumerate(TASKS)]
    options = ["--states", states, "--level", "medium", "expert", "--teachers", *teachers]
    options += ["--gradient-steps", 1, "--final-eval-episodes", 1]
    for i, task in enumerate(TASKS):
        arrays = make_arrays(33 + 11 * i)
        write_dataset(tmp_path / f"data/{NAMES[states][i]}.npz", task, arrays)
    text = run_main(distill, *options)
    assert "walker-stand, 33 states" in text and "walker-walk, 44 states" in text
    (tmp_path / f"data/{NAMES[states][1]}.npz").rename(tmp_path / "elsewhere.npz")
    code, text = run_main(distill, *options)
    assert code == 1 and f"data/{NAMES[states][1]}.npz: not found" in text
    assert "mop_td3_collect.py" in text
