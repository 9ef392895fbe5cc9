"""The workflow in reproduce/: its whole grid dry, one chain at tiny scale, and what must not run twice."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import ROOT, write_teacher

sys.path.insert(0, str(ROOT / "reproduce"))
import record

pytest.importorskip("snakemake")
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "reproduce" / "Snakefile"), "--cores", "2"]
MSE = "student/mse-none-{hidden}-{states}-medium-medium/seed1"
TINY = "docs/results/tiny"
LAYERS = (4 + 2) * 2  # seeds 2 and 3: widths of Fig. 6.4 but 512, ndcg, listwise; not at thesis scale
PLAIN = 2 * 3  # without the cloning term, not at thesis scale: tasks x seeds; naive and frozen x seeds
GRID = {
    "td3": 2,  # a task each
    "behavior": 4,  # medium, expert; that of medium-replay comes from td3
    "data": 4,
    "composed": 2 * 4 + 2 + 2,  # four mixes by the medium teachers, online by those of expert and medium-replay
    "teacher": 2 * 3 * 3 + 2 * 3 + 2 * 2 + PLAIN,  # tasks x levels x seeds; Gaussian of medium; tanh, common seed
    "multitask": 3 * 3 + 3 + PLAIN,  # naive: levels x seeds; frozen: of medium
    "student": 3 * 4  # losses x seeds
    + 2 * 4  # of teachers with a bounded std, or of a common seed
    + 8 * 4  # the other eight pairs
    + 4  # online states of medium-replay
    + 6 * 4 * 3  # widths x mixes x seeds
    + 5  # other widths on offline states, seed 1
    + 3  # regularisers, seed 1
    + LAYERS,
    "ds": 2 * 4 + 1,  # and of a common seed
    "oqs": 2 * 4,
    "measure": 3 * 4 + 2 * 2 * 4 + 4 + 1,  # MOP's of three levels; those of DS and OQS; of a common seed
    "activations": 3,
    "shift": 2 * (3 + 3) * 3,  # tasks x (levels, mixes) x seeds
    "all": 1,
}


def snakemake(folder, *args, **config):
    command = [*SNAKEMAKE, *args, "--config", f"folder={folder}", *(f"{k}={v}" for k, v in config.items())]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def planned(folder, *targets, **config) -> Counter:
    """Rule -> number of jobs of a dry run."""
    text = snakemake(folder, "--quiet", "rules", "--dry-run", *targets, **config)
    return Counter({rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", text, re.M) if rule != "total"})


def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_grid(tmp_path):
    assert planned(tmp_path, scale="laptop") == GRID | {"cross": 3 * 1}


def test_every_figure_and_table_is_a_target(tmp_path):
    parts = (ROOT / "reproduce" / "Snakefile").read_text().partition("PARTS = ")[2]
    targets = re.findall(r'^    "(\w+)":', parts, re.M)
    assert {"fig51", "fig53", "fig54", "fig55", "fig57", "fig58", "fig63", "fig64", "fig65", "fig69"} < set(targets)
    assert {"table61", "table62", "table63", "appendixC", "appendixD", "appendixE", "appendixF"} < set(targets)
    wanted = GRID | {"cross": 3 * 3} | dict.fromkeys(targets, 1)
    wanted |= {rule: GRID[rule] - PLAIN for rule in ("teacher", "multitask")} | {"student": GRID["student"] - LAYERS}
    assert planned(tmp_path, *targets, scale="thesis") == {rule: n for rule, n in wanted.items() if rule != "all"}


def test_a_fresh_clone_runs_only_what_has_no_csv(tmp_path):
    """The CSVs of all but one student of Fig. 5.4: its data is made, no other student or teacher again."""
    text = snakemake(tmp_path, "--dry-run", "fig54", scale="laptop")
    wanted = {path for path in re.findall(r"docs/results/laptop/\S+\.csv", text)}
    left = "docs/results/laptop/student/q-none-256-offline-medium-medium/seed4.csv"
    assert left in wanted
    for path in wanted - {left}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert planned(tmp_path, "fig54", scale="laptop") == {"data": 2, "student": 1, "fig54": 1}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Behaviours to the activations of a student, at tiny scale."""
    folder = tmp_path_factory.mktemp("chain")
    student = MSE.format(hidden=16, states="offline")
    snakemake(folder, f"{TINY}/measure/{student}-activations.csv", scale="tiny")
    return folder


def test_a_chain(chain):
    student = MSE.format(hidden=16, states="offline")
    found = rows(chain / TINY / f"{student}.csv")
    assert list(found[0]) == ["policy", "task", "evaluation", "step", "episode", "return"]
    counts = Counter((r["policy"], r["task"], r["evaluation"], r["step"], r["episode"] == "mean") for r in found)
    tasks = "walker-stand", "walker-walk"
    training = {("student", task, "training", step, True): 1 for task in tasks for step in ("10", "20")}
    assert counts == training | {("student", task, "final", "20", False): 2 for task in tasks}
    assert {r["layer"] for r in rows(chain / TINY / f"{student}-tau.csv")} == {"1", "2"}
    assert {r["policy"] for r in rows(chain / TINY / "teacher/walker-stand-medium/seed1.csv")} == {"teacher"}
    assert {r["policy"] for r in rows(chain / TINY / "behavior/walker-walk-medium-replay/seed1.csv")} == {"behavior"}
    measures = {(r["measure"], r["layer"]) for r in rows(chain / TINY / f"measure/{student}.csv")}
    names = ["cka", *(f"{kind} tau-{x}" for kind in ("per-state", "average") for x in "ab")]
    assert measures == {(name, layer) for name in names for layer in "12"}
    found = rows(chain / TINY / f"measure/{student}-activations.csv")
    assert Counter((r["task"], r["layer"]) for r in found) == {(task, layer): 16 for task in tasks for layer in "12"}


def test_done_stays_done_without_the_big_files(chain, tmp_path):
    targets = [str(path.relative_to(chain)) for path in (chain / TINY).rglob("*.csv")]
    assert len(targets) == 8 and planned(chain, *targets, scale="tiny") == {}
    shutil.copytree(chain / "docs", tmp_path / "docs")
    activations = f"{TINY}/measure/{MSE.format(hidden=16, states='offline')}-activations.csv"
    assert planned(tmp_path, activations, scale="tiny") == {}


def test_an_interrupted_run_goes_on(chain):
    """Stopped after the student's first resume point; the same command ends the run."""
    name = MSE.format(hidden=8, states="offline")
    run, result = chain / "reproduce/work/tiny/runs" / name, chain / TINY / f"{name}.csv"
    run.mkdir(parents=True)
    (run / "returns.csv").touch()  # a folder without a resume point: of no use, replaced
    options = [f"{TINY}/{name}.csv", "--config", f"folder={chain}", "scale=tiny", "extra=--gradient-steps 40"]
    process = subprocess.Popen([*SNAKEMAKE, *options], start_new_session=True)
    end = time.time() + 300
    while not (run / "resume.pt").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C, which the script receives, too
    assert process.wait(300) != 0 and (run / "resume.pt").exists() and not result.exists()
    snakemake(chain, options[0], scale="tiny", extra="--gradient-steps 40")
    assert [r["step"] for r in rows(result) if r["episode"] == "mean"][::2] == [str(s) for s in range(10, 50, 10)]
    assert len(list(run.glob("events*"))) == 2  # the first one's is there, too


@pytest.mark.slow
def test_every_other_rule(chain):
    names = ["student/kl-none-16-offline_tanh-medium-medium/seed1", MSE.format(hidden=16, states="random90")]
    names += ["student/kl-none-16-offline-medium-medium/seed1", MSE.format(hidden=16, states="offline_common")]
    names += [f"{name}/medium/seed1" for name in ("naive-plain", "frozen", "ds", "ds-common", "oqs", "cross")]
    names += ["shift/walker-walk-medium-noise/seed1", "shift/walker-walk-medium-offline/seed1"]
    names += ["measure/ds/medium/seed1", "measure/oqs/medium/seed1", "behavior/walker-walk-expert/seed1"]
    snakemake(chain, *(f"{TINY}/{name}.csv" for name in names), scale="tiny")
    found = {(r["policy"], r["task"], r["evaluation"]) for r in rows(chain / TINY / "oqs/medium/seed1.csv")}
    both = {("walker-stand", "from walker-walk"), ("walker-walk", "from walker-stand")}
    both |= {(task, "student") for task in ("walker-stand", "walker-walk")}
    assert found == {(policy, task, kind) for task, policy in both for kind in ("training", "final")}
    assert {r["policy"] for r in rows(chain / TINY / "ds/medium/seed1.csv")} == {"teacher", "student"}
    crossed = Counter((r["teacher"], r["task"]) for r in rows(chain / TINY / "cross/medium/seed1.csv"))
    assert list(crossed.values()) == [2] * 4
    shift = {r["measure"]: r["value"] for r in rows(chain / TINY / "shift/walker-walk-medium-noise/seed1.csv")}
    assert list(shift) == ["js_bits", "kl_ab", "kl_ba", "auc", "accuracy"] and 0 <= float(shift["js_bits"]) <= 1
    work = chain / "reproduce/work/tiny/runs"
    points = {kind: torch.load(work / f"{kind}/medium/seed1/resume.pt") for kind in ("naive-plain", "frozen")}
    steps = {kind: float(point["actor_optimizer"]["state"][0]["step"]) for kind, point in points.items()}
    assert steps == {"naive-plain": 20, "frozen": 1}  # every second step, for both tasks


def test_frozen_actor_moves_once(tmp_path, monkeypatch):
    """As mop_pbrl_teacher.py's Adams: the first is the actor's."""
    script = (ROOT / "reproduce" / "frozen_actor.py").read_text()
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.Adam)  # put back at the end
    exec(script.partition("runpy.run_path")[0], {})
    actor, critic = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    adams = [torch.optim.Adam([x], lr=0.1) for x in (actor, critic)]
    for _ in range(3):
        for x, optimizer in zip((actor, critic), adams, strict=True):
            (x**2).sum().backward()
            optimizer.step()
    assert np.allclose(actor.detach(), 0.9) and np.allclose(critic.detach(), 0.7, atol=0.01)


def test_record_says_what_it_expects(tmp_path, monkeypatch):
    def main(*args):
        monkeypatch.setattr(sys, "argv", ["record.py", *map(str, args)])
        record.main()

    teacher = write_teacher(tmp_path / "teacher.pt")
    for args in ([], [tmp_path / "a.csv"], [tmp_path / "a.txt", teacher], [tmp_path / "a.csv", tmp_path / "none.pt"]):
        with pytest.raises(SystemExit, match="expected OUT"):
            main(*args)
    main(tmp_path / "a.csv", teacher)
    assert rows(tmp_path / "a.csv")[0]["return"] == "100.00"
