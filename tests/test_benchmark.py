"""benchmark/speed.py: its counts of operations against torch's own counter, and a tiny run with a peer."""

import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mop_distill as distill
import mop_pbrl_teacher as pbrl
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import scaling
import speed


def test_operations_of_a_distillation_step():
    student, x = distill.Actor(25, 6, 32), torch.randn(2 * 16, 25)
    with FlopCounterMode(display=False) as counter:
        distill.mse_loss(student, x, torch.zeros(32, 6)).mean().backward()
    assert speed.operations(speed.distill_products(batch=16, hidden=32)) == counter.get_total_flops()


def test_operations_of_a_pbrl_update():
    """Critics and, at half its count, the actor's part."""
    batch, hidden, k = 8, 32, 3
    actor, target_actor = (pbrl.Actor(24, 6, hidden) for _ in range(2))
    critics, target_critics = (pbrl.Critics(k, 24, 6, hidden) for _ in range(2))
    obs, action = torch.randn(batch, 24), torch.zeros(batch, 6)
    data = obs, action, torch.zeros(batch), obs, torch.zeros(batch)
    noise = torch.zeros(batch, 6), torch.zeros(3, 2 * batch, 6)
    with FlopCounterMode(display=False) as critic_counter:
        networks = critics, target_critics, actor, target_actor
        pbrl.pbrl_critic_loss(*networks, data, noise, 1.0, pbrl.Args())[0].backward()
    with FlopCounterMode(display=False) as actor_counter:
        torch.autograd.grad(pbrl.pbrl_actor_loss(actor, critics, obs, action), list(actor.parameters()))
    made, rows = critic_counter.get_total_flops() + 0.5 * actor_counter.get_total_flops(), batch * (1 + 2 * 3)
    bias = 2 * hidden * k * (2 * rows + batch + 0.5 * 2 * batch)  # ours has it as one more input row
    assert speed.operations(speed.pbrl_products(batch, hidden, k)) == made - bias


def test_a_tiny_run_with_a_peer(tmp_path, monkeypatch, capsys):
    (tmp_path / "peer.py").write_text(
        "def make(work, device):\n    return (lambda: None) if work == 'distill' else None\n"
    )
    options = ["--works", "distill", "load", "memory", "--rounds", "1", "--steps", "1", "--threads", "1"]
    options += ["--transitions", "2000"]
    options += ["--peer", f"{tmp_path}/peer.py:make", "--output", f"{tmp_path}/speed.json"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    speed.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("RESULT ")
    report = json.loads((tmp_path / "speed.json").read_text())
    row = report["results"]["distill"]
    assert 0 < row["floor"] < 3 * row["seconds"] and row["ratio"] > 0.3  # one noisy round
    assert row["shares"].keys() >= {"sampling", "backward", "optimiser", "targets", "evaluation", "logging"}
    assert sum(row["shares"].values()) == pytest.approx(1) and min(row["shares"].values()) >= 0
    assert 0 < row["peer"] < row["seconds"] and "peer" not in report["results"]["load"]
    assert report["results"]["load"]["seconds"] > 0
    sizes = report["results"]["memory"]  # 2000 rows are nothing beside torch's libraries
    assert 0.1 < sizes["gib_imports"] < sizes["gib"] < 2
    assert str(tmp_path) not in (tmp_path / "speed.json").read_text()  # nothing of this machine's folders


def test_the_precision_reaches_the_loop_and_its_floor(tmp_path, monkeypatch, capsys):
    seen, floor = [], speed.floor
    loss = distill.mse_loss
    spy = lambda where, f: lambda *a: (seen.append((where, torch.get_float32_matmul_precision())), f(*a))[1]  # noqa: E731
    monkeypatch.setattr(speed, "floor", spy("floor", floor))
    monkeypatch.setattr(distill, "mse_loss", spy("loop", loss))
    monkeypatch.setattr(speed, "overheads", lambda folder: (1.0, 1.0))
    options = ["--works", "distill", "--rounds", "1", "--steps", "1", "--threads", "1", "--matmul-precision", "medium"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, "--output", f"{tmp_path}/speed.json"])
    try:
        speed.main()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("floor", "medium"), ("loop", "medium")}
    assert json.loads((tmp_path / "speed.json").read_text())["args"]["matmul_precision"] == "medium"


def test_a_peer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--works", "load", "--transitions", "10", "--peer", "none.py:make"])
    with pytest.raises(SystemExit, match=r"none\.py:make: expected FILE\.py:FUNCTION"):
        speed.main()


def test_a_tiny_scaling(tmp_path, monkeypatch, capsys):
    options = ["--axes", "tasks", "width", "--points", "2", "--rounds", "1", "--steps", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options, "--output", f"{tmp_path}/scaling.json"])
    scaling.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("RESULT ")
    report = json.loads((tmp_path / "scaling.json").read_text())
    found = [(point["axis"], point["work"], point["value"]) for point in report["points"]]
    by_width = [("width", work, value) for work in ("pbrl", "td3", "distill") for value in (64, 128)]
    assert found == [("tasks", "distill", 2), ("tasks", "distill", 3), *by_width]
    assert all(0 < point["floor_ms"] < 3 * point["ms"] for point in report["points"])  # one noisy round
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_exponents_and_plot_of_a_known_law(tmp_path, monkeypatch, capsys):
    """Time proportional to K^2: exponent 2."""
    monkeypatch.setattr(scaling, "measure", lambda axis, value, *rest: {"ms": 3.0 * value**2})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--axes", "critics", "--output", f"{tmp_path}/scaling.json"])
    scaling.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1][7:])["exponents"] == {"pbrl by critics": 2.0}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_freed_memory_is_reused():
    """Twenty tensors of 8 MiB made and freed, ten times: without mallopt each of them brings 2048 page faults."""
    code = """
import resource, sys
sys.path.insert(0, {root!r})
import torch, mop_distill
sys.argv = ["mop_distill.py", "--threads", "1"]
mop_distill.parse_args(mop_distill.Args, mop_distill.LAPTOP)
for i in range(11):
    if i == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**21) for _ in range(20)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", code.format(root=str(ROOT))]
    faults = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults < 20_000, faults  # against 200 * 2048


def test_shares_of_a_known_profile():
    """100 units: 10 sampling, 20 forward, 60 backward (of which 50 in its products), 8 optimiser, 2 targets."""
    times = {"aten::randint": (10, 10), "aten::mm": (70, 70), "autograd::engine::evaluate_function: Mm": (10, 60)}
    times |= {"Optimizer.step#Adam.step": (8, 8), "aten::_foreach_lerp_": (2, 2)}  # own time, with what it calls
    rows = [SimpleNamespace(key=k, self_cpu_time_total=a, cpu_time_total=b) for k, (a, b) in times.items()]
    found = speed.shares(SimpleNamespace(key_averages=lambda: rows), "cpu")
    expected = {"sampling": 0.1, "forward and the rest": 0.2, "backward": 0.6, "optimiser": 0.08, "targets": 0.02}
    assert found == pytest.approx(expected)


def test_bytes_and_operations_by_hand():
    """Twice a product (2, 3) @ (3, 4): 6 + 12 + 8 numbers of 4 bytes, 24 multiplications and as many additions."""
    products = [(2, [(2, 3, 4)])]
    assert speed.operand_bytes(products) == 2 * 4 * (6 + 12 + 8) and speed.operations(products) == 2 * 48
