"""Compare runs: the paper's findings, their causes switched on and off, over seeds and worlds; or any runs you have.

    python compare.py --seeds 1             all runs of the findings, one seed: the shape of it all
    python compare.py                       ... 5 seeds, 2 runs at a time; then tables and figures
    python compare.py runs/opd runs/sft_offpolicy        draw these output directories together, in runs/together

A world is a folder as toy/build.py makes it: teacher, student, problems. Every run is an ordinary run of an ordinary
script, in --out_dir/WORLD/NAME-seed-N: one that is finished is not repeated, one that was stopped goes on. What is
written to --out_dir: results.json (every number that the rest is made of), table.md (means over seeds, ± half the width
of the 95 % t-interval), findings.md (what the paper says against what these runs say, as differences between runs of
the same seed), and figures as PNG.
"""

import concurrent.futures
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.arguments import check_args, parse, refuse
from plumbing.run import read_lines
from toy import findings


@dataclass
class Args:
    dirs: list[str] = field(default_factory=list)  # output directories to draw together, instead of the findings
    out_dir: str = "runs/compare"  # where runs, tables and figures go
    worlds: str = "toy"  # folders as toy/build.py makes them, by commas; figures and table show the first
    seeds: int = 5  # runs of each kind in the first world, seeds 0, 1, ...
    other_seeds: int = 1  # runs of each kind in the other worlds, for the signs
    workers: int = 2  # runs at the same time, one thread each
    steps: int = 150  # updates of every distillation run
    short: int = 8  # the short training length, tokens: a response's first line and a half
    length: int = 96  # the long one, where everything is cut: several times a response
    rl_steps: int = 60  # updates of the RL that follows


# ----------------------------------------------------------------------------------------------------------------
# Running


def run_one(script, arguments, out_dir):
    """Run a script as its command line would, in this process. -> an error, or None"""
    module = importlib.import_module(script)
    words = [str(w) for key, value in (arguments | {"out_dir": out_dir}).items() for w in (f"--{key}", value)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            module.main(parse(module.Args, words))
        except SystemExit as end:
            return None if "is finished" in str(end.code) else f"{out_dir}: {end.code}"


def run_all(args, world, seeds):
    """All runs of the plan over all seeds, --workers at a time; those that start from others come last.
    -> {name: the directories of its runs, by seed}"""
    out = os.path.join(args.out_dir, Path(world).name)
    runs = findings.plan(args, world)
    dirs = {name: [os.path.join(out, f"{name}-seed-{seed}") for seed in range(seeds)] for name in runs}

    def submit(name, seed):
        script, arguments = runs[name]
        student = arguments["student"]
        if student in runs:
            student = os.path.join(dirs[student][seed], "model")
        return pool.submit(run_one, script, arguments | dict(student=student, seed=seed), dirs[name][seed])

    first = [name for name, (_, arguments) in runs.items() if arguments["student"] not in runs]
    bar = tqdm(total=len(runs) * seeds, desc=f"runs in {world}")
    # spawn: a fresh interpreter for every worker, as torch's threads do not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for names in (first, [name for name in runs if name not in first]):
            futures = [submit(name, seed) for seed in range(seeds) for name in names]
            for future in concurrent.futures.as_completed(futures):
                bar.update()
                if future.result():
                    refuse(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return dirs


# ----------------------------------------------------------------------------------------------------------------
# Reading

METRICS = {
    "avg_at_k": "Avg@k", "pass_at_k": "Pass@k", "eval_ended": "finished", "eval_entropy": "entropy (nats)",
    "eval_len": "length (tokens)", "flops": "model FLOPs",
}  # fmt: skip
KEPT = {*METRICS, "step", "ended", "response_len", "entropy", "gate_entropy", "gate_open", "train_len"}


def read(path):
    """A run's log -> its rows at evaluations, at gates and at every tenth step."""
    rows = read_lines(os.path.join(path, "log.jsonl"))
    rows = [row for row in rows if "avg_at_k" in row or "gate_entropy" in row or row["step"] % 10 == 0]
    if not any("avg_at_k" in row for row in rows):
        refuse(f"{path!r} has no log, or no evaluation in it yet")
    number = lambda x: float(f"{x:.5g}") if isinstance(x, float) else x  # noqa: E731
    return [{"flops": 0.0} | {key: number(value) for key, value in row.items() if key in KEPT} for row in rows]


def final(runs, metric, flops=None):
    """-> (seeds,) a metric at the last evaluation, or between evaluations where each seed had used so many FLOPs."""
    at = [[(row["flops"], row[metric]) for row in rows if metric in row] or [(0.0, math.nan)] for rows in runs]
    flops = [points[-1][0] for points in at] if flops is None else flops
    return np.array([np.interp(f, *zip(*points)) for f, points in zip(flops, at)])


def mean_ci(values):
    """-> (mean, half the width of the 95 % t-interval; NaN for a single value)."""
    n, values = len(values), np.asarray(values, float)
    return values.mean(), t_quantile(n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan


def plus_minus(values, form):
    """mean_ci in words; nothing where there is no value, no interval for a single one."""
    mean, ci = mean_ci(values)
    interval = "" if math.isnan(ci) else " ± " + form.format(ci).lstrip("+")
    return "" if math.isnan(mean) else form.format(mean) + interval


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t: from tables; from 9 degrees of freedom on, Cornish and Fisher's series."""
    if freedom < 9:
        return (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def write_table(groups, path):
    """Means and intervals over the runs of a group, after the last step."""
    lines = ["| run | n | " + " | ".join(METRICS.values()) + " |", "|---|---|" + "---|" * len(METRICS)]
    for name, runs in groups.items():
        forms = {key: "{:.3f}" for key in METRICS} | {"flops": "{:.2e}", "eval_len": "{:.1f}"}
        cells = [plus_minus(final(runs, key), form) for key, form in forms.items()]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    gates = [(name, row) for name, runs in groups.items() for rows in runs for row in rows if "gate_entropy" in row]
    if gates:
        lines += ["", "| gate | after stage of | H_m (nats) | open |", "|---|---|---|---|"]
    for name, length in dict.fromkeys((name, row["train_len"]) for name, row in gates):
        here = [row for other, row in gates if (other, row["train_len"]) == (name, length)]
        h_m, n_open = plus_minus([row["gate_entropy"] for row in here], "{:.3f}"), sum(row["gate_open"] for row in here)
        lines.append(f"| {name} | {length} tokens | {h_m} | {n_open} of {len(here)} |")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------
# Findings


def write_findings(worlds, args):
    """findings.md. "found": the number has the expected sign in every world, and its interval in the first one leaves
    out 0; "found in 2 of 3": the same, but not in every world; "the opposite": likewise with the other sign; else "not
    found"."""
    lines = [f"| | expected | {' | '.join(Path(w).name for w in worlds)} | |", "|---|---|" + "---|" * (len(worlds) + 1)]
    for axis, says, sign, number in findings.claims(args):
        numbers = [
            number(lambda name, *rest, g=groups: final(g[name], *(rest or ("avg_at_k",)))) for groups in worlds.values()
        ]
        (mean, ci), signs = mean_ci(numbers[0]), [np.sign(np.mean(n)) for n in numbers]
        verdict, agree = "found" if mean * sign > 0 else "the opposite", signs.count(signs[0])
        verdict += "" if agree == len(worlds) else f" in {agree} of {len(worlds)}"
        verdict = "one seed" if math.isnan(ci) else verdict if abs(mean) > ci else "not found"
        form = "{:+.1f}" if abs(mean) > 1 else "{:+.3f}"
        says += " (+)" if sign > 0 else " (−)"
        lines.append(f"| {axis} | {says} | " + " | ".join(plus_minus(n, form) for n in numbers) + f" | {verdict} |")
    text = "\n".join(lines) + "\n"
    Path(args.out_dir, "findings.md").write_text(text, encoding="utf-8")
    return text


# ----------------------------------------------------------------------------------------------------------------
# Drawing

LABELS = METRICS | {"step": "step", "response_len": "length (tokens)", "entropy": "entropy (nats)"}


def draw(groups, path, title, panels, lines):
    """One figure: a row of panels in letters that can be read from the last row of a lecture hall; means over seeds,
    with 95 % intervals."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.5})
    fig = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False)
    fig.suptitle(title)
    for axis, (x, y) in zip(axes[0], panels):
        for color, marker, label, runs in lines:
            if x == "step":
                rows = zip(*([row for row in rows if y in row] for rows in groups[runs]))
                points = [((at[0][x], 0.0), mean_ci([r[y] for r in at])) for at in rows]
            else:
                points = [(mean_ci(final(groups[runs], x)), mean_ci(final(groups[runs], y)))]
            (xs, dx), (ys, dy) = np.array(points).transpose(1, 2, 0)
            style = dict(color=color, marker=marker, label=label, capsize=3, markersize=8)
            axis.errorbar(xs, ys, np.nan_to_num(dy), np.nan_to_num(dx) if any(dx) else None, **style)
        axis.set(xlabel=LABELS[x], ylabel=LABELS[y])
        if y == "pass_at_k":  # near its ceiling one problem more or less must not look like an effect
            axis.set_ylim(min(0.9, axis.get_ylim()[0]), 1.005)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3, fontsize=12)
    fig.savefig(path, dpi=80)


def main(args: Args):
    check_args(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        refuse("compare.py starts processes of its own: run it without torchrun")
    if args.dirs:
        args.out_dir = "runs/together" if args.out_dir == Args.out_dir else args.out_dir  # not over the findings
        groups, colors = {path: [read(path)] for path in args.dirs}, findings.COLORS
        lines = [(colors[i % 6], "o^sDPvX*"[i % 8], name, name) for i, name in enumerate(groups)]
        panels = [("step", y) for y in ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")]
        files = [Path(path, "args.json") for path in args.dirs]
        of_runs = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        names = {x for run in of_runs for x in run if x.startswith("eval_")} - {"eval_every", "eval_batch_size"}
        unlike = sorted(x for x in names | {"instruction"} if len({run.get(x) for run in of_runs}) > 1)
        if unlike:
            print(f"warning: these runs were not evaluated alike: they differ in --{', --'.join(unlike)}")
        os.makedirs(args.out_dir, exist_ok=True)
        draw(groups, os.path.join(args.out_dir, "together.png"), "runs, together", panels, lines)
    else:
        first, *others = worlds = args.worlds.split(",")
        for world in worlds:
            if not os.path.exists(os.path.join(world, "train.jsonl")):
                refuse(f"--worlds has {world!r}, which is no folder of toy/build.py: python -m toy.build --out FOLDER")
        if len({Path(world).name for world in worlds}) < len(worlds):
            refuse(f"--worlds is {args.worlds!r}: their folders need different names, as results are kept by name")
        runs = {first: run_all(args, first, args.seeds)} | {w: run_all(args, w, args.other_seeds) for w in others}
        worlds = {w: {name: [read(d) for d in dirs] for name, dirs in of.items()} for w, of in runs.items()}
        Path(args.out_dir, "results.json").write_text(
            json.dumps(worlds, separators=(",", ":")) + "\n", encoding="utf-8"
        )
        groups = next(iter(worlds.values()))
        for name, figure in findings.figures(args).items():
            draw(groups, os.path.join(args.out_dir, name + ".png"), *figure)
        print(write_findings(worlds, args))
    print(write_table(groups, os.path.join(args.out_dir, "table.md")))
    print(f"\ntables, numbers and figures are in {args.out_dir}")


if __name__ == "__main__":
    argv, dirs = sys.argv[1:], []
    while argv and not argv[0].startswith("-"):
        dirs.append(argv.pop(0))
    main(parse(Args, argv + (["--dirs", *dirs] if dirs else [])))
