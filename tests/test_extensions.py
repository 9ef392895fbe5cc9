"""Data sharing and the offline Q-switch: relabelled rewards, worlds where the right answer is known, resuming."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from dm_control import suite

import mop_ds as ds
import mop_oqs as oqs
from conftest import ROOT, make_arrays, own_rewards, write_dataset, write_teacher
from test_loops import World

BUNDLED = {task: ROOT / f"pretrained/{task}-medium.npz" for task in ("walker-stand", "walker-walk")}


# ---------------------------------------------------------------------------------------------------------- relabelling
@pytest.mark.parametrize("task", ["walker-stand", "walker-walk", "walker-run"])
def test_relabelled_rewards_are_those_of_dm_control(task):
    """On real data of both tasks, through dm_control's own task.get_reward."""
    env = suite.load(*task.split("-"))
    env.reset()
    for path in BUNDLED.values():
        with np.load(path) as data:
            physics, actions = data["physics"][::37], data["actions"][::37]
        expected = []
        for state in physics:
            with env.physics.reset_context():
                env.physics.set_state(state)
            expected.append(env.task.get_reward(env.physics))
        found = ds.compute_rewards(task, physics, actions)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found.std() > 0.01


def test_rewards_of_another_domain():
    """cheetah-run: equal to the rewards of a real rollout."""
    env, rng = suite.load("cheetah", "run", task_kwargs={"random": 1}), np.random.default_rng(0)
    env.reset()
    rewards, states, actions = [], [], rng.uniform(-1, 1, (60, 6))
    for action in actions:
        rewards.append(env.step(action).reward)
        states.append(env.physics.get_state())
    found = ds.compute_rewards("cheetah-run", np.array(states), actions)
    np.testing.assert_allclose(found, rewards, atol=1e-6)
    assert max(rewards) > 0.02


def test_rewards_that_depend_on_the_action():
    """cartpole-balance rewards small controls: the stored action is part of R(s, a, s')."""
    env, rng = suite.load("cartpole", "balance", task_kwargs={"random": 1}), np.random.default_rng(0)
    env.reset()
    rewards, states, actions = [], [], rng.uniform(-1, 1, (60, 1))
    for action in actions:
        rewards.append(env.step(action).reward)
        states.append(env.physics.get_state())
    found = ds.compute_rewards("cartpole-balance", np.array(states), actions)
    np.testing.assert_allclose(found, rewards, atol=1e-6)
    assert np.abs(ds.compute_rewards("cartpole-balance", np.array(states), 0 * actions) - rewards).max() > 1e-3


def test_relabelling_happens_once_per_content(tmp_path, monkeypatch):
    arrays, calls = make_arrays(50), []
    path = write_dataset(tmp_path / "d.npz", arrays=arrays)
    compute = ds.compute_rewards
    monkeypatch.setattr(ds, "compute_rewards", lambda *a: (calls.append(a[0]), compute(*a))[1])
    written, write = [], ds.write_atomic
    monkeypatch.setattr(ds, "write_atomic", lambda path, f: (written.append(path), write(path, f)))
    first = ds.relabel(path, arrays, "walker-walk")
    (cache,) = tmp_path.glob("*.npy")
    assert cache.name.startswith("d.walker-walk-") and str(os.getpid()) in written[0].name  # no other run's file
    again = ds.relabel(path, arrays, "walker-walk")
    assert np.array_equal(first, again) and calls == ["walker-walk"]
    ds.relabel(path, arrays, "walker-run")  # another task
    changed = {**arrays, "physics": arrays["physics"] + 1e-9}
    ds.relabel(path, changed, "walker-walk")  # other content under the same name
    assert calls == ["walker-walk", "walker-run", "walker-walk"] and len(list(tmp_path.glob("*.npy"))) == 3
    for broken in (b"", cache.read_bytes()[:-9], b"text"):
        cache.write_bytes(broken)
        assert np.array_equal(ds.relabel(path, arrays, "walker-walk"), first)
    assert len(calls) == 6 and np.array_equal(np.load(cache), first)


# ------------------------------------------------------------------------------------------- a line with two targets
class LineWorld(World):
    """s' = s + 0.25 a on [-1, 1], 20 steps from near 0; line-right earns (1 + s') / 2, line-left (1 - s') / 2."""

    obs_dim, action_dim, _step_limit = 1, 1, 20

    def start(self):
        return self.random.uniform(-0.1, 0.1, 1)

    def move(self, s, action):
        return np.clip(s + 0.25 * action, -1, 1)

    def get_reward(self, physics):
        return line_reward(self.name, physics.state)[0]


def line_reward(task, s):
    return ((1 + s) / 2 if task == "line-right" else (1 - s) / 2).astype(np.float32)


BEST = sum((1 + min(0.25 * t, 1)) / 2 for t in range(1, 21))  # always towards the target, from 0


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Each task's own data only ever goes the wrong way; the other task's data holds the right one."""
    rng = np.random.default_rng(0)
    for module in (ds, oqs):
        monkeypatch.setattr(module, "make_envs", LineWorld.make)
    for task, sign in (("line-right", -1), ("line-left", 1)):
        s = rng.uniform(-1, 1, (2000, 1)).astype(np.float32)
        a = (sign * rng.uniform(0.2, 1, (2000, 1))).astype(np.float32)
        after = np.clip(s + 0.25 * a, -1, 1)
        arrays = {"observations": s, "actions": a, "rewards": line_reward(task, after)[:, 0], "physics": after}
        arrays |= {"next_observations": after, "terminals": np.zeros(2000, bool), "timeouts": np.zeros(2000, bool)}
        write_dataset(tmp_path / f"data/{task}-medium.npz", task, arrays)
    options = ["--tasks", "line-right", "line-left", "--teacher-steps", 600, "--teacher-hidden", 32, "--hidden", 32]
    options += ["--teacher-batch-size", 128, "--teacher-learning-rate", 3e-3, "--gamma", 0.9, "--tau", 0.05]
    options += ["--actor-tau", 0.05, "--policy-noise", 0.05, "--beta-ood-decay", 0.99]
    options += ["--num-ood", 1, "--learning-rate", 3e-3, "--gradient-steps", 600, "--batch-size", 128]
    return [*options, "--eval-every", 300, "--eval-episodes", 2, "--final-eval-episodes", 4, "--threads", 1]


def student_action(module, path, s, task_id):
    actor = module.load_network(module.Actor, torch.load(path, weights_only=True), path)
    return actor(module.add_task(torch.tensor(s, dtype=torch.float32)[:, None], task_id))[:, 0]


INSIDE = np.linspace(-0.7, 0.7, 15)


def test_data_sharing_finds_what_the_own_data_lacks(run_main, line, tmp_path):
    result = run_main(ds, *line)
    for task in ("line-right", "line-left"):
        assert result["returns"][task]["teacher"] > 0.9 * BEST and result["returns"][task]["mean"] > 0.9 * BEST
    right, left = (student_action(ds, tmp_path / result["files"][0], INSIDE, i) for i in range(2))
    assert (right > 0.4).all() and (left < -0.4).all()
    teacher = torch.load(tmp_path / "checkpoints/line-right-medium-ds-teacher.pt", weights_only=True)
    assert teacher["data_tasks"] == ["line-right", "line-left"] and teacher["kind"] == "teacher"
    again = run_main(ds, *line, "--teachers", *result["files"][1:3], "--run-dir", "again")  # teachers passed in
    student = torch.load(tmp_path / "again/student.pt", weights_only=True)["actor"]
    first = torch.load(tmp_path / result["files"][0], weights_only=True)["actor"]
    assert again["returns"] == result["returns"] and all(torch.equal(student[k], first[k]) for k in first)


def test_q_switch_prefers_the_teacher_from_the_other_tasks_data(run_main, line, tmp_path):
    """Teachers of one seed: with streams of their own some values are off, and a wrong teacher wins near the edges."""
    result = run_main(oqs, *line, "--teachers", "train", "train", "--bc-coef", 1, "--common-seed")
    for task, other in (("line-right", "line-left"), ("line-left", "line-right")):
        row = result["returns"][task]
        assert row[f"from {task}"] < 0.6 * BEST  # the MOP teacher: its data only goes the wrong way
        assert row[f"from {other}"] > 0.9 * BEST and row["mean"] > 0.9 * BEST
        for source in ("line-right", "line-left"):
            assert result["switch"][task][source][f"from {other}"] > 0.9
            assert sum(result["switch"][task][source].values()) == pytest.approx(1, abs=1e-3)
    checkpoint = torch.load(tmp_path / result["files"][0], weights_only=True)
    assert checkpoint["switch"] == result["switch"]
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.pt")} == {
        f"line-{i}-from-line-{j}-medium-teacher.pt" for i in ("right", "left") for j in ("right", "left")
    }


def test_q_switch_equals_a_plain_loop():
    torch.manual_seed(0)
    teachers = [(oqs.Actor(5, 2, 8), oqs.Critics(3, 5, 2, 8)) for _ in range(3)]
    obs = 5 * torch.randn(50, 5)
    with torch.no_grad():
        for _, critics in teachers:
            critics.w3 *= 10  # values that differ more between states than between teachers
    target, winner = oqs.q_switch(teachers, obs, rows=7)
    for row, s in enumerate(obs):
        values = [min(critics(s[None], actor(s[None]))[:, 0].tolist()) for actor, critics in teachers]
        assert winner[row] == int(np.argmax(values))
        torch.testing.assert_close(target[row], teachers[winner[row]][0](s[None])[0])
    assert len(winner.unique()) > 1


# --------------------------------------------------------------------------- the grid of the thesis (Figs. 6.1 and 6.6)
MOVES = {"R": (0, 1), "D": (1, 0), "L": (0, -1)}
TO_T0 = "RRDR"  # to (1, 3)
PATHS = {"aligned": "RRDD", "one is not an expert": "RRRDDL", "unaligned": "DDRR"}  # to T1 = (2, 2), from (0, 0)


def cells(path):
    """The states of a path, each with its move: {(row, column): (down, right)}."""
    position, table = (0, 0), {}
    for move in path:
        table[position] = MOVES[move]
        position = position[0] + MOVES[move][0], position[1] + MOVES[move][1]
    return table


class TableStudent(torch.nn.Module):
    """One free action per grid cell and task id: capacity is no limit, so that only the teachers decide."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(0.1 * torch.randn(2, 4, 4, 2))

    def forward(self, x):
        row, column, task = x.long().T
        return self.table[task, row, column]


def distilled(targets):
    """Distil tables {state: action}, one per task, with the scripts' loss; returns {state: action} per task."""
    torch.manual_seed(0)
    student = TableStudent()
    optimizer = torch.optim.SGD(student.parameters(), lr=2.0)
    obs = [torch.tensor(list(table), dtype=torch.float32) for table in targets]
    x = torch.cat([ds.add_task(states, i) for i, states in enumerate(obs)])
    action = torch.cat([torch.tensor(list(table.values()), dtype=torch.float32) for table in targets])
    for _ in range(200):
        optimizer.zero_grad()
        ds.mse_loss(student, x, action).mean().backward()
        optimizer.step()
    actions = [student(ds.add_task(states, i)).detach() for i, states in enumerate(obs)]
    return [dict(zip(table, a, strict=True)) for table, a in zip(targets, actions, strict=True)]


def shared(tables):
    """States that both tasks visit and where they act the same."""
    return {s for s in tables[0].keys() & tables[1].keys() if torch.allclose(*(t[s] for t in tables), atol=1e-3)}


@pytest.mark.parametrize("scenario, pairs", [("aligned", 3), ("one is not an expert", 2), ("unaligned", 0)])
def test_hypothesis_2_on_the_grid(scenario, pairs):
    """Distillation shares the state-action pairs in which the teachers agree, and no other (Fig. 6.6: 3, 2, 0)."""
    teachers = [cells(TO_T0), cells(PATHS[scenario])]
    agree = {s for s in teachers[0].keys() & teachers[1].keys() if teachers[0][s] == teachers[1][s]}
    assert shared(distilled(teachers)) == agree and len(agree) == pairs


@pytest.mark.parametrize("scenario", ["one is not an expert", "unaligned"])
def test_the_q_switch_can_align_teachers_on_the_grid(scenario):
    """Task 1 has a second teacher, from task 0's data, that follows task 0's way and turns to T1 at its last cell.

    Its value gamma^(steps left) beats the detour's; for the unaligned teacher it is the better one by a step less.
    """
    own, other = PATHS[scenario], "RRDD"
    if scenario == "unaligned":
        own = "DDDRRU"  # as optimal a way as there is below, one step up again at the end
        MOVES["U"] = (-1, 0)

    def teacher(path):
        table = cells(path)
        steps_left = {s: len(table) - k for k, s in enumerate(table)}
        actor = lambda obs: torch.tensor([table.get(tuple(s), (0, 0)) for s in obs.long().tolist()]).float()  # noqa: E731
        value = lambda obs: [0.9 ** steps_left.get(tuple(s), 99) for s in obs.long().tolist()]  # noqa: E731
        return actor, lambda obs, action: torch.tensor([value(obs), value(obs)])  # two equal critics

    visited = {**cells(TO_T0), **cells(own), **cells(other)}
    obs = torch.tensor(list(visited), dtype=torch.float32)
    target, winner = oqs.q_switch([teacher(other), teacher(own)], obs)
    task_1 = {s: tuple(a.tolist()) for s, a in zip(visited, target, strict=True)}
    common = list(cells("RRD"))
    assert all(winner[list(visited).index(s)] == 0 for s in common)
    before = shared(distilled([cells(TO_T0), cells(own)]))
    after = shared(distilled([cells(TO_T0), {s: a for s, a in task_1.items() if any(a)}]))
    assert len(before) < 3 and after == set(common)


# ------------------------------------------------------------------------------------------------- runs on the walker
SIZES = ["--teacher-steps", 60, "--teacher-hidden", 16, "--teacher-batch-size", 32, "--gradient-steps", 60]
SIZES += ["--hidden", 16, "--batch-size", 32, "--eval-every", 30, "--eval-episodes", 1, "--final-eval-episodes", 1]
SIZES += ["--threads", 1, "--device", "cpu"]


def write_data(folder):
    for i, task in enumerate(BUNDLED):
        write_dataset(folder / f"data/{task}-medium.npz", task, own_rewards(make_arrays(seed=i), task))


def weights(folder):
    paths = sorted((folder / "checkpoints").glob("*.pt")) + [folder / "run/student.pt"]
    return {f"{path.name} {k}": v for path in paths for k, v in torch.load(path, weights_only=True)["actor"].items()}


@pytest.mark.parametrize("name, phase", [("mop_ds", 2), ("mop_oqs", 2)])
def test_killed_and_resumed_ends_with_the_same_weights(run_main, tmp_path, name, phase, monkeypatch):
    """Killed while a teacher, or the student, learns; --resume finishes with the weights of an uninterrupted run."""
    module = {"mop_ds": ds, "mop_oqs": oqs}[name]
    options = [*SIZES, *(["--teachers", "train", "train"] if name == "mop_oqs" else []), "--run-dir", "run"]
    write_data(tmp_path)
    run_main(module, *options)
    whole = weights(tmp_path)
    folder = tmp_path / "killed"
    write_data(folder)
    command = [str(c) for c in (sys.executable, ROOT / f"{name}.py", *options)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    point = {"phase": 0}
    while point["phase"] < phase and process.poll() is None:
        time.sleep(0.01)
        if (folder / "run/resume.pt").is_file():
            point = torch.load(folder / "run/resume.pt", weights_only=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "run/student.pt").exists(), "the run was over before it was killed"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, "--resume", "run"])
    module.main()
    resumed = weights(folder)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert (folder / "run/returns.csv").read_text() == (tmp_path / "run/returns.csv").read_text()


def test_teachers_of_mop_are_found_and_passed_on(run_main, tmp_path):
    """Default: the ii teachers are MOP's; the switch knows them by their critics; nothing of theirs is written."""
    write_data(tmp_path)
    for i, task in enumerate(BUNDLED):
        write_teacher(tmp_path / f"checkpoints/{task}-medium-teacher.pt", task, seed=i)
    before = (tmp_path / "checkpoints/walker-walk-medium-teacher.pt").read_bytes()
    result = run_main(oqs, *SIZES, "--run-dir", "run")
    assert result["returns"]["walker-walk"]["from walker-walk"] == 100.0
    assert sorted(result["files"][1:3]) == [
        "checkpoints/walker-stand-from-walker-walk-medium-teacher.pt",
        "checkpoints/walker-walk-from-walker-stand-medium-teacher.pt",
    ]
    assert (tmp_path / "checkpoints/walker-walk-medium-teacher.pt").read_bytes() == before
    _, text = run_main(oqs, *SIZES, "--run-dir", "other")
    assert "walker-stand-from-walker-walk-medium-teacher.pt: exists; pass --overwrite" in text


@pytest.mark.parametrize("module", [ds, oqs])
@pytest.mark.parametrize(
    "options, words",
    [
        (["--tasks", "walker-walk"], ["--tasks", "two or more"]),
        (["--tasks", "walker-walk", "cheetah-run"], ["one domain", "cheetah-run"]),
        (["--teachers", "a.pt"], ["--teachers", "found 1"]),
        (["--data", "a.npz"], ["--level, --data"]),
        (["--teacher-steps", "0"], ["--teacher-steps", "above 0"]),
        (["--num-critics", "1"], ["--num-critics"]),
        (["--teachers", "a.pt", "b.pt"], ["a.pt: expected a readable checkpoint"]),
    ],
)
def test_bad_input(run_main, tmp_path, module, options, words):
    code, text = run_main(module, *options)
    assert code not in (0, None) and all(word in text for word in words), text
    assert not list(tmp_path.iterdir())
