"""Every command in the documentation runs, at tiny size; every flag that it names exists; --help.

bash itself reads the fenced blocks (variables, loops, globs), but writes down each program that it
would start. What is one of our scripts then runs in a copy of the repository, one page after the
other, with the flags of TINY at its end: what one command makes is there for the next ones. Names
in <> are read as NAME. Of the tour the Python blocks run, too, and its change of a script is made.
Every link between pages, with its anchor, leads somewhere.
"""

import ast
import glob
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dm_control.suite import walker

import mop_distill
from conftest import ROOT, SCRIPTS, script, write_dataset, write_teacher
from test_copies import args_fields

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINKED = [*PAGES, ROOT / "reproduce/README.md", *sorted((ROOT / "docs/results").glob("*.md"))]
OTHER_FLAGS = {"--check", "--logdir", "--no-deps", "--dist"}  # of ruff, tensorboard, pip, pytest
TOUR = ROOT / "docs/tour.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)  # language, text
RECORD = r"""command_not_found_handle() {{
    printf '%s\0' "$@" >> "{log}"
    printf '\n\0' >> "{log}"
}}
PATH=/nowhere
{block}"""

EVALUATION = "--eval-episodes 1 --final-eval-episodes 1 --eval-every 1000 --threads 1 --overwrite"
EVALUATION += " --no-cuda-graph"  # tests/test_cuda_graph.py
TRAINING = f"{EVALUATION} --gradient-steps 2 --batch-size 16 --hidden 8 --device cpu"
TINY = {  # appended: the last one of two equal flags counts
    "mop_td3_collect": f"{EVALUATION} --total-timesteps 1000 --learning-starts 998 --batch-size 16"
    " --hidden 8 --num-transitions 1000 --medium-return 0.1",
    "mop_pbrl_teacher": TRAINING,
    "naive_multitask_pbrl": TRAINING,
    "mop_distill": TRAINING,
    "my_distill": TRAINING,  # the tour's copy
    "distill_reweighted": f"{TRAINING} --weight-steps 2",
    "mop_ds": TRAINING,
    "mop_oqs": TRAINING,
    "mop_measure": "--episodes 1 --cross-episodes 1 --num-states 500 --threads 1 --overwrite",
    "run_student": "",
}
LAST_LINE = {"run_student": r"walker-\w+: return \d"}  # of what is printed; else: wrote
WHOLE_MIX = {  # transitions that hold the shares of a mix
    "online": "1000",
    "noise": "10000",
    "random90": "10000",
    "random99": "100000",
}
NOT_RUN = {  # what begins like this -> why
    r"pip install": "an installation; .ci/run makes the README's",
    r"python -m venv": "likewise",
    r"git |diff |pre-commit ": "no program of ours",
    r"ruff |python -m pytest": "this is run by them",
    r"tensorboard": "a server",
    r"python benchmark/": "measures for minutes; tests/test_benchmark.py runs these scripts",
    r".* --device cuda": "needs a GPU; tests/test_cuda_graph.py",
    r"python examples/convert.py": "needs other libraries; tests/test_convert.py",
    r".*run_student.py .* --gif": "needs a GL library; tests/test_tour.py",
}
STAND_INS = {  # files that a page takes for granted: a reader has them from another page
    "checkpoints/walker-walk-medium-teacher.pt": "walker-walk",
    "checkpoints/walker-run-medium-teacher.pt": "walker-run",
    "data/walker-run-medium.npz": "walker-run",
    "data/walker-walk-medium-replay.npz": "walker-walk",
    "data/walker-stand-expert.npz": "walker-stand",
    "data/stand-noise.npz": "walker-stand",
    "data/walk-noise.npz": "walker-walk",
    "a00.pt": "walker-stand",
    "a11.pt": "walker-walk",
}


@pytest.fixture
def repository(tmp_path, monkeypatch, short_episodes):
    """A copy of what the commands need, with 2 episodes per dataset, and the stand-ins."""
    monkeypatch.chdir(tmp_path)
    for path in ROOT.glob("mop_*.py"):
        shutil.copy(path, tmp_path)
        monkeypatch.delitem(sys.modules, path.stem, raising=False)  # the example imports the copy
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(walker.SUITE, "allow_overriding_keys", True)  # the example's task, again
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copytree(ROOT / "pretrained", "pretrained", ignore=shutil.ignore_patterns("*.np[yz]"))
    for path in (ROOT / "pretrained").glob("*.npz"):
        arrays = dict(np.load(path))
        metadata = arrays.pop("metadata")
        first_rows = {name: array[:2000] for name, array in arrays.items()}
        np.savez(tmp_path / "pretrained" / path.name, **first_rows, metadata=metadata)
    for name, task in STAND_INS.items():
        write = write_dataset if name.endswith(".npz") else write_teacher
        levels = [level for level in ("expert", "medium-replay") if level in name]
        write(tmp_path / name, task, level=levels[0] if levels else "medium")
    write_teacher(tmp_path / "a01.pt", "walker-stand", data_tasks=["walker-walk"])
    write_teacher(tmp_path / "a10.pt", "walker-walk", data_tasks=["walker-stand"])

    path = write_teacher(tmp_path / "runs/NAME/student.pt", kind="student")
    student = torch.load(path, weights_only=True)
    student["tasks"] = ["walker-stand", "walker-walk"]
    student["actor"]["net.0.weight"] = torch.rand(8, 25)  # it reads the task id, too
    student["sizes"]["in_dim"] = 25
    student["sizes"]["task_encoding"] = "number"
    student["returns"] = {"walker-stand": [100.0], "walker-walk": [100.0]}
    torch.save(student, path)
    yield tmp_path
    for path in ROOT.glob("mop_*.py"):
        sys.modules.pop(path.stem, None)


def recorded(block, folder) -> list[list[str]]:
    """The programs that a block would start, their arguments as bash expands them."""
    log = folder / "commands"
    log.write_bytes(b"")
    text = RECORD.format(log=log, block=re.sub(r"<([\w-]+)>", "NAME", block))
    done = subprocess.run(["/bin/bash", "-c", text], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    commands = log.read_text().split("\n\0")[:-1]
    return [command.strip("\0").split("\0") for command in commands]


def run(argv, number, monkeypatch, capsys):
    """One command in this process; the example with its own task may stand before the script."""
    command = " ".join(argv)
    assert argv[0] == "python", f"neither a script nor listed in NOT_RUN: {command}"
    names = [Path(word).stem for word in argv[1:3] if Path(word).stem in TINY]
    assert names, f"neither a script nor listed in NOT_RUN: {command}"
    expanded = []
    for word in argv[1:]:  # globs of files that were made since bash read the block
        found = sorted(glob.glob(word)) if "*" in word else []
        expanded += found or [word]
    expanded += TINY[names[0]].split()
    if "--policy" in argv:
        mix = argv[argv.index("--mix") + 1] if "--mix" in argv else "online"
        expanded += ["--num-transitions", WHOLE_MIX[mix]]
    elif names[0] != "run_student" and "--run-dir" not in argv and "--resume" not in argv:
        expanded += ["--run-dir", f"runs/docs-{number}"]
    monkeypatch.setattr(sys, "argv", expanded)
    try:
        runpy.run_path(expanded[0], run_name="__main__")
    except SystemExit as end:
        raise AssertionError(f"{command}: {end.code}{capsys.readouterr().err}") from end
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert re.match(LAST_LINE.get(names[0], "wrote "), last_line), command


def apply_diff(text, path):
    """Make a page's change of a script: in each part after a line of @@, what stands after a blank
    or a minus is found once and becomes what stands after a blank or a plus."""
    script = path.read_text()
    for part in re.split(r"^@@.*\n", text, flags=re.MULTILINE)[1:]:
        before = ""
        after = ""
        for line in part.splitlines(keepends=True):
            if line[0] in "- \n":
                before += line[1:] or line
            if line[0] in "+ \n":
                after += line[1:] or line
        assert script.count(before) == 1, f"{path.name} no longer has once:\n{before}"
        script = script.replace(before, after)
    path.write_text(script)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page, repository, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    number = 0
    variables = {}
    for language, block in BLOCK.findall(page.read_text()):
        if page == TOUR and language == "python":
            exec(block, variables)
        if page == TOUR and language == "diff":
            apply_diff(block, repository / "my_distill.py")
        if language != "bash":
            assert language not in ("sh", "shell", "console"), "name it bash"
            continue
        for argv in recorded(block, repository):
            if argv[0] == "cp":
                shutil.copy(argv[1], argv[2])
            elif not any(re.match(pattern, " ".join(argv)) for pattern in NOT_RUN):
                number += 1
                run(argv, number, monkeypatch, capsys)


@pytest.fixture(scope="module")
def helps():
    """script -> its --help, as a user asks for it, whatever the shell wants to render with."""
    env = os.environ | {"MUJOCO_GL": "EGL"}  # dm_control knows none of this name, and would stop
    texts = {}
    for name in SCRIPTS:
        done = script(name, "--help", cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        texts[name] = done.stdout
    return texts


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(helps, name):
    """What the script does, its command, every flag and what it is for."""
    path = ROOT / f"{name}.py"
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", helps[name]).split())
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring.splitlines()[0] in text
    assert f"python {name}.py" in text
    for field, definition in args_fields(path).items():
        _, docstring = definition.split("\n", 1)
        words = " ".join(ast.literal_eval(docstring).split())
        assert f"--{field.replace('_', '-')}" in text
        assert words[:30] in text, field


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_that_are_named_exist(helps, page):
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(helps.values()))) | OTHER_FLAGS
    for path in (ROOT / "benchmark").glob("*.py"):
        for name in re.findall(r"^    (\w+): ", path.read_text(), re.MULTILINE):
            known.add(f"--{name.replace('_', '-')}")
    others = (
        "examples/distill_reweighted.py",
        "examples/run_student.py",
        "reproduce/compression.py",
    )
    for path in others:
        for name in args_fields(ROOT / path):
            known.add(f"--{name.replace('_', '-')}")
    for node in ast.walk(ast.parse((ROOT / "examples/convert.py").read_text())):
        if isinstance(node, ast.arg):
            known.add(f"--{node.arg.replace('_', '-')}")
    code = re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(code))) <= known


def anchors(page) -> set:
    """Those that GitHub makes of a page's headings: lower case, no punctuation, hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Every relative link and picture is there, and so is the heading that it names."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_in_the_index():
    text = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in text, page.name


def test_numbers_of_the_readme():
    """At most 900 words; the sizes of the scripts and of the students."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    found = re.search(r"([\d,]+) to ([\d,]+) lines each.*?(\d+) to (\d+)", text).groups()
    low, high, low_method, high_method = [int(number.replace(",", "")) for number in found]
    for name in SCRIPTS:
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        marked = [i for i, line in enumerate(lines) if "the method ends here" in line]
        assert low <= len(lines) <= high, name
        assert low_method <= marked[0] <= high_method, name
    for in_dim, hidden in [(25, 256), (24, 256), (25, 128)]:
        actor = mop_distill.Actor(in_dim, 6, hidden)
        number = sum(weight.numel() for weight in actor.parameters())
        assert f"{number:,}" in text
