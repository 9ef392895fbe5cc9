"""Every command in README.md, CONTRIBUTING.md and docs/ runs, at tiny size; every flag they name exists; --help.

bash itself reads the fenced blocks (variables, loops, globs), but writes down each program that it would start. What
is one of our scripts then runs in a copy of the repository, one page after the other, with the flags of TINY at its
end: what one command makes is there for the next ones. Names in <> are read as NAME.
"""

import ast
import glob
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dm_control.suite import walker

from conftest import ROOT, SCRIPTS, script, write_dataset, write_teacher
from test_copies import flags

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = "".join(path.read_text() for path in (ROOT / "benchmark").glob("*.py"))
OTHER_FLAGS = {"--check", "--logdir", "--no-deps", "--dist"}  # of ruff, tensorboard, pip, pytest
SHELL = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECORD = """command_not_found_handle() {{ printf '%s\\0' "$@" >> "{log}"; printf '\\n\\0' >> "{log}"; }}
PATH=/nowhere
{block}"""

EVALUATION = "--eval-episodes 1 --final-eval-episodes 1 --eval-every 1000"
TRAINING = f"{EVALUATION} --gradient-steps 2 --batch-size 16 --hidden 8 --device auto --threads 1 --overwrite"
TEACHERS = "--teacher-steps 2 --teacher-batch-size 16 --teacher-hidden 8"
TINY = {  # appended: the last one of two equal flags counts
    "mop_td3_collect": f"{EVALUATION} --total-timesteps 1000 --learning-starts 998 --batch-size 16 --hidden 8 "
    "--num-transitions 1000 --medium-return 0.1 --threads 1 --overwrite",
    "mop_td3_collect --policy": "--num-transitions {} --threads 1 --overwrite",
    "mop_pbrl_teacher": TRAINING,
    "mop_distill": TRAINING,
    "mop_ds": f"{TRAINING} {TEACHERS}",
    "mop_oqs": f"{TRAINING} {TEACHERS}",
    "mop_measure": "--episodes 1 --cross-episodes 1 --tau-states 50 --cka-states 100 --shift-states 1000 --no-gif "
    "--threads 1 --overwrite",
}
WHOLE = {"online": 1000, "noise": 10_000, "random90": 10_000, "random99": 100_000}  # least transitions of a mix
NOT_RUN = {  # what begins like this -> why
    r"pip install": "an installation; .ci/run makes the README's",
    r"python -m venv": "likewise",
    r"git |pre-commit ": "no program of ours",
    r"ruff |python -m pytest": "this is run by them",
    r"tensorboard": "a server",
    r"python benchmark/": "measures for minutes; tests/test_benchmark.py runs these scripts at tiny size",
    r".* --device cuda": "needs a GPU; tests/test_cuda_graph.py",
}
STAND_INS = {  # files that a page takes for granted: a reader has them from another page, or has his own
    "runs/NAME/student.pt": {"kind": "student", "tasks": ["walker-stand", "walker-walk"]},
    "checkpoints/walker-walk-medium-teacher.pt": {"task": "walker-walk"},
    "checkpoints/walker-run-medium-teacher.pt": {"task": "walker-run"},
    "data/walker-run-medium.npz": {"task": "walker-run"},
    "data/stand-noise.npz": {},
    "data/walk-noise.npz": {"task": "walker-walk"},
    **{f"a{i}{j}.pt": {"task": ("walker-stand", "walker-walk")[i]} for i in (0, 1) for j in (0, 1)},
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Scripts that run in this process leave nothing of theirs behind."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C is for pytest
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(walker.SUITE, "allow_overriding_keys", True)  # the example's task, once more
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of what the commands need, with 2 episodes per dataset, and the stand-ins."""
    monkeypatch.chdir(tmp_path)
    for path in ROOT.glob("mop_*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "pretrained", tmp_path / "pretrained", ignore=shutil.ignore_patterns("*.np[yz]"))
    for path in (ROOT / "pretrained").glob("*.npz"):
        with np.load(path) as data:
            np.savez(tmp_path / "pretrained" / path.name, **{k: v[:2000] if v.ndim else v for k, v in data.items()})
    for name, content in STAND_INS.items():
        path = tmp_path / name
        write_dataset(path, **content) if path.suffix == ".npz" else write_teacher(path, **content)
        if content.get("kind") == "student":
            student = torch.load(path, weights_only=True)
            student["actor"]["net.0.weight"] = torch.rand(8, 25)  # it reads the task id, too
            student["sizes"] |= {"in_dim": 25, "task_encoding": "number"}
            student["returns"] = {task: [100.0] for task in content["tasks"]}
            torch.save(student, path)
    return tmp_path


def recorded(block, folder) -> list[list[str]]:
    """The programs that a block would start, with bash's expansion of their arguments; none of them is started."""
    log = folder / "commands"
    log.write_bytes(b"")
    text = RECORD.format(log=log, block=re.sub(r"<([\w-]+)>", "NAME", block))
    found = subprocess.run(["/bin/bash", "-c", text], cwd=folder, capture_output=True, text=True)
    assert found.stderr == "", found.stderr
    return [command.strip("\0").split("\0") for command in log.read_text().split("\n\0")[:-1]]


def run(argv, number, capsys):
    """One command in this process; a launcher may stand before the script."""
    command = " ".join(argv)
    name = next((Path(word).stem for word in argv[1:3] if Path(word).stem in SCRIPTS), None)
    assert argv[0] == "python" and name, f"neither a script nor listed in NOT_RUN: {command}"
    argv = [
        path for word in argv for path in ("*" in word and sorted(glob.glob(word))) or [word]
    ]  # of files made since
    mix = argv[argv.index("--mix") + 1] if "--mix" in argv else "online"
    tiny = TINY[f"{name} --policy" if "--policy" in argv else name].format(WHOLE[mix]).split()
    run_dir = [] if {"--run-dir", "--resume", "--policy"} & {*argv} else ["--run-dir", f"runs/docs-{number}"]
    sys.argv = [*argv[1:], *tiny, *run_dir]
    try:
        runpy.run_path(argv[1], run_name="__main__")
    except SystemExit as end:
        raise AssertionError(f"{command}: {end.code}{capsys.readouterr().err}") from end
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("RESULT ")), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page, repository, capsys):
    number = 0
    for block in SHELL.findall(page.read_text()):
        for argv in recorded(block, repository):
            if not any(re.match(pattern, " ".join(argv)) for pattern in NOT_RUN):
                run(argv, number := number + 1, capsys)


@pytest.fixture(scope="module")
def helps():
    """script -> its --help, as a user asks for it."""
    done = {name: script(name, "--help", cwd=ROOT) for name in SCRIPTS}
    assert all(process.returncode == 0 and process.stderr == "" for process in done.values()), done
    return {name: process.stdout for name, process in done.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(helps, name):
    """What the script does, its example, every flag and what it is for."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    (cls,) = (node for node in tree.body if getattr(node, "name", "") == "Args")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", helps[name]).split())
    assert f"python {name}.py" in text and ast.get_docstring(tree).splitlines()[0][:60] in text
    for field, lines in flags(cls, (ROOT / f"{name}.py").read_text().splitlines()).items():
        doc = lines.split('"""')[1] if '"""' in lines else lines.split("  # ", 1)[1]
        assert f"--{field.replace('_', '-')}" in text
        assert " ".join(doc.split())[:30] in text, field


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_named_exist(helps, page):
    known = {*re.findall(r"--[a-z][a-z-]+", "".join(helps.values())), *OTHER_FLAGS}
    known |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", BENCHMARKS, re.MULTILINE)}
    code = re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL)
    assert {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(code))} <= known
