"""The distillation loss against a plain loop, its wiring, and the teachers' precomputed actions."""

import numpy as np
import pytest
import torch

import mop_distill as distill
from conftest import make_arrays, write_dataset, write_teacher


def test_mse_loss_equals_a_plain_loop():
    torch.manual_seed(0)
    student, teachers = distill.Actor(6, 2, 16), [distill.Actor(5, 2, 8) for _ in range(3)]
    states = torch.randn(3, 7, 5)
    total = 0.0
    for i, teacher in enumerate(teachers):
        for s in states[i]:
            error = teacher(s[None])[0] - student(torch.cat([s, torch.tensor([float(i)])])[None])[0]
            total += (error**2).sum().item() / (3 * 7)
    x = torch.cat([distill.add_task(states[i], i) for i in range(3)])
    targets = torch.cat([distill.in_parts(t, states[i], rows=3) for i, t in enumerate(teachers)]).detach()
    loss = distill.mse_loss(student, x, targets).mean()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for t in teachers for p in t.parameters())


def test_the_student_fits_its_teachers(run_main, tmp_path):
    """Two teachers that disagree, datasets of unequal sizes: the student learns both, told apart by the id."""
    arrays = make_arrays(300), make_arrays(150, seed=1)
    data = [write_dataset(tmp_path / f"d{i}.npz", task, arrays[i]) for i, task in enumerate(distill.Args.tasks)]
    teachers = [write_teacher(tmp_path / f"t{i}.pt", task, seed=i) for i, task in enumerate(distill.Args.tasks)]
    options = ["--data", *data, "--teachers", *teachers, "--run-dir", "run", "--gradient-steps", 600, "--hidden", 64]
    options += ["--learning-rate", 1e-3, "--eval-every", 600, "--eval-episodes", 1, "--final-eval-episodes", 2]
    result = run_main(distill, *options, "--batch-size", 128)
    assert result["files"][0] == "run/student.pt" and (tmp_path / "run/learning_curve.png").stat().st_size > 5000
    checkpoint = distill.load_checkpoint(tmp_path / "run/student.pt", ("student",))
    student = distill.load_actor(checkpoint, "student")
    for i in range(2):
        obs = torch.from_numpy(arrays[i]["observations"])
        teacher = distill.load_actor(torch.load(teachers[i], weights_only=True), "teacher")
        with torch.no_grad():
            error = (teacher(obs) - student(distill.add_task(obs, i))).square().sum(1).mean()
            wrong = (teacher(obs) - student(distill.add_task(obs, 1 - i))).square().sum(1).mean()
        assert error < 2e-3 < wrong
    assert result["returns"]["walker-walk"]["episodes"] == 2 and result["returns"]["walker-walk"]["teacher"] == 100.0
    assert len(checkpoint["returns"]["walker-stand"]) == 2
    rows = (tmp_path / "run/returns.csv").read_text().splitlines()
    assert rows[0] == "step,task,episode,return" and len(rows) == 3
    assert np.isfinite(float(rows[1].split(",")[3]))


def test_an_unknown_loss_is_refused(run_main):
    code, text = run_main(distill, "--loss", "bc")
    assert code == 2 and "bc" in text
