"""Data sharing and the Q-switch: relabelled rewards, worlds where the answer is known, resuming."""

import functools
import os

import numpy as np
import pytest
import torch
from dm_control import suite

import mop_ds as ds
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
from conftest import ROOT, make_arrays, own_rewards, write_dataset, write_teacher
from test_loops import World

TASKS = ["walker-stand", "walker-walk"]
BUNDLED = [ROOT / f"pretrained/{task}-medium.npz" for task in TASKS]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def finish(run_main, module, *args) -> str:
    """What a run prints that comes to its end."""
    printed = run_main(module, *args)
    assert isinstance(printed, str), printed
    return printed


def assert_same_weights(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------------------- relabelling
@pytest.mark.parametrize("task", ["walker-stand", "walker-walk", "walker-run"])
@pytest.mark.parametrize("path", BUNDLED)
def test_relabelled_rewards_are_those_of_dm_control(task, path):
    with np.load(path) as data:
        arrays = {"physics": data["physics"][::97], "actions": data["actions"][::97]}
    expected = own_rewards(arrays, task)["rewards"]
    found = ds.compute_rewards(task, **arrays)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.std() > 0.01


@pytest.mark.parametrize("domain, name", [("cheetah", "run"), ("cartpole", "balance")])
def test_relabelled_rewards_are_those_of_an_episode(domain, name):
    """Of other domains, too; cartpole-balance rewards small actions, so R(s, a, s') reads a."""
    env = suite.load(domain, name, task_kwargs={"random": 1})
    env.reset()
    low = env.action_spec().minimum
    actions = np.random.default_rng(0).uniform(low, -low, (60, len(low)))
    rewards = []
    states = []
    for action in actions:
        rewards.append(env.step(action).reward)
        states.append(env.physics.get_state())
    found = ds.compute_rewards(f"{domain}-{name}", np.array(states), actions)
    np.testing.assert_allclose(found, rewards, atol=1e-6)
    assert found.std() > 1e-3
    without_actions = ds.compute_rewards(f"{domain}-{name}", np.array(states), 0 * actions)
    depends_on_action = np.abs(without_actions - rewards).max() > 1e-3
    assert depends_on_action == (domain == "cartpole")


@pytest.fixture
def relabelled_tasks(monkeypatch) -> list:
    """The task of every call of compute_rewards."""
    tasks = []
    compute_rewards = ds.compute_rewards

    def record(task, physics, actions):
        tasks.append(task)
        return compute_rewards(task, physics, actions)

    monkeypatch.setattr(ds, "compute_rewards", record)
    return tasks


def test_relabelling_happens_once_per_content(tmp_path, relabelled_tasks):
    path = tmp_path / "d.npz"
    arrays = make_arrays(50)
    first = ds.relabel(path, arrays, "walker-walk")
    np.testing.assert_array_equal(first, own_rewards(arrays, "walker-walk")["rewards"])
    np.testing.assert_array_equal(first, ds.relabel(path, arrays, "walker-walk"))
    assert relabelled_tasks == ["walker-walk"]
    ds.relabel(path, arrays, "walker-run")
    other_states = arrays | {"physics": arrays["physics"] + 1e-9}
    ds.relabel(path, other_states, "walker-walk")
    other_actions = arrays | {"actions": arrays["actions"] / 2}
    ds.relabel(path, other_actions, "walker-walk")
    assert relabelled_tasks == ["walker-walk", "walker-run", "walker-walk", "walker-walk"]
    assert len(list(tmp_path.iterdir())) == 4


def test_damaged_files_of_relabelled_rewards_are_made_anew(tmp_path, relabelled_tasks):
    path = tmp_path / "d.npz"
    arrays = make_arrays(50)
    first = ds.relabel(path, arrays, "walker-walk")
    (cache,) = tmp_path.iterdir()
    whole = cache.read_bytes()
    not_a_number = np.where(np.arange(50) == 7, np.nan, first).astype(np.float32)
    for damaged in (not_a_number, first[:-1], first.astype(np.float64)):
        np.save(cache, damaged)
        np.testing.assert_array_equal(first, ds.relabel(path, arrays, "walker-walk"))
    for damaged in (b"", whole[:-9], b"text"):
        cache.write_bytes(damaged)
        np.testing.assert_array_equal(first, ds.relabel(path, arrays, "walker-walk"))
    assert len(relabelled_tasks) == 7
    assert cache.read_bytes() == whole


def test_relabelled_rewards_without_room_for_their_file(tmp_path, monkeypatch):
    """They are used all the same, and no part of a file takes the file's place."""

    def save(path, rewards):
        path.write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr(ds.np, "save", save)
    arrays = make_arrays(50)
    found = ds.relabel(tmp_path / "d.npz", arrays, "walker-walk")
    np.testing.assert_array_equal(found, own_rewards(arrays, "walker-walk")["rewards"])
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(f".{os.getpid()}-d.walker-walk-")  # no other run writes this one


# -------------------------------------------------------------------- a line with two targets
class LineWorld(World):
    """s' = s + 0.25 a on [-1, 1], 20 steps from near 0; the reward grows towards one end."""

    def __init__(self, name):
        super().__init__(name)
        self.state = np.zeros(1)

    def reset(self):
        self.state = self.random.uniform(-0.1, 0.1, 1)
        self.time = 0
        return self.time_step()

    def step(self, action):
        self.state = np.clip(self.state + 0.25 * np.asarray(action, np.float64), -1, 1)
        self.time += 1
        return self.time_step()

    def get_reward(self, physics):
        return line_reward(self.name, physics.state)[0]

    def observation_spec(self):
        spec = super().observation_spec()["observations"]
        spec.shape = (1,)
        return {"observations": spec}

    def action_spec(self):
        spec = super().action_spec()
        spec.shape = (1,)
        return spec


def line_reward(task, s):
    sign = {"line-right": 1, "line-left": -1}[task]
    return (1 + sign * s) / 2


BEST = sum((1 + min(0.25 * t, 1)) / 2 for t in range(1, 21))  # straight to the target, from 0
OTHER = {"line-right": "line-left", "line-left": "line-right"}
LINE = ["--tasks", *OTHER, "--gamma", 0.9, "--tau", 0.05, "--actor-tau", 0.05, "--num-ood", 1]
LINE += ["--policy-noise", 0.05, "--beta-ood-decay", 0.99, "--num-critics", 3]
LINE += ["--teacher-steps", 400, "--teacher-hidden", 32]
LINE += ["--teacher-batch-size", 128, "--teacher-learning-rate", 3e-3]
LINE += ["--gradient-steps", 400, "--hidden", 32, "--batch-size", 128, "--learning-rate", 3e-3]
LINE += ["--eval-every", 200, "--eval-episodes", 2, "--final-eval-episodes", 4, "--device", "cpu"]


@pytest.fixture
def line(tmp_path, monkeypatch, run_main):
    """run_main where each task's own data goes the wrong way only, the other's the right one."""
    rng = np.random.default_rng(0)
    for module in (ds, oqs):
        monkeypatch.setattr(module, "make_env", functools.cache(LineWorld))
    for task, sign in (("line-right", -1), ("line-left", 1)):
        arrays = make_arrays(2000, 1, 1, 1)
        s = rng.uniform(-1, 1, (2000, 1))
        action = sign * rng.uniform(0.2, 1, (2000, 1))
        next_s = np.clip(s + 0.25 * action, -1, 1)
        arrays["observations"] = s.astype(np.float32)
        arrays["actions"] = action.astype(np.float32)
        arrays["next_observations"] = next_s.astype(np.float32)
        arrays["physics"] = next_s
        arrays["rewards"] = line_reward(task, next_s)[:, 0].astype(np.float32)
        write_dataset(tmp_path / f"data/{task}-medium.npz", task, arrays)
    return run_main


def test_data_sharing_finds_what_the_own_data_lacks(line, tmp_path):
    finish(line, ds, *LINE, "--run-dir", "run")
    student = load(tmp_path / "run/student.pt")
    teacher_paths = []
    for i, task in enumerate(OTHER):
        teacher_paths.append(tmp_path / f"checkpoints/{task}-medium-ds-teacher.pt")
        teacher = load(teacher_paths[i])
        assert teacher["kind"] == "teacher" and teacher["level"] == "medium"
        assert teacher["data_tasks"] == ["line-right", "line-left"]
        assert len(teacher["returns"][task]) == 4
        assert np.mean(teacher["returns"][task]) > 0.9 * BEST
        assert np.mean(student["returns"][task]) > 0.9 * BEST
    # the student again, from these teachers
    finish(line, ds, *LINE, "--teachers", *teacher_paths, "--run-dir", "again")
    again = load(tmp_path / "again/student.pt")
    assert_same_weights(again["actor"], student["actor"])
    assert again["returns"] == student["returns"]


def test_q_switch_prefers_the_teacher_from_the_other_tasks_data(line, tmp_path):
    """Teachers of one seed: with their own some values are off, and a wrong one wins at an end."""
    train = ["--teachers", "train", "train", "--bc-coef", 1, "--common-seed"]
    printed = finish(line, oqs, *LINE, *train, "--run-dir", "run")
    student = load(tmp_path / "run/student.pt")
    returns = {}
    for task in OTHER:
        for source in OTHER:
            path = tmp_path / f"checkpoints/{task}-from-{source}-medium-teacher.pt"
            assert f"wrote {path}" in printed
            teacher = load(path)
            assert teacher["data_tasks"] == [source]
            returns[task, source] = np.mean(teacher["returns"][task])
        assert returns[task, task] < 0.6 * BEST  # MOP's teacher: its data only goes the wrong way
        assert returns[task, OTHER[task]] > 0.9 * BEST
        assert np.mean(student["returns"][task]) > 0.9 * BEST
        for source in OTHER:
            shares = student["switch"][task][source]
            assert shares[f"from {OTHER[task]}"] > 0.9
            assert sum(shares.values()) == pytest.approx(1)
    rows = (tmp_path / "run/returns.csv").read_text()
    assert "\n200,line-right from line-left,1," in rows
    assert "\n400,line-left,3," in rows


def test_q_switch_equals_a_plain_loop():
    torch.manual_seed(0)
    teachers = []
    for _ in range(3):
        actor = oqs.Actor(5, 2, 8).requires_grad_(False)
        critics = oqs.Critics(3, 5, 2, 8).requires_grad_(False)
        critics.w3 *= 10  # values that differ more between states than between teachers
        teachers.append((actor, critics))
    obs = 5 * torch.randn(50, 5)
    actions, winners = oqs.q_switch(teachers, obs, rows=7)
    for row, s in enumerate(obs):
        values = []
        for actor, critics in teachers:
            values.append(min(critics(s[None], actor(s[None]))[:, 0].tolist()))
        best = int(np.argmax(values))
        assert winners[row] == best
        torch.testing.assert_close(actions[row], teachers[best][0](s[None])[0])
    assert len(winners.unique()) > 1


# --------------------------------------------------- the grid of the thesis (Figs. 6.1 and 6.6)
MOVES = {"R": (0, 1), "D": (1, 0), "L": (0, -1), "U": (-1, 0)}  # (row, column)
TO_T0 = "RRDR"  # from (0, 0) to T0 = (1, 3); the others lead to T1 = (2, 2)
ALIGNED = "RRDD"
NO_EXPERT = "RRRDDL"
UNALIGNED = "DDRR"
UNALIGNED_LONGER = "DDDRRU"


def cells(path: str) -> dict:
    """The states of a path, each with its action: {(row, column): (down, right)}."""
    row, column = 0, 0
    table = {}
    for move in path:
        down, right = MOVES[move]
        table[row, column] = (down, right)
        row += down
        column += right
    return table


class TableStudent(torch.nn.Module):
    """A free action per cell and task id: no lack of capacity, so only the teachers decide."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(0.1 * torch.randn(2, 4, 4, 2))

    def forward(self, x):
        row, column, task = x.long().T
        return self.table[task, row, column]


def distilled(teachers: list) -> list:
    """Distil a table {state: action} per task with the scripts' loss -> the student's tables."""
    torch.manual_seed(0)
    student = TableStudent()
    optimizer = torch.optim.SGD(student.parameters(), lr=2.0)
    inputs = []
    actions = []
    for i, table in enumerate(teachers):
        states = torch.tensor(list(table), dtype=torch.float32)
        inputs.append(ds.add_code(states, torch.tensor([float(i)])))
        actions.append(torch.tensor(list(table.values()), dtype=torch.float32))
    for _ in range(200):
        optimizer.zero_grad()
        ds.mse_loss(student(torch.cat(inputs)), torch.cat(actions)).mean().backward()
        optimizer.step()
    tables = []
    for table, x in zip(teachers, inputs, strict=True):
        tables.append(dict(zip(table, student(x).tolist(), strict=True)))
    return tables


def shared(tables: list) -> set:
    """States that both tasks visit and where they act the same."""
    states = set()
    for state in tables[0].keys() & tables[1].keys():
        if np.allclose(tables[0][state], tables[1][state], atol=1e-3):
            states.add(state)
    return states


@pytest.mark.parametrize("path, pairs", [(ALIGNED, 3), (NO_EXPERT, 2), (UNALIGNED, 0)])
def test_hypothesis_2_on_the_grid(path, pairs):
    """Distillation shares what the teachers agree in, and no more (Fig. 6.6: 3, 2, 0)."""
    teachers = [cells(TO_T0), cells(path)]
    assert len(shared(teachers)) == pairs
    assert shared(distilled(teachers)) == shared(teachers)


def grid_teacher(path: str):
    """An actor and two equal critics of value 0.9^(steps left), next to 0 beside the path."""
    table = cells(path)
    values = {}
    for k, state in enumerate(table):
        values[state] = 0.9 ** (len(table) - k)

    def actor(obs):
        return torch.tensor([table.get(tuple(s), (0, 0)) for s in obs.long().tolist()]).float()

    def critics(obs, action):
        return torch.tensor([values.get(tuple(s), 1e-6) for s in obs.long().tolist()]).repeat(2, 1)

    return actor, critics


@pytest.mark.parametrize("own_path", [NO_EXPERT, UNALIGNED_LONGER])
def test_the_q_switch_can_align_teachers_on_the_grid(own_path):
    """Task 1 has a second teacher, from task 0's data, that goes task 0's way, and less far."""
    visited = list(cells(TO_T0) | cells(own_path) | cells(ALIGNED))
    obs = torch.tensor(visited, dtype=torch.float32)
    actions, winners = oqs.q_switch([grid_teacher(ALIGNED), grid_teacher(own_path)], obs)
    switched = {}
    for state, action in zip(visited, actions.tolist(), strict=True):
        if any(action):
            switched[state] = tuple(action)
    common = set(cells("RRD"))
    for state in common:
        assert winners[visited.index(state)] == 0
    assert len(shared(distilled([cells(TO_T0), cells(own_path)]))) < 3
    assert shared(distilled([cells(TO_T0), switched])) == common


# -------------------------------------------------------------------------- runs on the walker
SIZES = ["--hidden", 16, "--batch-size", 32, "--gradient-steps", 40, "--eval-every", 20]
SIZES += ["--eval-episodes", 1, "--final-eval-episodes", 2, "--device", "cpu"]
TEACHERS = ["--teacher-steps", 40, "--teacher-hidden", 16, "--teacher-batch-size", 32]
TRAIN = {ds: [], oqs: ["--teachers", "train", "train"]}


def write_data(folder):
    for i, task in enumerate(TASKS):
        arrays = own_rewards(make_arrays(seed=i), task)
        write_dataset(folder / f"data/{task}-medium.npz", task, arrays)


@pytest.fixture
def no_episodes(monkeypatch):
    """Evaluation takes most of a tiny run's time, and changes no weight."""

    def run_episodes(policy, task, seeds, workers, **options):
        return [{"rewards": np.full(10, 0.1 * seed)} for seed in range(len(seeds))]

    for module in (ds, oqs, pbrl):
        monkeypatch.setattr(module, "run_episodes", run_episodes)


class Killed(Exception):
    pass


@pytest.mark.parametrize("module, points", [(ds, 6), (oqs, 10)])
def test_killed_and_resumed_ends_with_the_same_files(
    run_main, no_episodes, tmp_path, monkeypatch, module, points
):
    """Killed after every single resume point, of teachers and student, and resumed elsewhere."""
    write_data(tmp_path)
    finish(run_main, module, *SIZES, *TEACHERS, *TRAIN[module], "--run-dir", "run")
    folder = tmp_path / "killed"
    write_data(folder)
    (tmp_path / "elsewhere").mkdir()
    save_resume_point = module.save_resume_point

    def save_and_die(*arguments):
        save_resume_point(*arguments)
        raise Killed

    monkeypatch.setattr(module, "save_resume_point", save_and_die)
    monkeypatch.chdir(folder)
    with pytest.raises(Killed):
        finish(run_main, module, *SIZES, *TEACHERS, *TRAIN[module], "--run-dir", "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(points - 1):
        torch.manual_seed(0)  # the random numbers come from the resume point
        with pytest.raises(Killed):
            run_main(module, "--resume", folder / "run")
    monkeypatch.setattr(module, "save_resume_point", save_resume_point)
    finish(run_main, module, "--resume", folder / "run")
    assert not list((tmp_path / "elsewhere").iterdir())
    paths = [path.relative_to(tmp_path) for path in tmp_path.glob("checkpoints/*.pt")]
    assert len(paths) == points // 2 - 1
    for path in ["run/student.pt", *paths]:
        whole = load(tmp_path / path)
        resumed = load(folder / path)
        assert whole["returns"] == resumed["returns"]
        assert_same_weights(whole["actor"], resumed["actor"])
        assert_same_weights(whole.get("critics", {}), resumed.get("critics", {}))
    for name in ("returns.csv", "losses.csv"):
        assert (folder / "run" / name).read_text() == (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize("common_seed", [[], ["--common-seed"]])
def test_an_own_teacher_of_the_q_switch_is_that_of_mop(
    run_main, no_episodes, tmp_path, common_seed
):
    """The same bits as from mop_pbrl_teacher.py with the same settings."""
    write_data(tmp_path)
    settings = [*SIZES, *common_seed]
    finish(run_main, oqs, *settings, *TEACHERS, *TRAIN[oqs], "--run-dir", "run")
    critics = []
    for task in TASKS:
        finish(run_main, pbrl, "--task", task, *settings, "--run-dir", f"run-{task}")
        mop = load(tmp_path / f"checkpoints/{task}-medium-teacher.pt")
        own = load(tmp_path / f"checkpoints/{task}-from-{task}-medium-teacher.pt")
        assert_same_weights(own["actor"], mop["actor"])
        assert_same_weights(own["critics"], mop["critics"])
        critics.append(own["critics"])
    assert not torch.equal(critics[0]["w1"], critics[1]["w1"])


def test_teachers_of_mop_are_found_and_kept(run_main, no_episodes, tmp_path):
    """By default the ii teachers are MOP's: read, not written. What exists is not replaced."""
    write_data(tmp_path)
    for i, task in enumerate(TASKS):
        write_teacher(tmp_path / f"checkpoints/{task}-medium-teacher.pt", task, seed=i)
    before = (tmp_path / "checkpoints/walker-walk-medium-teacher.pt").read_bytes()
    printed = finish(run_main, oqs, *SIZES, *TEACHERS, "--run-dir", "run")
    assert "walker-walk 0.5 +- 0.5 (from walker-stand 0.5, from walker-walk 100.0)" in printed
    assert (tmp_path / "checkpoints/walker-walk-medium-teacher.pt").read_bytes() == before
    trained = {path.name for path in tmp_path.glob("checkpoints/*-from-*")}
    assert trained == {
        "walker-stand-from-walker-walk-medium-teacher.pt",
        "walker-walk-from-walker-stand-medium-teacher.pt",
    }
    code, text = run_main(oqs, *SIZES, *TEACHERS, "--run-dir", "other")
    assert code == 1
    assert "walker-stand-from-walker-walk-medium-teacher.pt: exists; pass --overwrite" in text
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("module", [ds, oqs])
@pytest.mark.parametrize(
    "options, words",
    [
        (["--tasks"], "--tasks: expected two or more"),
        (["--tasks", "walker-walk"], "--tasks: expected two or more"),
        (["--tasks", "walker-walk", "walker-walk"], "--tasks: expected two or more"),
        (["--tasks", "walker-walk", "cheetah-run"], "--tasks: expected one domain"),
        (["--level", "medium", "expert", "expert"], "--level: expected one"),
        (["--data", "a.npz"], "--data: expected one file per task"),
        (["--num-critics", 1], "--num-critics: expected 2 or more"),
        (["--teachers", "a.pt"], "--teachers: expected"),
        (["--teachers", "a.pt", "train"], "a.pt: expected a teacher"),
        (["--teachers", "gaussian.pt", "train"], "gaussian.pt: expected a deterministic teacher"),
        (["--teachers", "train", "gaussian.pt"], "gaussian.pt: expected (task, obs, actions)"),
    ],
)
def test_bad_input(run_main, tmp_path, module, options, words):
    write_teacher(tmp_path / "gaussian.pt", "walker-stand", log_std=(-5.0, 0.0))
    code, text = run_main(module, *options)
    assert code == 1
    assert words in text
    assert [path.name for path in tmp_path.iterdir()] == ["gaussian.pt"]


@pytest.mark.parametrize("module", [ds, oqs])
def test_physics_states_that_do_not_give_the_rewards(run_main, no_episodes, tmp_path, module):
    """Of the states before the actions, say, or of another model: new rewards would be wrong."""
    arrays = own_rewards(make_arrays(), "walker-stand")
    write_data(tmp_path)
    before = np.roll(arrays["physics"], 1, axis=0)
    other_model = arrays["physics"][:, :1]
    for physics in (before, other_model):
        write_dataset(
            tmp_path / "data/walker-stand-medium.npz", arrays=arrays | {"physics": physics}
        )
        code, text = run_main(module, *SIZES, *TEACHERS, *TRAIN[module])
        assert code == 1
        assert "data/walker-stand-medium.npz: expected physics states" in text
        assert not (tmp_path / "runs").exists()
