"""Data sharing and the Q-switch: relabelled rewards, a world where the answer is known, resuming.

tests/test_loops.py compares the loops of both scripts with plain ones.
"""

import os
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dm_control import suite

import mop_ds as ds
import mop_oqs as oqs
from conftest import (
    ROOT,
    assert_stopped,
    make_arrays,
    own_rewards,
    write_dataset,
    write_teacher,
)
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


@pytest.mark.parametrize("task", ["cheetah-run", "cartpole-balance", "quadruped-run"])
def test_relabelled_rewards_are_those_of_an_episode(task):
    """Of other domains, too; cartpole-balance rewards small actions, so R(s, a, s') reads a."""
    domain, name = task.split("-")
    env = suite.load(domain, name, task_kwargs={"random": 1})
    env.reset()
    low = env.action_spec().minimum
    high = env.action_spec().maximum
    actions = np.random.default_rng(0).uniform(-1, 1, (60, len(low)))
    rewards = []
    states = []
    for action in actions:
        rewards.append(env.step(low + (high - low) * (action + 1) / 2).reward)
        states.append(env.physics.get_state())
    found = ds.compute_rewards(task, np.array(states), actions)
    np.testing.assert_allclose(found, rewards, atol=1e-6)
    assert found.std() > 1e-3
    without_actions = ds.compute_rewards(task, np.array(states), 0 * actions)
    depends_on_action = np.abs(without_actions - rewards).max() > 1e-3
    assert depends_on_action == (task == "cartpole-balance")


def test_tasks_with_a_goal_of_each_episode_are_refused():
    """The target of reacher-easy is no part of the physics state: a reset draws it."""
    states = np.random.default_rng(0).uniform(-1, 1, (300, 4))
    with pytest.raises(SystemExit, match=r"task reacher-easy: .* on what a reset draws"):
        ds.compute_rewards("reacher-easy", states, np.zeros((300, 2)))


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


@pytest.mark.parametrize("damage", ["not finite", "a row less"])
def test_damaged_files_of_relabelled_rewards_are_refused(tmp_path, damage):
    arrays = make_arrays(50)
    rewards = ds.relabel(tmp_path / "d.npz", arrays, "walker-walk")
    (cache_path,) = tmp_path.iterdir()
    if damage == "not finite":
        rewards[7] = np.nan
    else:
        rewards = rewards[:-1]
    np.save(cache_path, rewards)
    with pytest.raises(SystemExit, match=f"{cache_path}: damaged; delete it"):
        ds.relabel(tmp_path / "d.npz", arrays, "walker-walk")


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

    def get_state(self):
        return self.state[:1].copy()

    def observation_spec(self):
        return {"observations": SimpleNamespace(shape=(1,))}

    def action_spec(self):
        return SimpleNamespace(shape=(1,))


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
        monkeypatch.setattr(module, "make_env", cache(LineWorld))
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
    for task in OTHER:
        path = tmp_path / f"run/{task}-medium-ds-teacher.pt"
        teacher = load(path)
        assert teacher["data_tasks"] == ["line-right", "line-left"]
        assert np.mean(teacher["returns"][task]) > 0.9 * BEST
        assert np.mean(student["returns"][task]) > 0.9 * BEST
        teacher_paths.append(path)
    # the student again, from these teachers
    finish(line, ds, *LINE, "--teachers", *teacher_paths, "--run-dir", "again")
    again = load(tmp_path / "again/student.pt")
    assert_same_weights(again["actor"], student["actor"])
    assert again["returns"] == student["returns"]
    assert not list(tmp_path.glob("again/*-teacher.pt"))


def test_q_switch_prefers_the_teacher_from_the_other_tasks_data(line, tmp_path):
    own_paths = []
    for i, task in enumerate(OTHER):  # untrained, they value everything near 0
        own_paths.append(write_teacher(tmp_path / f"{i}.pt", task, obs_dim=1, action_dim=1))
    printed = finish(line, oqs, *LINE, "--teachers", *own_paths, "--run-dir", "run")
    student = load(tmp_path / "run/student.pt")
    for task, source in OTHER.items():
        path = tmp_path / f"run/{task}-from-{source}-medium-teacher.pt"
        teacher = load(path)
        assert teacher["data_tasks"] == [source]
        assert np.mean(teacher["returns"][task]) > 0.9 * BEST
        assert np.mean(student["returns"][task]) > 0.9 * BEST
        assert f"{task} from {source}: {path.relative_to(tmp_path)}, return" in printed
        for states in OTHER:
            shares = student["switch"][task][states]
            assert shares[f"from {source}"] > 0.9
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


# -------------------------------------------------------------------------- runs on the walker
SIZES = ["--hidden", 16, "--batch-size", 32, "--gradient-steps", 40, "--eval-every", 20]
SIZES += ["--eval-episodes", 1, "--final-eval-episodes", 2, "--device", "cpu"]
SIZES += ["--teacher-steps", 40, "--teacher-hidden", 16, "--teacher-batch-size", 32]


def write_data(folder):
    """Data and MOP's teacher of every task, where the scripts look for them."""
    for i, task in enumerate(TASKS):
        arrays = own_rewards(make_arrays(seed=i), task)
        write_dataset(folder / f"data/{task}-medium.npz", task, arrays)
        write_teacher(folder / f"checkpoints/{task}-medium-teacher.pt", task, seed=i)


class Killed(Exception):
    pass


@pytest.mark.parametrize("module", [ds, oqs])
def test_killed_and_resumed_ends_with_the_same_files(
    run_main, no_episodes, tmp_path, monkeypatch, module
):
    """Killed after every one of six resume points, of two teachers and the student, and resumed
    from another folder."""
    write_data(tmp_path)
    finish(run_main, module, *SIZES, "--run-dir", "run")
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
        run_main(module, *SIZES, "--run-dir", "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(5):
        torch.manual_seed(0)  # the random numbers come from the resume point
        with pytest.raises(Killed):
            run_main(module, "--resume", folder / "run")
    monkeypatch.setattr(module, "save_resume_point", save_resume_point)
    finish(run_main, module, "--resume", folder / "run")
    assert not list((tmp_path / "elsewhere").iterdir())
    names = [path.name for path in tmp_path.glob("run/*-teacher.pt")]
    assert len(names) == 2
    for name in ["student.pt", *names]:
        whole = load(tmp_path / "run" / name)
        resumed = load(folder / "run" / name)
        assert whole["returns"] == resumed["returns"]
        assert_same_weights(whole["actor"], resumed["actor"])
        assert_same_weights(whole.get("critics", {}), resumed.get("critics", {}))
    for name in ("returns.csv", "losses.csv"):
        assert (folder / "run" / name).read_text() == (tmp_path / "run" / name).read_text()


def test_teachers_of_mop_are_found_and_kept(run_main, no_episodes, tmp_path):
    """The Q-switch's own teachers are MOP's, read and not written."""
    write_data(tmp_path)
    before = (tmp_path / "checkpoints/walker-walk-medium-teacher.pt").read_bytes()
    printed = finish(run_main, oqs, *SIZES, "--run-dir", "run")
    assert "walker-walk 0.5 +- 0.5 (from walker-stand 0.5, from walker-walk 100.0)" in printed
    assert (tmp_path / "checkpoints/walker-walk-medium-teacher.pt").read_bytes() == before
    assert len(list(tmp_path.glob("checkpoints/*"))) == 2
    assert {path.name for path in tmp_path.glob("run/*-teacher.pt")} == {
        "walker-stand-from-walker-walk-medium-teacher.pt",
        "walker-walk-from-walker-stand-medium-teacher.pt",
    }


FLAGS = [
    (["--tasks"], "--tasks: expected two or more"),
    (["--tasks", "walker-walk"], "--tasks: expected two or more"),
    (["--tasks", "walker-walk", "walker-walk"], "--tasks: expected two or more"),
    (["--tasks", "walker-walk", "cheetah-run"], "--tasks: expected one domain"),
    (["--level", "medium", "expert", "expert"], "--level: expected one"),
    (["--data", "a.npz"], "--data: expected one file per task"),
    (["--num-critics", 1], "--num-critics: expected 2 or more"),
    (["--teachers", "a.pt"], "--teachers: expected"),
    (["--teachers", "a.pt", "b.pt", "c.pt"], "--teachers: expected"),
    (["--teachers", "a.pt", "b.pt"], "a.pt: expected a teacher"),
]


@pytest.mark.parametrize("module", [ds, oqs])
@pytest.mark.parametrize(("options", "message"), FLAGS)
def test_flags(run_main, tmp_path, module, options, message):
    assert_stopped(run_main(module, *options), message)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("module", [ds, oqs])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_tasks": ["walker-run"]}, "a.pt: learned from the data of ['walker-run']"),
        ({"log_std": (-5.0, 0.0)}, "a.pt: found a Gaussian teacher"),
    ],
)
def test_teachers_that_do_not_fit(run_main, tmp_path, module, changes, message):
    write_data(tmp_path)
    write_teacher(tmp_path / "a.pt", **changes)
    write_teacher(tmp_path / "b.pt", task="walker-walk")
    outcome = run_main(module, *SIZES, "--teachers", "a.pt", "b.pt")
    assert_stopped(outcome, message)


@pytest.mark.parametrize("module", [ds, oqs])
def test_fewer_teacher_steps_than_made(run_main, no_episodes, tmp_path, module):
    """Else a teacher's file would be missing when all others have been trained."""
    write_data(tmp_path)
    longer = [*SIZES, "--teacher-steps", 60, "--eval-every", 40, "--run-dir", "run"]
    save_resume_point = module.save_resume_point

    def save_and_die(*arguments):
        save_resume_point(*arguments)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_resume_point", save_and_die)
        with pytest.raises(Killed):
            run_main(module, *longer)
    outcome = run_main(module, "--resume", "run", "--teacher-steps", 20)
    code, text = outcome
    assert code == 1
    assert "has made 40" in text


@pytest.mark.parametrize("module", [ds, oqs])
@pytest.mark.parametrize("states", ["before the actions", "of another model"])
def test_physics_states_that_do_not_give_the_rewards(run_main, tmp_path, module, states):
    """The rewards under another task would be wrong."""
    write_data(tmp_path)
    arrays = own_rewards(make_arrays(), "walker-stand")
    if states == "before the actions":
        arrays["physics"] = np.roll(arrays["physics"], 1, axis=0)
    else:
        arrays["physics"] = arrays["physics"][:, :1]
    write_dataset(tmp_path / "data/walker-stand-medium.npz", arrays=arrays)
    outcome = run_main(module, *SIZES)
    assert_stopped(outcome, "data/walker-stand-medium.npz: expected physics states")
