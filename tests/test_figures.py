"""Figures and tables of docs/results.md and docs/results/: intervals, rows to the digit, the pages
as they are; results of two recipes of teachers are never compared."""

import csv
import itertools
import re
import sys
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats

import test_docs
from conftest import ROOT
from reproduce import figures

MSE = "student/mse-none-256-offline-medium-medium"
PAGES = [ROOT / "docs/results.md", *sorted((ROOT / "docs/results").glob("*.md"))]


def write(folder, name, columns, *rows):
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows), ""]))


def write_returns(folder, name, policy, **tasks):
    """Per task two evaluations in training, and two episodes around the final return."""
    rows = []
    for task, value in tasks.items():
        rows.append((policy, f"walker-{task}", "training", 1000, "mean", value / 2))
        rows.append((policy, f"walker-{task}", "training", 2000, "mean", value / 4))
        rows.append((policy, f"walker-{task}", "final", 2000, 0, value - 30))
        rows.append((policy, f"walker-{task}", "final", 2000, 1, value + 30))
    write(folder, name, figures.KINDS["returns"][0], *rows)


def rows_of(folder, name):
    rows = figures.findings(figures.load_recipes(folder), name)
    return {row.cells[0]: row.cells[1:] for row in rows}


def place(marker):
    return f"by hand\n<!-- {marker} -->\nold\n<!-- end -->\nby hand\n"


@pytest.fixture
def docs(tmp_path):
    """Three mse students and their teachers, a q student; a docs folder with empty pages."""
    results = tmp_path / "results" / "laptop"
    for seed, value in ((1, 400), (2, 410), (3, 420)):
        write_returns(results, f"{MSE}/seed{seed}", "student", stand=value, walk=value + 300)
        for task in ("stand", "walk"):
            write_returns(
                results, f"teacher/walker-{task}-medium/seed{seed}", "teacher", **{task: value + 30}
            )
    write_returns(
        results, "student/q-none-256-offline-medium-medium/seed1", "student", stand=100, walk=90
    )
    text = place("glance")
    for name in figures.FIGURES:
        text += place(f"picture {name}")
    (tmp_path / "results.md").write_text(text)
    for name in figures.TITLES:
        (tmp_path / "results" / f"{name}.md").write_text(place(f"table {name}"))
    return tmp_path


@pytest.mark.parametrize("n", [2, 3, 4, 10])
def test_interval_is_that_of_scipy(n):
    a, b = np.random.default_rng(n).normal(size=(2, n)) * 50 + 400
    low, high = stats.t.interval(0.95, n - 1, loc=a.mean(), scale=stats.sem(a))
    assert np.allclose(figures.interval(a), [(low + high) / 2, (high - low) / 2])
    assert np.allclose(figures.interval(a, 390.0), [(low + high) / 2 - 390, (high - low) / 2])
    found = stats.ttest_ind(a, [*b, 500.0], equal_var=False).confidence_interval(0.95)
    mean, half = figures.interval(a, [*b, 500.0])
    assert np.allclose([mean - half, mean + half], found)


def test_one_seed_has_no_interval_and_equal_seeds_have_an_empty_one():
    assert np.isnan(figures.interval([400.0])[1]) and np.isnan(
        figures.interval([400.0], [1.0, 2.0])[1]
    )
    assert figures.interval([400.0], 390.0)[0] == 10 and figures.interval([400.0, 400.0]) == (
        400,
        0,
    )


def test_rows_to_the_digit(docs):
    """t(2 degrees of freedom) = 4.3027, standard error 10 / sqrt(3)."""
    rows = rows_of(docs / "results" / "laptop", "fig54")
    ours, teacher = "410.0 ± 24.8 (3 seeds)", "430.0 (seed 1)"  # 20 below: 5% are 21.5
    assert rows["walker-stand: mse against its teacher"] == [
        "matches",
        ours,
        teacher,
        "-20.0 ± 24.8",
        "open",
    ]
    ours, teacher = "710.0 ± 24.8 (3 seeds)", "430.0 (seed 1)"
    assert rows["walker-walk: mse against its teacher"][1:] == [
        ours,
        teacher,
        "+280.0 ± 24.8",
        "as the thesis",
    ]
    q = ["below", "100.0 (1 seed)", "430.0 (seed 1)", "-330.0", "as the thesis (one seed)"]
    assert rows["walker-stand: q against its teacher"] == q
    assert rows["walker-stand: kl against its teacher"] == ["falls short", "", "", "", "not run"]
    gaussian = rows["walker-stand: Gaussian teacher against deterministic teacher"]
    assert gaussian == ["below", "", "440.0 ± 24.8 (3 seeds)", "", "not run"]


def test_returns_by_width_to_the_digit(docs):
    folder = docs / "results" / "laptop"
    for (seed, value), (i, width) in itertools.product(
        ((1, 400), (2, 410), (3, 420)), enumerate(figures.WIDTHS)
    ):
        write_returns(
            folder,
            f"student/mse-none-{width}-noise-medium-medium/seed{seed}",
            "student",
            walk=value + 2 * i,
        )
    table = figures.by_width(figures.load(folder))
    assert (
        table[0] == "| task | width | online | noise | random90 | random99 |"
        and len(table) == 2 + 2 * 7
    )
    assert table[11] == "| walker-walk | 64 |  | 414.0 ± 24.8 (3 seeds) |  |  |"
    assert table[15] == "| walker-walk | mean |  | 415.0 ± 24.8 (3 seeds) |  |  |"


@pytest.mark.parametrize(
    ("claim", "shift", "verdict"),
    [
        ("above", 30, "as the thesis"),
        ("above", 20, "open"),
        ("above", -30, "against the thesis"),
        ("below", -30, "as the thesis"),
        ("below", 30, "against the thesis"),
        ("matches", 10, "as the thesis"),
        ("matches", -10, "open"),
        ("matches", -50, "against the thesis"),
        ("falls short", -50, "as the thesis"),
        ("falls short", -30, "open"),
        ("falls short", 10, "against the thesis"),
        ("not above", -10, "as the thesis"),
        ("not above", 10, "open"),
        ("not above", 50, "against the thesis"),
        ("within 5%", 0, "open"),
        ("within 5%", 60, "against the thesis"),
        ("within 5%", -60, "against the thesis"),
        ("within 0.1", 20, "open"),
        ("within 0.1", 30, "against the thesis"),
        ("figure only", 90, "-"),
    ],
)
def test_verdicts(docs, claim, shift, verdict):
    """a is 410 ± 24.84, and b a constant with 5% = 20.5 - 0.05 * shift."""
    data = figures.load(docs / "results" / "laptop")
    assert (
        figures.finding(data, "", f"{MSE}?task=walker-stand", claim, str(410 - shift))[-1]
        == verdict
    )


def test_pairs_samples_and_the_better_teacher(tmp_path):
    """Runs of one folder are compared seed by seed, others as two samples."""
    columns, last = figures.KINDS["returns"][0], ("walker-stand", "final", 1, 0)
    for seed, (ds, student, cross) in enumerate(
        [(300, 310, 500), (500, 510, 100), (700, 710, 450)], start=1
    ):
        write(
            tmp_path,
            f"ds/medium/seed{seed}",
            columns,
            ("teacher", *last, ds),
            ("student", *last, student),
        )
        write(
            tmp_path,
            f"oqs/medium/seed{seed}",
            columns,
            ("from walker-walk", *last, cross),
            ("student", *last, 400),
        )
        write_returns(
            tmp_path, f"teacher/walker-stand-medium/seed{seed}", "teacher", stand=400 + seed
        )
    rows = rows_of(tmp_path, "fig69")
    assert rows["walker-stand medium: DS student against DS teacher"][3:] == [
        "+10.0 ± 0.0",
        "as the thesis",
    ]
    assert rows["walker-stand medium: DS teacher against MOP teacher"][3:] == [
        "+98.0 ± 496.8",
        "open",
    ]
    best = rows[
        "walker-stand medium: OQS student against the better of its teachers"
    ]  # 500, 401, 450
    assert best[2:] == ["450.3 ± 123.0 (3 seeds)", "-50.3 ± 123.0", "-"]
    for seed in (1, 2, 3):
        cross, student = ("from walker-walk", *last, 9), ("student", *last, 390 + seed)
        write(tmp_path, f"oqs/medium/seed{seed}", columns, cross, student)
    best = rows_of(tmp_path, "fig69")[
        "walker-stand medium: OQS student against the better of its teachers"
    ]
    assert best[2:] == [
        "401.0 (seed 1)",
        "-9.0 ± 2.5",
        "-",
    ]  # one teacher, not three seeds of it


def test_tau_of_the_last_step_and_measures(tmp_path):
    """Seed 1 has the columns of today, seed 2 those of the files made before."""
    for seed in (1, 2):
        for width, last in ((16, 0.2), (256, 0.5)):
            new_rows = []
            old_rows = []
            for step, start in ((1000, 0.9), (2000, last)):
                for task, other_task in itertools.permutations(figures.TASKS):
                    for layer in (1, 2):
                        tau = start + layer / 10 + seed / 100
                        new_rows.append((step, task, other_task, layer, tau, 0.1))
                        old_rows.append((step, task, layer, tau, 0.1, 0.9))
            name = f"student/mse-none-{width}-offline-medium-medium/seed{seed}-tau"
            if seed == 1:
                write(tmp_path, name, figures.KINDS["tau"][0], *new_rows)
            else:
                write(tmp_path, name, figures.OLD_TAU, *old_rows)
        rows = ("average tau-a", 1, 0.06 + seed / 100, ""), ("average tau-b", 1, 0.9, "")
        write(tmp_path, f"measure/{MSE}/seed{seed}", figures.KINDS["measure"][0], *rows)
    row = rows_of(tmp_path, "fig64")["per-state tau-a, layer 1: width 16 against width 256"]
    assert row[1:] == [
        "0.315 ± 0.064 (2 seeds)",
        "0.615 ± 0.064 (2 seeds)",
        "-0.300 ± 0.030",
        "as the thesis",
    ]
    for states, bits in (("noise", 0.3), ("random90", 0.7)):
        rows = [("js_bits", bits, 0.01), ("kl_ab", 9, ""), ("auc", 1, "")]
        write(
            tmp_path, f"shift/walker-walk-medium-{states}/seed1", figures.KINDS["shift"][0], *rows
        )
    row = rows_of(tmp_path, "section52")["walker-walk medium: random90 against noise"]
    assert row == [
        "above",
        "0.700 (1 seed)",
        "0.300 (1 seed)",
        "+0.400",
        "as the thesis (one seed)",
    ]
    row = rows_of(tmp_path, "table62")["medium MOP, layer 1 against the thesis's"]
    assert row == [
        "within 0.1",
        "0.075 ± 0.064 (2 seeds)",
        "0.067",
        "+0.008 ± 0.064",
        "as the thesis",
    ]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, args)])
    figures.main()


def test_figures_of_what_is_there(docs, monkeypatch):
    run(monkeypatch, "--docs", docs)
    results = docs / "results" / "laptop"
    # Appendix E draws the same students
    assert sorted(path.name for path in results.glob("*.png")) == ["appendixE.png", "fig54.png"]
    assert (results / "fig54.png").read_bytes()[:4] == b"\x89PNG"

    overview = (docs / "results.md").read_text()
    assert overview.count("by hand") == 2 * (1 + len(figures.FIGURES))
    assert "old" not in overview
    shown = "![Fig. 5.4 at laptop scale](results/laptop/fig54.png)\n<!-- end -->"
    assert f"<!-- picture fig54 -->\n{shown}" in overview
    assert "<!-- picture fig51 -->\n\n<!-- end -->" in overview  # not run: nothing
    line = "| A student with the loss mse matches its teachers | 1 as the thesis; 1 open |"
    line += " walker-walk: mse against its teacher: 710.0 for 430.0, +280.0 ± 24.8 |"
    assert f"{line} [Fig. 5.4](results/fig54.md) |\n" in overview
    line = "| A student with the loss q stays below its teachers | 2 as the thesis (one seed) |"
    assert line in overview

    page = (docs / "results" / "fig54.md").read_text()
    assert page.count("by hand") == 2
    assert "\n![Fig. 5.4 at laptop scale](laptop/fig54.png)\n\n| a against b |" in page
    assert "| a - b | verdict |\n" in page  # no recipe without a list of the old CSVs
    empty = (docs / "results" / "fig58.md").read_text()
    assert empty == place("table fig58").replace("old", "")
    figure = figures.fig54(figures.load(results))
    (legend,) = figure.legends
    labels = [label.get_text() for label in legend.get_texts()]
    none = ["kl (0 seeds)", "kl, std bounded as published (0 seeds)"]
    assert labels == ["mse (3 seeds)", "q (1 seed)", *none, "teacher of mse and q"]
    line = figure.axes[0].lines[0]
    assert [*line.get_xdata()] == [1, 2] and [*line.get_ydata()] == [
        205,
        102.5,
    ]  # thousands of steps, means of seeds
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    t = stats.t.ppf(0.975, 2) / 3**0.5  # the seeds' stds are 5 and 2.5
    assert (band.max(), band.min()) == pytest.approx((205 + 5 * t, 102.5 - 2.5 * t))

    levels = []
    for ax in figures.fig51(figures.load(results)).axes:
        (line,) = (line for line in ax.lines if line.get_label() == "behaviour of the thesis")
        levels.append((ax.get_title(), *line.get_ydata()[:1]))
    assert levels[:3] == [
        ("walker-stand, medium", 463),
        ("walker-walk, medium", 691),
        ("walker-stand, expert", 979),
    ]


def test_a_curve_ends_with_the_final_evaluation(tmp_path):
    """Where the last step has no row of training, as in files made since."""
    rows = [("student", "walker-walk", "training", 1000, "mean", 300)]
    for e, value in enumerate((480, 520)):
        rows.append(("student", "walker-walk", "final", 2000, e, value))
    write(tmp_path, f"{MSE}/seed1", figures.KINDS["returns"][0], *rows)
    line = figures.fig54(figures.load(tmp_path)).axes[1].lines[0]
    assert [*line.get_xdata()] == [1, 2]
    assert [*line.get_ydata()] == [300, 500]


@pytest.mark.parametrize("part", ["fig54", "fig58", "fig63", "fig69"])
def test_nothing_is_drawn_of_nothing(part):
    assert figures.FIGURES[part]({}) is None


def test_bars_and_activations(docs):
    results = docs / "results" / "laptop"
    key = "measure/student/mse-none-256-offline-medium-replay-medium-replay/seed1-activations"
    means = {"walker-stand": (0.3, 0.1, 0.2), "walker-walk": (0.6, 0.4, 0.5)}
    rows = []
    for task, layer, neuron in itertools.product(means, (1, 2), range(3)):
        rows.append((task, layer, neuron, means[task][neuron]))
    write(results, key, figures.KINDS["activations"][0], *rows)
    data = figures.load(results)
    stand, walk = figures.fig63(data).axes[1].lines
    assert [*stand.get_ydata()] == [0.1, 0.2, 0.3] and [*walk.get_ydata()] == [0.4, 0.5, 0.6]
    bars = [bar.get_height() for bar in figures.fig69(data).axes[0].patches if bar.get_height() > 0]
    assert bars == pytest.approx([440, 410, 440])


def test_findings_name_runs_of_the_layout():
    """A misspelt quantity would be 'not run' for ever."""
    level, task = "(medium|expert|medium-replay|{level})", "(walker-stand|walker-walk|{task})"
    student = r"student/(mse|q|kl)-(none|ndcg|pairwise|listwise)-(16|32|64|128|256|512)"
    student += rf"-\w+-{level}-{level}"
    folder = rf"(teacher(-plain)?|gaussian(-tanh)?|behavior)/{task}-{level}|{student}(/tau)?"
    folder += rf"|((naive|frozen)(-plain)?|ds|oqs|cross)/{level}"
    folder += rf"|shift/{task}-{level}-(offline|noise|random90|random99)"
    folder = re.compile(rf"{folder}|measure/({student}|(ds|ds-common|oqs)/{level})|[\d.]+")
    with (ROOT / "reproduce" / "findings.csv").open(newline="") as file:
        lines = [*csv.DictReader(file)]
    assert {line["part"] for line in lines} == {*figures.TITLES}
    assert {line["claim"] for line in lines} == {*figures.CLAIMS, *figures.WITHIN, "figure only"}
    for line in lines:
        for quantity in (line["a"], *line["b"].split(" | ")):
            name, *conditions = re.split(r"[?&]", quantity.removesuffix("#1"))
            assert folder.fullmatch(name), quantity
            kind = "tau" if name.endswith("/tau") else name.split("/")[0]
            columns = figures.KINDS.get(kind, figures.KINDS["returns"])[0].split(",")
            assert all(condition.split("=")[0] in columns for condition in conditions), quantity


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ds/medium/seed1", "policy,task\nteacher,walker-stand\n", "expected the name"),
        (
            "ds/medium/first",
            figures.KINDS["returns"][0] + "\nstudent,walker-walk,final,1,0,5\n",
            "expected the name",
        ),
        ("ds/medium/seed1", figures.KINDS["returns"][0] + "\n", "and rows"),
        (
            "measure/ds/medium/seed1",
            figures.KINDS["measure"][0] + "\naverage tau-a,1,high,\n",
            "line 2: expected numbers",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    path = tmp_path / f"{name}.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(SystemExit, match=rf"{re.escape(str(path))}.*{message}"):
        figures.load(tmp_path)


def test_a_page_without_its_places_is_refused(docs, monkeypatch):
    page = docs / "results" / "fig51.md"
    page.write_text("<!-- table fig51 -->\n")
    with pytest.raises(SystemExit, match=r"<!-- table fig51 -->.*<!-- end -->"):
        run(monkeypatch, "--docs", docs)
    page.unlink()
    with pytest.raises(SystemExit, match=r"expected the page .*fig51\.md"):
        run(monkeypatch, "--docs", docs)


@pytest.fixture
def replaced(tmp_path):
    """Four students and their teachers of the old recipe, and a function that adds a new run."""
    new, old = tmp_path / "laptop", tmp_path / "laptop-alike"
    for seed in (1, 2, 3, 4):
        write_returns(old, f"{MSE}/seed{seed}", "student", stand=400 + seed, walk=600)
    for seed in (1, 2, 3):
        name = f"teacher/walker-stand-medium/seed{seed}"
        write_returns(old, name, "teacher", stand=500 + seed)
    write_returns(new, "behavior/walker-stand-medium/seed1", "behavior", stand=450)

    def add(name, value):
        policy = name.split("/")[0]
        write_returns(new, name, policy, stand=value)

    return new, add


def row_of(folder, part, what):
    rows = figures.findings(figures.load_recipes(folder), part)
    (row,) = (row for row in rows if row.cells[0] == what)
    return row


def test_old_and_new_seeds_are_no_sample(replaced):
    """Of the two recipes one is shown: that of more seeds, or the new."""
    folder, add = replaced
    what = "walker-stand medium: teacher against its behaviour"
    row = row_of(folder, "fig51", what)
    assert (row.recipe, row.cells[2]) == ("alike", "502.0 ± 2.5 (3 seeds)")
    assert row.cells[3] == "450.0 (seed 1)"  # of no recipe, so compared with both
    add("teacher/walker-stand-medium/seed1", 700)
    add("teacher/walker-stand-medium/seed2", 700)
    row = row_of(folder, "fig51", what)
    assert (row.recipe, row.cells[2]) == ("alike", "502.0 ± 2.5 (3 seeds)")
    add("teacher/walker-stand-medium/seed3", 700)
    row = row_of(folder, "fig51", what)
    assert (row.recipe, row.cells[2]) == ("weighted", "700.0 ± 0.0 (3 seeds)")


def test_old_and_new_are_not_compared(replaced):
    folder, add = replaced
    what = "walker-stand: mse against its teacher"
    old = row_of(folder, "fig54", what)
    assert (old.recipe, old.verdict) == ("alike", "against the thesis")
    for seed in (1, 2, 3, 4):
        assert row_of(folder, "fig54", what) == old  # new students alone are not enough
        add(f"{MSE}/seed{seed}", 465)
    add("teacher/walker-stand-medium/seed1", 460)  # the one of all students
    row = row_of(folder, "fig54", what)
    assert row.recipe == "weighted"
    assert row.cells[2:5] == ["465.0 ± 0.0 (4 seeds)", "460.0 (seed 1)", "+5.0 ± 0.0"]
    row = row_of(folder, "fig54", "walker-stand: kl against its teacher")
    assert row.verdict == "not run"


def test_old_and_new_are_in_no_picture(docs, monkeypatch):
    new, old = docs / "results/laptop", docs / "results/laptop-alike"
    for seed in (1, 2, 3):
        (old / MSE).mkdir(parents=True, exist_ok=True)
        (new / f"{MSE}/seed{seed}.csv").rename(old / f"{MSE}/seed{seed}.csv")
    drawn = {}

    def draw(data):
        drawn.update(data)
        return figures.fig54(data)

    monkeypatch.setattr(figures, "FIGURES", {"fig54": draw})
    run(monkeypatch, "--docs", docs)
    # of the new recipe: six teachers and a student, of the old: three students
    assert MSE not in drawn and "teacher/walker-walk-medium" in drawn
    overview = (docs / "results.md").read_text()
    assert "fig54.png)\n\nCloning of the teachers in the picture: weighted.\n" in overview
    page = (docs / "results" / "fig54.md").read_text()
    assert "| a - b | verdict | cloning |\n" in page
    assert "| walker-walk: mse against its teacher | matches |  |" in page


def test_a_picture_changes_with_all_it_draws(tmp_path):
    """Fig. 6.4 draws six widths, and its table compares two of them."""
    for width in figures.WIDTHS:
        name = MSE.replace("256", str(width))
        write_returns(tmp_path / "laptop-alike", f"{name}/seed1", "student", stand=400)
        recipes = figures.load_recipes(tmp_path / "laptop")
        assert figures.main_recipe(recipes, "fig64") == "alike"
    for width in figures.WIDTHS:
        assert figures.main_recipe(recipes, "fig64") == "alike"
        name = MSE.replace("256", str(width))
        write_returns(tmp_path / "laptop", f"{name}/seed1", "student", stand=500)
        recipes = figures.load_recipes(tmp_path / "laptop")
    assert figures.main_recipe(recipes, "fig64") == "weighted"


def test_an_old_behavior_stays_with_the_old_teachers(replaced):
    folder, add = replaced
    old = folder.with_name("laptop-alike")
    write_returns(old, "behavior/walker-stand-medium/seed1", "behavior", stand=440)
    what = "walker-stand medium: teacher against its behaviour"
    assert row_of(folder, "fig51", what).cells[3] == "440.0 (seed 1)"
    for seed in (1, 2, 3):
        add(f"teacher/walker-stand-medium/seed{seed}", 700)
    assert row_of(folder, "fig51", what).cells[3] == "450.0 (seed 1)"


def test_every_claim_has_one_example():
    assert {*figures.FIGURES} < {*figures.TITLES}
    examples = defaultdict(int)
    for name in figures.TITLES:
        for line in figures.lines_of(name):
            tested = line["claim"] != "figure only"
            assert tested == bool(line["the thesis says"]), line
            if tested:
                examples[line["the thesis says"]] += line["example"] == line["a against b"]
    assert {*examples.values()} == {1}, examples


def test_the_pages_are_what_the_csvs_make():
    shown = set()
    for name, made in figures.blocks(ROOT / "docs").items():
        page = (ROOT / "docs" / name).read_text()
        wrong = f"{name}; run: python reproduce/figures.py"
        assert figures.fill(page, made) == page, wrong
        assert page.count("<!-- end -->") == len(made), wrong
        shown |= set(re.findall(r"\((?:results/)?(\w+/\w+)\.png\)", page))
    pictures = (ROOT / "docs/results").glob("*/*.png")
    assert shown == {f"{path.parent.name}/{path.stem}" for path in pictures}


def test_the_table_of_1000_episodes():
    """Each row from the CSV: students, their teacher or the better one, their difference."""
    returns = defaultdict(dict)
    with (ROOT / "docs/curves/returns-1000-episodes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["policy"], row["level"], row["task"]
            returns[key][int(row["seed"])] = float(row["mean"])
    text = (ROOT / "docs/results/1000-episodes.md").read_text()
    rows = re.findall(r"^\| (mse|Q-switch), (\w+) .*?\| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for method, level, cells in rows:
        numbers = cells.split(" | ")
        for task in ("walker-stand", "walker-walk"):
            student, teacher, difference = numbers[:3]
            numbers = numbers[3:]
            students = returns[f"{'OQS' if method == 'Q-switch' else 'MOP'} student", level, task]
            teachers = dict.fromkeys(students, returns["MOP teacher", level, task][1])
            others = returns["OQS teacher from walk's data", level, task]
            if method == "Q-switch" and others and others[1] > teachers[1]:
                teachers = others  # a teacher per seed
            seeds = [seed for seed in students if seed in teachers]
            assert student == f"{np.mean([students[seed] for seed in seeds]):.1f}"
            assert teacher == f"{np.mean([teachers[seed] for seed in seeds]):.1f}"
            mean, half = figures.interval([students[seed] - teachers[seed] for seed in seeds])
            assert difference == f"{mean:.1f} ± {half:.1f}", (method, level, task)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences(page):
    """No paragraph or list item by hand has more than 80 words; every link leads somewhere."""
    text = re.sub(r"^<!-- .*?^<!-- end -->", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\n|\n *- ", text):
        if not paragraph.lstrip().startswith("|"):
            assert len(paragraph.split()) <= 80, paragraph
    test_docs.test_links(page)
    assert page == PAGES[0] or f"(results/{page.name}" in PAGES[0].read_text()


def test_intervals_of_the_other_pages_are_of_these():
    """mean ± half in the README and on the scripts' pages: on the pages of the results or in a
    table of one recipe of teachers, perhaps rounded."""

    def pairs(text):
        return re.findall(r"(-?\d[\d.]*) ± ([\d.]*\d)", text)

    def rounded(short, long):
        return abs(float(short) - float(long)) < 0.55 * 10.0 ** -len(short.partition(".")[2])

    known = []
    for recipe, runs in figures.load_recipes(ROOT / "docs/results/laptop").items():
        for name in figures.TITLES:
            for row in figures.findings({recipe: runs}, name):
                known += pairs(" ".join(row.cells))
    for page in PAGES:
        known += pairs(page.read_text())
    texts = {"README.md": (ROOT / "README.md").read_text()}
    for name in ("mop_pbrl_teacher.md", "mop_distill.md", "mop_ds.md", "mop_oqs.md"):
        texts[name] = (ROOT / "docs" / name).read_text()
    for name, text in texts.items():
        found = pairs(text)
        unknown = [
            pair for pair in found if not any(all(map(rounded, pair, other)) for other in known)
        ]
        assert found and not unknown, f"{name}: not on the pages of the results: {unknown}"
