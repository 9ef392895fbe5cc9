"""What stands in two or more scripts is the same text in each, and every flag is read."""

import ast
import collections
import difflib
from itertools import pairwise

import pytest

from conftest import ROOT, SCRIPTS

# name -> reason why it differs between scripts; an exception that is not needed fails
EXCEPTIONS = {
    "main": "each script's own loop",
    "Args": "compared field by field",
    "__doc__": "each script's own",
    "load_inputs": "each script's own inputs",
    "LAPTOP": "each script's own flags",
    "Args.tasks": "of a teacher: the naive multi-task variant, none by default",
    "Args.output": "each script writes another kind of file",
    "Args.run_dir": "mop_measure.py has no settings in its default name",
    "Args.teachers": "one per task; m * m; any checkpoints, the rows of the cross-task table",
    "Args.seed": "TD3 and measuring also have initial states and samples",
    "Args.eval_every": "TD3's resume points lie between two episodes",
    "Args.learning_rate": "the student has no critics",
    "Args.hidden": "the thesis's width for TD3 differs",
    "Args.batch_size": "of transitions, of states per task",
    "Args.gradient_steps": "thesis: 1M for teachers, 500k for students",
    "Args.tau": "thesis: 1e-2 for TD3, 5e-3 for PBRL",
    "Args.policy_noise": "thesis: 0.3 for TD3, 0.2 for PBRL",
    "Args.noise_clip": "TD3 0.3, PBRL 0.5; in PBRL for the OOD noise, too",
}
SIMULATING = {"mop_td3_collect", "mop_measure"}  # in mujoco.batch; they also load behaviours, which have a LayerNorm
IN_TWO_FORMS = {"Actor", "Critics", "evaluate"}  # one text in SIMULATING, one in the others
LINES = {  # above the line that ends the method, in all
    "mop_td3_collect": (380, 635),
    "mop_pbrl_teacher": (380, 620),
    "mop_distill": (380, 640),
    "mop_ds": (480, 750),
    "mop_oqs": (480, 750),
    "mop_measure": (480, 680),
}


def definitions(name):
    """Every top-level function, class and constant, and every Args field (type, default, docstring), as text."""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.unparse(node)
        elif isinstance(node, ast.AugAssign):
            found[ast.unparse(node.target) + " |="] = ast.unparse(node)
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field, text_of_field in flags(node, text.splitlines()).items():
                found[f"Args.{field}"] = text_of_field
    return found


def flags(cls, lines):
    """{field of Args: its lines}: name, type, default, and what tyro shows as help, a comment or a docstring."""
    ends = [
        doc.end_lineno if isinstance(doc, ast.Expr) else field.end_lineno
        for field, doc in pairwise([*cls.body, None])
        if isinstance(field, ast.AnnAssign)
    ]
    fields = [field for field in cls.body if isinstance(field, ast.AnnAssign)]
    return {f.target.id: "\n".join(lines[f.lineno - 1 : end]) for f, end in zip(fields, ends, strict=True)}


def test_shared_definitions_are_the_same_text():
    versions = collections.defaultdict(dict)
    for name in SCRIPTS:
        for key, text in definitions(name).items():
            key = f"{key} where behaviours are loaded" if key in IN_TWO_FORMS and name in SIMULATING else key
            versions[key].setdefault(text, []).append(name)
    differ = {key for key, texts in versions.items() if len(texts) > 1}
    unexplained = {key: list(versions[key].values()) for key in differ - EXCEPTIONS.keys()}
    assert not unexplained, f"differ between scripts: {unexplained}"
    unused = {key for key in EXCEPTIONS if key not in differ and key != "__doc__"}
    assert not unused, f"exceptions without a difference: {unused}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_method_comes_first_and_the_rest_is_short(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    (end,) = [i for i, line in enumerate(lines) if "the method ends here" in line]
    place = {line.split("(")[0].split(":")[0]: i for i, line in enumerate(lines) if line.startswith(("def ", "class "))}
    assert place["class Args"] < place["class Actor"] < place["def main"] < end < place["def require"]
    assert lines[-2:] == ['if __name__ == "__main__":', "    main()"]
    above, total = LINES[name]
    assert end <= above and len(lines) <= total, (end, len(lines))


def test_all_scripts_together():
    assert sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in SCRIPTS) <= 4000


def test_what_the_two_extensions_do_not_share():
    ds, oqs = ((ROOT / f"{name}.py").read_text().splitlines() for name in ("mop_ds", "mop_oqs"))
    changed = [line for line in difflib.ndiff(ds, oqs) if line.startswith(("- ", "+ "))]
    assert len(changed) <= 70


@pytest.mark.parametrize("name", SCRIPTS)
def test_standalone(name):
    """No script imports another one, and none imports a helper module of this repository."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    local = {path.stem for path in ROOT.rglob("*.py")}
    assert not {module.split(".")[0] for module in modules} & local


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_documented(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    texts = flags(cls, (ROOT / f"{name}.py").read_text().splitlines())
    assert texts.keys() == fields
    assert not [text for text in texts.values() if "  # " not in text and '"""' not in text]
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    read |= {"data", "teachers"} if "getattr(args, name)" in ast.unparse(tree) and "teachers" in fields else set()
    assert fields <= read, f"flags nobody reads: {fields - read}"
