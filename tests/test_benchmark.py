"""benchmark/: counts of operations against torch's own counter, and tiny runs with a peer."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mop_distill as distill
import mop_pbrl_teacher as pbrl
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
speed = importlib.import_module("speed")
scaling = importlib.import_module("scaling")
plain_td3 = importlib.import_module("plain_td3")


def test_operations_of_a_distillation_step():
    student = distill.Actor(25, 6, 32)
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):  # tasks
            action = student(torch.randn(16, 25))
            distill.mse_loss(action, torch.zeros(16, 6)).mean().backward()
    expected = counter.get_total_flops()
    assert speed.operations(speed.distill_products(batch=16, hidden=32)) == expected


def test_operations_of_a_pbrl_update():
    """Critics and, at half its count, the actor's part."""
    batch_size = 8
    actor = pbrl.Actor(24, 6, 32)
    target_actor = pbrl.Actor(24, 6, 32)
    critics = pbrl.Critics(3, 24, 6, 32)
    target_critics = pbrl.Critics(3, 24, 6, 32)
    obs = torch.randn(batch_size, 24)
    action = torch.zeros(batch_size, 6)
    batch = {
        "observations": obs,
        "actions": action,
        "rewards": torch.zeros(batch_size),
        "next_observations": obs,
        "terminals": torch.zeros(batch_size, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as critic_counter:
        loss, _ = pbrl.pbrl_critic_loss(
            critics, target_critics, actor, target_actor, batch, 1.0, pbrl.Args()
        )
        loss.backward()
    with FlopCounterMode(display=False) as actor_counter:
        loss = pbrl.pbrl_actor_loss(actor, critics, obs, action, torch.ones(batch_size), 0.0)
        loss.backward(inputs=list(actor.parameters()))
    expected = critic_counter.get_total_flops() + 0.5 * actor_counter.get_total_flops()
    assert speed.operations(speed.pbrl_products(batch_size, 32, 3)) == expected


def test_bytes_and_operations_by_hand():
    """Twice a product (2, 3) @ (3, 4): 6 + 12 + 8 numbers of 4 bytes, 24 multiplications and
    as many additions."""
    products = [(2, [(2, 3, 4)])]
    assert speed.operand_bytes(products) == 2 * 4 * (6 + 12 + 8)
    assert speed.operations(products) == 2 * 48


def run(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--threads", "1", *flags])
    module.main()


def test_a_tiny_run_with_a_peer(tmp_path, monkeypatch):
    peer = "def make(work, device):\n    return (lambda: None) if work == 'distill' else None\n"
    (tmp_path / "peer.py").write_text(peer)
    monkeypatch.setattr(speed, "overheads", lambda folder, threads: (1.0, 1.0))
    flags = ["--works", "distill", "load", "collect", "memory", "--rounds", "1", "--steps", "1"]
    flags += ["--transitions", "2000", "--peer", f"{tmp_path}/peer.py:make"]
    run(monkeypatch, speed, *flags, "--output", f"{tmp_path}/speed.json")
    text = (tmp_path / "speed.json").read_text()
    assert str(tmp_path) not in text  # nothing of this machine's folders
    results = json.loads(text)["results"]
    row = results["distill"]
    assert 0 < row["floor"] < 3 * row["seconds"]  # one noisy round
    assert row["ratio"] > 0.3
    parts = {"sampling", "backward", "optimiser", "targets", "evaluation", "logging"}
    assert row["shares"].keys() >= parts
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert min(row["shares"].values()) >= 0
    assert 0 < row["peer"] < row["seconds"]
    assert "peer" not in results["load"]
    assert results["load"]["seconds"] > 0
    assert results["collect"]["seconds"] > 0
    sizes = results["memory"]  # 2000 rows are nothing beside torch's libraries
    assert 0.1 < sizes["gib_imports"] < sizes["gib"] < 2


def test_the_precision_reaches_the_loop_and_its_floor(tmp_path, monkeypatch):
    precisions = {"floor": set(), "loop": set()}
    floor = speed.floor
    loss = distill.mse_loss

    def spied_floor(*args):
        precisions["floor"].add(torch.get_float32_matmul_precision())
        return floor(*args)

    def spied_loss(*args):
        precisions["loop"].add(torch.get_float32_matmul_precision())
        return loss(*args)

    monkeypatch.setattr(speed, "floor", spied_floor)
    monkeypatch.setattr(distill, "mse_loss", spied_loss)
    monkeypatch.setattr(speed, "overheads", lambda folder, threads: (1.0, 1.0))
    flags = ["--works", "distill", "--rounds", "1", "--steps", "1", "--matmul-precision", "medium"]
    run(monkeypatch, speed, *flags, "--output", f"{tmp_path}/speed.json")
    assert precisions == {"floor": {"medium"}, "loop": {"medium"}}
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["args"]["matmul_precision"] == "medium"


def test_a_peer_that_is_not_there(monkeypatch):
    with pytest.raises(SystemExit, match=r"none\.py:make: expected FILE\.py:FUNCTION"):
        run(monkeypatch, speed, "--works", "load", "--peer", "none.py:make")


def test_the_plain_td3_learns_as_it_steps(monkeypatch):
    """A step changes the critics, every second one the actor, too."""
    networks = []
    mlp = plain_td3.mlp

    def kept_mlp(n_in, n_out):
        networks.append(mlp(n_in, n_out))
        return networks[-1]

    monkeypatch.setattr(plain_td3, "HIDDEN", 8)
    monkeypatch.setattr(plain_td3, "BATCH_SIZE", 4)
    monkeypatch.setattr(plain_td3, "mlp", kept_mlp)
    assert plain_td3.make("pbrl", "cpu") is None
    step = plain_td3.make("td3", "cpu")
    before = [network[0].weight.detach().clone() for network in networks]
    for expected in ([False, True, True], [True, True, True]):  # actor, critics
        step()
        changed = []
        for network, weight in zip(networks, before, strict=True):
            changed.append(not torch.equal(network[0].weight, weight))
        assert changed == expected


def test_a_tiny_scaling(tmp_path, monkeypatch):
    monkeypatch.setitem(scaling.VALUES, "states", (1000, 2000))
    flags = ["--axes", "tasks", "critics", "states", "--points", "2"]
    flags += ["--rounds", "1", "--steps", "1"]
    run(monkeypatch, scaling, *flags, "--output", f"{tmp_path}/scaling.json")
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    found = [(point["axis"], point["work"], point["value"]) for point in points]
    assert found == [
        ("tasks", "distill", 2),
        ("tasks", "distill", 3),
        ("critics", "pbrl", 2),
        ("critics", "pbrl", 3),
        ("states", "distill", 1000),
        ("states", "distill", 2000),
        ("states", "load", 1000),
        ("states", "load", 2000),
    ]
    for point in points:
        assert point["ms"] > 0
        if point["work"] == "load":
            continue
        assert 0 < point["floor_ms"] < 3 * point["ms"]  # one noisy round
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_exponents_of_a_known_law():
    """Time proportional to K^2: exponent 2."""
    points = []
    for value in scaling.VALUES["critics"]:
        points.append({"axis": "critics", "work": "pbrl", "value": value, "ms": 3.0 * value**2})
    assert scaling.power_law(points) == {"pbrl by critics": 2.0}


def test_shares_of_a_known_profile():
    """Of 100 units 10 sample, 20 go forward, 60 backward (50 in products), 8 optimise."""
    rows = []
    for key, own, with_calls in [
        ("aten::randint", 10, 10),
        ("aten::mm", 70, 70),
        ("autograd::engine::evaluate_function: Mm", 10, 60),
        ("Optimizer.step#Adam.step", 8, 8),
        ("aten::lerp_", 2, 2),
    ]:
        row = SimpleNamespace(key=key, self_cpu_time_total=own, cpu_time_total=with_calls)
        rows.append(row)
    found = speed.shares(SimpleNamespace(key_averages=lambda: rows), "cpu")
    expected = {
        "sampling": 0.1,
        "forward and the rest": 0.2,
        "backward": 0.6,
        "optimiser": 0.08,
        "targets": 0.02,
    }
    assert found == pytest.approx(expected)
