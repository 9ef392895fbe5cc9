"""Beyond the thesis: other domains, three tasks in one student, less data; see docs/beyond.md.

    snakemake --snakefile reproduce/beyond.smk --cores 2 [TARGET ...]

As in Snakefile, a result is a CSV in docs/results/beyond/, which is committed; checkpoints, data and
run folders lie in reproduce/work/beyond/, which is not. What has its CSV is done.
"""

import sys
from pathlib import Path

ROOT = Path(workflow.basedir).parent.resolve()


configfile: str(ROOT / "reproduce" / "beyond.yaml")


workdir: config["folder"] or str(ROOT)


SCALE = config["scale"]
if SCALE not in ("laptop", "tiny"):
    raise WorkflowError(f"--config scale={SCALE}: expected laptop or tiny")
NAME = "beyond" if SCALE == "laptop" else "beyond-tiny"
WORK, RESULTS = f"reproduce/work/{NAME}", f"docs/results/{NAME}"
GROUPS = config["groups"]
DOMAINS = [group for group in GROUPS if not group.startswith("walker")]
AMOUNTS = config["transitions"]
MOST = max(AMOUNTS)
PYTHON, RECORD = sys.executable, f"{sys.executable} {ROOT}/reproduce/record.py"
TEACHER = "teacher/{task}-{level}-{amount}/seed{seed}"
STUDENT = "student/{group}-{level}-{amount}-{encoding}/seed{seed}"


wildcard_constraints:
    group="|".join(GROUPS),
    level="medium|expert",
    amount=r"\d+",
    encoding="number|onehot",
    seed=r"\d+",


# ---------------------------------------------------------------- which results answer which question
def seeds(kind):
    return range(1, config["seeds"][kind] + 1)


def results_of(group, level="expert", amount=MOST, encodings=("number",)):
    """All results of a group of tasks: behaviours, teachers, students and what these share."""
    paths = []
    for task in GROUPS[group]:
        paths.append(f"{RESULTS}/behavior/{task}-{level}.csv")
        for seed in seeds("teacher"):
            paths.append(f"{RESULTS}/teacher/{task}-{level}-{amount}/seed{seed}.csv")
    for encoding in encodings:
        for seed in seeds("student"):
            name = f"student/{group}-{level}-{amount}-{encoding}/seed{seed}"
            paths += [f"{RESULTS}/{name}.csv", f"{RESULTS}/measure/{name}.csv"]
    return paths


PARTS = {
    "domains": [path for group in DOMAINS for path in results_of(group)],
    "three_tasks": results_of("walker3", "medium", encodings=("number", "onehot")),
    "amount": [
        path
        for level in ("medium", "expert")
        for amount in AMOUNTS
        for path in results_of("walker", level, amount)
    ],
}


# ---------------------------------------------------------------------------- helpers of the rules
def unless_made(inputs, *outputs):
    """Of a function from wildcards to inputs: none where the outputs are there."""

    def needed(wildcards):
        made = all(Path(path.format(**dict(wildcards.items()))).exists() for path in outputs)
        return {} if made else inputs(wildcards)

    return unpack(needed)


def flags(*names):
    """Those that beyond.yaml has for the most special of the names."""
    found = config["flags"][SCALE]
    return next((found[name] for name in names if name in found), "")


def training(*names):
    return f"--scale laptop {flags(*names)} {config['extra']}"


def behavior_of(task, level):
    """At laptop scale the bundled file where there is one."""
    file = ROOT / f"pretrained/{task}-{level}-behavior.pt"
    bundled = SCALE == "laptop" and file.is_file()
    return str(file) if bundled else f"{WORK}/checkpoints/{task}-{level}-behavior.pt"


def data_of(w, tasks):
    return [f"{WORK}/data/{task}-{w.level}-{w.amount}.npz" for task in tasks]


# ------------------------------------------------------------------------------------------- rules
rule all:
    input:
        [path for part in PARTS.values() for path in part if not Path(path).exists()],
    localrule: True


for part in PARTS:

    rule:
        name:
            part
        input:
            [path for path in PARTS[part] if not Path(path).exists()],
        localrule: True


# what starts or goes on, as in Snakefile: go RUN_FOLDER COMMAND ARGUMENTS
shell.prefix(
    "set -euo pipefail; "
    'go() {{ R=$1; shift; if [ -f "$R/resume.pt" ]; then "$@" --resume "$R"; '
    'else rm -rf "$R"; "$@" --run-dir "$R"; fi; rm "$R/resume.pt"; }}; '
)


rule td3:
    output:
        medium=f"{WORK}/checkpoints/{{task}}-medium-behavior.pt",
        expert=f"{WORK}/checkpoints/{{task}}-expert-behavior.pt",
    log:
        f"{WORK}/logs/td3/{{task}}.log",
    params:
        run="runs/td3/{task}",
        flags=lambda w: training(f"td3 {w.task}", "td3"),
    shell:
        "(cd {WORK}; go {params.run} {PYTHON} {ROOT}/mop_td3_collect.py --task {wildcards.task}"
        " {params.flags} --datasets --overwrite --threads {threads}) >> {log} 2>&1; "
        "{RECORD} {RESULTS}/behavior/{wildcards.task}-medium.csv {output.medium}; "
        "{RECORD} {RESULTS}/behavior/{wildcards.task}-expert.csv {output.expert}"


rule behavior:
    input:
        lambda w: behavior_of(w.task, w.level),
    output:
        f"{RESULTS}/behavior/{{task}}-{{level}}.csv",
    localrule: True
    shell:
        "{RECORD} {output} {input}"


rule data:
    input:
        unless_made(
            lambda w: {"policy": behavior_of(w.task, w.level)},
            f"{WORK}/data/{{task}}-{{level}}-{{amount}}.npz",
        ),
    output:
        f"{WORK}/data/{{task}}-{{level}}-{{amount}}.npz",
    log:
        f"{WORK}/logs/data/{{task}}-{{level}}-{{amount}}.log",
    params:
        amount=lambda w: 2000 if SCALE == "tiny" else w.amount,
    shell:
        "{PYTHON} {ROOT}/mop_td3_collect.py --policy {input.policy} --output {output}"
        " --num-transitions {params.amount} --overwrite --threads {threads} >> {log} 2>&1"


rule teacher:
    input:
        unless_made(
            lambda w: {"data": data_of(w, [w.task])},
            f"{WORK}/{TEACHER}.pt",
            f"{RESULTS}/{TEACHER}.csv",
        ),
    output:
        pt=f"{WORK}/{TEACHER}.pt",
        csv=f"{RESULTS}/{TEACHER}.csv",
    log:
        f"{WORK}/logs/{TEACHER}.log",
    params:
        run=f"{WORK}/runs/{TEACHER}",
        flags=lambda w: training(f"teacher {w.task.partition('-')[0]}", "teacher"),
    shell:
        "go {params.run} {PYTHON} {ROOT}/mop_pbrl_teacher.py --task {wildcards.task}"
        " --level {wildcards.level} --data {input.data} --seed {wildcards.seed} {params.flags}"
        " --output {output.pt} --overwrite --threads {threads} >> {log} 2>&1; "
        "{RECORD} {output.csv} {params.run}/returns.csv {output.pt}"


if SCALE == "laptop":  # of the most data the walker's teachers are those of Snakefile
    ruleorder: same_checkpoint > same_result > teacher

    rule same_checkpoint:  # of the teacher that students learn from
        input:
            str(ROOT / "pretrained/{task}-{level}-teacher.pt"),
        output:
            f"{WORK}/teacher/{{task}}-{{level}}-{MOST}/seed1.pt",
        wildcard_constraints:
            task="walker-stand|walker-walk",
        localrule: True
        shell:
            "cp {input} {output}"

    rule same_result:
        input:
            str(ROOT / "docs/results/laptop/teacher/{task}-{level}/seed{seed}.csv"),
        output:
            f"{RESULTS}/teacher/{{task}}-{{level}}-{MOST}/seed{{seed}}.csv",
        wildcard_constraints:
            task="walker-stand|walker-walk",
        localrule: True
        shell:
            "cp {input} {output}"


def student_inputs(w):
    tasks = GROUPS[w.group]
    teachers = [f"{WORK}/teacher/{task}-{w.level}-{w.amount}/seed1.pt" for task in tasks]
    return {"data": data_of(w, tasks), "teachers": teachers}


rule student:
    input:
        unless_made(student_inputs, f"{WORK}/{STUDENT}.pt", f"{RESULTS}/{STUDENT}.csv"),
    output:
        pt=f"{WORK}/{STUDENT}.pt",
        csv=f"{RESULTS}/{STUDENT}.csv",
    log:
        f"{WORK}/logs/{STUDENT}.log",
    params:
        run=f"{WORK}/runs/{STUDENT}",
        tasks=lambda w: GROUPS[w.group],
        flags=lambda w: training(f"student {w.group}", "student"),
    shell:
        "go {params.run} {PYTHON} {ROOT}/mop_distill.py --tasks {params.tasks}"
        " --level {wildcards.level} --data {input.data} --teachers {input.teachers}"
        " --task-encoding {wildcards.encoding} --seed {wildcards.seed} {params.flags}"
        " --threads {threads} >> {log} 2>&1; "
        "cp {params.run}/student.pt {output.pt}; "
        "{RECORD} {output.csv} {params.run}/returns.csv {output.pt}"


rule measure:
    input:
        unless_made(
            lambda w: {"student": f"{WORK}/{STUDENT}.pt".format(**dict(w.items()))},
            f"{RESULTS}/measure/{STUDENT}.csv",
        ),
    output:
        f"{RESULTS}/measure/{STUDENT}.csv",
    log:
        f"{WORK}/logs/measure/{STUDENT}.log",
    params:
        run=f"{WORK}/runs/measure/{STUDENT}",
        flags=flags("measure"),
    shell:
        "{PYTHON} {ROOT}/mop_measure.py --student {input.student} --run-dir {params.run}"
        " {params.flags} --overwrite --threads {threads} >> {log} 2>&1; "
        "{RECORD} {output} {params.run}/measure.json"
