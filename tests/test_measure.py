"""Every measure against an independent computation or a known value, the files of a run, and what it refuses."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import mop_measure as measure
from conftest import ROOT, make_arrays, write_dataset, write_teacher
from mop_distill import evaluate

TASKS = ["walker-stand", "walker-walk"]
CPU = torch.device("cpu")


def write_student(
    path, tasks=TASKS, kind="student", obs_dim=24, hidden=8, encoding="number", seed=0, log_std=None, **changes
):
    """Write a checkpoint of an untrained student; changes override the plain fields."""
    torch.manual_seed(seed)
    in_dim = obs_dim + (len(tasks) if encoding == "onehot" else 1)
    sizes = {"in_dim": in_dim, "action_dim": 6, "hidden": hidden, "layer_norm": False, "log_std": log_std}
    checkpoint = {"schema_version": 1, "kind": kind, "tasks": list(tasks), "level": ["medium"] * len(tasks)}
    checkpoint |= {"args": {}, "step": 7, "sizes": {**sizes, "obs_dim": obs_dim, "task_encoding": encoding}}
    checkpoint |= {"returns": {task: [1.0] for task in tasks}, "versions": {}}
    checkpoint["actor"] = measure.Actor(in_dim, 12 if log_std else 6, hidden, False).state_dict()
    torch.save({**checkpoint, **changes}, path)
    return path


# ---- Kendall's tau
def plain_tau_a(x, y):
    """Its definition as a double loop."""
    total = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(len(x)), 2))
    return 2 * total / (len(x) * (len(x) - 1))


@pytest.mark.parametrize("n", [2, 5, 64, 256, 300])
@pytest.mark.parametrize("kind", ["random", "relu", "negative", "few values", "constant", "signed zeros"])
def test_kendall_tau_equals_its_definition_and_scipy(n, kind):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((2, 6, n)).astype(np.float32)
    y = 0.5 * x + y
    if kind == "relu":
        x, y = np.maximum(x, 0), np.maximum(y, 0)
    elif kind == "negative":
        x, y = -np.abs(x), -np.abs(y) - 5
    elif kind == "few values":
        x, y = np.round(x), np.round(y)
    elif kind == "constant":
        x[::2] = 3.0
    elif kind == "signed zeros":
        x, y = x * (rng.random(x.shape) < 0.5), y * (rng.random(y.shape) < 0.5)
    tau_a, tau_b = (t.numpy() for t in measure.kendall_tau(torch.from_numpy(x), torch.from_numpy(y)))
    np.testing.assert_allclose(tau_a, [plain_tau_a(*pair) for pair in zip(x, y, strict=True)], atol=1e-12)
    expected = [stats.kendalltau(*pair).statistic for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(tau_b, expected, atol=1e-12)
    assert np.isnan(tau_b[0]) == np.isnan(expected[0]) == (np.ptp(x[0]) * np.ptp(y[0]) == 0)
    if kind == "random":  # no ties: tau-c is the same then, too
        expected = [stats.kendalltau(*pair, variant="c").statistic for pair in zip(x, y, strict=True)]
        np.testing.assert_allclose(tau_a, expected, atol=1e-12)
        np.testing.assert_array_equal(tau_a, tau_b)


def test_kendall_tau_of_float64():
    """As of mean activations: an order that float32 would lose."""
    x, y = torch.tensor([[1 + 1e-12 * k for k in range(5)], [1.0] * 5], dtype=torch.float64), torch.arange(5.0)
    tau_a, tau_b = measure.kendall_tau(x, y.double().expand(2, -1))
    np.testing.assert_array_equal(tau_a, [1, 0])
    np.testing.assert_array_equal(tau_b, [1, np.nan])


# ---- a student whose layers are known
def known_student():
    """3 state numbers and the id -> layer 1: relu(s0), relu(s1), relu(s2), relu(2 id); layer 2 equals it."""
    student = measure.Actor(4, 2, 4, False).requires_grad_(False)
    for layer in (student.net[0], student.net[2]):
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    student.net[0].weight[3, 3] = 2.0
    return student


def layers_of(student, onehot=0):
    return lambda states, i: measure.hidden_layers(student, measure.add_task(states, i, onehot))


def compare(student, states, tasks, ids=(0, 1), onehot=0):
    """compare_ids on states and the task that each was visited in, with CKA on random states, as main does it."""
    layers, tasks = layers_of(student, onehot), torch.tensor(tasks)
    means = [measure.mean_activations(layers, states[tasks == i], i) for i in range(1 + int(tasks.max()))]
    return measure.compare_ids(layers, *ids, states, tasks, torch.randn(50, states.shape[1]), means, TASKS)


def test_a_student_without_the_id_has_tau_1():
    student = known_student()
    student.net[0].weight[3, 3] = 0.0
    states = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 0.5], [-1.0, -1.0, -1.0]])  # the last: no neuron is active
    for row in compare(student, states, [0, 1, 1]):
        assert row["per_state"]["tau_a"]["mean"] == pytest.approx(2 / 3)  # of all neurons tied: 0
        assert row["per_state"]["tau_b"] == {"mean": 1.0, "std": 0.0, "undefined": 1}
        assert row["per_state"]["by_task"]["walker-stand"]["tau_b"] == {"mean": 1.0, "std": 0.0, "undefined": 0}
        assert row["per_state"]["by_task"]["walker-walk"]["tau_b"]["undefined"] == 1
        assert row["cka"] == pytest.approx(1.0)


def test_known_activations_and_their_measures(monkeypatch):
    student = known_student()
    states = torch.tensor([[1.0, 3.0, 4.0], [1.0, -5.0, 6.0]])
    rows = compare(student, states, [0, 1])
    # (1, 3, 4, 0) and (1, 3, 4, 2): one of 6 pairs turned; (1, 0, 6, 0) and (1, 0, 6, 2): one turned, one tied
    assert [row["layer"] for row in rows] == [1, 2] and rows[0]["per_state"] == rows[1]["per_state"]
    row = rows[0]
    assert row["ids"] == [0, 1]
    assert row["per_state"]["tau_a"] == {"mean": pytest.approx(3.5 / 6), "std": pytest.approx(0.5 / 6), "undefined": 0}
    tau_b = [4 / 6, 3 / np.sqrt(5 * 6)]
    assert row["per_state"]["tau_b"]["mean"] == pytest.approx(np.mean(tau_b))
    assert row["per_state"]["by_task"]["walker-walk"]["tau_a"] == {"mean": 0.5, "std": 0.0, "undefined": 0}
    for task, value in zip(TASKS, tau_b, strict=True):
        assert row["per_state"]["by_task"][task]["tau_b"]["mean"] == pytest.approx(value)
    # means (1, 3, 4, 0) and (1, 0, 6, 2): 01 up, down; 02 up, up; 03 down, up; 12 up, up; 13 down, up; 23 down, down
    assert row["average"]["tau_a"] == pytest.approx((3 - 3) / 6)
    means = measure.mean_activations(layers_of(student), states.repeat(10_000, 1), 1)  # in two parts
    np.testing.assert_allclose(means, [[1, 1.5, 5, 2]] * 2)


@pytest.mark.parametrize("encoding", ["number", "onehot"])
def test_task_encodings(tmp_path, encoding):
    """Three tasks: ids 0 and 2 differ as the plain forward pass says."""
    path = write_student(tmp_path / "s.pt", [*TASKS, "walker-run"], encoding=encoding)
    _, student, onehot = measure.load_policy(path, ("student",), None, CPU)
    assert onehot == (3 if encoding == "onehot" else 0)
    states = torch.randn(5, 24)
    codes = np.eye(3)[[0, 2]] if encoding == "onehot" else np.array([[0.0], [2.0]])
    layers = []
    for code in codes:
        x = torch.cat([states, torch.tensor(code, dtype=torch.float32).expand(5, -1)], dim=1)
        layers.append(torch.relu(x @ student.net[0].weight.T + student.net[0].bias).numpy())
    row = compare(student, states, [0, 0, 1, 1, 2], (0, 2), onehot)[0]
    expected = [plain_tau_a(a, b) for a, b in zip(*layers, strict=True)]
    assert row["per_state"]["tau_a"]["mean"] == pytest.approx(np.mean(expected))
    assert row["per_state"]["tau_a"]["std"] == pytest.approx(np.std(expected))


# ---- CKA
def kernel_cka(x, y, debiased=True):
    """With explicit n x n kernels: Song et al. 2012 (debiased), or centred kernels (Kornblith et al. 2019)."""
    n = len(x)

    def hsic(k, l_):
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(h @ k @ h @ l_)
        k, l_, one = k - np.diag(np.diag(k)), l_ - np.diag(np.diag(l_)), np.ones(n)
        product = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ l_) + product - 2 / (n - 2) * one @ k @ l_ @ one

    k, l_ = x @ x.T, y @ y.T
    return hsic(k, l_) / np.sqrt(hsic(k, k) * hsic(l_, l_))


def test_cka():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 7)) + 3, rng.standard_normal((40, 5)) - 1
    y[:, :3] += x[:, :3]
    cka = lambda a, b: measure.linear_cka(torch.from_numpy(a), torch.from_numpy(b))  # noqa: E731
    assert cka(x, y) == pytest.approx(kernel_cka(x, y), abs=1e-10)
    rotation = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    assert cka(x @ rotation * 5 + 2, y) == pytest.approx(cka(x, y), abs=1e-10)
    assert cka(x, x @ rotation) == pytest.approx(1.0)
    x, y = rng.standard_normal((2, 60, 50))  # independent, with nearly as many features as states
    assert abs(cka(x, y)) < 0.1 < 0.4 < kernel_cka(x, y, debiased=False)
    x = torch.rand(500, 6).float() * 1e-3 + 1e3  # float32 features with a large mean
    assert measure.linear_cka(x, x) == pytest.approx(1.0)


def test_cka_of_layers():
    student, states = known_student(), torch.randn(200, 3)
    assert [row["cka"] for row in compare(student, states, [0, 1] * 100)] == [pytest.approx(1.0)] * 2  # a constant
    student.net[0].weight.zero_()
    assert np.isnan([row["cka"] for row in compare(student, states, [0, 1] * 100)]).all()


# ---- shift
MEAN = {f"mean shift, KL {kl}": (np.full(24, np.sqrt(2 * kl / 24)), np.ones(24)) for kl in (0.5, 2.0)}
GAUSSIANS = {"equal": (np.zeros(24), np.ones(24)), **MEAN, "covariance": (np.zeros(24), np.linspace(0.5, 2.0, 24))}


@pytest.mark.parametrize("case", GAUSSIANS)
def test_shift_of_gaussians(case):
    """A = N(mu, diag(var)) rotated, B = N(0, 1) in 24 dimensions: KL in closed form, JS by Monte Carlo."""
    mean, var = GAUSSIANS[case]
    rng, n = np.random.default_rng(0), 20_000
    rotation = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    density_a = stats.multivariate_normal(rotation @ mean, rotation @ np.diag(var) @ rotation.T)
    density_b = stats.multivariate_normal(np.zeros(24), np.eye(24))
    a, b = (density.rvs(n, random_state=rng).astype(np.float32) for density in (density_a, density_b))
    kl_ab = 0.5 * np.sum(var + mean**2 - 1 - np.log(var))
    kl_ba = 0.5 * np.sum((1 + mean**2) / var - 1 + np.log(var))
    ratios = [density_a.logpdf(s) - density_b.logpdf(s) for s in (a, b)]
    js = 1 - (np.logaddexp(0, -ratios[0]).mean() + np.logaddexp(0, ratios[1]).mean()) / (2 * np.log(2))

    timeouts = np.arange(1, n + 1) % 100 == 0
    found = measure.state_shift([(a, timeouts), (b, timeouts)], 0, CPU, max_states=n)
    assert found["train_states"] == [12_000] * 2 and found["test_states"] == [4000] * 2
    assert found["test_episodes"] == [40] * 2 and found["beyond_limit"] == []
    assert found["js_bits"]["value"] == pytest.approx(js, abs=0.03)
    for name, kl in (("kl_ab", kl_ab), ("kl_ba", kl_ba)):
        assert found[name]["value"] == pytest.approx(kl, rel=0.12, abs=0.02)
        assert found[name]["error"] < 0.1
    assert 0 <= found["js_bits"]["value"] <= 1 and found["js_bits"]["error"] < 0.02


def test_divergences_of_the_exact_log_ratio():
    """N(mu, 1) and N(0, 1) on the line, |mu| = 1: AUC, accuracy and KL are known."""
    rng = np.random.default_rng(0)
    f_a, f_b = (rng.standard_normal(200_000) + mean - 0.5 for mean in (1, 0))  # ln p_A / p_B = s - 1/2
    found = measure.divergences(f_a, f_b, np.arange(200_000), np.arange(200_000))
    assert found["kl_ab"]["value"] == pytest.approx(0.5, abs=0.01)
    assert found["kl_ba"]["value"] == pytest.approx(0.5, abs=0.01)
    assert found["kl_ab"]["error"] == pytest.approx(1 / np.sqrt(200_000), rel=0.02)
    assert found["auc"] == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.003)
    assert found["accuracy"] == pytest.approx(stats.norm.cdf(0.5), abs=0.003)


def test_what_no_sample_can_confirm_is_flagged():
    """Datasets that do not overlap: JS 1, and a KL above ln of the test states."""
    a, b = np.random.default_rng(0).standard_normal((2, 2000, 3)).astype(np.float32)
    timeouts = np.arange(1, 2001) % 100 == 0
    found = measure.state_shift([(a, timeouts), (b + 20, timeouts)], 0, CPU, max_states=2000)
    assert found["js_bits"]["value"] > 0.99 and found["auc"] == 1.0
    assert found["kl_limit"] == pytest.approx(np.log(400))
    assert set(found["beyond_limit"]) == {n for n in ("kl_ab", "kl_ba") if found[n]["value"] > np.log(400)} != set()


def test_standard_errors_count_episodes():
    """Rows of an episode that are equal carry no more than one row."""
    values = np.random.default_rng(0).standard_normal(30)
    found = measure.clustered(np.repeat(values, 100), np.repeat(np.arange(5, 35), 100))
    assert found == {"value": pytest.approx(values.mean()), "error": pytest.approx(stats.sem(values))}
    assert np.isnan(measure.clustered(values, np.zeros(30, int))["error"])


def test_episodes_are_not_split():
    timeouts = np.zeros(1050, bool)
    timeouts[[99, 299, 300, 499, 599, 699, 799, 899, 999]] = True  # the tenth episode is cut
    episode, use = measure.split_episodes(timeouts, np.random.default_rng(0))
    assert episode[99] == 0 and episode[100] == 1 and episode[300] == 2 and episode[-1] == 9
    uses = [set(use[episode == e]) for e in range(10)]
    assert all(len(u) == 1 for u in uses) and sorted(next(iter(u)) for u in uses) == [0] * 6 + [1] * 2 + [2] * 2
    episode, use = measure.split_episodes(np.arange(200) == 199, np.random.default_rng(0))  # one episode: ten blocks
    assert np.flatnonzero(np.diff(episode)).tolist() == list(range(19, 199, 20))
    assert all(len(set(use[episode == e])) == 1 for e in range(10)) and set(use) == {0, 1, 2}


def test_a_split_by_rows_would_see_a_shift_that_is_none():
    """Episodes that stand still at random points: equal distributions, yet a row's neighbours give its dataset away."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((2, 60, 24))
    rows = (np.repeat(points, 50, axis=1) + 0.01 * rng.standard_normal((2, 3000, 24))).astype(np.float32)
    whole, single = np.arange(1, 3001) % 50 == 0, np.ones(3000, bool)  # episodes of 50 rows; every row an episode
    by_episode = measure.state_shift([(rows[0], whole), (rows[1], whole)], 0, CPU, max_states=3000)
    by_row = measure.state_shift([(rows[0], single), (rows[1], single)], 0, CPU, max_states=3000)
    assert by_episode["js_bits"]["value"] < 0.1 < 0.8 < by_row["js_bits"]["value"]


def test_shift_of_unequal_sizes_and_with_a_constant_column():
    """Ten times as many states of A count no more than those of B; a column without spread is not divided by 0."""
    rng, data = np.random.default_rng(0), []
    for mean, n in ((1.0, 20_000), (0.0, 2000)):
        observations = np.column_stack([rng.normal(mean, 1, n), np.full(n, 7.0), rng.standard_normal((n, 3))])
        data.append((observations.astype(np.float32), np.arange(1, n + 1) % 20 == 0))
    found = measure.state_shift(data, 0, CPU, max_states=20_000)
    assert found["kl_ab"]["value"] == pytest.approx(0.5, abs=0.15)
    assert found["kl_ba"]["value"] == pytest.approx(0.5, abs=0.15)


def test_shift_is_subsampled_and_repeatable():
    a, b = np.random.default_rng(0).standard_normal((2, 3000, 3)).astype(np.float32)
    data = [(a, np.arange(1, 3001) % 100 == 0), (b[:900], np.arange(1, 901) % 100 == 0)]
    draw = lambda seed: json.loads(measure.to_json(measure.state_shift(data, seed, CPU, 1000), 9))  # noqa: E731
    found = draw(3)
    assert found["train_states"] == [600, 600] and found["test_states"] == [200, 100]
    assert found == draw(3) != draw(4)


# ---- rollouts, the cross-task table, the whole script
def test_rollout(tmp_path):
    _, student, _ = measure.load_policy(write_student(tmp_path / "s.pt"), ("student",), None, CPU)
    seen = []

    def policy(obs):
        seen.append(obs.numpy().copy())
        return student(measure.add_task(obs, 1))

    env = measure.LockstepEnv("walker-walk", 2, 1)
    returns, visited, film = measure.rollout(policy, env, 2, CPU)
    np.testing.assert_array_equal(visited.numpy(), np.concatenate(seen))
    assert visited.shape == (2000, 24) and film.shape == (1000, 18)
    expected = evaluate(policy, measure.make_envs("walker-walk", 2), CPU)
    assert returns == pytest.approx(expected, abs=1e-6)  # the other scripts' evaluation
    np.testing.assert_allclose(film[:-1, 9:], visited.numpy()[2::2, 15:], rtol=1e-6)  # velocities of episode 0
    more, states, first = measure.rollout(policy, env, 3, CPU)  # two at a time, of the second two only one
    assert more[:2] == returns and len(more) == 3 and states.shape == (3000, 24)
    np.testing.assert_array_equal(states.reshape(1000, 3, 24)[:, :2], visited.reshape(1000, 2, 24))
    np.testing.assert_array_equal(first, film)
    assert len(set(more)) == 3


def test_the_whole_script(run_main, tmp_path):
    student = write_student(tmp_path / "my-student.pt")
    arrays = make_arrays(400), make_arrays(300, seed=1)
    data = [write_dataset(tmp_path / f"{i}.npz", TASKS[i], arrays[i]) for i in range(2)]
    teachers = [write_teacher(tmp_path / "t0.pt", seed=3)]
    teachers += [write_teacher(tmp_path / "t1.pt", "walker-walk", kind="behavior", seed=4)]
    command = ["--student", student, "--episodes", 2, "--teachers", *teachers, "--cross-episodes", 1, "--shift", *data]
    command += ["--run-dir", "run", "--threads", 1, "--tau-states", 0, "--cka-states", 500, "--no-gif"]
    result = run_main(measure, *command)
    assert result["files"] == [f"run/{name}" for name in ("measure.json", "activations.png", "activations_sorted.png")]
    for name in result["files"][1:]:
        with Image.open(tmp_path / name) as image:
            assert image.size == (1080, 720) and len(image.getcolors(10**6)) > 10
    text = (tmp_path / "run/measure.json").read_text()
    assert str(tmp_path) not in text and "NaN" not in text
    report = json.loads(text)
    assert report["args"]["student"] == report["student"]["checkpoint"] == "my-student.pt"
    assert report["args"]["shift"] == ["0.npz", "1.npz"] and report["student"]["step"] == 7
    assert report["states"] == dict.fromkeys(TASKS, 2000) and report["cka_states"] == 500 and "gif" not in report
    assert report["tau_states"] == 4000
    assert result["returns"]["walker-walk"]["episodes"] == len(report["returns"]["walker-walk"]["values"]) == 2

    # the same from the functions
    _, actor, _ = measure.load_policy(student, ("student",), None, CPU)
    states, means = [], []
    for i, task in enumerate(TASKS):
        policy = lambda obs: actor(measure.add_task(obs, i))  # noqa: E731
        returns, visited, _ = measure.rollout(policy, measure.LockstepEnv(task, 2, 1), 2, CPU)
        assert report["returns"][task]["values"] == pytest.approx(returns, abs=1e-8)
        states.append(visited)
        layers = measure.hidden_layers(actor, measure.add_task(visited, i))
        means.append([layer.double().mean(dim=0).numpy() for layer in layers])
        np.testing.assert_allclose(report["mean_activations"][task], means[-1], rtol=1e-6, atol=1e-9)
    layers = [[v.numpy() for v in measure.hidden_layers(actor, measure.add_task(torch.cat(states), i))] for i in (0, 1)]
    for layer, row in enumerate(report["shared_computation"]):
        assert (row["layer"], row["ids"]) == (layer + 1, [0, 1])
        tau_b = [stats.kendalltau(a, b).statistic for a, b in zip(layers[0][layer], layers[1][layer], strict=True)]
        assert row["per_state"]["tau_b"]["mean"] == pytest.approx(np.nanmean(tau_b), abs=1e-6)
        assert row["per_state"]["tau_b"]["std"] == pytest.approx(np.nanstd(tau_b), abs=1e-6)
        assert row["per_state"]["tau_b"]["undefined"] == np.isnan(tau_b).sum()
        by_task = row["per_state"]["by_task"]
        assert by_task["walker-walk"]["tau_b"]["mean"] == pytest.approx(np.nanmean(tau_b[2000:]), abs=1e-6)
        assert row["average"]["tau_a"] == pytest.approx(plain_tau_a(means[0][layer], means[1][layer]), abs=1e-6)
        tau_b = stats.kendalltau(means[0][layer], means[1][layer]).statistic
        assert row["average"]["tau_b"] == pytest.approx(tau_b, abs=1e-6)
        assert -0.1 < row["cka"] <= 1
    rows = report["shared_computation"]
    assert result["shared_computation"][1]["average"]["tau_a"] == round(rows[1]["average"]["tau_a"], 3)
    for name in ("values", "by_task", "mean_activations"):
        assert f'"{name}"' not in json.dumps(result)  # RESULT is short

    # cross-task table: every teacher under every task's reward
    for path, row in zip(teachers, report["cross_task"], strict=True):
        assert row["checkpoint"] == path.name
        teacher = measure.load_actor(torch.load(path, weights_only=True), path)
        for task in TASKS:
            expected = evaluate(teacher, measure.make_envs(task, 1), CPU)
            assert row["returns"][task]["values"] == pytest.approx(expected, abs=1e-6)
    assert [row["task"] for row in report["cross_task"]] == TASKS
    pairs = [(a["observations"], a["timeouts"]) for a in arrays]
    expected = measure.state_shift(pairs, 1, CPU, 100_000)
    assert report["shift"]["js_bits"] == pytest.approx(expected["js_bits"], abs=1e-8)
    assert report["shift"]["auc"] == pytest.approx(expected["auc"], abs=1e-8)

    code, error = run_main(measure, *command)
    assert code != 0 and "run/measure.json" in error and "--overwrite" in error
    assert run_main(measure, *command[:4], *command[-9:], "--overwrite")["files"] == result["files"]


def test_one_task_and_a_naive_policy(run_main, tmp_path, capsys):
    path = write_student(tmp_path / "s.pt", TASKS[:1], kind="naive")
    result = run_main(measure, "--student", path, "--episodes", 1, "--run-dir", "run", "--no-gif", "--threads", 1)
    assert result["shared_computation"] == [] and len(result["files"]) == 3
    assert json.loads((tmp_path / "run/measure.json").read_text())["student"]["kind"] == "naive"


def test_a_gaussian_student_acts_by_its_mean(run_main, tmp_path):
    """Its network's output is twice as wide, the mean comes first: equal to the plain network with that half alone."""
    path = write_student(tmp_path / "gaussian.pt", log_std=[-5.0, 0.0])
    checkpoint = torch.load(path, weights_only=True)
    weights = {k: v[:6] if k.startswith("net.4") else v for k, v in checkpoint["actor"].items()}
    sizes = {**checkpoint["sizes"], "log_std": None}
    torch.save({**checkpoint, "actor": weights, "sizes": sizes}, tmp_path / "plain.pt")
    options = ["--episodes", 1, "--tau-states", 100, "--no-gif", "--threads", 1]
    a, b = (run_main(measure, "--student", f"{k}.pt", *options, "--run-dir", k) for k in ("gaussian", "plain"))
    assert a["returns"] == b["returns"] and a["shared_computation"] == b["shared_computation"]


def test_tau_of_a_sample(run_main, tmp_path):
    """--tau-states: another draw per seed, whose mean is near that of all states; the rest does not change."""
    path = write_student(tmp_path / "s.pt", hidden=16)
    options = ["--student", path, "--episodes", 1, "--no-gif", "--threads", 1]
    reports = []
    for i, (n, seed) in enumerate([(0, 1), (500, 1), (500, 1), (500, 2)]):
        run_main(measure, *options, "--tau-states", n, "--seed", seed, "--run-dir", i)
        reports.append(json.loads((tmp_path / str(i) / "measure.json").read_text()))
    assert [report["tau_states"] for report in reports] == [2000, 500, 500, 500]
    everything, sample, again, other = ([row["per_state"] for row in r["shared_computation"]] for r in reports)
    assert sample == again != other
    for rows in (sample, other):
        for full, row in zip(everything, rows, strict=True):
            for name in ("tau_a", "tau_b"):
                error = full[name]["std"] / np.sqrt(500)
                assert abs(row[name]["mean"] - full[name]["mean"]) < 5 * error
                means = [row["by_task"][task][name]["mean"] for task in TASKS]
                assert min(means) <= row[name]["mean"] <= max(means)
    for report in reports:
        for a, b in zip(report["shared_computation"], reports[0]["shared_computation"], strict=True):
            assert a["average"] == b["average"] and a["cka"] == pytest.approx(b["cka"])  # all states, in another order


def test_json_has_null_for_what_is_not_defined():
    value = {"a": [float("nan"), 1.23456], "b": {"a": 1, "c": np.float64("nan")}}
    assert json.loads(measure.to_json(value, 3)) == {"a": [None, 1.235], "b": {"a": 1, "c": None}}
    assert json.loads(measure.to_json(value, 3, without=("a",))) == {"b": {"c": None}}


# ---- GIF
def some_states(count=60):
    env = measure.LockstepEnv("walker-walk", 1, 1)
    env.reset([1])
    states = [env.step(np.full((1, 6), np.sin(t / 5), np.float32))[2][0] for t in range(count)]
    return {"walker-walk": np.array(states)}


def test_gif_of_a_copy_of_the_script(tmp_path, monkeypatch):
    """The child process imports the file it is, whatever its name."""
    shutil.copy(ROOT / "mop_measure.py", tmp_path / "my variant-2.0.py")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "my variant-2.0.py"))
    reason = measure.write_gifs(some_states(), tmp_path, 20)
    if reason:
        assert "libegl1" in reason and "libosmesa6" in reason
        pytest.skip(f"nothing renders here: {reason}")
    with Image.open(tmp_path / "walker-walk.gif") as image:
        assert image.n_frames == 30 and image.size == (320, 240) and image.info["loop"] == 0
        assert image.info["duration"] == 50  # every second control step of 25 ms
        frames = []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
    assert np.abs(frames[0] - frames[-1]).max() > 50 and len(np.unique(frames[0].reshape(-1, 3), axis=0)) > 20
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_a_gl_library(run_main, tmp_path, monkeypatch, capsys):
    """One line that names the packages, exit code 0, and null in measure.json."""
    calls = []

    def broken(command, env, **options):
        calls.append(env["MUJOCO_GL"])
        assert options["check"]
        raise subprocess.CalledProcessError(1, command, b"", b"Traceback\nAttributeError: no eglQueryString\n")

    monkeypatch.setattr(measure.subprocess, "run", broken)
    path = write_student(tmp_path / "s.pt")
    command = ["--student", path, "--episodes", 1, "--threads", 1, "--run-dir"]
    result = run_main(measure, *command, "run")
    assert calls == ["egl", "osmesa"] and not any(name.endswith(".gif") for name in result["files"])
    report = json.loads((tmp_path / "run/measure.json").read_text())
    assert report["gif"] is None
    for word in ("libegl1", "libosmesa6", "no eglQueryString"):
        assert word in report["gif_reason"]
    assert "\n" not in report["gif_reason"]
    calls.clear()
    monkeypatch.setenv("GIF_GL", "osmesa")
    assert measure.write_gifs({}, tmp_path, 10) and calls == ["osmesa"]  # what the user asks for, only

    def slow(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(measure.subprocess, "run", slow)
    assert "TimeoutExpired" in measure.write_gifs({}, tmp_path, 10)


# ---- bad input
def test_bad_input_is_refused(run_main, tmp_path):
    student, teacher = write_student(tmp_path / "s.pt"), write_teacher(tmp_path / "t.pt")
    data, other = write_dataset(tmp_path / "d.npz"), write_dataset(tmp_path / "o.npz", arrays=make_arrays(obs_dim=17))
    cheetah = write_teacher(tmp_path / "c.pt", "cheetah-run", obs_dim=17)
    small = write_dataset(tmp_path / "small.npz", arrays=make_arrays(50))
    narrow = write_student(tmp_path / "n.pt", obs_dim=23)
    nan, flat = make_arrays(), make_arrays()
    nan["observations"][3, 4] = np.nan
    flat["observations"] = flat["observations"][:, 0]
    nan, flat = write_dataset(tmp_path / "nan.npz", arrays=nan), write_dataset(tmp_path / "flat.npz", arrays=flat)
    old = write_dataset(tmp_path / "old.npz", schema_version=0)
    normed = torch.load(student, weights_only=True)
    normed["actor"] = measure.Actor(25, 6, 8, True).state_dict()
    torch.save(normed | {"sizes": normed["sizes"] | {"layer_norm": True}}, tmp_path / "normed.pt")
    normed = tmp_path / "normed.pt"
    cases = {
        (): ["nothing to measure", "python mop_measure.py --student"],
        ("--student", "none.pt"): ["none.pt", "expected a readable checkpoint", "No such file"],
        ("--student", teacher): ["t.pt", "kind teacher, not student or naive"],
        ("--student", narrow): ["n.pt", "walker-stand", "24", "23"],
        ("--teachers", student): ["s.pt", "kind student, not teacher or behavior"],
        ("--teachers", cheetah): ["c.pt", "walker-stand", "(24, 6)", "(17, 6)"],
        ("--teachers", teacher, "--tasks", "walker-fly"): ["walker-fly", "walker-stand"],
        ("--teachers", teacher, "--tasks"): ["--tasks", "one task or more"],
        ("--shift", data): ["--shift", "expected two dataset files, found 1"],
        ("--shift", data, other): ["o.npz", "24", "17"],
        ("--shift", data, small): ["small.npz", "100 rows", "50"],
        ("--shift", data, "none.npz"): ["none.npz", "a dataset .npz", "No such file"],
        ("--shift", data, nan): ["nan.npz", "NaN"],
        ("--shift", data, flat): ["flat.npz", "found"],
        ("--shift", data, old): ["old.npz", "schema version"],
        ("--student", student, "--episodes", 0): ["--episodes", "from 1", "found 0"],
        ("--student", student, "--cka-states", 3): ["--cka-states", "from 100", "found 3"],
        ("--student", student, "--tau-states", -1): ["--tau-states", "from 0", "found -1"],
        ("--student", normed): ["normed.pt", "layer norm"],
        ("--student", student, "--run-dir", data): ["d.npz", "a folder that can be"],
    }
    for command, words in cases.items():
        code, text = run_main(measure, *command)
        assert code not in (0, None) and "Traceback" not in text and len(text.strip().splitlines()) <= 2, text
        for word in words:
            assert word in text, (command, text)
    assert not (tmp_path / "runs").exists()


def test_output_of_a_process(tmp_path):
    """Nothing on standard error where the output is no terminal, and at most 120 columns; also by a symlink."""
    (tmp_path / "link.py").symlink_to(ROOT / "mop_measure.py")
    command = [sys.executable, str(tmp_path / "link.py"), "--teachers", write_teacher(tmp_path / "t.pt")]
    command += ["--cross-episodes", "1", "--threads", "1"]
    environment = {**os.environ, "MUJOCO_GL": "osmesa"}  # may be missing: this process does not render
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert process.returncode == 0 and process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[0].split()[:3] == ["t.pt", "(walker-stand):", "walker-stand"] and " walker-walk " in lines[0]
    assert len(lines) == 2 and len(lines[0]) <= 120
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert (tmp_path / result["files"][0]).is_file() and result["run_dir"].startswith("runs/link-")
