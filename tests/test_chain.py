"""The chain collect -> teacher -> distill -> measure in processes of their own; seeds; resuming a killed run."""

import json
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from conftest import ROOT, script

TINY = ["--threads", 1, "--device", "cpu", "--eval-episodes", 1, "--final-eval-episodes", 2]
TD3 = ["--task", "walker-stand", "--total-timesteps", 4000, "--eval-every", 1000, "--learning-starts", 500]
TD3 += ["--hidden", 16, "--batch-size", 32, "--num-transitions", 2000, "--medium-return", 20, *TINY]
STEPS = ["--gradient-steps", 120, "--eval-every", 30, "--hidden", 16, "--batch-size", 32, *TINY]
PBRL, DISTILL = ["--task", "walker-stand", *STEPS], ["--tasks", "walker-stand", *STEPS]


def result(process) -> dict:
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no warnings, no progress bar where the output is no terminal
    last = process.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    return json.loads(last.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One pass of the three scripts, with default file names throughout."""
    folder = tmp_path_factory.mktemp("chain")
    td3 = result(script("mop_td3_collect", *TD3, "--run-dir", "runs/td3", cwd=folder))
    pbrl = result(script("mop_pbrl_teacher", *PBRL, "--run-dir", "runs/pbrl", cwd=folder))
    distill = result(script("mop_distill", *DISTILL, "--run-dir", "runs/distill", cwd=folder))
    return folder, td3, pbrl, distill


def test_files_and_formats(chain):
    folder, td3, pbrl, distill = chain
    assert set(td3["files"]) == {
        *(f"checkpoints/walker-stand-{level}-behavior.pt" for level in ("medium", "expert")),
        *(f"data/walker-stand-{level}.npz" for level in ("medium", "expert", "medium-replay")),
    }
    assert pbrl["files"] == ["checkpoints/walker-stand-medium-teacher.pt"]
    for name in td3["files"] + pbrl["files"] + distill["files"]:
        assert (folder / name).is_file()
    for level, rows in (("medium", 2000), ("expert", 2000), ("medium-replay", None)):
        with np.load(folder / f"data/walker-stand-{level}.npz", allow_pickle=False) as data:
            metadata = json.loads(str(data["metadata"]))
            shapes = {name: (data[name].shape[1:], str(data[name].dtype)) for name in data.files if name != "metadata"}
            assert metadata["task"] == "walker-stand" and metadata["level"] == level
            n = rows or torch.load(folder / "checkpoints/walker-stand-medium-behavior.pt", weights_only=True)["step"]
            assert len(data["rewards"]) == n and len(metadata["episode_returns"]) == n // 1000
            sums = data["rewards"].reshape(-1, 1000).sum(axis=1)
            np.testing.assert_allclose(metadata["episode_returns"], sums, rtol=1e-4)
            assert np.flatnonzero(data["timeouts"]).tolist() == list(range(999, n, 1000))
            assert not data["terminals"].any()
        expected = {"observations": ((24,), "float32"), "actions": ((6,), "float32"), "rewards": ((), "float32")}
        expected |= {"next_observations": ((24,), "float32"), "terminals": ((), "bool"), "timeouts": ((), "bool")}
        assert shapes == {**expected, "physics": ((18,), "float64")}
    for run in ("td3", "pbrl", "distill"):
        names = {path.name.split(".")[0] for path in (folder / "runs" / run).iterdir()}
        assert {"returns", "resume", "events"} | ({"tau", "student"} if run == "distill" else set()) <= names
    assert not list(folder.rglob("*.tmp"))


def test_rewards_in_the_files_are_those_of_dm_control(chain):
    """The reward of each stored physics state, recomputed by dm_control's task, is the stored reward."""
    from dm_control import suite

    env = suite.load("walker", "stand", environment_kwargs={"flat_observation": True})
    env.reset()
    with np.load(chain[0] / "data/walker-stand-medium.npz") as data:
        for row in range(0, 2000, 97):
            with env.physics.reset_context():
                env.physics.set_state(data["physics"][row])
            assert env.task.get_reward(env.physics) == pytest.approx(data["rewards"][row], abs=1e-6)


def test_checkpoints_describe_themselves(chain):
    folder = chain[0]
    files = {"behavior": "checkpoints/walker-stand-medium-behavior.pt", "student": "runs/distill/student.pt"}
    files["teacher"] = "checkpoints/walker-stand-medium-teacher.pt"
    for kind, name in files.items():
        checkpoint = torch.load(folder / name, weights_only=True)
        assert (checkpoint["kind"], checkpoint["tasks"]) == (kind, ["walker-stand"])
        assert checkpoint["schema_version"] == 1 and checkpoint["step"] > 0
        assert checkpoint["args"]["hidden"] == checkpoint["sizes"]["hidden"] == 16
        assert len(checkpoint["returns"]["walker-stand"]) == 2 and checkpoint["versions"]["torch"]


@pytest.mark.parametrize("run, target", [("td3", "critics"), ("td3", "actor"), ("pbrl", "critics"), ("pbrl", "actor")])
def test_targets_follow_and_lag(chain, run, target):
    """After training a target network is neither the initial network (same seed) nor the online one."""
    import mop_pbrl_teacher as pbrl
    import mop_td3_collect as td3

    point = torch.load(chain[0] / f"runs/{run}/resume.pt", weights_only=True)
    if run == "td3":  # the order of construction in the scripts
        torch.manual_seed(zlib.crc32(b"1 behavior walker-stand"))
        initial = {"actor": td3.Actor(24, 6, 16, True), "critics": td3.Critics(2, 24, 6, 16)}
    else:
        torch.manual_seed(zlib.crc32(b"1 teacher walker-stand from walker-stand"))
        actors = [pbrl.Actor(24, 6, 16) for _ in range(2)]
        initial = {"actor": actors[0], "critics": pbrl.Critics(5, 24, 6, 16)}
    for name, start in initial[target].state_dict().items():
        moved, online = point[f"target_{target}"][name], point[target][name]
        assert 0 < (moved - start).norm() < (online - start).norm(), name


def weights(folder, name):
    return torch.load(folder / name, weights_only=True)["actor"]


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["mop_td3_collect", "mop_pbrl_teacher"])  # mop_distill: test_trust.py
def test_killed_and_resumed_ends_with_the_same_weights(chain, tmp_path, name):
    """Also: a second run with the same seed gives the same weights."""
    folder = chain[0]
    options, run_dir, output = {
        "mop_td3_collect": (TD3, "runs/td3", "checkpoints/walker-stand-expert-behavior.pt"),
        "mop_pbrl_teacher": (PBRL, "runs/pbrl", "checkpoints/walker-stand-medium-teacher.pt"),
    }[name]
    if name == "mop_pbrl_teacher":
        (tmp_path / "data").symlink_to(folder / "data")
    command = [sys.executable, ROOT / f"{name}.py", *options, "--run-dir", run_dir]
    process = subprocess.Popen(
        [str(c) for c in command], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / run_dir / "resume.pt").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(tmp_path / run_dir / "resume.pt", weights_only=True)["step"]
    assert step < (4000 if name == "mop_td3_collect" else 120), "the run was over before it was killed"
    result(script(name, "--resume", run_dir, cwd=tmp_path))
    assert_equal_weights(weights(folder, output), weights(tmp_path, output))
    assert (folder / run_dir / "returns.csv").read_text() == (tmp_path / run_dir / "returns.csv").read_text()
    if name == "mop_td3_collect":
        for level in ("medium", "medium-replay"):
            with (
                np.load(folder / f"data/walker-stand-{level}.npz") as a,
                np.load(tmp_path / f"data/walker-stand-{level}.npz") as b,
            ):
                assert all(np.array_equal(a[key], b[key]) for key in a.files if key != "metadata")


def meanwhile(folder):
    """While a run goes on no second one may write to its folder or its output file."""
    again = "--run-dir", "other", "--output"
    for flags, path in (
        (("--resume", "run", "--output", "x.pt"), "run/resume.pt"),
        ((*DISTILL, *again, "student.pt"), "student.pt"),
    ):
        second = script("mop_distill", *flags, cwd=folder)
        assert second.returncode == 1 and len(second.stderr.splitlines()) == 1, second.stderr
        assert f"{path}: expected a folder that can be made and written, and no other run" in second.stderr
    result(script("mop_distill", *DISTILL, "--gradient-steps", 1, *again, "other.pt", cwd=folder))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(chain, tmp_path, number, code):
    """One line that says how to go on."""
    for name in ("data", "checkpoints"):
        (tmp_path / name).symlink_to(chain[0] / name)
    command = [sys.executable, ROOT / "mop_distill.py", *DISTILL, "--gradient-steps", 10**6, "--run-dir", "run"]
    command += ["--output", "student.pt"]
    process = subprocess.Popen([str(c) for c in command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/resume.pt").is_file() and process.poll() is None:
        time.sleep(0.02)
    if number == signal.SIGINT:
        meanwhile(tmp_path)
    process.send_signal(number)
    assert process.communicate()[1] == "mop_distill.py: stopped; continue with --resume run\n"
    assert process.returncode == code and not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "run/.resume.pt.tmp").write_bytes(b"left by a run that was killed while it saved")
    step = torch.load(tmp_path / "run/resume.pt", weights_only=True)["step"]
    result(script("mop_distill", "--resume", "run", "--gradient-steps", step + 1, cwd=tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_tasks_through_every_script(chain, run_main, tmp_path):
    """collect -> teacher (also Gaussian, naive) -> distill, ds, oqs -> measure: each reads what the others wrote."""
    import mop_distill as distill
    import mop_ds as ds
    import mop_measure as measure
    import mop_oqs as oqs
    import mop_pbrl_teacher as pbrl
    import mop_td3_collect as td3

    for folder in ("data", "checkpoints"):
        (tmp_path / folder).mkdir()
        for path in (chain[0] / folder).iterdir():
            (tmp_path / folder / path.name).symlink_to(path)
    sizes = ["--hidden", 16, "--batch-size", 32, "--eval-episodes", 1, "--final-eval-episodes", 1, "--threads", 1]
    behaviour = ["--task", "walker-walk", "--total-timesteps", 2000, "--eval-every", 1000, "--learning-starts", 500]
    run_main(td3, *sizes, *behaviour, "--medium-step", 1000, "--num-transitions", 1000)
    tasks, sizes = ["walker-stand", "walker-walk"], [*sizes, "--gradient-steps", 20, "--eval-every", 20]
    run_main(pbrl, *sizes, "--task", "walker-walk", "--run-dir", "runs/walk")
    for task in tasks:
        run_main(pbrl, *sizes, "--task", task, "--actor", "gaussian", "--run-dir", f"runs/{task}-gaussian")
    naive = run_main(pbrl, *sizes, "--tasks", *tasks, "--run-dir", "runs/naive")
    run_main(distill, *sizes, "--loss", "q", "--run-dir", "runs/q")
    kl = run_main(distill, *sizes, "--loss", "kl", "--run-dir", "runs/kl")
    teachers = ["--teacher-steps", 20, "--teacher-hidden", 16, "--teacher-batch-size", 32]
    shared = run_main(ds, *sizes, *teachers, "--run-dir", "runs/ds")
    switched = run_main(oqs, *sizes, *teachers, "--run-dir", "runs/oqs")
    assert switched["returns"]["walker-walk"].keys() >= {"from walker-stand", "from walker-walk"}
    run_main(distill, *sizes, "--teachers", *shared["files"][1:3], "--run-dir", "runs/mse")
    options = ["--episodes", 2, "--cross-episodes", 1, "--no-gif", "--threads", 1, "--tau-states", 50]
    for name, student in (("naive", naive), ("kl", kl), ("oqs", switched)):
        found = run_main(measure, "--student", student["files"][0], *options, "--run-dir", f"runs/measure-{name}")
        assert found["returns"].keys() == set(tasks)
    table = ["--teachers", *shared["files"][1:3], *switched["files"][1:3], "checkpoints/walker-walk-medium-behavior.pt"]
    shift = ["--shift", *(f"data/{task}-medium.npz" for task in tasks), "--run-dir", "runs/measure"]
    found = run_main(measure, *table, *shift, *options)
    assert len(found["cross_task"]) == 5


def test_another_seed_gives_other_weights(chain, tmp_path):
    (tmp_path / "data").symlink_to(chain[0] / "data")
    result(script("mop_pbrl_teacher", *PBRL, "--seed", 2, cwd=tmp_path))
    name = "checkpoints/walker-stand-medium-teacher.pt"
    a, b = weights(chain[0], name), weights(tmp_path, name)
    assert not any(torch.equal(a[key], b[key]) for key in a)


def test_collecting_with_a_policy(chain, tmp_path):
    """Another mix, of which every tenth episode is by the plain policy; an episode cut short."""
    for folder in ("data", "checkpoints"):
        (tmp_path / folder).mkdir()
    source = chain[0] / "checkpoints"
    for kind, mix, name, n in (
        ("behavior", "noise", "-noise", 10_000),
        ("teacher", "online", "-teacher-online", 1500),
    ):
        options = ["--policy", source / f"walker-stand-medium-{kind}.pt", "--mix", mix, "--num-transitions", n]
        options += ["--threads", 1]
        found = result(script("mop_td3_collect", *options, cwd=tmp_path))
        assert found["files"] == [f"data/walker-stand-medium{name}.npz"]
        with np.load(tmp_path / found["files"][0]) as data:
            ends = [999, 1499] if n == 1500 else list(range(999, n, 1000))
            assert len(data["rewards"]) == n and np.flatnonzero(data["timeouts"]).tolist() == ends
            assert len(json.loads(str(data["metadata"]))["episode_returns"]) == len(ends)
