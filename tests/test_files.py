"""Files: bad input is one line with the file's or flag's name, and a stopped run loses nothing.

`python -m pytest -m slow tests/test_files.py` damages more files and kills more often.
"""

import csv
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import naive_multitask_pbrl as naive
import numpy as np
import pytest
import torch

import mop_distill as distill
import mop_ds as ds
import mop_measure as measure
import mop_oqs as oqs
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import (
    ROOT,
    SCRIPTS,
    assert_stopped,
    make_arrays,
    own_rewards,
    script,
    write_dataset,
    write_teacher,
)

TINY = ["--device", "cpu", "--hidden", 8, "--batch-size", 4]
TINY += ["--eval-episodes", 1, "--final-eval-episodes", 1]
STUDENT = ["--tasks", "walker-stand", "--data", "d.npz", "--teachers", "t.pt", *TINY]
TEACHER = ["--task", "walker-stand", "--data", "d.npz", "--output", "teacher.pt", *TINY]
TEACHER_RUN = [*TEACHER, "--run-dir", "run", "--gradient-steps", 2]
SHARED = ["--task", "walker-walk", "--sources", "walker-stand", *TEACHER[2:]]
TWO_TASKS = ["--tasks", "walker-stand", "walker-walk", "--data", "d.npz", "w.npz", *TINY]
SWITCH = [*TWO_TASKS, "--teachers", "t.pt", "tw.pt", "wt.pt", "w.pt"]
NAIVE = [*TWO_TASKS, "--output", "teacher.pt"]
RUNS = {pbrl: TEACHER, ds: SHARED, distill: STUDENT, oqs: SWITCH, naive: NAIVE}
EACH_RUN = pytest.mark.parametrize("module", RUNS, ids=lambda module: module.__name__)


def equal(one, other) -> bool:
    """To the bit, of nested dicts and lists of tensors, arrays and numbers."""
    if isinstance(one, dict):
        return list(one) == list(other) and equal(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and np.array_equal(one, other)


def write_inputs():
    """A dataset and a teacher of walker-stand, d.npz and t.pt; of walker-walk w.npz and w.pt.

    wt.pt learned walker-walk from the data of walker-stand, tw.pt the other way round.
    """
    for name, task in (("d", "walker-stand"), ("w", "walker-walk")):
        write_dataset(Path(f"{name}.npz"), task)
    write_teacher(Path("t.pt"))
    write_teacher(Path("w.pt"), "walker-walk")
    write_teacher(Path("tw.pt"), data_tasks=["walker-walk"])
    write_teacher(Path("wt.pt"), "walker-walk", data_tasks=["walker-stand"])


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs()


# ------------------------------------------------------------------------------------ bad input
BUNDLED = sorted(ROOT.glob("pretrained/walker-*-medium-teacher.pt"))
NOISE = ["--policy", BUNDLED[0], "--mix", "noise", "--output", "d.npz"]
FLAGS = [
    (td3, ["--device", "cuda"], "--device cuda: found no CUDA device"),
    (distill, ["--cuda-graph"], "--cuda-graph: expected --device cuda"),
    (td3, ["--seed", "-1"], "--seed: expected 0 or more"),
    (td3, ["--eval-every", 0], "--eval-every, --eval-episodes, --final-eval-episodes: expected 1"),
    (distill, ["--eval-episodes", 0], "--final-eval-episodes: expected 1 or more"),
    (pbrl, ["--final-eval-episodes", 0], "--final-eval-episodes: expected 1 or more"),
    (measure, ["--student", "s.pt", "--seed", "-1"], "--seed: expected 0 or more"),
    (measure, ["--student", "s.pt", "--num-states", 3], "--num-states: expected 4 or more"),
    (td3, ["--task", "walker-fly"], "task walker-fly: not one of"),
    (td3, ["--task", "lqr-lqr_2_1"], "task lqr-lqr_2_1: its episodes have no end"),
    (distill, ["--tasks", "walker-stand", "walker-stand"], "--tasks: expected distinct tasks"),
    (distill, ["--tasks", "walker-stand", "walker-fly"], "walker-fly-medium-teacher.pt: not found"),
    (distill, ["--tasks", "walker-stand", "--regularizer", "ndcg"], "--regularizer: expected two"),
    (distill, ["--level", "medium", "expert", "medium"], "--level: expected one level, or one per"),
    (distill, ["--data", "a.npz"], "--data: expected one file per task"),
    (distill, ["--teachers", "a.pt"], "--teachers: expected one file per task"),
    (distill, ["--teachers", "a.pt", "b.pt"], "a.pt: expected a teacher"),
    (distill, ["--loss", "kl", "--level", "expert"], "expert-teacher-gaussian.pt: not found"),
    (distill, ["--loss", "kl", "--teachers", *BUNDLED], "--loss kl: expected Gaussian teachers"),
    (distill, ["--states", "shared"], "walker-stand-medium-ds-teacher.pt: not found"),
    (oqs, ["--tasks", "walker-walk"], "--tasks: expected two or more distinct tasks"),
    (oqs, ["--tasks", "walker-walk", "walker-walk"], "--tasks: expected two or more distinct"),
    (oqs, ["--level", "medium", "expert", "medium"], "--level: expected one level, or one per"),
    (oqs, ["--data", "a.npz"], "--data: expected one file per task"),
    (oqs, ["--teachers", *BUNDLED], "--teachers: expected 4 files"),
    (oqs, [], "walker-stand-from-walker-walk-medium-teacher.pt: not found"),
    (ds, ["--sources"], "--sources: expected distinct tasks"),
    (ds, ["--sources", "walker-walk", "walker-walk"], "--sources: expected distinct tasks"),
    (ds, ["--data", "a.npz"], "--data: expected one file per source"),
    (ds, ["--num-critics", 1], "--num-critics: expected 2 or more"),
    (ds, ["--bc-temperature", 0], "--bc-temperature: expected more than 0"),
    (naive, ["--tasks", "walker-walk"], "--tasks: expected two or more distinct tasks"),
    (naive, ["--tasks", "walker-walk", "walker-walk"], "--tasks: expected two or more distinct"),
    (naive, ["--level", "medium", "expert", "medium"], "--level: expected one level, or one per"),
    (naive, ["--data", "a.npz"], "--data: expected one file per task"),
    (naive, ["--num-critics", 1], "--num-critics: expected 2 or more"),
    (naive, ["--bc-temperature", 0], "--bc-temperature: expected more than 0"),
    (pbrl, ["--task", "walker-run"], "data/walker-run-medium.npz: not found, nor in pretrained/"),
    (pbrl, ["--num-critics", 1], "--num-critics: expected 2 or more"),
    (pbrl, ["--bc-temperature", 0], "--bc-temperature: expected more than 0"),
    (pbrl, ["--resume", "nowhere"], "nowhere/resume.pt: expected a resume point of mop_pbrl"),
    (td3, ["--total-timesteps", 2_000_500], "--total-timesteps: expected multiples of"),
    (td3, ["--total-timesteps", 20_000], "--medium-step: expected a multiple of 10000 up to 20000"),
    (td3, ["--medium-step", 0], "--medium-step: expected a multiple of 10000 up to 2000000"),
    (td3, ["--mix", "noise"], "--mix, --output: expected --policy"),
    (td3, ["--output", "d.npz"], "--mix, --output: expected --policy"),
    (td3, ["--policy", "none.pt"], "none.pt: expected a behavior or teacher"),
    (td3, [*NOISE, "--num-transitions", 5000], "--mix noise takes a multiple of 10000"),
]


@pytest.mark.parametrize(("module", "options", "message"), FLAGS)
def test_flags(run_main, tmp_path, monkeypatch, module, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_stopped(run_main(module, *options), message)
    assert not list(tmp_path.iterdir())


def load_any_pt(path) -> dict:
    return distill.read_pt(path, "teacher", "resume point of mop_pbrl_teacher.py")


def load_all(path) -> dict:
    return pbrl.load_dataset(path, "walker-stand", "medium", 24, 6)


def load_states(path) -> torch.Tensor:
    return distill.load_observations(path, "walker-stand", "medium", 24)


def refusal(load, path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(SystemExit) as stop:
        load(path)
    assert str(path) in stop.value.code
    assert "\n" not in stop.value.code
    return stop.value.code


DATASETS = [
    ({"rewards": np.zeros(199, np.float32)}, {}, "expected float32 (199, 24), found float32"),
    ({"observations": np.zeros(200, np.float32)}, {}, "observations: expected float32 (200, 24)"),
    ({"actions": np.zeros((200, 6), int)}, {}, "actions: expected float32 (200, 6), found int64"),
    ({"actions": np.full((200, 6), 1.5, np.float32)}, {}, "expected actions in [-1, 1], found 1.5"),
    ({"terminals": np.zeros(200)}, {}, "terminals: expected bool (200,), found float64"),
    ({"rewards": np.array([None] * 200)}, {}, "Object arrays cannot be loaded"),
    ({"rewards": np.zeros((200, 1), np.float32)}, {}, "rewards: expected float32 (200,), found"),
    ({"timeouts": np.zeros((200, 1), bool)}, {}, "timeouts: expected bool (200,), found bool"),
    ({}, {"task": "walker-walk"}, "expected (task, level, schema) ('walker-stand', 'medium', 1)"),
    ({}, {"level": "expert"}, "found ('walker-stand', 'expert', 1)"),
    ({}, {"schema_version": 9}, "found ('walker-stand', 'medium', 9)"),
    ({"next_observations": make_arrays()["observations"]}, {}, "found others in 198 rows"),
    ({"timeouts": np.zeros(200, bool)}, {}, "found others in 1 rows"),
    (make_arrays(0), {}, "expected transitions, found none"),
]


@pytest.mark.parametrize(("arrays", "metadata", "message"), DATASETS)
def test_datasets(tmp_path, arrays, metadata, message):
    path = write_dataset(tmp_path / "d.npz", arrays=make_arrays() | arrays, **metadata)
    assert message in refusal(load_all, path)


STATES = [
    ({"observations": np.zeros(200, np.float32)}, {}, "expected floats (N, 24), found float32 (20"),
    ({"observations": np.zeros((9, 17))}, {}, "expected floats (N, 24), found float64 (9, 17)"),
    ({"observations": np.zeros((9, 24), int)}, {}, "expected floats (N, 24), found int64 (9, 24)"),
    ({"observations": np.full((9, 24), np.nan)}, {}, "observations: found NaN or infinite values"),
    ({"observations": np.full((9, 24), np.inf)}, {}, "observations: found NaN or infinite values"),
    ({"observations": np.array([None] * 200)}, {}, "Object arrays cannot be loaded"),
    *DATASETS[8:11],  # task, level and schema
]


@pytest.mark.parametrize(("arrays", "metadata", "message"), STATES)
def test_states_of_datasets(tmp_path, arrays, metadata, message):
    path = write_dataset(tmp_path / "d.npz", arrays=make_arrays() | arrays, **metadata)
    assert message in refusal(load_states, path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["observations", "actions", "rewards", "next_observations", "physics"]
)
def test_datasets_that_are_not_finite(tmp_path, name, value):
    arrays = make_arrays()
    arrays[name][17] = value
    path = write_dataset(tmp_path / "d.npz", arrays=arrays)
    assert f"{name}: found NaN or infinite values" in refusal(load_all, path)


class Payload:
    """Unpickling this creates a file named executed."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.parametrize("load", [load_all, load_states])
def test_files_that_are_no_datasets(inputs, load):
    path = Path("d.npz")
    content = path.read_bytes()
    message = "expected a dataset as in docs/formats.md"
    for wrong in (content[:5000], b"", b"PK\x03\x04 nonsense", pickle.dumps(Payload())):
        path.write_bytes(wrong)
        assert message in refusal(load, path)
    for metadata in (np.array("{"), np.array("[]"), np.array("{}"), np.array([Payload()])):
        np.savez(path, **make_arrays(), metadata=metadata)
        assert message in refusal(load, path)
    write_dataset(path, arrays={})
    assert "observations is not a file" in refusal(load, path)
    assert not Path("executed").exists()


def test_a_flipped_bit_in_a_shape(tmp_path):
    """np.load reads less then, and never comes to the check sum at the end."""
    path = write_dataset(tmp_path / "d.npz", arrays=make_arrays(1000))
    content = path.read_bytes()
    assert content.count(b"'shape': (1000, 18)") == 1
    path.write_bytes(content.replace(b"'shape': (1000, 18)", b"'shape': (1000, 10)"))
    assert "damaged bytes in physics.npy" in refusal(load_all, path)


TEACHERS = [
    ({"kind": "behavior"}, "t.pt: expected a teacher, found a behavior"),
    ({"schema_version": 9}, "t.pt: expected schema 1, found 9"),
    ({"task": "walker-walk"}, "t.pt: expected (task, obs, actions) (['walker-stand'], 24, 6)"),
    ({"obs_dim": 17}, "found (['walker-stand'], 17, 6)"),
    ({"actor": {"net.0.weight": torch.full((8, 24), torch.nan)}}, "net.0.weight: NaN or infinite"),
    ({"critics": {"w1": torch.full((2, 30, 8), torch.inf)}}, "critics: w1: NaN or infinite"),
]


@pytest.mark.parametrize(("changes", "message"), TEACHERS)
def test_teachers(run_main, inputs, changes, message):
    write_teacher(Path("t.pt"), **changes)
    assert_stopped(run_main(distill, *STUDENT), message)


def test_a_teacher_without_critics(run_main, inputs):
    teacher = torch.load("t.pt", weights_only=True)
    del teacher["critics"]
    torch.save(teacher, "t.pt")
    message = "t.pt: has no critics, as --loss q needs"
    assert_stopped(run_main(distill, *STUDENT, "--loss", "q"), message)


def test_files_that_are_no_checkpoints(run_main, inputs):
    path = Path("t.pt")
    message = "t.pt: expected a behavior or teacher, a .pt file"
    for wrong in (path.read_bytes()[:5000], b"", b"text", pickle.dumps(Payload())):
        path.write_bytes(wrong)
        assert_stopped(run_main(td3, "--policy", path), message)
    for wrong in ([1, 2], {"net.0.weight": torch.ones(2)}, {"kind": "teacher", "x": Payload()}):
        torch.save(wrong, path)
        assert_stopped(run_main(td3, "--policy", path), message)
    assert not Path("executed").exists() and not Path("data").exists()


def damaged(content: bytes, rng) -> bytes:
    """Flipped bits, or a part that is missing, zeroed or moved."""
    data = bytearray(content)
    start, end = sorted(rng.integers(0, len(content), 2))
    kind = rng.integers(4)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[start : start + 100]
    elif kind == 2:
        data[start:end] = bytes(end - start)
    elif kind == 3:
        data = data[start:] + data[:start]
    return data


@pytest.mark.parametrize("count", [40, pytest.param(700, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, read",
    [
        ("d.npz", load_all),
        ("d.npz", measure.load_states),
        ("t.pt", load_any_pt),
        ("run/resume.pt", load_any_pt),
    ],
)
def test_damaged_files_are_refused_or_what_they_were(
    run_main, inputs, no_episodes, name, read, count
):
    run_main(pbrl, *TEACHER_RUN)
    content = Path(name).read_bytes()
    original = read(name)
    rng = np.random.default_rng(count)
    refused = 0
    for _ in range(count):
        Path(name).write_bytes(damaged(content, rng))
        try:
            assert equal(read(name), original)
        except SystemExit as stop:
            assert name in stop.code
            assert "\n" not in stop.code
            refused += 1
    assert refused > 0.7 * count  # the others hit padding, or bytes that nobody reads


@EACH_RUN
def test_layouts_and_folders(run_main, monkeypatch, inputs, no_episodes, module):
    """Arrays in Fortran order, big-endian, of 64 bits (as others write them) train to the same
    weights, can be saved, and resumed from another folder although --data is a relative path."""
    plain = own_rewards(make_arrays(), "walker-stand")
    other = {}
    for name, array in plain.items():
        dtype = ">f8" if array.dtype.kind == "f" else bool
        other[name] = array.astype(dtype, order="F")
    home = Path.cwd()
    (home / "elsewhere").mkdir()
    ends = []
    for run_dir, arrays in (("plain", plain), ("other", other)):
        write_dataset(Path("d.npz"), arrays=arrays)
        sizes = ["--run-dir", run_dir, "--gradient-steps", 2, "--overwrite"]
        assert isinstance(run_main(module, *RUNS[module], *sizes), str)
        monkeypatch.chdir(home / "elsewhere")
        run_main(module, "--resume", f"../{run_dir}", "--overwrite", "--gradient-steps", 4)
        monkeypatch.chdir(home)
        end = torch.load(f"{run_dir}/resume.pt", weights_only=True)
        assert end["step"] == 4
        del end["args"]
        ends.append(end)
    assert equal(*ends)
    assert not list((home / "elsewhere").iterdir())


def test_a_copy_in_a_subfolder_finds_the_bundled_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "__file__", str(ROOT / "variants/copy.py"))
    found = distill.find_file("data/walker-stand-medium.npz")
    assert found == str(ROOT / "pretrained/walker-stand-medium.npz")


def test_a_file_of_ones_own_comes_before_the_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("data/walker-stand-medium.npz")
    path.parent.mkdir()
    path.touch()
    assert distill.find_file(str(path)) == str(path)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_last_row_of_a_dataset_ends_an_episode(tmp_path, terminal):
    """Also of one that was cut short: in a union another dataset follows."""
    arrays = make_arrays(150)
    arrays["terminals"][-1] = terminal
    data = load_all(write_dataset(tmp_path / "d.npz", arrays=arrays))
    assert np.flatnonzero(data["timeouts"]).tolist() == ([99] if terminal else [99, 149])


# --------------------------------------------------------------------------------- what is there
def test_what_exists_is_not_replaced(run_main, inputs, no_episodes):
    """Said before training."""
    Path("teacher.pt").write_bytes(b"precious")
    assert_stopped(run_main(pbrl, *TEACHER_RUN), "teacher.pt: exists; pass --overwrite")
    outcome = run_main(td3, "--policy", "t.pt", "--output", "teacher.pt")
    assert_stopped(outcome, "teacher.pt: exists; pass --overwrite")
    write_dataset(Path("data/walker-stand-expert.npz"), arrays=make_arrays())
    outcome = run_main(td3, "--task", "walker-stand", "--run-dir", "run")
    assert_stopped(outcome, "data/walker-stand-expert.npz: exists; pass --overwrite")
    assert Path("teacher.pt").read_bytes() == b"precious"
    assert not Path("run").exists()


@pytest.mark.parametrize("module", [pbrl, ds, naive], ids=lambda module: module.__name__)
def test_what_appears_during_a_training_is_not_replaced(
    run_main, monkeypatch, inputs, no_episodes, module
):
    """Another run may have the same output; the run goes on from its resume point to another."""
    run_episodes = module.run_episodes

    def another_run_ends(*args, **kwargs):
        Path("teacher.pt").write_bytes(b"precious")
        return run_episodes(*args, **kwargs)

    monkeypatch.setattr(module, "run_episodes", another_run_ends)
    flags = ["--gradient-steps", 4, "--eval-every", 2, "--run-dir", "run"]
    outcome = run_main(module, *RUNS[module], *flags)
    assert_stopped(outcome, "teacher.pt: exists; pass --overwrite")
    assert Path("teacher.pt").read_bytes() == b"precious"
    assert isinstance(run_main(module, "--resume", "run", "--output", "other.pt"), str)
    assert torch.load("other.pt", weights_only=True)["step"] == 4


def test_run_folders(run_main, tmp_path, monkeypatch, inputs, no_episodes):
    """New or empty ones; others with --overwrite only. Each run has its own, ~ is the home."""
    Path("run").mkdir()
    assert isinstance(run_main(pbrl, *TEACHER_RUN), str)
    outcome = run_main(pbrl, *TEACHER_RUN, "--output", "b.pt")
    assert_stopped(outcome, "--run-dir run: not empty; pass --overwrite, or --resume run")
    diverging = [*TEACHER_RUN, "--overwrite", "--learning-rate", 1e9, "--gradient-steps", 40]
    assert_stopped(run_main(pbrl, *diverging, "--eval-every", 40), "step 40: ")
    assert not Path("run/resume.pt").exists()  # that of the run before is not this one's
    assert isinstance(run_main(pbrl, *TEACHER_RUN, "--overwrite"), str)

    Path("run/student.pt").touch()
    Path("run/notes.txt").touch()
    distill.make_run_dir(distill.Args(resume="run"), "name")
    assert Path("run/student.pt").exists()
    distill.make_run_dir(distill.Args(run_dir="run", overwrite=True), "name")
    for name in ("student.pt", "returns.csv", "losses.csv"):  # nor are that policy, these curves
        assert not Path(f"run/{name}").exists()
    assert Path("run/notes.txt").exists()

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir = distill.make_run_dir(distill.Args(run_dir="~/x"), "name")
    assert run_dir == tmp_path / "home/x"
    run_dirs = {distill.make_run_dir(distill.Args(), "name") for _ in range(10)}
    assert len(run_dirs) == 10  # though made in the same second


def test_a_file_that_cannot_be_written_keeps_the_old_one(tmp_path):
    """No file may grow beyond 1000 bytes: the system refuses the write, as on a full disk."""
    path = tmp_path / "old"
    path.write_bytes(b"old")
    save_dataset = partial(td3.save_dataset, path, make_arrays(), "walker-stand", {}, td3.Args())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RuntimeError):
            distill.save(path, {"weights": torch.ones(9999)})
        with pytest.raises(OSError, match="File too large"):
            distill.write_csv(path, [["step", "value"]] * 9999)
        with pytest.raises(OSError, match="File too large"):
            save_dataset()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    save_dataset()  # also where the name does not end in .npz
    assert len(load_all(path)["rewards"]) == 200


def test_a_run_that_diverges_stops_by_name(run_main, inputs, no_episodes):
    run_main(pbrl, *TEACHER_RUN)
    before = Path("run/resume.pt").read_bytes()
    flags = ["--resume", "run", "--overwrite", "--learning-rate", 1e9, "--gradient-steps", 40]
    assert_stopped(run_main(pbrl, *flags), "step 40: loss/in_distribution is nan")
    assert Path("run/resume.pt").read_bytes() == before
    with pytest.raises(SystemExit, match=r"x\.pt: actor: weight: NaN or infinite values"):
        distill.save(Path("x.pt"), {"actor": {"weight": torch.tensor([1.0, torch.nan])}})
    assert not Path("x.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(run_main, monkeypatch, inputs, no_episodes):
    """Every critic's, also in a list."""

    def damage(target, network, rate):
        list(network.parameters())[-1].data.fill_(torch.inf)

    monkeypatch.setattr(naive, "move_target", damage)
    outcome = run_main(naive, *NAIVE, "--run-dir", "run", "--gradient-steps", 1)
    assert_stopped(outcome, "critics of walker-stand: b3: NaN or infinite")
    assert not Path("teacher.pt").exists()


@EACH_RUN
def test_a_run_without_steps_is_refused(run_main, inputs, module):
    outcome = run_main(module, *RUNS[module], "--gradient-steps", 0)
    assert_stopped(outcome, "--gradient-steps: expected more than the 0 made")


# ---------------------------------------------------------------------------- killed and resumed
def test_resume_points_of_another_run(run_main, inputs, no_episodes):
    run_main(pbrl, *TEACHER_RUN, "--overwrite")  # which is not for later
    assert_stopped(run_main(pbrl, "--resume", "run"), "teacher.pt: exists; pass --overwrite")
    message = "--gradient-steps: expected more than the 2 made"
    assert_stopped(run_main(pbrl, "--resume", "run", "--overwrite"), message)
    resume = ["--resume", "run", "--overwrite", "--gradient-steps", 4]
    other = ["--task", "walker-walk", "--data", "w.npz"]
    assert_stopped(run_main(pbrl, *resume, *other), "--resume: expected the same --task")
    outcome = run_main(pbrl, *resume, "--common-seed")
    assert_stopped(outcome, "--resume: expected the same --common-seed")
    outcome = run_main(pbrl, *resume, "--actor", "gaussian")
    assert_stopped(outcome, "--resume: expected the same --actor")
    for flag, old, new in [("seed", 1, 2), ("scale", "thesis", "laptop"), ("run_dir", "run", "b")]:
        outcome = run_main(pbrl, *resume, f"--{flag}", new)
        assert_stopped(outcome, f"--resume: expected --{flag} {old}, as before")
    message = "run/resume.pt: expected a resume point of mop_distill.py, found a resume point of m"
    assert_stopped(run_main(distill, *resume), message)
    resume_point = torch.load("run/resume.pt", weights_only=True)
    arguments = resume_point["args"] | {"device": "cuda"}
    torch.save(resume_point | {"args": arguments}, "run/resume.pt")
    message = "--resume: expected --device cuda, as before"
    assert_stopped(run_main(pbrl, *resume, "--device", "cpu"), message)
    if not torch.cuda.is_available():
        assert_stopped(run_main(pbrl, *resume), "--device cuda: found no CUDA device")
    kind = "resume point of mop_td3_collect.py"
    torch.save({"kind": kind, "args": vars(td3.Args())}, "run/resume.pt")
    outcome = run_main(td3, "--resume", "run", "--task", "walker-stand", *TINY)
    assert_stopped(outcome, "--resume: expected the same --task")
    outcome = run_main(td3, "--resume", "run", "--policy", "teacher.pt")
    assert_stopped(outcome, "--resume: expected no --policy")
    run_main(distill, *STUDENT, "--gradient-steps", 2, "--run-dir", "student")
    outcome = run_main(distill, "--resume", "student", "--states", "online")
    assert_stopped(outcome, "--resume: expected the same --states")
    run_main(naive, *NAIVE, "--gradient-steps", 2, "--run-dir", "naive", "--overwrite")
    other = ["--tasks", "walker-walk", "walker-stand", "--data", "w.npz", "d.npz"]
    outcome = run_main(naive, "--resume", "naive", *other, "--overwrite")
    assert_stopped(outcome, "--resume: expected the same --tasks")
    run_main(ds, *SHARED, "--gradient-steps", 2, "--run-dir", "shared", "--overwrite")
    other = ["--task", "walker-stand", "--output", "other.pt"]
    outcome = run_main(ds, "--resume", "shared", *other)
    assert_stopped(outcome, "--resume: expected the same --task")
    outcome = run_main(ds, "--resume", "shared", "--common-seed", "--overwrite")
    assert_stopped(outcome, "--resume: expected the same --common-seed")


def resume_time() -> int:
    path = Path("run/resume.pt")
    return path.stat().st_mtime_ns if path.exists() else 0


def start_until_a_resume_point(module, flags) -> subprocess.Popen:
    """The script's process, in a session of its own, which has just written a resume point."""
    process = subprocess.Popen(
        [sys.executable, module.__file__, *map(str, flags)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    before = resume_time()
    while process.poll() is None and resume_time() == before:
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", [*RUNS, td3], ids=lambda module: module.__name__)
def test_a_killed_run_ends_as_one_left_alone(run_main, tmp_path, monkeypatch, module, kills):
    """To the bit, whenever it is killed after its first resume point, while saving as well."""
    periods = 2 * kills + 2  # of evaluation, each longer than the longest wait
    if module is td3:
        flags = ["--task", "walker-stand", *TINY, "--total-timesteps", 1000 * (kills + 1)]
        flags += ["--eval-every", 1000, "--medium-step", 1000, "--learning-starts", 900]
        flags += ["--datasets", "medium-replay"]
    else:
        flags = [*RUNS[module], "--gradient-steps", 50 * periods, "--eval-every", 50]
    rng = np.random.default_rng(kills)
    results = []
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_inputs()
        arguments = [*flags, "--run-dir", "run"]
        for _ in range(kills if name == "killed" else 0):
            process = start_until_a_resume_point(module, [*arguments, "--threads", 1])
            time.sleep(0.25 * rng.random())
            process.kill()
            error = process.communicate()[1]
            assert process.returncode == -signal.SIGKILL, error
            arguments = ["--resume", "run"]
        assert isinstance(run_main(module, *arguments), str)
        end = torch.load("run/resume.pt", weights_only=True)  # weights, Adam's states, replay, ..
        del end["args"]
        end["csv"] = Path("run/returns.csv").read_text() + Path("run/losses.csv").read_text()
        results.append(end)
    assert equal(*results)


@pytest.mark.parametrize("module", [*RUNS, td3], ids=lambda module: module.__name__)
def test_a_learning_rate_given_to_resume_wins(run_main, inputs, no_episodes, module):
    steps = "--gradient-steps"
    flags = RUNS.get(module, [])
    if module is td3:
        steps = "--total-timesteps"
        flags = ["--task", "walker-stand", *TINY, "--eval-every", 1000, "--medium-step", 1000]
        flags += ["--learning-starts", 995, "--datasets", "medium-replay"]
    run_main(module, *flags, steps, 1000 if module is td3 else 1, "--run-dir", "run")
    resume = ["--resume", "run", "--overwrite", "--learning-rate", 1e-7]
    outcome = run_main(module, *resume, steps, 2000 if module is td3 else 2)
    assert isinstance(outcome, str), outcome
    end = torch.load("run/resume.pt", weights_only=True)
    optimizers = [state for name, state in end.items() if "optimizer" in name]
    assert optimizers
    for state in optimizers:
        assert float(state["param_groups"][0]["lr"]) == pytest.approx(1e-7)


@pytest.mark.parametrize("module", [pbrl, ds, naive], ids=lambda module: module.__name__)
def test_a_resumed_run_anneals_on(run_main, monkeypatch, inputs, no_episodes, module):
    """Its learning rate falls as that of a run left alone."""
    save = module.save

    def stop_at_step_2(path, content):
        save(path, content)
        if path.name == "resume.pt" and content["step"] == 2:
            raise SystemExit("stopped")

    flags = [*RUNS[module], "--gradient-steps", 4, "--eval-every", 2, "--anneal", 1]
    run_main(module, *flags, "--run-dir", "alone")
    monkeypatch.setattr(module, "save", stop_at_step_2)
    assert_stopped(run_main(module, *flags, "--run-dir", "run", "--overwrite"), "stopped")
    monkeypatch.setattr(module, "save", save)
    assert isinstance(run_main(module, "--resume", "run", "--overwrite"), str)
    ends = [torch.load(f"{name}/resume.pt", weights_only=True) for name in ("alone", "run")]
    for end in ends:
        del end["args"]
    assert equal(*ends)


@EACH_RUN
def test_tensorboard_has_the_curves_of_the_csv_files(
    run_main, monkeypatch, inputs, no_episodes, module
):
    """A resumed run replaces what one that was killed wrote after its resume point."""
    boards = []

    class Board:
        def __init__(self, folder, purge_step):
            self.points = []
            self.purge_step = purge_step
            boards.append(self)

        def add_scalar(self, name, value, step):
            self.points.append((step, name, float(value)))

        def close(self):
            pass

    monkeypatch.setattr(module, "SummaryWriter", Board)
    flags = [*RUNS[module], "--final-eval-episodes", 3, "--run-dir", "run"]
    run_main(module, *flags, "--gradient-steps", 2)
    run_main(module, "--resume", "run", "--gradient-steps", 4, "--overwrite")
    assert [board.purge_step for board in boards] == [1, 3]
    points = boards[0].points + boards[1].points
    with open("run/losses.csv") as file:
        losses = [(int(step), name, float(y)) for step, name, y in list(csv.reader(file))[1:]]
    assert [x for x in points if not x[1].startswith(("return/", "tau/"))] == losses
    means = [(step, value) for step, name, value in points if name.startswith("return/")]
    assert {step for step, _ in means} == {2, 4}
    assert [value for _, value in means] == pytest.approx([1.0] * len(means))  # of 0, 1, 2


def test_ctrl_c_during_an_evaluation_leaves_no_process_behind(inputs):
    """The terminal sends it to the workers, too. Left alone, the run would go on for minutes."""
    flags = [*STUDENT, "--run-dir", "run", "--threads", 2]
    flags += ["--gradient-steps", 400, "--eval-every", 1, "--eval-episodes", 10]
    process = start_until_a_resume_point(distill, flags)
    time.sleep(0.5)  # the second evaluation is under way
    os.killpg(process.pid, signal.SIGINT)
    try:
        # until all have ended that write to its standard error, and so the workers
        error = process.communicate(timeout=60)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "in run_episodes" in error
    assert "concurrent/futures/process.py" in error  # it waited for workers
    assert "KeyboardInterrupt" in error


# ------------------------------------------------------------------------- as a user starts them
def test_python_O_as_a_user_sees_it(tmp_path):
    """-O removes assertions, not our checks: one line on standard error, nothing else."""
    write_dataset(tmp_path / "d.npz", arrays=make_arrays(action_dim=3))
    env = os.environ | {"PYTHONOPTIMIZE": "1"}
    process = script("mop_pbrl_teacher", *TEACHER, cwd=tmp_path, env=env)
    message = "d.npz: actions: expected float32 (200, 6), found float32 (200, 3)"
    assert process.stderr == f"mop_pbrl_teacher.py: error: {message}\n"
    assert process.stdout == ""
    assert process.returncode == 1


def test_importing_a_script_leaves_rendering_alone():
    code = f"import os, {', '.join(SCRIPTS)}; print(os.environ['MUJOCO_GL'])"
    env = os.environ | {"MUJOCO_GL": "off", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.stdout == "off\n", process.stderr
