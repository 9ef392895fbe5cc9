"""What docs/tour.md promises: a student loaded by hand earns what the scripts report, Huber's loss.

tests/test_docs.py runs the page itself.
"""

import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mop_distill
import mop_measure
from conftest import ROOT, write_teacher
from test_docs import BLOCK, TOUR, apply_diff

SEED = 2**31 + 3


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run_student = load_module(ROOT / "examples/run_student.py")


def write_student(path, tasks, obs_dim, action_dim, encoding="number", log_std=None):
    """A student with large random weights, so that its actions depend on state and id."""
    torch.manual_seed(1)
    code_size = len(tasks) if encoding == "onehot" else 1
    out_dim = 2 * action_dim if log_std else action_dim
    actor = mop_distill.Actor(obs_dim + code_size, out_dim, 8)
    with torch.no_grad():
        for weight in actor.parameters():
            weight.mul_(3)
    checkpoint = {
        "schema_version": 1,
        "kind": "student",
        "tasks": tasks,
        "sizes": {
            "in_dim": obs_dim + code_size,
            "obs_dim": obs_dim,
            "action_dim": action_dim,
            "hidden": 8,
            "log_std": log_std,
            "layer_norm": False,
            "task_encoding": encoding,
        },
        "actor": actor.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return actor


WALKER = (["walker-stand", "walker-walk"], 24, 6)
BALL_IN_CUP = (["ball_in_cup-catch"], 8, 2)


@pytest.mark.parametrize(
    "sizes, task, encoding, log_std, code",
    [
        (WALKER, "walker-walk", "number", None, [1]),
        (WALKER, "walker-stand", "onehot", None, [1, 0]),
        (WALKER, "walker-walk", "number", (-5.0, 0.0), [1]),  # of --loss kl
        (BALL_IN_CUP, "ball_in_cup-catch", "number", None, [0]),  # no walker
    ],
)
def test_returns_are_those_of_the_scripts(tmp_path, sizes, task, encoding, log_std, code):
    actor = write_student(tmp_path / "student.pt", *sizes, encoding, log_std)
    args = run_student.Args(str(tmp_path / "student.pt"), task, SEED)
    found = run_student.main(args)
    episodes = mop_measure.run_episodes(actor, task, [SEED], 1, code=code)
    assert found == pytest.approx(episodes[0]["rewards"].sum(), rel=1e-9)
    if task.startswith("walker"):  # there the id matters
        other_code = [1 - number for number in code]
        others = mop_measure.run_episodes(actor, task, [SEED], 1, code=other_code)
        assert abs(found - others[0]["rewards"].sum()) > 1e-3


@pytest.mark.parametrize("layer_norm", [True, False])
def test_returns_of_behaviours_and_teachers(tmp_path, layer_norm):
    actor = mop_measure.Actor(24, 6, 8, layer_norm)
    path = tmp_path / "policy.pt"
    write_teacher(path, actor=actor.state_dict())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["sizes"]["layer_norm"] = layer_norm
    torch.save(checkpoint, path)
    found = run_student.main(run_student.Args(str(path), "walker-walk", SEED))
    (episode,) = mop_measure.run_episodes(actor, "walker-walk", [SEED], 1)
    assert found == pytest.approx(episode["rewards"].sum(), rel=1e-9)


def test_the_tours_lines_earn_the_same(tmp_path, monkeypatch, capsys):
    """Its episode is the first one of the scripts' evaluations, in walker-walk."""
    monkeypatch.chdir(tmp_path)
    actor = write_student(tmp_path / "runs/tour/student.pt", *WALKER)
    blocks = [text for language, text in BLOCK.findall(TOUR.read_text()) if language == "python"]
    blocks = [text for text in blocks if "student.pt" in text]
    assert len(blocks) == 1
    exec(blocks[0], {})
    found = float(re.fullmatch(r"walker-walk: return (.*)\n", capsys.readouterr().out).group(1))
    seeds = [2**31]
    episodes = mop_measure.run_episodes(actor, "walker-walk", seeds, 1, code=[1])
    assert found == pytest.approx(episodes[0]["rewards"].sum(), abs=0.0501)


def test_gif(tmp_path):
    """Ten pictures per second of an episode of 25 s."""
    write_student(tmp_path / "student.pt", *WALKER)
    render = "from dm_control import suite; suite.load('walker', 'walk').physics.render(8, 8)"
    has_egl = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['MUJOCO_GL'] = 'egl'; {render}"]
    )
    if has_egl.returncode:
        pytest.skip("EGL does not work here")
    options = ["--student", "student.pt", "--gif", "walk.gif"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/run_student.py"), *options],
        cwd=tmp_path,
        env={"MUJOCO_GL": "egl", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "wrote walk.gif"
    with Image.open(tmp_path / "walk.gif") as image:
        assert image.n_frames > 100  # equal ones are one
        image.seek(0)
        first = np.array(image.convert("RGB"))
        image.seek(image.n_frames - 1)
        assert np.abs(first.astype(int) - np.array(image.convert("RGB"))).max() > 20


def test_hubers_loss_of_the_tour(tmp_path):
    """The page's change of the script, against Huber's definition; far away its slope is 0.1."""
    path = tmp_path / "my_distill.py"
    shutil.copy(ROOT / "mop_distill.py", path)
    changes = [text for language, text in BLOCK.findall(TOUR.read_text()) if language == "diff"]
    assert len(changes) == 1
    apply_diff(changes[0], path)
    huber_loss = load_module(path).huber_loss

    rng = np.random.default_rng(1)
    action = rng.uniform(-1, 1, (50, 6))
    distances = rng.choice([-1.5, -0.3, -0.05, 0.0, 0.02, 0.09, 0.8], (50, 6))
    expected = np.zeros(50)
    for row in range(50):
        for distance in np.abs(distances[row]):
            if distance <= 0.1:
                expected[row] += distance**2 / 2
            else:
                expected[row] += 0.1 * (distance - 0.05)
    teacher_action = torch.from_numpy(action + distances)
    action = torch.from_numpy(action).requires_grad_()
    loss = huber_loss(action, teacher_action)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-9)
    loss.sum().backward()
    slope = -np.clip(distances, -0.1, 0.1)
    np.testing.assert_allclose(action.grad, slope, atol=1e-9)
