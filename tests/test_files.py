"""Files: bad input is one line with the file's or flag's name, and a killed run loses nothing.

`python -m pytest -m slow tests/test_files.py` damages more files and kills more often.
"""

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mop_distill as distill
import mop_pbrl_teacher as pbrl
import mop_td3_collect as td3
from conftest import ROOT, SCRIPTS, make_arrays, script, write_dataset, write_teacher

TINY = ["--device", "cpu", "--hidden", 8, "--batch-size", 4]
TINY += ["--eval-episodes", 1, "--final-eval-episodes", 1]
STUDENT = ["--tasks", "walker-stand", "--data", "d.npz", "--teachers", "t.pt", *TINY]
TEACHER = ["--task", "walker-stand", "--data", "d.npz", "--output", "teacher.pt", *TINY]
TEACHER_RUN = [*TEACHER, "--run-dir", "run", "--gradient-steps", 2]


def assert_stopped(outcome, message):
    """The outcome of run_main is exit code 1 and one line with this message."""
    code, text = outcome
    assert code == 1
    assert message in text
    assert len(text.strip().splitlines()) == 1, text


def equal(one, other) -> bool:
    """To the bit, of nested dicts and lists of tensors, arrays and numbers."""
    if isinstance(one, dict):
        return list(one) == list(other) and equal(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and np.array_equal(one, other)


@pytest.fixture
def inputs(tmp_path):
    """A dataset and a teacher, d.npz and t.pt."""
    write_dataset(tmp_path / "d.npz", arrays=make_arrays())
    write_teacher(tmp_path / "t.pt")


@pytest.fixture
def no_episodes(monkeypatch):
    """Evaluation takes most of a tiny run's time, and changes no weight."""

    def run_episodes(policy, task, seeds, workers, **options):
        observations = np.eye(1001, 24, dtype=np.float32)
        return [{"observations": observations, "rewards": np.ones(1000)} for _ in seeds]

    for module in (distill, pbrl, td3):
        monkeypatch.setattr(module, "run_episodes", run_episodes)


NOISE = ["--policy", ROOT / "pretrained/walker-walk-medium-behavior.pt", "--mix", "noise"]
FLAGS = [
    (td3, ["--device", "cuda"], "--device cuda: no CUDA device was found"),
    (distill, ["--cuda-graph"], "--cuda-graph: needs a CUDA device"),
    (td3, ["--task", "walker-fly"], "task walker-fly: not one of"),
    (td3, ["--task", "quadruped-walk"], "task quadruped-walk: expected actions in [-1, 1]"),
    (distill, ["--tasks", "walker-stand", "walker-stand"], "--tasks: expected distinct tasks"),
    (distill, ["--tasks", "walker-stand", "cheetah-run"], "--tasks: expected the same sizes"),
    (distill, ["--tasks", "walker-stand", "--regularizer", "ndcg"], "--regularizer: expected two"),
    (distill, ["--level", "medium", "expert", "medium"], "--level: expected one level, or one per"),
    (distill, ["--data", "a.npz"], "--data: expected one file per task"),
    (distill, ["--teachers", "a.pt"], "--teachers: expected one file per task"),
    (distill, ["--teachers", "a.pt", "b.pt"], "a.pt: expected a teacher"),
    (distill, ["--loss", "kl", "--level", "expert"], "expert-teacher-gaussian.pt: not found"),
    (pbrl, ["--task", "walker-run"], "data/walker-run-medium.npz: not found, nor in pretrained/"),
    (pbrl, ["--num-critics", 1], "--num-critics: expected 2 or more"),
    (pbrl, ["--resume", "nowhere"], "nowhere/resume.pt: expected a resume point of mop_pbrl"),
    (td3, ["--total-timesteps", 2_000_500], "--total-timesteps: expected multiples of"),
    (td3, ["--total-timesteps", 20_000], "--medium-step: expected a multiple of 10000 up to 20000"),
    (td3, ["--policy", "none.pt"], "none.pt: expected a behavior or teacher"),
    (td3, [*NOISE, "--num-transitions", 5000, "--output", "d.npz"], "takes a multiple of 10000"),
]


@pytest.mark.parametrize(("module", "options", "message"), FLAGS)
def test_flags(run_main, tmp_path, monkeypatch, module, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_stopped(run_main(module, *options), message)
    assert not list(tmp_path.iterdir())


def refusal(path, task="walker-stand") -> str:
    """The line with which load_dataset stops."""
    with pytest.raises(SystemExit) as stop:
        distill.load_dataset(path, task, 24, 6)
    assert str(path) in stop.value.code
    assert "\n" not in stop.value.code
    return stop.value.code


def test_arrays_of_another_kind(tmp_path):
    cases = [
        ("rewards", np.zeros(199, np.float32), "expected float32 (199, 24), found float32"),
        ("observations", np.zeros(200, np.float32), "observations: expected float32 (200, 24)"),
        ("actions", np.zeros((200, 6), int), "actions: expected float32 (200, 6), found int64"),
        ("actions", np.full((200, 6), 1.5, np.float32), "expected actions in [-1, 1]"),
        ("terminals", np.zeros(200), "terminals: expected bool (200,), found float64"),
        ("rewards", np.array([None] * 200), "Object arrays cannot be loaded"),
    ]
    for name in ("observations", "actions", "rewards", "next_observations", "physics"):
        for value in (np.nan, np.inf):
            array = make_arrays()[name]
            array[17] = value
            cases.append((name, array, f"{name}: found NaN or infinite values"))
    for name, array, message in cases:
        path = write_dataset(tmp_path / "d.npz", arrays=make_arrays() | {name: array})
        assert message in refusal(path)


class Payload:
    """Unpickling this creates a file named executed."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_files_that_are_no_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_dataset(tmp_path / "d.npz", arrays=make_arrays())
    content = path.read_bytes()
    message = "expected (task, schema) ('walker-walk', 1), found ('walker-stand', 1)"
    assert message in refusal(path, "walker-walk")
    for wrong in (content[:5000], b"", b"PK\x03\x04 nonsense", pickle.dumps(Payload())):
        path.write_bytes(wrong)
        assert "expected a dataset as in docs/formats.md" in refusal(path)
    for metadata in (np.array("{"), np.array("[]"), np.array("{}"), np.array([Payload()])):
        np.savez(path, **make_arrays(), metadata=metadata)
        assert "expected a dataset as in docs/formats.md" in refusal(path)
    assert "observations is not a file" in refusal(write_dataset(path, arrays={}))
    write_dataset(path, arrays=make_arrays(), schema_version=9)
    assert "found ('walker-stand', 9)" in refusal(path)
    for returns in ([], [1.0, float("nan")]):
        write_dataset(path, arrays=make_arrays(), episode_returns=returns)
        assert "no finite episode_returns" in refusal(path)
    assert not Path("executed").exists()

    # a flipped bit in a shape: np.load reads less, and never comes to the check sum at the end
    content = write_dataset(path, arrays=make_arrays(1000)).read_bytes()
    assert content.count(b"'shape': (1000, 18)") == 1
    path.write_bytes(content.replace(b"'shape': (1000, 18)", b"'shape': (1000, 10)"))
    assert "damaged bytes in physics.npy" in refusal(path)


def test_layouts_and_folders(run_main, tmp_path, monkeypatch, inputs, no_episodes):
    """Arrays in Fortran order, big-endian, of 64 bits (as others write them) train to the same
    weights, can be saved, and resumed from another folder although --data is a relative path."""
    plain = make_arrays()
    other = {}
    for name, array in plain.items():
        dtype = ">f8" if array.dtype.kind == "f" else bool
        other[name] = array.astype(dtype, order="F")
    (tmp_path / "elsewhere").mkdir()
    for module, flags, network in ((pbrl, TEACHER, "actor"), (distill, STUDENT, "student")):
        weights = []
        for folder, arrays in (("plain", plain), ("other", other)):
            monkeypatch.chdir(tmp_path)
            write_dataset(Path("d.npz"), arrays=arrays)
            run_dir = f"{module.__name__}-{folder}"
            run_main(module, *flags, "--run-dir", run_dir, "--gradient-steps", 2, "--overwrite")
            monkeypatch.chdir("elsewhere")
            run_main(module, "--resume", f"../{run_dir}", "--gradient-steps", 4)
            resume_point = torch.load(f"../{run_dir}/resume.pt", weights_only=True)
            assert resume_point["step"] == 4
            weights.append(resume_point[network])
        assert equal(*weights)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_checkpoints(run_main, tmp_path, inputs):
    for changes, message in [
        ({"kind": "behavior"}, "t.pt: expected a teacher, found a behavior"),
        ({"schema_version": 9}, "t.pt: expected schema 1, found 9"),
        ({"task": "walker-walk"}, "t.pt: expected (task, obs, actions) (['walker-stand'], 24, 6)"),
        ({"obs_dim": 17}, "found (['walker-stand'], 17, 6)"),
        ({"actor": {"net.0.weight": torch.full((8, 24), torch.nan)}}, "net.0.weight: NaN or inf"),
        ({"critics": {"w1": torch.full((2, 30, 8), torch.inf)}}, "critics: w1: NaN or infinite"),
    ]:
        write_teacher(tmp_path / "t.pt", **changes)
        assert_stopped(run_main(distill, *STUDENT), message)
    write_teacher(tmp_path / "t.pt")
    assert_stopped(run_main(distill, *STUDENT, "--loss", "kl"), "expected Gaussian teachers")


def test_files_that_are_no_checkpoints(run_main, tmp_path, inputs):
    content = Path("t.pt").read_bytes()
    of_others = ([1, 2], {"net.0.weight": torch.ones(2)}, {"kind": "teacher", "x": Payload()})
    for wrong in (content[:5000], b"", b"text", pickle.dumps(Payload()), *of_others):
        if isinstance(wrong, bytes):
            Path("t.pt").write_bytes(wrong)
        else:
            torch.save(wrong, "t.pt")
        outcome = run_main(td3, "--policy", "t.pt", "--output", "out.npz")
        assert_stopped(outcome, "t.pt: expected a behavior or teacher, a .pt file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "t.pt"]


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
@pytest.mark.parametrize("name", ["d.npz", "t.pt", "run/resume.pt"])
def test_damaged_files_are_refused_or_what_they_were(run_main, inputs, no_episodes, name, count):
    def read():
        if name == "d.npz":
            return distill.load_dataset(name, "walker-stand", 24, 6)
        return distill.read_pt(name, "teacher", "resume point of mop_pbrl_teacher.py")

    run_main(pbrl, *TEACHER_RUN)
    content = Path(name).read_bytes()
    original = read()
    rng = np.random.default_rng(count)
    refused = 0
    for _ in range(count):
        Path(name).write_bytes(damaged(content, rng))
        try:
            assert equal(read(), original)
        except SystemExit as stop:
            assert name in stop.code
            assert "\n" not in stop.code
            refused += 1
    assert refused > 0.7 * count  # the others hit padding, or bytes that nobody reads


def test_what_exists_is_not_replaced(run_main, tmp_path, inputs, no_episodes):
    """Said before training."""
    Path("teacher.pt").write_bytes(b"precious")
    assert_stopped(run_main(pbrl, *TEACHER_RUN), "teacher.pt: exists; pass --overwrite")
    outcome = run_main(td3, "--policy", "t.pt", "--output", "teacher.pt")
    assert_stopped(outcome, "teacher.pt: exists; pass --overwrite")
    write_dataset(tmp_path / "data/walker-stand-expert.npz", arrays=make_arrays())
    outcome = run_main(td3, "--task", "walker-stand", "--run-dir", "run")
    assert_stopped(outcome, "data/walker-stand-expert.npz: exists; pass --overwrite")
    assert Path("teacher.pt").read_bytes() == b"precious"
    assert not Path("run").exists()


def test_run_folders(run_main, tmp_path, monkeypatch, inputs, no_episodes):
    """New or empty ones; others with --overwrite only. Each run has its own, ~ is the home."""
    Path("run").mkdir()
    assert isinstance(run_main(pbrl, *TEACHER_RUN), str)
    outcome = run_main(pbrl, *TEACHER_RUN, "--output", "b.pt")
    assert_stopped(outcome, "--run-dir run: not empty; pass --overwrite, or --resume run")
    assert isinstance(run_main(pbrl, *TEACHER_RUN, "--overwrite"), str)

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
            distill.write_csv(path, "step,value", [[1, 2.0]] * 9999)
        with pytest.raises(OSError, match="File too large"):
            save_dataset()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    save_dataset()  # also where the name does not end in .npz
    assert len(distill.load_dataset(path, "walker-stand", 24, 6)["rewards"]) == 200


def test_a_run_that_diverges_stops_by_name(run_main, inputs, no_episodes):
    run_main(pbrl, *TEACHER_RUN)
    before = Path("run/resume.pt").read_bytes()
    flags = ["--resume", "run", "--learning-rate", 1e9, "--gradient-steps", 40]
    assert_stopped(run_main(pbrl, *flags), "step 40: loss/in_distribution is nan")
    assert Path("run/resume.pt").read_bytes() == before
    with pytest.raises(SystemExit, match=r"x\.pt: actor: weight: NaN or infinite values"):
        distill.save(Path("x.pt"), {"actor": {"weight": torch.tensor([1.0, torch.nan])}})
    assert not Path("x.pt").exists()


def test_resume_points_of_another_run(run_main, tmp_path, inputs, no_episodes):
    run_main(pbrl, *TEACHER_RUN)
    resume = ["--resume", "run", "--gradient-steps", 4]
    message = "run/resume.pt: expected a resume point of mop_distill.py, found a resume point of m"
    assert_stopped(run_main(distill, *resume), message)
    other = write_dataset(tmp_path / "other.npz", arrays=make_arrays(seed=1))
    outcome = run_main(pbrl, *resume, "--data", other)
    assert_stopped(outcome, "--resume: expected the same data")
    resume_point = torch.load("run/resume.pt", weights_only=True)
    torch.save(resume_point | {"device": "cuda"}, "run/resume.pt")
    assert_stopped(run_main(pbrl, *resume), "--resume: expected a run on cpu, found cuda")
    kind = "resume point of mop_td3_collect.py"
    torch.save({"kind": kind, "args": vars(td3.Args()), "device": "cpu"}, "run/resume.pt")
    outcome = run_main(td3, "--resume", "run", "--task", "walker-stand", *TINY)
    assert_stopped(outcome, "--resume: expected the same task")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_states_are_kept(run_main, inputs, no_episodes, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    flags = [*TEACHER_RUN, "--device", device, "--overwrite"]
    run_main(pbrl, *flags, "--gradient-steps", 4, "--eval-every", 2)
    expected = torch.load("run/resume.pt", weights_only=True)["random_states"]
    run_main(pbrl, *flags)
    torch.manual_seed(99)  # of all devices
    run_main(pbrl, "--resume", "run", "--gradient-steps", 4)
    assert len(expected) == 1 + torch.cuda.device_count()
    assert equal(torch.load("run/resume.pt", weights_only=True)["random_states"], expected)


def kill_after_a_resume_point(module, flags, wait: float) -> None:
    """Start the script, wait for a new resume point and some seconds more, and kill it."""
    command = [sys.executable, ROOT / f"{module.__name__}.py", *map(str, flags), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before = resume_time()
    while process.poll() is None and resume_time() == before:
        time.sleep(0.005)
    time.sleep(wait)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()


def resume_time() -> int:
    path = Path("run/resume.pt")
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", [distill, pbrl, td3])
def test_a_killed_run_ends_as_one_left_alone(run_main, tmp_path, monkeypatch, module, kills):
    """To the bit, whenever it is killed after its first resume point, while saving as well."""
    periods = 2 * kills + 2  # of evaluation, each longer than the longest wait
    if module is td3:
        flags = ["--task", "walker-stand", *TINY, "--total-timesteps", 1000 * (kills + 1)]
        flags += ["--eval-every", 1000, "--medium-step", 1000, "--learning-starts", 900]
        flags += ["--datasets", "medium-replay"]
    else:
        flags = TEACHER if module is pbrl else STUDENT
        flags = [*flags, "--gradient-steps", 50 * periods, "--eval-every", 50]
    rng = np.random.default_rng(kills)
    results = []
    for name in ("alone", "killed"):
        write_dataset(tmp_path / name / "d.npz", arrays=make_arrays())
        write_teacher(tmp_path / name / "t.pt")
        monkeypatch.chdir(tmp_path / name)
        arguments = [*flags, "--run-dir", "run"]
        for _ in range(kills if name == "killed" else 0):
            kill_after_a_resume_point(module, arguments, wait=0.25 * rng.random())
            arguments = ["--resume", "run"]
        assert isinstance(run_main(module, *arguments), str)
        end = torch.load("run/resume.pt", weights_only=True)  # weights, Adam's states, replay, ..
        del end["args"]
        end["csv"] = Path("run/returns.csv").read_text() + Path("run/losses.csv").read_text()
        results.append(end)
    assert equal(*results)


def test_python_O_as_a_user_sees_it(tmp_path):
    """-O removes assertions, not our checks: one line on standard error, nothing else."""
    write_dataset(tmp_path / "d.npz", arrays=make_arrays(action_dim=3))
    env = os.environ | {"PYTHONOPTIMIZE": "1"}
    process = script("mop_pbrl_teacher", *TEACHER, cwd=tmp_path, env=env)
    message = "d.npz: actions: expected float32 (200, 6), found float32 (200, 3)"
    assert process.stderr == f"mop_pbrl_teacher.py: error: {message}\n"
    assert (process.stdout, process.returncode) == ("", 1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_whatever_the_shell_wants_to_render_with(tmp_path, name):
    """dm_control knows no backend of this name, and stops where it is imported with it."""
    process = script(name, "--help", cwd=tmp_path, env=os.environ | {"MUJOCO_GL": "EGL"})
    assert "--run-dir" in process.stdout, process.stderr


def test_importing_a_script_leaves_rendering_alone(tmp_path):
    code = f"import os, {', '.join(SCRIPTS)}; print(os.environ['MUJOCO_GL'])"
    env = os.environ | {"MUJOCO_GL": "off", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert process.stdout == "off\n", process.stderr


def test_threads_0_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    monkeypatch.setattr(sys, "argv", ["mop_distill.py", "--threads", "0"])
    assert distill.parse_args()[0].threads == 3
    assert torch.get_num_threads() == 3


def test_a_copy_in_a_subfolder_finds_the_bundled_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "__file__", str(ROOT / "variants/copy.py"))
    found = distill.find_file("data/walker-stand-medium.npz")
    assert found == str(ROOT / "pretrained/walker-stand-medium.npz")
