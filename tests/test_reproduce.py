"""The workflow in reproduce/: its grid dry, a chain at tiny scale, and what must not run twice."""

import base64
import csv
import importlib
import itertools
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

sys.path += [str(ROOT / "reproduce"), str(ROOT / "examples")]
record = importlib.import_module("record")
naive = importlib.import_module("naive_multitask_pbrl")

pytest.importorskip("snakemake")
SNAKEFILE = ROOT / "reproduce/Snakefile"
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--cores", "2"]
MSE = "student/mse-none-{hidden}-{states}-medium-medium/seed1"
TINY = "docs/results/tiny"
TASKS = ("walker-stand", "walker-walk")

# rule -> its number of jobs
STUDENTS = 3 * 4  # losses x seeds
STUDENTS += 2 * 4  # of teachers with a bounded std, or of a common seed
STUDENTS += 8 * 4  # the other eight pairs of levels
STUDENTS += 4  # online states of medium-replay
STUDENTS += 6 * 4 * 3  # widths x mixes x seeds
STUDENTS += 5  # other widths on offline states, seed 1
STUDENTS += 3  # regularisers, seed 1
LAYERS = (5 + 2) * 2  # seeds 2 and 3, not at thesis scale: widths of Fig. 6.4, ndcg, listwise
PLAIN = 2 * 3  # without the cloning term, not at thesis scale: tasks x seeds; naive, frozen x seeds
TEACHERS = 2 * 3 * 3  # tasks x levels x seeds
TEACHERS += 2 * 3  # Gaussian ones of medium
TEACHERS += 2 * 2  # with a bounded std, or a common seed
GRID = {
    "td3": 2,  # a task each
    "behavior": 4,  # medium, expert; that of medium-replay comes from td3
    "data": 4,
    "composed": 2 * 4 + 2 + 2,  # mixes by medium teachers; online by expert and medium-replay ones
    "teacher": TEACHERS + PLAIN,
    "multitask": 3 * 3 + 3 + PLAIN,  # naive: levels x seeds; frozen: of medium
    "student": STUDENTS + LAYERS,
    "shared_teacher": 2 * (2 * 4 + 3 + 2 * 4),  # tasks x (DS; of a common seed; OQS)
    "shared_student": 2 * 4 + 3 + 2 * 4,
    "measure": 3 * 4 + 2 * 2 * 4 + 4 + 3,  # MOP's of three levels; DS and OQS; of a common seed
    "cross": 3 * 3,  # levels x seeds
    "activations": 3,
    "shift": 2 * (3 + 3) * 3,  # tasks x (levels, mixes) x seeds
    "all": 1,
}
FIGURES = ["fig51", "fig53", "fig54", "fig55", "fig57", "fig58", "fig63", "fig64", "fig65", "fig69"]
TABLES = ["table61", "table62", "table63", "appendixC", "appendixD", "appendixE", "appendixF"]


def snakemake(folder, *args, **config):
    """What it prints that comes to its end."""
    settings = [f"{name}={value}" for name, value in config.items()]
    command = [*SNAKEMAKE, *args, "--config", f"folder={folder}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def planned(folder, *targets, **config) -> dict:
    """Rule -> number of jobs of a dry run."""
    text = snakemake(folder, "--quiet", "rules", "--dry-run", *targets, **config)
    jobs = {rule: int(number) for rule, number in re.findall(r"^(\w+) +(\d+)$", text, re.M)}
    jobs.pop("total", None)
    return jobs


def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_grid(tmp_path):
    bundled = 2 * (2 + 1)  # tasks x (levels; Gaussian ones of medium), of seed 1
    laptop = {"bundled_teacher": bundled, "teacher": GRID["teacher"] - bundled}
    assert planned(tmp_path, scale="laptop") == GRID | laptop


def test_reweighted_students_and_what_they_are_compared_with(tmp_path):
    jobs = planned(tmp_path, "reweighting", scale="laptop")
    widths = shifted = seeds = 3
    assert jobs["reweighted"] == 3 * widths * shifted * seeds  # three kinds of weights
    assert jobs["student"] == widths * seeds * (shifted + 2)  # drawn alike; online of both levels


def test_students_stand_beside_their_teachers(tmp_path):
    for part, levels in (("fig58", 1), ("compression", 1), ("appendixE", 3)):
        jobs = planned(tmp_path, part, scale="laptop")
        assert jobs.get("teacher", 0) + jobs["bundled_teacher"] == 2 * levels  # tasks


def test_wider_students_and_their_losses(tmp_path):
    jobs = planned(tmp_path, "wide", scale="laptop")
    assert jobs["student"] == jobs["losses"] == 8 * 2 * 3  # widths, mixes, seeds


def test_every_figure_and_table_is_a_target(tmp_path):
    parts = SNAKEFILE.read_text().partition("PARTS = ")[2].partition("\n}")[0]
    targets = re.findall(r'^    "(\w+)":', parts, re.M)
    assert {*FIGURES, *TABLES} < set(targets)
    expected = GRID | dict.fromkeys(targets, 1)
    del expected["all"]
    expected["teacher"] -= PLAIN
    expected["multitask"] -= PLAIN
    expected["student"] -= LAYERS
    assert planned(tmp_path, *targets, scale="thesis") == expected


def test_a_fresh_clone_runs_only_what_has_no_csv(tmp_path):
    """The CSVs of all but one student of Fig. 5.4: its data is made, and no other run again."""
    text = snakemake(tmp_path, "--dry-run", "fig54", scale="laptop")
    wanted = set(re.findall(r"docs/results/laptop/\S+\.csv", text))
    left = "docs/results/laptop/student/q-none-256-offline-medium-medium/seed4.csv"
    assert left in wanted
    for path in wanted - {left}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert planned(tmp_path, "fig54", scale="laptop") == {"data": 2, "student": 1, "fig54": 1}


def test_a_job_that_outlived_snakemake_is_done(tmp_path):
    """Its files are there, though still marked as incomplete."""
    name = "teacher/walker-stand-medium/seed1"
    marks = tmp_path / ".snakemake/incomplete"
    marks.mkdir(parents=True)
    for path in (f"reproduce/work/tiny/{name}.pt", f"{TINY}/{name}.csv"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        (marks / base64.b64encode(path.encode()).decode()).touch()
    assert planned(tmp_path, f"{TINY}/{name}.csv", scale="tiny") == {}


def test_a_bundled_teacher_is_that_of_seed_1(tmp_path):
    path = "docs/results/laptop/teacher/walker-stand-medium/seed1.csv"
    snakemake(tmp_path, path, scale="laptop")
    bundled = torch.load(
        ROOT / "pretrained/walker-stand-medium-teacher.pt", map_location="cpu", weights_only=True
    )
    returns = [float(row["return"]) for row in rows(tmp_path / path)]
    np.testing.assert_allclose(returns, bundled["returns"]["walker-stand"], atol=0.005)


def test_scripts_and_flags_of_one_actor_for_all_tasks(tmp_path):
    targets = [f"docs/results/laptop/{kind}/medium/seed1.csv" for kind in ("frozen", "naive-plain")]
    text = snakemake(tmp_path, "--dry-run", "--printshellcmds", *targets, scale="laptop")
    (frozen,) = re.findall(r"frozen_actor\.py .*", text)
    assert "--gradient-steps 2000" in frozen and "--bc-coef" not in frozen
    (plain,) = re.findall(r"naive_multitask_pbrl\.py .*", text)
    assert "--gradient-steps 30000 --learning-rate 3e-4" in plain and "--bc-coef 0" in plain


def test_a_shared_teacher_has_its_data(tmp_path):
    """Its checkpoint alone is left of a run, which is made again, from the data as before."""
    left = "reproduce/work/tiny/oqs/medium/seed1/walker-stand-teacher.pt"
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).touch()
    returns = left.replace(".pt", "-returns.csv")
    text = snakemake(tmp_path, "--dry-run", "--printshellcmds", returns, scale="tiny")
    assert "--data reproduce/work/tiny/data/walker-walk-medium.npz --seed" in text


@pytest.mark.parametrize("kind", ["ds", "oqs"])
def test_what_is_measured_of_a_finished_student(tmp_path, kind):
    """Of data sharing and the Q-switch: measured later, without a new training."""
    student = f"{kind}/medium/seed1"
    for path in (f"reproduce/work/tiny/{student}/student.pt", f"{TINY}/{student}.csv"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert planned(tmp_path, f"{TINY}/measure/{student}.csv", scale="tiny") == {"measure": 1}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Behaviours to the activations of a student, at tiny scale."""
    folder = tmp_path_factory.mktemp("chain")
    student = MSE.format(hidden=16, states="offline")
    snakemake(folder, f"{TINY}/measure/{student}-activations.csv", scale="tiny")
    return folder


def test_a_chain(chain):
    student = MSE.format(hidden=16, states="offline")
    returns = rows(chain / TINY / f"{student}.csv")
    assert list(returns[0]) == ["policy", "task", "evaluation", "step", "episode", "return"]
    counts = Counter()
    for row in returns:
        counts[row["policy"], row["task"], row["evaluation"], row["step"], row["episode"]] += 1
    expected = Counter()
    for task in TASKS:
        expected["student", task, "training", "10", "mean"] = 1
        expected["student", task, "final", "20", "0"] = 1
        expected["student", task, "final", "20", "1"] = 1
    assert counts == expected
    tau = rows(chain / TINY / f"{student}-tau.csv")
    assert {row["layer"] for row in tau} == {"1", "2"}
    teacher = rows(chain / TINY / "teacher/walker-stand-medium/seed1.csv")
    assert {row["policy"] for row in teacher} == {"teacher"}
    behavior = rows(chain / TINY / "behavior/walker-walk-medium-replay/seed1.csv")
    found = [(row["policy"], row["evaluation"], row["step"]) for row in behavior]
    # evaluated after training: the last step is one of training, too
    assert found == [("behavior", "training", "1000")] + 2 * [("behavior", "final", "1000")]
    measured = rows(chain / TINY / f"measure/{student}.csv")
    measures = {(row["measure"], row["layer"]) for row in measured}
    names = ["cka", "per-state tau-a", "per-state tau-b", "average tau-a", "average tau-b"]
    assert measures == set(itertools.product(names, "12"))
    activations = rows(chain / TINY / f"measure/{student}-activations.csv")
    counts = Counter((row["task"], row["layer"]) for row in activations)
    assert counts == dict.fromkeys(itertools.product(TASKS, "12"), 16)


def test_done_stays_done_without_the_big_files(chain, tmp_path):
    targets = [str(path.relative_to(chain)) for path in (chain / TINY).rglob("*.csv")]
    assert len(targets) == 8
    assert planned(chain, *targets, scale="tiny") == {}
    shutil.copytree(chain / "docs", tmp_path / "docs")
    activations = f"{TINY}/measure/{MSE.format(hidden=16, states='offline')}-activations.csv"
    assert planned(tmp_path, activations, scale="tiny") == {}


def test_a_run_that_fails_leaves_no_result(chain):
    """And not the one of a run before: its folder has another student."""
    name = MSE.format(hidden=8, states="offline").replace("seed1", "seed2")
    run = chain / "reproduce/work/tiny/runs" / name
    run.mkdir(parents=True)
    other = MSE.format(hidden=16, states="offline")
    shutil.copy(chain / f"reproduce/work/tiny/{other}.pt", run / "student.pt")
    shutil.copy(run.parents[2] / other / "returns.csv", run)
    (run / "resume.pt").write_bytes(b"damaged")
    command = [*SNAKEMAKE, f"{TINY}/{name}.csv", "--config", f"folder={chain}", "scale=tiny"]
    assert subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 1
    assert not (chain / TINY / f"{name}.csv").exists()
    assert (run / "resume.pt").exists()


def test_a_repeated_run_starts_anew(chain):
    """As its CSV was deleted; nothing of the run before is gone on from."""
    result = chain / TINY / "teacher/walker-stand-medium/seed1.csv"
    before = result.read_text()
    result.unlink()
    snakemake(chain, str(result.relative_to(chain)), scale="tiny")
    assert result.read_text() == before


def test_an_interrupted_run_goes_on(chain):
    """Stopped after the student's first resume point; the same command ends the run."""
    name = MSE.format(hidden=8, states="offline")
    run = chain / "reproduce/work/tiny/runs" / name
    result = chain / TINY / f"{name}.csv"
    run.mkdir(parents=True)
    (run / "returns.csv").touch()  # a folder without a resume point: of no use, replaced
    target = f"{TINY}/{name}.csv"
    config = [f"folder={chain}", "scale=tiny", "extra=--gradient-steps 100"]
    command = [*SNAKEMAKE, target, "--config", *config]
    process = subprocess.Popen(command, start_new_session=True)
    end = time.time() + 300
    while not (run / "resume.pt").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C, which the script receives, too
    assert process.wait(300) != 0
    assert (run / "resume.pt").exists()
    assert not result.exists()
    snakemake(chain, target, scale="tiny", extra="--gradient-steps 100")
    steps = [int(row["step"]) for row in rows(result) if row["episode"] == "mean"]
    assert steps == sorted([*range(10, 100, 10)] * 2)  # of two tasks
    assert len(list(run.glob("events*"))) == 2  # the first one's is there, too


@pytest.mark.slow
def test_every_other_rule(chain):
    names = [
        "student/kl-none-16-offline_tanh-medium-medium/seed1",
        "student/kl-none-16-offline-medium-medium/seed1",
        "student/mse-none-16-random90-medium-medium/seed1",
        "student/mse-none-16-offline_common-medium-medium/seed1",
        "naive-plain/medium/seed1",
        "frozen/medium/seed1",
        "ds/medium/seed1",
        "ds-common/medium/seed1",
        "oqs/medium/seed1",
        "cross/medium/seed1",
        "shift/walker-walk-medium-noise/seed1",
        "shift/walker-walk-medium-offline/seed1",
        "measure/ds/medium/seed1",
        "measure/oqs/medium/seed1",
        "behavior/walker-walk-expert/seed1",
    ]
    snakemake(chain, *(f"{TINY}/{name}.csv" for name in names), scale="tiny")
    oqs = rows(chain / TINY / "oqs/medium/seed1.csv")
    found = {(row["policy"], row["task"], row["evaluation"]) for row in oqs}
    expected = set()
    for evaluation in ("training", "final"):
        expected.add(("from walker-walk", "walker-stand", evaluation))
        expected.add(("from walker-stand", "walker-walk", evaluation))
        expected.add(("student", "walker-stand", evaluation))
        expected.add(("student", "walker-walk", evaluation))
    assert found == expected
    ds = rows(chain / TINY / "ds/medium/seed1.csv")
    assert {row["policy"] for row in ds} == {"teacher", "student"}
    cross = rows(chain / TINY / "cross/medium/seed1.csv")
    counts = Counter((row["teacher"], row["task"]) for row in cross)
    assert counts == dict.fromkeys(itertools.product(TASKS, TASKS), 2)
    shift = rows(chain / TINY / "shift/walker-walk-medium-noise/seed1.csv")
    assert [row["measure"] for row in shift] == ["js_bits", "kl_ab", "kl_ba", "accuracy"]
    assert 0 <= float(shift[0]["value"]) <= 1


BEYOND = [sys.executable, "-m", "snakemake", "--cores", "2"]
BEYOND += ["--snakefile", str(ROOT / "reproduce/beyond.smk")]


def beyond(folder, *args, extra="") -> str:
    """What reproduce/beyond.smk prints that comes to its end."""
    command = [*BEYOND, *args, "--config", f"folder={folder}", "scale=tiny", f"extra={extra}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_all_beyond_the_thesis(tmp_path):
    text = beyond(tmp_path, "--quiet", "rules", "--dry-run")
    jobs = {rule: int(number) for rule, number in re.findall(r"^(\w+) +(\d+)$", text, re.M)}
    domains = 4 + 2 + 2 + 2  # tasks of cartpole, reacher, finger, hopper
    amounts = 2 * 2 * 5  # tasks x levels x amounts; of 1M medium rows also in three_tasks
    assert jobs["td3"] == domains + 3
    assert jobs["behavior"] == domains + 3 + 2  # walker: medium, and expert but of run
    assert jobs["data"] == domains + amounts + 1
    assert jobs["teacher"] == 3 * (domains + amounts + 1)
    assert jobs["student"] == jobs["measure"] == 3 * (4 + 2 + 2 * 5)


def test_more_flags_beyond_the_thesis(tmp_path):
    target = "docs/results/beyond-tiny/student/reacher-expert-1000000-number/seed1.csv"
    text = beyond(tmp_path, "--dry-run", "--printshellcmds", target, extra="--eval-every=7")
    trainings = re.findall(r"mop_(?:td3|pbrl|distill).* --eval-every=7 ", text)
    assert len(trainings) == 2 + 2 + 1  # behaviours, teachers, a student


@pytest.mark.slow
def test_three_tasks_of_beyond(tmp_path):
    student = "student/walker3-medium-1000000-onehot/seed1"
    folder = tmp_path / "docs/results/beyond-tiny"
    beyond(tmp_path, f"docs/results/beyond-tiny/measure/{student}.csv")
    tasks = [*TASKS, "walker-run"]
    final = [row["task"] for row in rows(folder / f"{student}.csv") if row["evaluation"] == "final"]
    assert Counter(final) == dict.fromkeys(tasks, 2)
    names = {row["measure"] for row in rows(folder / f"measure/{student}.csv")}
    for pair in ("0-1", "0-2", "1-2"):
        assert f"per-state tau-a {pair}" in names


def test_frozen_actor_moves_once(monkeypatch):
    """The first Adam that the script makes is the actor's."""
    adam = naive.Adam
    frozen_actor = importlib.import_module("frozen_actor")
    assert naive.Adam is frozen_actor.Adam
    monkeypatch.setattr(naive, "Adam", adam)  # for the other tests
    monkeypatch.setattr(frozen_actor.Adam, "number_made", 0)
    actor = torch.ones(2, requires_grad=True)
    critic = torch.ones(2, requires_grad=True)
    for parameters in (actor, critic):
        optimizer = frozen_actor.Adam([parameters], lr=0.1)
        for step in range(3):
            if step == 2:  # as after a resume point
                state = optimizer.state_dict()
                optimizer.load_state_dict(state)
            parameters.square().sum().backward()
            optimizer.step()
    assert np.allclose(actor.detach(), 0.9)
    assert np.allclose(critic.detach(), 0.7, atol=0.01)


def test_record_of_returns(tmp_path):
    """Of an evaluation in training the mean; of the last one every episode of the checkpoint."""
    curve = "step,task,episode,return\n"
    for step, values in ((10, (3, 5, 10)), (20, (1, 2, 9))):
        for e, value in enumerate(values):
            curve += f"{step},walker-stand,{e},{value}\n"
    (tmp_path / "returns.csv").write_text(curve)
    facts = {"step": 20, "returns": {"walker-stand": [1.0, 2.0, 9.0]}}
    training = ("walker-stand", "training", 10, "mean", "6.00")
    final = [("walker-stand", "final", 20, e, f"{y:.2f}") for e, y in enumerate((1, 2, 9))]
    for kind, data_task, policy in (
        ("student", "walker-stand", "student"),
        ("teacher", "walker-stand", "teacher"),
        ("teacher", "walker-walk", "from walker-walk"),
    ):
        path = write_teacher(tmp_path / "a.pt", kind=kind, data_tasks=[data_task], **facts)
        found = record.returns([str(tmp_path / "returns.csv"), str(path)])
        assert found[1:] == [(policy, *row) for row in (training, *final)]


def test_record_of_a_measure():
    def row(ids, start):
        per_state = {"tau_a": {"mean": start, "std": 2.0}, "tau_b": {"mean": 3.0, "std": 4.0}}
        average = {"tau_a": 5.0, "tau_b": None}
        return {"ids": ids, "layer": 2, "per_state": per_state, "average": average, "cka": 6.0}

    report = {"student": {"tasks": ["a", "b"]}, "shared_computation": [row([0, 1], 1.0)]}
    expected = [
        ("per-state tau-a", 2, 1.0, 2.0),
        ("average tau-a", 2, 5.0, ""),
        ("per-state tau-b", 2, 3.0, 4.0),  # the other one is undefined
        ("cka", 2, 6.0, ""),
    ]
    assert record.measures(report)[1:] == expected
    report["student"]["tasks"] = ["a", "b", "c"]
    report["shared_computation"] = [row([0, 2], 1.0), row([1, 2], 7.0)]
    values = {name: value for name, _, value, _ in record.measures(report)[1:]}
    assert values["per-state tau-a 0-2"] == 1.0 and values["per-state tau-a 1-2"] == 7.0

    report = {"mean_activations": {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[5.0, 6.0], [7.0, 8.0]]}}
    found = record.activations(report)[1:]
    assert found[:3] == [("a", 1, 0, 1.0), ("a", 1, 1, 2.0), ("a", 2, 0, 3.0)]
    assert found[4] == ("b", 1, 0, 5.0) and len(found) == 8

    table = [{"task": "a", "returns": {"a": {"values": [1.0]}, "b": {"values": [2.0, 3.5]}}}]
    expected = [("a", "a", 0, "1.00"), ("a", "b", 0, "2.00"), ("a", "b", 1, "3.50")]
    assert record.cross({"cross_task": table})[1:] == expected

    parts = {"js_bits": (0.5, 0.1), "kl_ab": (2.0, 0.2), "kl_ba": (3.0, 0.3)}
    shift = {name: {"value": y, "error": error} for name, (y, error) in parts.items()}
    expected = [(name, y, error) for name, (y, error) in parts.items()]
    found = record.shift({"shift": shift | {"accuracy": 0.9}})[1:]
    assert found == [*expected, ("accuracy", 0.9, "")]


def test_record_says_what_it_expects(tmp_path, monkeypatch):
    teacher = write_teacher(tmp_path / "teacher.pt")
    out = tmp_path / "a.csv"
    for args in ([], [out], [tmp_path / "a.txt", teacher], [out, tmp_path / "none.pt"]):
        monkeypatch.setattr(sys, "argv", ["record.py", *map(str, args)])
        with pytest.raises(SystemExit, match="expected OUT"):
            record.main()
    monkeypatch.setattr(sys, "argv", ["record.py", str(out), str(teacher)])
    record.main()
    assert rows(out)[0]["return"] == "100.00"
