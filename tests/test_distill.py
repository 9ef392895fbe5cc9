"""Distillation and ranking losses against independent values, and what the student learns."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score
from torch.distributions import Normal, kl_divergence

import mop_distill as distill
import mop_pbrl_teacher as pbrl
from conftest import ROOT
from test_loops import LEVELS, TASKS, load, read_csv, use_world, write_inputs, write_toy_teacher


def test_mse_loss_by_hand():
    action = torch.tensor([[0.5, -1.0], [0.0, 0.0]])
    teacher_action = torch.tensor([[0.0, 1.0], [0.0, 0.25]])
    loss = distill.mse_loss(action, teacher_action)
    assert loss.tolist() == [0.5**2 + 2**2, 0.25**2]


def test_q_loss_takes_the_lowest_critic():
    """Two critics of one unit a layer: s + a, and s - a + 0.25, of which s + a = 1 is the limit."""
    critics = {
        "w1": torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]]),
        "b1": torch.tensor([[[0.0]], [[0.25]]]),
        "w2": torch.ones(2, 1, 1),
        "b2": torch.zeros(2, 1, 1),
        "w3": torch.ones(2, 1, 1),
        "b3": torch.zeros(2, 1, 1),
    }
    action = torch.tensor([[0.5], [-0.25], [-0.5]])
    obs = torch.tensor([[1.0], [2.0], [0.25]])
    loss = distill.q_loss(action, obs, critics)
    assert loss.tolist() == [-0.75, -1.75, 0.0]


def test_q_values_are_those_of_the_trained_critics():
    critics = pbrl.Critics(3, 5, 2, 8)
    obs = torch.randn(9, 5)
    action = torch.rand(9, 2)
    found = distill.q_values(critics.state_dict(), obs, action)
    torch.testing.assert_close(found, critics(obs, action))


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


def test_ndcg_takes_ties_in_their_order():
    """Units that are 0 after a ReLU: the same loss on every device and for every width."""
    x = torch.randn(9, 64).clamp(min=0)
    y = torch.rand(9, 64)
    order = torch.from_numpy(np.argsort(-x.numpy(), axis=1, kind="stable"))
    in_order = torch.arange(64.0).flip(0).expand(9, -1)  # untied
    torch.testing.assert_close(
        distill.ndcg_loss(x, y), distill.ndcg_loss(in_order, y.gather(1, order))
    )


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
TWO_TASKS = ["--tasks", *TASKS, "--level", "medium", "expert"]


@pytest.fixture
def train(run_main, monkeypatch):
    """A short run in World, of teachers that were not trained -> the student's checkpoint."""
    use_world(monkeypatch)
    write_inputs(TASKS)

    def run(*options, run_dir="run"):
        sizes = ["--hidden", 16, "--batch-size", 32, "--learning-rate", 3e-3]
        sizes += ["--final-eval-episodes", 1, "--run-dir", run_dir]
        outcome = run_main(distill, *TWO_TASKS, *sizes, *options)
        assert isinstance(outcome, str), outcome
        return load(f"{run_dir}/student.pt")

    return run


def test_the_student_fits_its_teachers(train):
    """Two teachers that disagree: the student learns both, told apart by the id."""
    checkpoint = train("--gradient-steps", 600, "--hidden", 64)
    student = distill.load_actor(checkpoint)
    rows = []
    for i, task in enumerate(TASKS):
        obs = torch.randn(100, 3)
        teacher = distill.load_actor(load(f"checkpoints/{task}-{LEVELS[task]}-teacher.pt"))
        own = student(distill.add_code(obs, torch.tensor([float(i)])))
        other = student(distill.add_code(obs, torch.tensor([1.0 - i])))
        assert distill.mse_loss(own, teacher(obs)).mean() < 2e-3
        assert distill.mse_loss(other, teacher(obs)).mean() > 2e-2
        rows.append(["600", task, "0", str(checkpoint["returns"][task][0])])
    assert read_csv("run/returns.csv") == rows


def taus_of(run_dir) -> dict:
    """{(task, layer): [mean, std]} of tau.csv."""
    taus = {}
    for _, task, _, layer, mean, std in read_csv(f"{run_dir}/tau.csv"):
        taus[task, int(layer)] = [float(mean), float(std)]
    return taus


def test_pairwise_ranking_raises_tau(train):
    """As the thesis reports (Fig. 6.5b)."""
    train("--gradient-steps", 60, run_dir="plain")
    train("--gradient-steps", 60, "--regularizer", "pairwise", "--reg-lambda", 1, run_dir="ranked")
    before = taus_of("plain")
    after = taus_of("ranked")
    for layer in (1, 2):
        gains = [after[task, layer][0] - before[task, layer][0] for task in TASKS]
        assert np.mean(gains) > 0.05


def test_tau_of_the_visited_states(train):
    """tau.csv is recomputed from the student; all 20 states of an episode count."""
    student = distill.load_actor(train("--gradient-steps", 40))
    rows = read_csv("run/tau.csv")
    assert len(rows) == 4 and rows[0][:4] == ["40", "toy-up", "toy-down", "1"]
    taus = taus_of("run")
    for i, task in enumerate(TASKS):
        code = torch.tensor([float(i)])
        (episode,) = distill.run_episodes(student, task, [2**31], 1, code=code.tolist())
        obs = torch.from_numpy(episode["observations"])
        own_layers = distill.hidden_layers(student, distill.add_code(obs, code))
        other_layers = distill.hidden_layers(student, distill.add_code(obs, 1 - code))
        for layer in (1, 2):
            expected = []
            for x, y in zip(own_layers[layer - 1], other_layers[layer - 1], strict=True):
                agreement = (x[:, None] - x).sign() * (y[:, None] - y).sign()
                expected.append(agreement.sum().item() / (16 * 15))
            mean_and_std = [np.mean(expected), np.std(expected, ddof=1)]
            assert taus[task, layer] == pytest.approx(mean_and_std, abs=1e-6)


def test_tau_of_a_sample_of_the_visited_states(train, monkeypatch):
    """TAU_STATES different ones, the same in every run."""
    seen = []
    layer_taus = distill.layer_taus

    def record(student, obs, code, other_code):
        seen.append(obs)
        return layer_taus(student, obs, code, other_code)

    monkeypatch.setattr(distill, "layer_taus", record)
    monkeypatch.setattr(distill, "TAU_STATES", 15)
    for run_dir in ("first", "second"):
        train("--gradient-steps", 2, run_dir=run_dir)
    assert [len(obs.unique(dim=0)) for obs in seen] == [15] * 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_gaussian_teachers_of_two_kinds_are_refused(train, run_main):
    """Their outputs stand for other log stds."""
    paths = []
    for task, log_std in zip(TASKS, [(-5.0, 0.0), (-1.0, 1.0)], strict=True):
        paths.append(write_toy_teacher(f"{task}-gaussian", task, log_std=log_std))
    options = [*TWO_TASKS, "--loss", "kl", "--gradient-steps", 1, "--final-eval-episodes", 1]
    code, text = run_main(distill, *options, "--teachers", *paths)
    assert code == 1 and "--loss kl: expected Gaussian teachers of one kind" in text


NAMES = {
    "offline": ["toy-up-medium", "toy-down-expert"],
    "online": ["toy-up-medium-teacher-online", "toy-down-expert-teacher-online"],
}


@pytest.mark.parametrize("states", NAMES)
def test_which_states_are_read(train, run_main, states):
    """Those of the levels' datasets, or those of the teachers' own episodes."""
    paths = [Path(f"data/{name}.npz") for name in NAMES[states]]
    Path("data").rename("elsewhere")
    Path("data").mkdir()
    Path("elsewhere/toy-up-medium.npz").rename(paths[0])
    options = [*TWO_TASKS, "--states", states, "--gradient-steps", 1, "--final-eval-episodes", 1]
    code, text = run_main(distill, *options)
    assert code == 1 and f"{paths[1]}: not found" in text
    Path("elsewhere/toy-down-expert.npz").rename(paths[1])
    text = run_main(distill, *options)
    assert f"50 states of {paths[0]}" in text and f"80 states of {paths[1]}" in text
