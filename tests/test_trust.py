"""Damaged files are refused in one line or read as what they were; runs that are killed again and again lose nothing.

CI runs a part; `python -m pytest -m slow tests/test_trust.py` runs all: 2,100 damaged files, 50 kills.
"""

import copy
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import mop_distill as distill
import mop_ds as ds
from conftest import ROOT, make_arrays, script, write_dataset, write_teacher

FULL = [pytest.param(0, 30), pytest.param(1, 670, marks=pytest.mark.slow)]  # seed, number of damaged files of each kind
FULL = pytest.mark.parametrize("seed, count", FULL)
ODD = [None, -1, 0, 2**70, 0.5, float("nan"), "x", b"x", [], [[]], {}, {"a": 1}, torch.zeros(3), torch.ones(())]


def damaged(content: bytes, rng) -> bytes:
    """Flipped bits, a part that is missing, zeroed, doubled or moved."""
    data, (a, b) = bytearray(content), sorted(rng.integers(0, len(content), 2))
    kind = rng.integers(6)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        del data[a : min(b, a + 100)]
    elif kind == 3:
        data[a:b] = bytes(b - a)
    elif kind == 4:
        data[a:a] = data[a:b]
    else:
        data = data[a:] + data[:a]
    return bytes(data)


def altered(value, rng):
    """A copy in which one entry, at any depth, is missing or something odd."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        if isinstance(place[key], dict | list) and len(place[key]) and rng.random() < 0.7:
            place = place[key]
            continue
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = ODD[rng.integers(len(ODD))]
        return value


def attempt(read):
    """What read() returns, or None where it refuses with one line."""
    try:
        return read()
    except SystemExit as end:
        if end.code == 2:  # tyro's, of a flag
            return None
        assert isinstance(end.code, str) and "error: " in end.code and "\n" not in end.code, end.code
    return None


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@FULL
def test_damaged_datasets(tmp_path, seed, count):
    rng, path = np.random.default_rng([1, seed]), tmp_path / "d.npz"
    content = write_dataset(path, arrays=make_arrays(20)).read_bytes()
    known, refused = distill.load_dataset(path, "walker-stand", (24, 6)), 0
    for _ in range(count):
        path.write_bytes(damaged(content, rng))
        found = attempt(lambda: distill.load_dataset(path, "walker-stand", (24, 6)))
        assert found is None or equal(found, known)
        refused += found is None
    assert refused > 0.8 * count


def read_teacher(path):
    checkpoint = distill.load_checkpoint(path, ("teacher",), "walker-stand")
    networks = [distill.load_network(cls, checkpoint, path) for cls in (distill.Actor, distill.Critics)]
    return [network.state_dict() for network in networks]


@FULL
def test_damaged_checkpoints(tmp_path, seed, count):
    rng, path = np.random.default_rng([2, seed]), write_teacher(tmp_path / "t.pt")
    content, known, refused = path.read_bytes(), read_teacher(path), 0
    original = torch.load(path, weights_only=True)
    for i in range(count):
        if i % 2:
            path.write_bytes(damaged(content, rng))
        else:
            torch.save(altered(original, rng), path)
        found = attempt(lambda: read_teacher(path))
        assert found is None or (equal(found, known) if i % 2 else all(v.isfinite().all() for v in found[0].values()))
        refused += found is None
    assert refused > 0.4 * count  # where a name that nobody reads is altered, it is read


@FULL
def test_damaged_resume_points(tmp_path, monkeypatch, seed, count):
    """Read as main() does; what is taken must also make another step."""
    rng, path, table = np.random.default_rng([3, seed]), tmp_path / "resume.pt", torch.randn(8, 25)

    def modules(hidden):
        torch.manual_seed(0)
        student = distill.Actor(25, 6, hidden)
        adam = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True, capturable=True)
        return {"student": student, "optimizer": adam}, torch.Generator()

    def train(parts):
        parts["student"](table).sum().backward()
        parts["optimizer"].step()
        return parts["student"].state_dict()

    def read():
        monkeypatch.setattr(sys, "argv", ["mop_distill.py", "--resume", str(tmp_path)])
        args, point, _ = distill.parse_args(distill.Args, distill.LAPTOP)
        parts, generator = modules(args.hidden)
        step, rows = distill.restore(point, args.gradient_steps, parts, generator, [table])
        return [step, rows, train(parts), generator.get_state()]

    parts, generator = modules(4)
    train(parts)
    rows = [[2, "walker-stand", [1.0, 2.0]]]
    monkeypatch.setattr(sys, "argv", ["mop_distill.py", "--threads", "1", "--hidden", "4"])
    distill.save_point(tmp_path, 2, parts, generator, [table], rows)
    content, known, refused = path.read_bytes(), read(), 0
    original = torch.load(path, weights_only=True)
    for i in range(count):
        if i % 2:
            path.write_bytes(damaged(content, rng))
        else:
            torch.save(altered(original, rng), path)
        found = attempt(read)
        assert found is None or not i % 2 or equal(found, known)
        refused += found is None
    assert refused > 0.4 * count


@contextmanager
def full_disk():
    """No file grows beyond 1000 bytes: the system refuses the write, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [lambda f: torch.save(torch.ones(9999), f), lambda f: f.write(bytes(9999))])
def test_a_full_disk_keeps_the_old_file(tmp_path, write):
    path = tmp_path / "resume.pt"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(SystemExit, match=r"resume\.pt: expected free space"):
        distill.write_atomic(path, write)
    assert path.read_bytes() == b"old" and [found.name for found in tmp_path.iterdir()] == ["resume.pt"]


def test_relabelled_rewards_without_room_for_their_file(tmp_path):
    """They are used all the same; where a part of the file was written, the next run makes it anew."""
    arrays = make_arrays(400)
    with full_disk():
        found = ds.relabel(tmp_path / "d.npz", arrays, "walker-walk")
    np.testing.assert_array_equal(found, ds.relabel(tmp_path / "d.npz", arrays, "walker-walk"))
    (path,) = tmp_path.iterdir()
    np.testing.assert_array_equal(found, np.load(path))


KILLS = [pytest.param("mop_distill", 2), pytest.param("mop_distill", 25, marks=pytest.mark.slow)]
KILLS += [pytest.param("mop_td3_collect", 25, marks=pytest.mark.slow)]


@pytest.mark.parametrize("name, kills", KILLS)
def test_killed_again_and_again(tmp_path, name, kills):
    """At any moment after the first resume point, while it is saved as well; the end is that of a run left alone."""
    rng, outputs, steps = np.random.default_rng(kills), [], 300 * (kills + 2)
    common = ["--threads", 1, "--eval-episodes", 1, "--final-eval-episodes", 1, "--hidden", 16, "--batch-size", 16]
    if name == "mop_distill":
        options = ["--tasks", "walker-stand", "--gradient-steps", steps, "--eval-every", 200]
        output = "run/student.pt"
    else:
        options = [
            "--task",
            "walker-stand",
            "--total-timesteps",
            1000 * (kills + 2),
            "--eval-every",
            1000,
            "--medium-step",
            1000,
        ]
        options += ["--learning-starts", 500, "--num-transitions", 1000]
        output = "checkpoints/walker-stand-expert-behavior.pt"
    for folder, left in ((tmp_path / "alone", 0), (tmp_path / "killed", kills)):
        folder.mkdir()
        flags = [*options, *common, "--run-dir", "run"]
        while left:
            command = [str(part) for part in (sys.executable, ROOT / f"{name}.py", *flags)]
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            point = folder / "run/resume.pt"
            before = point.stat().st_mtime_ns if point.exists() else 0
            while process.poll() is None and (not point.exists() or point.stat().st_mtime_ns == before):
                time.sleep(0.005)
            time.sleep(rng.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, process.stderr.read()
            flags, left = ["--resume", "run"], left - 1
        process = script(name, *flags, cwd=folder)
        assert process.returncode == 0, process.stderr
        outputs.append([torch.load(folder / output, weights_only=True), (folder / "run/returns.csv").read_text()])
        assert not list(folder.rglob("*.tmp"))
    (alone, curve), (killed, other) = outputs
    assert equal(alone["actor"], killed["actor"]) and alone["returns"] == killed["returns"] and curve == other
