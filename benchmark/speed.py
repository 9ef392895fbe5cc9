"""Times the scripts' own loops, evaluation, collection and loading beside the floor of their matrix products.

  python benchmark/speed.py                        # everything; table, and JSON in benchmark/results/
  python benchmark/speed.py --works pbrl distill   # some of it
  python benchmark/speed.py --peer peer.py:make    # another implementation in the same run

A training script is run through its own main() on a made-up dataset, with its progress bar replaced by a clock, so that
nothing of the loop is left out or copied. The floor of a step is the time of its matrix products alone, each shape at
the rate that this machine reaches for it, measured between the rounds of the loop. Figures are medians over rounds.

peer.py:make is called as make(work, device) and returns a function to time, one step of pbrl, distill or td3 or one
evaluation of 10 episodes, or None where it has none.
"""

import contextlib
import importlib.util
import io
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "disable")

import numpy as np
import torch
import tyro

import mop_distill
import mop_pbrl_teacher
import mop_td3_collect

OBS, ACT = 24, 6  # the walker's
Work = Literal["pbrl", "distill", "td3", "evaluation", "collect", "load"]


@dataclass
class Args:
    works: tuple[Work, ...] = ("pbrl", "distill", "td3", "evaluation", "collect", "load")
    """what to time"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the training loops run"""
    threads: int = 0
    """CPU threads; 0: all cores"""
    rounds: int = 5
    """rounds of a loop and its floor, after one to warm up"""
    steps: int = 20
    """steps of a loop per round"""
    transitions: int = 1_000_000
    """rows of the collection and of the loaded dataset; a smaller number is scaled up to 1M"""
    peer: str | None = None
    """FILE.py:FUNCTION that makes another implementation's functions"""
    output: str | None = None
    """JSON to write; default: benchmark/results/<device>-<threads>-threads.json"""


# -------------------------------------------------------------------------------------------------------------- floors
def forward_products(rows: int, *sizes: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every product (m, k) @ (k, n) in the forward pass of an MLP."""
    return [(rows, a, b) for a, b in pairwise(sizes)]


def backward_products(rows: int, *sizes: int, weights: bool = True, inputs: bool = False) -> list:
    """The same of its backward pass: gradients of the weights, of the activations, and (inputs) of the input."""
    layers = list(pairwise(sizes))
    return [(a, rows, b) for a, b in layers if weights] + [(rows, b, a) for a, b in (layers if inputs else layers[1:])]


def pbrl_products(batch: int = 1024, hidden: int = 256, k: int = 5, num_ood: int = 3) -> list:
    """(count, products) of one update of PBRL; the actor's is made in every second."""
    critic, actor = (OBS + ACT, hidden, hidden, 1), (OBS, hidden, hidden, ACT)
    rows = batch * (1 + 2 * num_ood)
    return [
        (k, forward_products(rows, *critic) + backward_products(rows, *critic) + forward_products(batch, *critic)),
        (1, forward_products(batch, *actor) + forward_products(2 * batch, *actor)),
        (0.5, forward_products(batch, *actor) + backward_products(batch, *actor)),
        (0.5 * k, forward_products(batch, *critic) + backward_products(batch, *critic, weights=False, inputs=True)),
    ]


def distill_products(batch: int = 1024, hidden: int = 256, m: int = 2) -> list:
    sizes = OBS + 1, hidden, hidden, ACT
    return [(1, forward_products(m * batch, *sizes) + backward_products(m * batch, *sizes))]


def td3_products(batch: int = 1024, hidden: int = 1024) -> list:
    """The actor's update, in every second step, goes through one critic (TD3 paper)."""
    critic, actor = (OBS + ACT, hidden, hidden, 1), (OBS, hidden, hidden, ACT)
    return [
        (2, 2 * forward_products(batch, *critic) + backward_products(batch, *critic)),
        (1, forward_products(batch, *actor) + forward_products(1, *actor)),
        (0.5, forward_products(batch, *actor) + backward_products(batch, *actor)),
        (0.5, forward_products(batch, *critic) + backward_products(batch, *critic, weights=False, inputs=True)),
    ]


def median_time(function, repeats: int, device: str = "cpu") -> float:
    """Median seconds of one call, after a warm-up; the clock waits for the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floor(products: list, device: str) -> float:
    """Seconds of the products alone, each shape at the rate it reaches now."""
    seconds = {}
    for m, k, n in {shape for _, shapes in products for shape in shapes}:
        a, b, out = (torch.randn(*shape, device=device) for shape in ((m, k), (k, n), (m, n)))
        seconds[m, k, n] = median_time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 9, device)
    return sum(count * seconds[shape] for count, shapes in products for shape in shapes)


def operations(products: list) -> float:
    """Floating-point operations of the products."""
    return sum(count * 2 * m * k * n for count, shapes in products for m, k, n in shapes)


# ------------------------------------------------------------------------------------------------------------ our loops
class Enough(Exception):
    """Raised by on_round to end a script's loop."""


class Clock:
    """Stands in for a script's tqdm: calls on_round(seconds per step) after every `steps` updates of the loop."""

    steps, on_round, device = 1, None, "cpu"

    def __init__(self, *args, **kwargs):
        self.count, self.start = 0, time.perf_counter()

    def update(self, n=1):
        self.count += 1
        if self.count % Clock.steps == 0:
            if Clock.device == "cuda":
                torch.cuda.synchronize()
            Clock.on_round((time.perf_counter() - self.start) / Clock.steps)
            self.start = time.perf_counter()  # what on_round did is not the loop's

    def close(self):
        pass

    def write(self, *args):
        pass

    def set_postfix(self, *args):
        pass


@torch.no_grad()
def one_state(policy, env, device) -> list[float]:
    """In place of a script's evaluate: one call of the policy, no episodes."""
    policy(torch.zeros(env.n, env.obs_dim, device=device))
    return [0.0] * env.n


def run_loop(module, argv: list, on_round, steps: int, device: str) -> None:
    """The script's main() with a Clock; evaluations are left out, they are timed on their own."""
    Clock.steps, Clock.on_round, Clock.device = steps, on_round, device
    originals = module.tqdm, module.evaluate, sys.argv
    module.tqdm, module.evaluate = Clock, one_state
    sys.argv = [module.__name__, *map(str, argv)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
            module.main()
    finally:
        module.tqdm, module.evaluate, sys.argv = originals


def shares(profile) -> dict:
    """Share of each part in the time on the CPU, from a profile of some steps."""
    seconds = dict.fromkeys(("sampling", "backward", "optimiser", "targets"), 0.0)
    parts = {"aten::randint": "sampling", "aten::randn": "sampling", "aten::index": "sampling"}
    parts |= {"aten::_foreach_lerp_": "targets", "Optimizer.step#Adam.step": "optimiser"}
    for row in profile.key_averages():
        if row.key.startswith("autograd::engine::evaluate_function"):
            seconds["backward"] += row.cpu_time_total
        elif row.key in parts:
            seconds[parts[row.key]] += row.cpu_time_total
    total = sum(row.self_cpu_time_total for row in profile.key_averages())
    found = {name: value / total for name, value in seconds.items()}
    return {**found, "forward and the rest": 1 - sum(found.values())}


def time_loop(module, argv: list, products: list, args) -> dict:
    """Rounds of a script's loop and of its floor in turn, then one profiled round."""
    loop, floors, profiler = [], [], torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_round(seconds):
        loop.append(seconds)
        if len(loop) <= args.rounds:
            floors.append(floor(products, args.device))
        if len(loop) == args.rounds + 1:
            profiler.start()
        elif len(loop) == args.rounds + 2:
            profiler.stop()
            raise Enough

    run_loop(module, argv, on_round, args.steps, args.device)
    ours, least = statistics.median(loop[1 : args.rounds + 1]), statistics.median(floors)
    rate = operations(products) / least / 1e9
    ratio = statistics.median(a / b for a, b in zip(loop[1 : args.rounds + 1], floors[1:] + floors[:1], strict=True))
    return {"seconds": ours, "floor": least, "ratio": ratio, "gflops_of_floor": rate, "shares": shares(profiler)}


def made_up_dataset(path: Path, task: str, n: int) -> Path:
    """A dataset file in the scripts' format, random rows."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.standard_normal((n, OBS), np.float32),
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "rewards": rng.uniform(0, 1, n).astype(np.float32),
        "next_observations": rng.standard_normal((n, OBS), np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 1000 == 0,
        "physics": rng.standard_normal((n, 18)),
    }
    metadata = {"schema_version": 1, "task": task, "level": "medium", "episode_returns": [0.0]}
    np.savez(path, **arrays, metadata=np.array(json.dumps(metadata)))
    return path


def time_works(args, folder: Path) -> dict:
    """One entry per work: seconds, and floor and ratio or goal where there is one."""
    results, total = {}, (args.rounds + 2) * args.steps + 1000  # more than are made
    tasks = "walker-stand", "walker-walk"
    common = ["--device", args.device, "--threads", args.threads, "--eval-episodes", 1, "--final-eval-episodes", 1]
    loop = [*common, "--eval-every", 10**9, "--gradient-steps", total]
    data = [made_up_dataset(folder / f"{task}.npz", task, 100_000) for task in tasks]
    if {"pbrl", "distill"} & set(args.works):
        tiny = [*common, "--eval-every", 10**9, "--gradient-steps", 1, "--batch-size", 8]
        teachers = [folder / f"{task}.pt" for task in tasks]
        for task, path, teacher in zip(tasks, data, teachers, strict=True):
            run_loop(
                mop_pbrl_teacher,
                [*tiny, "--task", task, "--data", path, "--output", teacher, "--run-dir", folder / f"tiny-{task}"],
                lambda seconds: None,
                1,
                args.device,
            )
    for work in args.works:
        print(f"timing {work} ...", flush=True)
        run_dir = ["--run-dir", folder / work]
        if work == "pbrl":
            argv = ["--task", tasks[0], "--data", data[0], "--output", folder / "t.pt", *run_dir, *loop]
            results[work] = time_loop(mop_pbrl_teacher, argv, pbrl_products(), args)
        elif work == "distill":
            argv = ["--data", *data, "--teachers", *teachers, *run_dir, *loop]
            results[work] = time_loop(mop_distill, argv, distill_products(), args)
        elif work == "td3":
            steps = -(-total // 1000) * 1000
            argv = ["--task", tasks[1], "--total-timesteps", steps, "--learning-starts", 0, "--datasets", "expert"]
            argv += ["--num-transitions", 1000, "--eval-every", steps, *run_dir, *common]
            results[work] = time_loop(mop_td3_collect, argv, td3_products(), args)
        elif work == "evaluation":
            actor, env = mop_distill.Actor(OBS, ACT, 256), mop_distill.LockstepEnv(tasks[1], 10, args.threads)
            cpu = torch.device("cpu")
            seconds = median_time(lambda actor=actor, env=env: mop_distill.evaluate(actor, env, cpu), args.rounds)
            results[work] = {"seconds": seconds}
        elif work == "collect":
            actor = mop_distill.Actor(OBS, ACT, 256)
            start = time.perf_counter()
            options = {"num_envs": mop_td3_collect.Args.num_envs, "seed": 1, "device": torch.device("cpu")}
            mop_td3_collect.collect(actor, tasks[1], "online", args.transitions, **options, threads=args.threads)
            results[work] = {"seconds": (time.perf_counter() - start) * 1e6 / args.transitions}
        elif work == "load":
            path = made_up_dataset(folder / "large.npz", tasks[0], args.transitions)
            seconds = median_time(lambda path=path: mop_distill.load_dataset(path, tasks[0]), 3)
            results[work] = {"seconds": seconds * 1e6 / args.transitions}
    return results


def time_peer(args) -> dict:
    """Seconds of the peer's functions, in this process, under the same number of threads."""
    file, _, name = args.peer.partition(":")
    spec = importlib.util.spec_from_file_location("peer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {work: getattr(module, name)(work, args.device) for work in args.works}
    repeats = args.rounds * args.steps
    return {
        work: median_time(function, args.rounds if work == "evaluation" else repeats, args.device)
        for work, function in found.items()
        if function is not None
    }


def main():
    args = tyro.cli(Args, description=__doc__)
    file, _, name = (args.peer or "").partition(":")
    if args.peer and not (Path(file).is_file() and name):
        raise SystemExit(f"speed.py: error: --peer {args.peer}: expected FILE.py:FUNCTION, an existing file")
    torch.set_num_threads(args.threads or os.cpu_count())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # TD3 writes to checkpoints/ and data/
        results = time_works(args, Path(folder))
    peers = time_peer(args) if args.peer else {}
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    hardware = {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report = {"hardware": hardware, "versions": versions, "args": vars(args), "results": results, "peer": peers}
    report |= {"peak_memory_gib": round(peak, 2)}

    print(f"{device}, {hardware['threads']} threads, torch {torch.__version__}; seconds per step, run or 1M rows")
    print(f"{'work':12}{'ours':>10}{'floor':>10}{'ratio':>8}{'peer':>10}   shares")
    for work, row in results.items():
        columns = [f"{row['seconds']:10.4g}", f"{row['floor']:10.4g}" if "floor" in row else " " * 10]
        columns += [f"{row['ratio']:8.2f}" if "ratio" in row else " " * 8]
        columns += [f"{peers[work]:10.4g}" if work in peers else " " * 10]
        text = ", ".join(f"{name} {100 * share:.0f}%" for name, share in row.get("shares", {}).items())
        print(f"{work:12}{''.join(columns)}   {text}")
    print(f"peak memory of this process {peak:.2f} GiB")
    path = Path(args.output or ROOT / f"benchmark/results/{args.device}-{hardware['threads']}-threads.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    mop_distill.write_atomic(path, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    print("RESULT", json.dumps({"results": results, "peer": peers, "file": str(path)}))


if __name__ == "__main__":
    main()
