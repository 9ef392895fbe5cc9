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

TASKS = ["walker-stand", "walker-walk"]
CPU = torch.device("cpu")


def write_student(path, tasks=TASKS, kind="student", obs_dim=24, hidden=8, encoding="number", seed=0, **changes):
    """Write a checkpoint of an untrained student; changes override the plain fields."""
    torch.manual_seed(seed)
    in_dim = obs_dim + (len(tasks) if encoding == "onehot" else 1)
    sizes = {"in_dim": in_dim, "action_dim": 6, "hidden": hidden, "layer_norm": False, "log_std": None}
    checkpoint = {"schema_version": 1, "kind": kind, "tasks": list(tasks), "level": ["medium"] * len(tasks)}
    checkpoint |= {"args": {}, "step": 7, "sizes": {**sizes, "obs_dim": obs_dim, "task_encoding": encoding}}
    checkpoint |= {"returns": {task: [1.0] for task in tasks}, "versions": {}}
    checkpoint["actor"] = measure.Actor(in_dim, 6, hidden).state_dict()
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
    tau_a, tau_b = measure.kendall_tau(x, y, threads=1, rows=4)
    np.testing.assert_allclose(tau_a, [plain_tau_a(*pair) for pair in zip(x, y, strict=True)], atol=1e-12)
    expected = [stats.kendalltau(*pair).statistic for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(tau_b, expected, atol=1e-12)
    assert np.isnan(tau_b[0]) == np.isnan(expected[0]) == (kind == "constant" or np.ptp(x[0]) * np.ptp(y[0]) == 0)


def test_vector_taus():
    rng = np.random.default_rng(0)
    x, y = np.round(rng.standard_normal((2, 40)), 1)
    tau_a, tau_b = measure.vector_taus(x, y)
    assert tau_a == pytest.approx(plain_tau_a(x, y)) and tau_b == pytest.approx(stats.kendalltau(x, y).statistic)
    assert tau_a != pytest.approx(tau_b)  # there are ties
    x = 1 + 1e-12 * np.arange(5)  # an order that float32 would lose
    assert measure.vector_taus(x, np.arange(5.0)) == (1.0, 1.0)
    assert measure.vector_taus(np.ones(5), x) == (0.0, None)


# ---- a student whose layers are known
def known_student():
    """3 state numbers and the id -> layer 1: relu(s0), relu(s1), relu(s2), relu(2 id); layer 2 equals it."""
    student = measure.Actor(4, 2, 4).requires_grad_(False)
    for layer in (student.net[0], student.net[2]):
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    student.net[0].weight[3, 3] = 2.0
    return student


def test_a_student_without_the_id_has_tau_1():
    student = known_student()
    student.net[0].weight[3, 3] = 0.0
    states = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 0.5], [-1.0, -1.0, -1.0]])
    taus = measure.per_state_taus(student, states, 0, 1, 0, CPU, threads=1)
    assert taus.shape == (2, 2, 3)
    np.testing.assert_array_equal(taus[:, 0], [[1, 1, 0]] * 2)  # a state in which no neuron is active: all tied
    np.testing.assert_array_equal(taus[:, 1], [[1, 1, np.nan]] * 2)
    assert measure.describe(taus[0, 1]) == {"mean": 1.0, "std": 0.0, "undefined": 1}


def test_known_activations_and_their_measures():
    student = known_student()
    states = torch.tensor([[1.0, 3.0, 4.0], [1.0, -5.0, 6.0]])
    taus = measure.per_state_taus(student, states, 0, 1, 0, CPU, threads=1, rows=1)
    # (1, 3, 4, 0) and (1, 3, 4, 2): one of 6 pairs turned; (1, 0, 6, 0) and (1, 0, 6, 2): one turned, one tied
    np.testing.assert_allclose(taus[0, 0], [(5 - 1) / 6, (4 - 1) / 6])
    np.testing.assert_allclose(taus[0, 1], [4 / 6, 3 / np.sqrt(5 * 6)])
    np.testing.assert_array_equal(taus[0], taus[1])
    means = np.stack([measure.mean_activations(student, states[i:], i, 0, CPU, rows=1) for i in range(2)])
    np.testing.assert_allclose(
        means[:, 0], [[1, 1.5, 5, 0], [1, 0, 6, 2]]
    )  # id 0 over both states, id 1 over the second
    row = measure.compare_layers(taus, means, [0.5, None], {"walker-stand": 1, "walker-walk": 1})[0]
    assert row["layer"] == 1 and row["cka"] == 0.5 and row["per_state"]["tau_a"]["mean"] == pytest.approx(3.5 / 6)
    assert row["per_state"]["tau_a"]["std"] == pytest.approx(0.5 / 6)
    assert row["per_state"]["by_task"]["walker-walk"]["tau_a"] == {"mean": 0.5, "std": 0.0, "undefined": 0}
    # pairs of the means: 01 up, down; 02 up, up; 03 down, up; 12 up, up; 13 down, up; 23 down, down
    assert row["average"]["tau_a"] == pytest.approx((3 - 3) / 6)


@pytest.mark.parametrize("encoding", ["number", "onehot"])
def test_task_encodings(tmp_path, encoding):
    """Three tasks: ids 0 and 2 differ as the plain forward pass says."""
    checkpoint = measure.load_checkpoint(
        write_student(tmp_path / "s.pt", [*TASKS, "walker-run"], encoding=encoding), ("student",)
    )
    student, states = measure.load_actor(checkpoint, "s.pt"), torch.randn(5, 24)
    codes = np.eye(3)[[0, 2]] if encoding == "onehot" else np.array([[0.0], [2.0]])
    layers = []
    for code in codes:
        x = torch.cat([states, torch.tensor(code, dtype=torch.float32).expand(5, -1)], dim=1)
        layers.append(torch.relu(x @ student.net[0].weight.T + student.net[0].bias).numpy())
    taus = measure.per_state_taus(student, states, 0, 2, 3 if encoding == "onehot" else 0, CPU, threads=1)
    expected = [plain_tau_a(a, b) for a, b in zip(*layers, strict=True)]
    np.testing.assert_allclose(taus[0, 0], expected)


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
    first, second = measure.layer_ckas(student, states, 0, 1, 0, CPU)
    assert first == second == pytest.approx(1.0)  # the id only adds a constant
    student.net[0].weight.zero_()
    assert measure.layer_ckas(student, states, 0, 1, 0, CPU) == [None, None]


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
    mean, error = measure.clustered(np.repeat(values, 100), np.repeat(np.arange(5, 35), 100))
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(stats.sem(values))
    assert np.isnan(measure.clustered(values, np.zeros(30, int))[1])


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
    found = measure.state_shift(data, 3, CPU, max_states=1000)
    assert found["train_states"] == [600, 600] and found["test_states"] == [200, 100]
    assert found == measure.state_shift(data, 3, CPU, max_states=1000) != measure.state_shift(data, 4, CPU, 1000)


# ---- rollouts, the cross-task table, the whole script
def test_rollout_returns_are_evaluates(tmp_path):
    checkpoint = measure.load_checkpoint(write_student(tmp_path / "s.pt"), ("student",))
    student, seen = measure.load_actor(checkpoint, "s.pt"), []

    def policy(obs):
        seen.append(obs.numpy().copy())
        return student(measure.add_task(obs, 1))

    env = measure.LockstepEnv("walker-walk", 2, 1)
    returns, visited, physics = measure.rollout(policy, env, 2, CPU)
    np.testing.assert_array_equal(visited.numpy(), np.concatenate(seen))
    assert visited.shape == (2000, 24) and physics.shape == (1000, 18)
    assert returns == measure.evaluate(policy, env, CPU)
    np.testing.assert_allclose(physics[:, 9:], visited.numpy()[::2, 15:], rtol=1e-6)  # velocities of episode 0
    more, states, first = measure.rollout(policy, env, 3, CPU)  # two at a time, of the second two only one
    assert more[:2] == returns and len(more) == 3 and states.shape == (3000, 24)
    np.testing.assert_array_equal(states.reshape(1000, 3, 24)[:, :2], visited.reshape(1000, 2, 24))
    np.testing.assert_array_equal(first, physics)
    assert len(set(more)) == 3


def test_the_whole_script(run_main, tmp_path):
    student = write_student(tmp_path / "my-student.pt")
    arrays = make_arrays(400), make_arrays(300, seed=1)
    data = [write_dataset(tmp_path / f"{i}.npz", TASKS[i], arrays[i]) for i in range(2)]
    teachers = [write_teacher(tmp_path / "t0.pt", seed=3)]
    teachers += [write_teacher(tmp_path / "t1.pt", "walker-walk", kind="behavior", seed=4)]
    command = ["--student", student, "--episodes", 2, "--teachers", *teachers, "--cross-episodes", 1, "--shift", *data]
    command += ["--run-dir", "run", "--threads", 1, "--cka-states", 500, "--no-gif"]
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
    assert result["returns"]["walker-walk"]["episodes"] == len(report["returns"]["walker-walk"]["values"]) == 2

    # the same from the functions
    actor = measure.load_actor(measure.load_checkpoint(student, ("student",)), student)
    states, means = [], []
    for i, task in enumerate(TASKS):
        policy = lambda obs: actor(measure.add_task(obs, i))  # noqa: E731
        returns, visited, _ = measure.rollout(policy, measure.LockstepEnv(task, 2, 1), 2, CPU)
        assert report["returns"][task]["values"] == returns
        states.append(visited)
        layers = measure.hidden_layers(actor, measure.add_task(visited, i))
        means.append([layer.double().mean(dim=0).numpy() for layer in layers])
        np.testing.assert_allclose(report["mean_activations"][task], means[-1], rtol=1e-6)
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
        assert -0.1 < row["cka"] <= 1
    assert result["shared_computation"][1]["average_tau_a"] == round(
        report["shared_computation"][1]["average"]["tau_a"], 3
    )

    # cross-task table: every teacher under every task's reward
    for path, row in zip(teachers, report["cross_task"], strict=True):
        assert row["checkpoint"] == path.name
        teacher = measure.load_actor(torch.load(path, weights_only=True), path)
        for task in TASKS:
            expected = measure.evaluate(teacher, measure.LockstepEnv(task, 1, 1), CPU)
            assert row["returns"][task]["values"] == expected
    assert [row["task"] for row in report["cross_task"]] == TASKS
    pairs = [(a["observations"], a["timeouts"]) for a in arrays]
    assert {k: report["shift"][k] for k in ("js_bits", "auc")} == {
        k: measure.state_shift(pairs, 1, CPU, 100_000)[k] for k in ("js_bits", "auc")
    }
    assert set(report["seconds"]) >= {"rollouts", "per_state_tau_0_1", "cka_0_1", "cross_task", "shift"}

    code, error = run_main(measure, *command)
    assert code != 0 and "run/measure.json" in error and "--overwrite" in error
    assert run_main(measure, *command[:4], *command[-7:], "--overwrite")["files"] == result["files"]


def test_one_task_and_a_naive_policy(run_main, tmp_path, capsys):
    path = write_student(tmp_path / "s.pt", TASKS[:1], kind="naive")
    result = run_main(measure, "--student", path, "--episodes", 1, "--run-dir", "run", "--no-gif", "--threads", 1)
    assert "shared_computation" not in result and len(result["files"]) == 3
    assert json.loads((tmp_path / "run/measure.json").read_text())["shared_computation"] == []


# ---- GIF
def some_states(count=60):
    env = measure.LockstepEnv("walker-walk", 1, 1)
    env.reset([1])
    states = []
    for t in range(count):
        states.append(env.physics_state()[0])
        env.step(np.full((1, 6), np.sin(t / 5), np.float32))
    return {"walker-walk": np.array(states)}


def test_gif_of_a_copy_of_the_script(tmp_path, monkeypatch):
    """The child process imports the file it is, whatever its name."""
    shutil.copy(ROOT / "mop_measure.py", tmp_path / "my variant-2.0.py")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "my variant-2.0.py"))
    gifs, reason = measure.write_gifs(some_states(), tmp_path, 20)
    if gifs is None:
        assert "libegl1" in reason and "libosmesa6" in reason
        pytest.skip(f"nothing renders here: {reason}")
    assert gifs == {"walker-walk": "walker-walk.gif"} and reason is None
    with Image.open(tmp_path / gifs["walker-walk"]) as image:
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
        return subprocess.CompletedProcess(command, 1, b"", b"Traceback\nAttributeError: no eglQueryString\n")

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
    assert measure.write_gifs({}, tmp_path, 10)[0] is None and calls == ["osmesa"]  # what the user asks for, only

    def slow(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(measure.subprocess, "run", slow)
    assert "not ready" in measure.write_gifs({}, tmp_path, 10)[1]


# ---- bad input
def test_bad_input_is_refused(run_main, tmp_path):
    student, teacher = write_student(tmp_path / "s.pt"), write_teacher(tmp_path / "t.pt")
    data, other = write_dataset(tmp_path / "d.npz"), write_dataset(tmp_path / "o.npz", arrays=make_arrays(obs_dim=17))
    cheetah = write_teacher(tmp_path / "c.pt", "cheetah-run", obs_dim=17)
    small = write_dataset(tmp_path / "small.npz", arrays=make_arrays(50))
    narrow = write_student(tmp_path / "n.pt", obs_dim=23)
    cases = {
        (): ["nothing to measure", "python mop_measure.py --student"],
        ("--student", "none.pt"): ["none.pt", "no such checkpoint"],
        ("--student", teacher): ["t.pt", "kind student or naive, found teacher"],
        ("--student", narrow): ["n.pt", "walker-stand", "24", "23"],
        ("--teachers", student): ["s.pt", "kind teacher or behavior, found student"],
        ("--teachers", cheetah): ["c.pt", "walker-stand", "(24, 6)", "(17, 6)"],
        ("--teachers", teacher, "--tasks", "walker-fly"): ["walker-fly", "stand, walk"],
        ("--shift", data): ["--shift", "expected two dataset files, found 1"],
        ("--shift", data, other): ["o.npz", "24", "17"],
        ("--shift", data, small): ["small.npz", "100 rows", "50"],
        ("--shift", data, "none.npz"): ["none.npz", "no such dataset"],
        ("--student", student, "--episodes", 0): ["--episodes", "positive"],
        ("--student", student, "--cka-states", 3): ["--cka-states", "100"],
    }
    for command, words in cases.items():
        code, text = run_main(measure, *command)
        assert code not in (0, None) and "Traceback" not in text and len(text.strip().splitlines()) <= 2, text
        for word in words:
            assert word in text, (command, text)
    assert not (tmp_path / "runs").exists()


def test_output_of_a_process(tmp_path):
    """Nothing on standard error where the output is no terminal, and a table of at most 100 columns."""
    command = [sys.executable, str(ROOT / "mop_measure.py"), "--teachers", write_teacher(tmp_path / "t.pt")]
    command += ["--cross-episodes", "1", "--threads", "1"]
    environment = {**os.environ, "MUJOCO_GL": "osmesa"}  # may be missing: this process does not render
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert process.returncode == 0 and process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[0].split() == ["return", "(*:", "its", "own", "task)", "walker-stand", "walker-walk"]
    assert lines[1].startswith("t.pt") and lines[1].count("*") == 1 and max(map(len, lines[:2])) <= 100
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert (tmp_path / result["files"][0]).is_file() and result["run_dir"].startswith("runs/mop_measure-")
