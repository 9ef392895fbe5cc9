"""What stands in two or more scripts is the same text in each, and every flag is read.

A file under examples/ that says "a copy of SCRIPT.py" in its docstring is compared with that
script, but for the definitions that a line `Own: main, Args.tasks, ...` of the docstring lists.
"""

import ast
import re

import pytest

from conftest import ROOT, SCRIPTS

# definition -> how many forms of it there are, and why; an exception that is not needed fails
EXCEPTIONS = {
    "main": (6, "each script's own"),
    "LAPTOP": (3, "of TD3, teachers and students"),
    "Actor": (2, "behaviours have a LayerNorm: in TD3, and where any policy is measured"),
    "Critics": (2, "TD3's two have a LayerNorm"),
    "load_actor": (2, "as Actor"),
    "run_episode": (2, "TD3's mixes actions, the others append a task id"),
    "parse_args": (2, "mop_measure.py has neither --scale nor --resume"),
    "make_run_dir": (2, "nor are there settings in the name of its folder"),
    "Args.run_dir": (2, "the same"),
    "Args.tasks": (2, "mop_measure.py: the columns of a table"),
    "Args.seed": (
        4,
        "of what, four kinds: TD3, teachers, students, samples",
    ),
    "Args.eval_every": (2, "TD3's resume points lie between two episodes"),
    "Args.final_eval_episodes": (2, "TD3 has one task and two checkpoints"),
    "Args.level": (2, "of one task, of several"),
    "Args.data": (4, "one file; one per source; one per task; which --states replaces"),
    "Args.output": (3, "a dataset; a teacher, of the data of one task or of several"),
    "Args.teachers": (3, "one per task; m * m; any"),
    "Args.gradient_steps": (2, "thesis: 1M for teachers, 500k for students"),
    "Args.learning_rate": (2, "a student has no critics"),
    "Args.batch_size": (2, "of transitions, of states per task"),
    "Args.hidden": (2, "thesis: 1024 for TD3, else 256"),
    "Args.tau": (2, "thesis: 1e-2 for TD3, of all targets; 5e-3 for PBRL's critics"),
    "Args.policy_noise": (2, "thesis: 0.3 for TD3, 0.2 for PBRL"),
    "Args.noise_clip": (2, "TD3 0.3; PBRL 0.5, also of the OOD noise"),
}


def definitions(path) -> dict:
    """{name: text} of every top-level function, class, constant and field of Args."""
    text = path.read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.unparse(node)
    for name, field in args_fields(path).items():
        found[f"Args.{name}"] = field
    return found


def args_fields(path) -> dict:
    """{name: text} of every field of Args: name, type, default and the docstring below it."""
    fields = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    name = part.target.id
                    fields[name] = ast.unparse(part)
                elif fields:
                    fields[name] += "\n" + ast.unparse(part)
    return fields


def test_shared_definitions_are_the_same_text():
    versions = {}  # name -> text -> scripts
    for script in SCRIPTS:
        for name, text in definitions(ROOT / f"{script}.py").items():
            versions.setdefault(name, {}).setdefault(text, []).append(script)
    found = {name: list(texts.values()) for name, texts in versions.items() if len(texts) > 1}
    wrong = []
    for name in found.keys() | EXCEPTIONS.keys():
        expected = EXCEPTIONS[name][0] if name in EXCEPTIONS else 1
        if len(found.get(name, [])) != expected:
            wrong.append(f"{name}: expected {expected} forms, found {found.get(name)}")
    assert not wrong


def test_copies_under_examples():
    compared = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        source = re.search(r"a copy of (mop_\w+\.py)", docstring)
        if source:
            own = re.search(r"^Own: (.*?)\n\n", docstring, re.MULTILINE | re.DOTALL)
            own = re.split(r",\s+", own[1]) if own else []
            original = definitions(ROOT / source[1])
            differing = []
            for name, text in definitions(path).items():
                if original.get(name) != text:
                    differing.append(name)
            assert sorted(differing) == sorted(own), f"{path.name} and {source[1]}"
            compared.append(path.name)
    assert compared


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_method_comes_first(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    (end,) = [i for i, line in enumerate(lines) if "the method ends here" in line]
    place = {}
    for i, line in enumerate(lines):
        if line.startswith(("def ", "class ")):
            place[re.match(r"\w+ (\w+)", line)[1]] = i
    assert place["Args"] < place["Actor"] < place["main"] < end
    assert end < place["make_env"] < place["run_episodes"] < place["check"]
    assert lines[-2:] == ['if __name__ == "__main__":', "    main()"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_standalone(script):
    """No script imports another one, nor a helper module of this repository."""
    local = {path.stem for path in ROOT.rglob("*.py")}
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            assert name.split(".")[0] not in local


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_documented(script):
    path = ROOT / f"{script}.py"
    text = path.read_text()
    for name, field in args_fields(path).items():
        assert re.search(rf"\bargs\.{name}\b", text), f"nobody reads {name}"
        assert len(field.splitlines()) > 1, f"{name} has no docstring"
