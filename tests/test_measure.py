"""Every measure against a computation of its own or a known value, a run's files, its refusals."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import mop_measure as measure
from conftest import make_arrays, script, write_dataset, write_teacher

TASKS = ["walker-stand", "walker-walk"]
CPU = torch.device("cpu")


def write_student(path, tasks=TASKS, kind="student", encoding="number", log_std=None):
    """Write a checkpoint of an untrained student of width 8."""
    in_dim = 24 + (len(tasks) if encoding == "onehot" else 1)
    write_teacher(path, kind=kind, obs_dim=in_dim, log_std=log_std, tasks=list(tasks))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["sizes"]["task_encoding"] = encoding
    torch.save(checkpoint, path)
    return path


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    """Enough for the easy distributions and few states below."""
    monkeypatch.setattr(measure, "SHIFT_STEPS", 1000)


def report_of(folder):
    return json.loads((folder / "measure.json").read_text(), parse_constant=pytest.fail)


# ---- Kendall's tau
def plain_tau_a(x, y):
    """Its definition as a loop over pairs."""
    total = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        total += int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]))
    return 2 * total / (len(x) * (len(x) - 1))


def some_rows(kind, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((6, n)).astype(np.float32)
    y = 0.5 * x + rng.standard_normal((6, n)).astype(np.float32)
    if kind == "relu":
        return np.maximum(x, 0), np.maximum(y, 0)
    if kind == "few values":
        return np.round(x), np.round(y)
    if kind == "constant":
        x[::2] = 3.0
    return x, y


@pytest.mark.parametrize("n", [2, 5, 64, 130])
@pytest.mark.parametrize("kind", ["random", "relu", "few values", "constant"])
def test_kendall_taus_equal_their_definition_and_scipy(n, kind):
    x, y = some_rows(kind, n)
    tau_a, tau_b = measure.kendall_taus(torch.from_numpy(x), torch.from_numpy(y))
    for row in range(6):
        assert tau_a[row] == pytest.approx(plain_tau_a(x[row], y[row]), abs=1e-12)
        expected = stats.kendalltau(x[row], y[row]).statistic
        assert tau_b[row] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    if kind == "random":  # no ties
        np.testing.assert_allclose(tau_a, tau_b)
    if kind == "constant":
        np.testing.assert_array_equal(tau_b.isnan(), [True, False] * 3)


def test_kendall_taus_of_float64():
    """As of mean activations: an order that float32 would lose; more rows than fit in one part."""
    x = torch.tensor([1 + 1e-12 * k for k in range(5)], dtype=torch.float64).expand(130, -1)
    y = torch.arange(5.0).double().expand(130, -1)
    tau_a, tau_b = measure.kendall_taus(x, y)
    assert tau_a.tolist() == tau_b.tolist() == [1.0] * 130


# ---- a student whose layers are known
def known_student():
    """3 state numbers and the id -> layer 1: relu(s0, s1, s2, 2 id); layer 2 equals it."""
    student = measure.Actor(4, 2, 4, layer_norm=False).requires_grad_(False)
    for layer in (student.net[0], student.net[2]):
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    student.net[0].weight[3, 3] = 2.0
    return student


def compare(student, *visited):
    codes = torch.tensor([[0.0], [1.0]])
    visited = dict(zip(TASKS, map(torch.tensor, visited), strict=True))
    args = measure.Args(num_states=10_000)
    return measure.shared_computation(student, codes, visited, args)


def test_a_student_without_the_id_has_tau_1():
    student = known_student()
    student.net[0].weight[3, 3] = 0.0
    off = [-1.0, -1.0, -1.0]  # no neuron is active: all tied
    report = compare(student, [[1.0, 2.0, 3.0]], [[3.0, 2.0, 0.5], off, [1.0, 5.0, 3.0]])
    for row in report["shared_computation"]:
        assert row["per_state"]["tau_a"]["mean"] == pytest.approx(3 / 4)  # 0 of the state `off`
        assert row["per_state"]["tau_b"] == {"mean": 1.0, "std": 0.0, "undefined": 1}
        assert row["cka"] == pytest.approx(1.0)


def test_known_activations_and_their_measures():
    # (1, 3, 4, 0) and (1, 3, 4, 2): one of 6 pairs is turned: tau-a 4/6
    # (1, 0, 6, 0) and (1, 0, 6, 2): one is turned, one is tied: tau-a 3/6
    report = compare(known_student(), [[1.0, 3.0, 4.0]] * 9000, [[1.0, -5.0, 6.0]] * 18_000)
    assert report["num_states"] == 10_000
    assert report["mean_activations"] == {
        "walker-stand": [[1.0, 3.0, 4.0, 0.0]] * 2,
        "walker-walk": [[1.0, 0.0, 6.0, 2.0]] * 2,
    }
    assert [row["layer"] for row in report["shared_computation"]] == [1, 2]
    for row in report["shared_computation"]:
        assert row["ids"] == [0, 1]
        tau_a = row["per_state"]["tau_a"]
        tau_b = row["per_state"]["tau_b"]
        share = (tau_a["mean"] - 3 / 6) / (4 / 6 - 3 / 6)  # of the first state in the sample
        expected = share * 4 / 6 + (1 - share) * 3 / np.sqrt(5 * 6)
        assert tau_b["mean"] == pytest.approx(expected)
        assert tau_a["mean"] == pytest.approx(10 / 3 / 6, abs=0.004)  # a third, two thirds
        assert tau_a["std"] == pytest.approx(2**0.5 / 3 / 6, abs=0.002)
        # pairs of the means: 01, 03, 13 are turned, 02, 12, 23 are not
        assert row["average"]["tau_a"] == pytest.approx(0)


def test_three_tasks_pair_by_pair():
    """Every pair under its own ids, averages over the states of its own tasks."""
    states = [[1.0, 3.0, 5.0], [5.0, 2.5, 1.5], [3.0, 0.5, 2.2]]
    visited = {task: torch.tensor([state] * 2) for task, state in zip("abc", states, strict=True)}
    codes = torch.tensor([[0.0], [1.0], [2.0]])
    report = measure.shared_computation(known_student(), codes, visited, measure.Args())
    pairs = [[0, 1], [0, 2], [1, 2]]
    assert [row["ids"] for row in report["shared_computation"]] == np.repeat(pairs, 2, 0).tolist()
    for row in report["shared_computation"]:
        i, j = row["ids"]
        average = plain_tau_a([*states[i], 2 * i], [*states[j], 2 * j])
        assert row["average"]["tau_a"] == pytest.approx(average)
        per_state = np.mean([plain_tau_a([*s, 2 * i], [*s, 2 * j]) for s in states])
        assert row["per_state"]["tau_a"]["mean"] == pytest.approx(per_state)


def test_description_of_taus():
    found = measure.describe(torch.tensor([1.0, 3.0, torch.nan]))
    assert found == {"mean": 2.0, "std": pytest.approx(2**0.5), "undefined": 1}


@pytest.mark.parametrize("sort", [False, True])
def test_order_of_the_neurons_in_the_pictures(tmp_path, monkeypatch, sort):
    figures = []

    def savefig(figure, path, **options):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(measure.Figure, "savefig", savefig)
    means = {"stand": [[3, 1, 2], [5, 6, 4]], "walk": [[9, 8, 7], [1, 2, 3]]}  # of two layers
    report = {"mean_activations": means, "shared_computation": []}
    measure.plot_activations(tmp_path / "a.png", report, sort)
    lines = {}
    for layer, axes in enumerate(figures[0].axes):
        for line in axes.lines:
            lines[line.get_label(), layer] = line.get_ydata().tolist()
    expected = {
        ("stand (id 0)", 0): [1, 2, 3] if sort else [3, 1, 2],
        ("stand (id 0)", 1): [4, 5, 6] if sort else [5, 6, 4],
        ("walk (id 1)", 0): [8, 7, 9] if sort else [9, 8, 7],
        ("walk (id 1)", 1): [3, 1, 2] if sort else [1, 2, 3],
    }
    assert lines == expected


# ---- CKA
def kernel_cka(x, y, debiased):
    """With n x n kernels: Song et al. 2012, or biased as in Kornblith et al. 2019."""
    n = len(x)
    one = np.ones(n)
    centre = np.eye(n) - 1 / n

    def hsic(k, m):
        if not debiased:
            return np.trace(centre @ k @ centre @ m)
        k = k - np.diag(np.diag(k))
        m = m - np.diag(np.diag(m))
        product = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ m) + product - 2 / (n - 2) * one @ k @ m @ one

    k = x @ x.T
    m = y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def cka(x, y):
    return measure.linear_cka(torch.from_numpy(x), torch.from_numpy(y))


def test_cka():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 7)) + 3
    y = rng.standard_normal((40, 5)) - 1
    y[:, :3] += x[:, :3]
    assert cka(x, y) == pytest.approx(kernel_cka(x, y, debiased=True), abs=1e-10)
    rotation = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    assert cka(x @ rotation * 5 + 2, y) == pytest.approx(cka(x, y), abs=1e-10)
    assert cka(x, x @ rotation) == pytest.approx(1.0)


def test_cka_of_independent_features_is_near_0():
    """Also with nearly as many features as states, where the biased one is large."""
    x, y = np.random.default_rng(0).standard_normal((2, 60, 50))
    assert abs(cka(x, y)) < 0.1 < 0.4 < kernel_cka(x, y, debiased=False)


def test_cka_of_float32_features_with_a_large_mean():
    x = torch.rand(500, 6) * 1e-3 + 1e3
    assert measure.linear_cka(x, x) == pytest.approx(1.0)


# ---- shift
def every(length, n):
    """timeouts of n rows in episodes of that length."""
    return np.arange(1, n + 1) % length == 0


GAUSSIANS = {  # of A in 24 dimensions: mean, variances
    "equal": (np.zeros(24), np.ones(24)),
    "mean shift, KL 0.5": (np.full(24, np.sqrt(1 / 24)), np.ones(24)),
    "mean shift, KL 2": (np.full(24, np.sqrt(4 / 24)), np.ones(24)),
    "covariance": (np.zeros(24), np.linspace(0.5, 2.0, 24)),
}


@pytest.mark.parametrize("case", GAUSSIANS)
def test_shift_of_gaussians(case):
    """A = N(mean, diag(var)) rotated, B = N(0, 1): KL in closed form, JS by Monte Carlo."""
    mean, var = GAUSSIANS[case]
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    p_a = stats.multivariate_normal(rotation @ mean, rotation @ np.diag(var) @ rotation.T)
    p_b = stats.multivariate_normal(np.zeros(24), np.eye(24))
    a = p_a.rvs(20_000, random_state=rng).astype(np.float32)
    b = p_b.rvs(20_000, random_state=rng).astype(np.float32)
    kl_ab = 0.5 * np.sum(var + mean**2 - 1 - np.log(var))
    kl_ba = 0.5 * np.sum((1 + mean**2) / var - 1 + np.log(var))
    loss_a = np.logaddexp(0, p_b.logpdf(a) - p_a.logpdf(a)).mean()
    loss_b = np.logaddexp(0, p_a.logpdf(b) - p_b.logpdf(b)).mean()
    js = 1 - (loss_a + loss_b) / (2 * np.log(2))

    timeouts = every(100, 20_000)
    found = measure.state_shift([(a, timeouts), (b, timeouts)], 20_000, 0, CPU)
    assert found["train_states"] == [12_000, 12_000]
    assert found["test_states"] == [4000, 4000]
    assert found["test_episodes"] == [40, 40]
    assert found["js_bits"]["value"] == pytest.approx(js, abs=0.03)
    assert found["js_bits"]["error"] < 0.02
    assert found["kl_ab"]["value"] == pytest.approx(kl_ab, rel=0.12, abs=0.02)
    assert found["kl_ba"]["value"] == pytest.approx(kl_ba, rel=0.12, abs=0.02)
    assert found["kl_ab"]["error"] < 0.1


def test_divergences_of_the_exact_log_ratio():
    """N(1, 1) and N(0, 1) on the line: accuracy and KL are known."""
    n = 200_000
    rng = np.random.default_rng(0)
    logit_a = rng.standard_normal(n) + 0.5  # ln p_A / p_B = s - 1/2
    logit_b = rng.standard_normal(n) - 0.5
    found = measure.divergences(logit_a, logit_b, np.arange(n), np.arange(n))
    assert found["kl_ab"]["value"] == pytest.approx(0.5, abs=0.01)
    assert found["kl_ba"]["value"] == pytest.approx(0.5, abs=0.01)
    assert found["kl_ab"]["error"] == pytest.approx(1 / np.sqrt(n), rel=0.02)
    assert found["accuracy"] == pytest.approx(stats.norm.cdf(0.5), abs=0.003)


def test_divergences_by_hand():
    """Three states of A and two of B, each of an episode of its own."""
    logit_a = np.array([2.0, -1.0, 0.5])
    logit_b = np.array([-3.0, 1.0])
    bits_a = 1 + np.log2(1 / (1 + np.exp(-logit_a)))
    bits_b = 1 + np.log2(1 / (1 + np.exp(logit_b)))
    js_error = np.sqrt(stats.sem(bits_a) ** 2 + stats.sem(bits_b) ** 2) / 2
    expected = {
        "js_bits": {"value": (bits_a.mean() + bits_b.mean()) / 2, "error": js_error},
        "kl_ab": {"value": 0.5, "error": stats.sem(logit_a)},
        "kl_ba": {"value": 1.0, "error": stats.sem(logit_b)},
    }
    found = measure.divergences(logit_a, logit_b, np.arange(3), np.arange(2))
    for name, values in expected.items():
        assert found[name] == pytest.approx(values)
    assert found["kl_limit"] == pytest.approx(np.log(2))
    assert found["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_the_classifier_with_the_lowest_validation_loss_is_kept(monkeypatch):
    """Few states of one distribution: it learns them by heart, and ever less of others."""
    rng = np.random.default_rng(0)
    train = [torch.from_numpy(rng.standard_normal((30, 10))).float() for _ in range(2)]
    validation = [torch.from_numpy(rng.standard_normal((200, 10))).float() for _ in range(2)]
    losses = []
    logistic_loss = measure.logistic_loss

    def record(net, obs_a, obs_b):
        loss = logistic_loss(net, obs_a, obs_b)
        if not torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(measure, "logistic_loss", record)
    net = measure.train_classifier(train, validation, 0)
    assert len(losses) == 5 and losses[-1] > 1.1 * min(losses)
    assert logistic_loss(net, *validation).item() == pytest.approx(min(losses))


def test_terminals_end_episodes_too(tmp_path):
    arrays = make_arrays(300)
    arrays["terminals"][49] = True
    _, ends = measure.load_states(write_dataset(tmp_path / "d.npz", arrays=arrays))
    assert np.flatnonzero(ends).tolist() == [49, 99, 199, 299]


def test_datasets_that_do_not_overlap():
    """JS 1, and a KL above ln of the test states, which no sample can confirm."""
    a, b = np.random.default_rng(0).standard_normal((2, 2000, 3)).astype(np.float32)
    timeouts = every(100, 2000)
    found = measure.state_shift([(a, timeouts), (b + 20, timeouts)], 2000, 0, CPU)
    assert found["js_bits"]["value"] > 0.99
    assert found["accuracy"] == 1.0
    assert found["kl_limit"] == pytest.approx(np.log(400))
    assert max(found["kl_ab"]["value"], found["kl_ba"]["value"]) > np.log(400)


def test_standard_errors_count_episodes():
    """Rows of an episode that are equal carry no more than one row."""
    values = np.random.default_rng(0).standard_normal(30)
    episode = np.repeat(np.arange(5, 35), 100)
    found = measure.clustered(np.repeat(values, 100), episode)
    assert found["value"] == pytest.approx(values.mean())
    assert found["error"] == pytest.approx(stats.sem(values))
    assert np.isnan(measure.clustered(values, np.zeros(30, int))["error"])


def test_episodes_are_not_split():
    timeouts = np.zeros(1050, bool)
    timeouts[[99, 299, 300, 499, 599, 699, 799, 899, 999]] = True  # the tenth episode is cut
    episode, rows = measure.split_episodes(timeouts, 10_000, np.random.default_rng(0))
    assert episode[[99, 100, 300, 301, -1]].tolist() == [0, 1, 2, 3, 9]
    episodes = {use: set(episode[rows[use]].tolist()) for use in rows}
    assert [len(part) for part in episodes.values()] == [6, 2, 2]
    assert set.union(*episodes.values()) == set(range(10))
    assert sum(map(len, rows.values())) == 1050
    for num_episodes in (1, 9):  # ten blocks of rows, so that two are left to test on
        ends = every(180 // num_episodes, 180)
        episode, rows = measure.split_episodes(ends, 10_000, np.random.default_rng(0))
        np.testing.assert_array_equal(episode, np.repeat(np.arange(10), 18))
        assert [len(part) for part in rows.values()] == [108, 36, 36]


def test_a_split_by_rows_would_see_a_shift_that_is_none():
    """Episodes that stand still at random points: a row's neighbours give its dataset away."""
    rng = np.random.default_rng(0)
    points = np.repeat(rng.standard_normal((2, 60, 24)), 50, axis=1)
    a, b = (points + 0.01 * rng.standard_normal((2, 3000, 24))).astype(np.float32)
    found = {}
    for length in (1, 50):
        timeouts = every(length, 3000)
        shift = measure.state_shift([(a, timeouts), (b, timeouts)], 3000, 0, CPU)
        found[length] = shift["js_bits"]["value"]
    assert found[50] < 0.1 < 0.8 < found[1]


def test_shift_of_unequal_sizes_and_with_a_constant_column():
    """Ten times as many states of A count no more; a column without spread is not divided by 0."""
    rng = np.random.default_rng(0)
    data = []
    for mean, n in ((1.0, 20_000), (0.0, 2000)):
        columns = [rng.normal(mean, 1, n), np.full(n, 7.0), rng.standard_normal((n, 3))]
        data.append((np.column_stack(columns).astype(np.float32), every(20, n)))
    found = measure.state_shift(data, 20_000, 0, CPU)
    assert found["kl_ab"]["value"] == pytest.approx(0.5, abs=0.15)
    assert found["kl_ba"]["value"] == pytest.approx(0.5, abs=0.15)


def test_shift_is_of_a_sample_and_repeatable():
    a, b = np.random.default_rng(0).standard_normal((2, 3000, 3)).astype(np.float32)
    data = [(a, every(100, 3000)), (b[:950], every(95, 950))]
    first = measure.state_shift(data, 1000, 3, CPU)
    assert first["train_states"] == [600, 570]
    assert first["test_states"] == [200, 190]
    again = measure.state_shift(data, 1000, 3, CPU)
    assert measure.null_for_nan(first) == measure.null_for_nan(again)
    other = measure.state_shift(data, 1000, 4, CPU)
    assert first["js_bits"] != other["js_bits"]


# ---- the whole script
@pytest.mark.parametrize("encoding, log_std", [("number", None), ("onehot", [-5.0, 0.0])])
def test_a_student(run_main, tmp_path, encoding, log_std):
    """Everything again from its episodes, by plain matrix products and scipy."""
    path = write_student(tmp_path / "my.pt", encoding=encoding, log_std=log_std)
    options = ["--student", path, "--episodes", 1, "--run-dir", "run"]
    text = run_main(measure, *options)
    report = report_of(tmp_path / "run")
    assert report["student"]["checkpoint"] == "my.pt"
    assert report["student"]["step"] == 1
    assert report["states"] == {"walker-stand": 1000, "walker-walk": 1000}
    assert report["num_states"] == 2000
    for name in ("activations.png", "activations_sorted.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert len(image.getcolors(10**6)) > 10

    actor = measure.load_actor(torch.load(path, weights_only=True))
    w1, b1, w2, b2, _, _ = [array.numpy() for array in actor.state_dict().values()]

    def plain_layers(states, code):
        code = np.tile(code, (len(states), 1)).astype(np.float32)
        first = np.maximum(np.hstack([states, code]) @ w1.T + b1, 0)
        return [first, np.maximum(first @ w2.T + b2, 0)]

    codes = np.eye(2) if encoding == "onehot" else np.array([[0], [1]])
    visited = []
    for i, task in enumerate(TASKS):
        (episode,) = measure.run_episodes(actor, task, [2**31], 1, code=codes[i])
        total = episode["rewards"].sum()
        assert report["returns"][task]["values"] == [pytest.approx(total)]
        assert f"{task}: return {total:.1f} +- 0.0" in text
        visited.append(episode["observations"])
        means = [layer.mean(axis=0) for layer in plain_layers(visited[i], codes[i])]
        np.testing.assert_allclose(report["mean_activations"][task], means, rtol=1e-4, atol=1e-6)
    layers = plain_layers(np.concatenate(visited), codes[0])
    other_layers = plain_layers(np.concatenate(visited), codes[1])
    for layer, row in enumerate(report["shared_computation"]):
        taus = []
        for pair in zip(layers[layer], other_layers[layer], strict=True):
            taus.append(stats.kendalltau(*pair).statistic)
        found = row["per_state"]["tau_b"]
        assert found["mean"] == pytest.approx(np.nanmean(taus), abs=1e-4)
        assert found["std"] == pytest.approx(np.nanstd(taus), abs=1e-3)
        assert found["undefined"] == np.isnan(taus).sum()
        means = [report["mean_activations"][task][layer] for task in TASKS]
        assert row["average"]["tau_a"] == pytest.approx(plain_tau_a(*means))
        assert row["average"]["tau_b"] == pytest.approx(stats.kendalltau(*means).statistic)
        assert row["cka"] == pytest.approx(cka(layers[layer], other_layers[layer]), abs=1e-3)


def test_cross_task_table_and_shift(run_main, tmp_path):
    """The same with two worker processes as in this one, and as from the functions."""
    teachers = [
        write_teacher(tmp_path / "t0.pt", seed=3),
        write_teacher(tmp_path / "t1.pt", "walker-walk", kind="behavior", log_std=[-5.0, 0.0]),
    ]
    arrays = [make_arrays(400), make_arrays(300, seed=1)]
    data = [write_dataset(tmp_path / f"{i}.npz", TASKS[i], arrays[i]) for i in range(2)]
    options = ["--teachers", *teachers, "--cross-episodes", 1, "--device", "cpu"]
    text = run_main(measure, *options, "--run-dir", "run", "--shift", *data)
    report = report_of(tmp_path / "run")
    for row, path, task in zip(report["cross_task"], teachers, TASKS, strict=True):
        assert row["checkpoint"] == path.name
        assert row["task"] == task
        actor = measure.load_actor(torch.load(path, weights_only=True))
        for other_task in TASKS:
            (episode,) = measure.run_episodes(actor, other_task, [2**31], 1)
            returns = row["returns"][other_task]["values"]
            assert returns == [pytest.approx(episode["rewards"].sum())]
    assert "t1.pt (walker-walk): walker-stand" in text
    pairs = [(part["observations"], part["timeouts"]) for part in arrays]
    shift = measure.state_shift(pairs, 100_000, 1, CPU)
    assert report["shift"] == {"a": "0.npz", "b": "1.npz"} | shift

    environment = os.environ | {"MUJOCO_GL": "osmesa"}  # may be missing: nothing is rendered
    options += ["--run-dir", "again", "--threads", 2]
    done = script("mop_measure", *options, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert report_of(tmp_path / "again")["cross_task"] == report["cross_task"]


def test_tau_of_a_sample(run_main, tmp_path):
    """Another draw per seed, with a mean near that of all states; the rest does not change."""
    path = write_student(tmp_path / "s.pt")
    reports = []
    for size, seed in ((2000, 1), (500, 1), (500, 2)):
        name = str(len(reports))
        options = ["--episodes", 1, "--num-states", size, "--seed", seed]
        run_main(measure, "--student", path, *options, "--run-dir", name)
        reports.append(report_of(tmp_path / name)["shared_computation"])
    full, sample, other = reports
    for layer in range(2):
        expected = full[layer]["per_state"]["tau_a"]
        for rows in (sample, other):
            found = rows[layer]["per_state"]["tau_a"]["mean"]
            assert found == pytest.approx(expected["mean"], abs=5 * expected["std"] / 500**0.5)
            assert rows[layer]["average"] == full[layer]["average"]
        assert sample[layer]["per_state"] != other[layer]["per_state"]


def test_statistics_of_returns():
    """The std is that of the episodes, not of their mean. Deviations: -4, -2, 6."""
    episodes = [{"rewards": np.array(rewards)} for rewards in ([1.0, 2.0], [5.0], [0.0, 13.0])]
    found = measure.return_statistics(episodes)
    assert found["values"] == [3.0, 5.0, 13.0] and found["episodes"] == 3
    assert found["mean"] == pytest.approx(7.0)
    assert found["std"] == pytest.approx((56 / 3) ** 0.5)
    assert measure.text_of(found) == "7.0 +- 4.3"


def test_nan_becomes_null():
    value = {"a": [float("nan"), 1.5], "b": {"c": np.float64("nan"), "d": 1}}
    assert measure.null_for_nan(value) == {"a": [None, 1.5], "b": {"c": None, "d": 1}}


def test_a_naive_policy_of_one_task(run_main, tmp_path):
    path = write_student(tmp_path / "s.pt", TASKS[:1], kind="naive")
    run_main(measure, "--student", path, "--episodes", 1, "--run-dir", "run")
    report = report_of(tmp_path / "run")
    assert report["student"]["kind"] == "naive"
    assert report["shared_computation"] == []


# ---- bad input
def test_bad_input_is_refused(run_main, tmp_path):
    student = write_student(tmp_path / "s.pt")
    wide = write_student(tmp_path / "w.pt", encoding="onehot")
    changed = torch.load(wide, weights_only=True)
    changed["sizes"]["task_encoding"] = "number"
    torch.save(changed, wide)
    teacher = write_teacher(tmp_path / "t.pt")
    cheetah = write_teacher(tmp_path / "c.pt", "cheetah-run", obs_dim=17)
    data = write_dataset(tmp_path / "d.npz", arrays=make_arrays())
    other = write_dataset(tmp_path / "o.npz", arrays=make_arrays(obs_dim=17))
    small = write_dataset(tmp_path / "small.npz", arrays=make_arrays(50))
    old = write_dataset(tmp_path / "old.npz", arrays=make_arrays(), schema_version=0)
    arrays = make_arrays()
    arrays["observations"][3, 4] = np.nan
    nan = write_dataset(tmp_path / "nan.npz", arrays=arrays)
    arrays = make_arrays()
    arrays["observations"] = arrays["observations"][:, 0]
    flat = write_dataset(tmp_path / "flat.npz", arrays=arrays)
    used = write_dataset(tmp_path / "used/x.npz", arrays=make_arrays()).parent
    cases = {
        (): ["nothing to measure"],
        ("--student", "none.pt"): ["none.pt: expected a student or naive", "No such file"],
        ("--student", teacher): ["t.pt: expected a student or naive, found a teacher"],
        ("--student", wide): ["w.pt: walker-stand has (inputs, actions) (25, 6), not (26, 6)"],
        ("--teachers", student): ["s.pt: expected a teacher or behavior, found a student"],
        ("--teachers", cheetah): ["c.pt: walker-stand has (inputs, actions) (24, 6), not (17, 6)"],
        ("--teachers", teacher, "--tasks", "walker-fly"): ["task walker-fly"],
        ("--shift", data, other): ["--shift: expected states of one size, found [24, 17]"],
        ("--shift", data, small): ["small.npz: expected 100 or more rows"],
        ("--shift", data, "none.npz"): ["none.npz: expected a dataset", "No such file"],
        ("--shift", data, nan): ["nan.npz: observations: found NaN"],
        ("--shift", data, flat): ["flat.npz: expected", "(200,)"],
        ("--shift", data, old): ["old.npz: expected schema 1, found 0"],
        ("--student", student, "--run-dir", used): ["used: not empty; pass --overwrite"],
    }
    for command, parts in cases.items():
        code, text = run_main(measure, *command)
        assert code == 1 and len(text.strip().splitlines()) == 1, text
        for part in parts:
            assert part in text
    code, text = run_main(measure, "--shift", data)
    assert code == 2 and "--shift" in text
    assert not (tmp_path / "runs").exists()
