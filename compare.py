"""The paper's findings against runs on the toy, or any runs of yours in one figure and one table.

    python compare.py                                # the findings: 20 kinds of run, five seeds, two more worlds
    python compare.py runs/opd runs/sft_offpolicy    # overlay these: runs/together/overlay.png and table.md

Every run is an ordinary run of a script. A finished one is not repeated, and one that was stopped goes on. A world is a
folder of toy/build.py; one that is not there is built, with the seed that its name ends in. CLAIMS was written before
its seeds were run. A claim is *reproduced* if the 95 % interval of its effect over the first world's seeds excludes 0
and every other world has its sign; *opposite* likewise, with the other sign; else it is *open*.
"""

import concurrent.futures
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.arguments import check_args, parse, refuse
from plumbing.run import read_lines
from toy import build


@dataclass
class Args:
    dirs: list[str] = field(default_factory=list)  # output directories to draw together, instead of the findings
    out_dir: str = "runs/compare"  # where runs, tables and figures go
    worlds: str = "toy,runs/toy-12,runs/toy-13"  # the first one gets all seeds, each other one seed 0
    seeds: int = 5  # runs of each kind in the first world, seeds 0, 1, ...
    workers: int = 2  # runs at the same time, one thread each


# What is run, claimed and drawn


def plan(world):
    """{kind: (script, arguments)}. A student may be another kind of run: the model that it has trained."""
    files = dict(data=f"{world}/train.jsonl", eval_data=f"{world}/eval.jsonl", save_every=10**6)
    chat = files | dict(teacher=f"{world}/teacher", student=f"{world}/student")
    base = chat | dict(student=f"{world}/base_student")
    return {
        "sft": ("sft_offpolicy", chat),
        "offline_rl": ("offline_rl_distill", chat),
        "dagger": ("dagger_onpolicy", chat),
        "opd": ("opd", chat),
        "opd-8": ("opd", chat | dict(max_new_tokens=8)),
        "base-sft": ("sft_offpolicy", base),
        "base-offline_rl": ("offline_rl_distill", base),
        "base-dagger": ("dagger_onpolicy", base),
        "base-opd": ("opd", base),
        "base-opd-8": ("opd", base | dict(max_new_tokens=8)),
        "base-opd-merged": ("opd", base | dict(ends="as_one")),
        "base-kl_mix-0.2": ("kl_mix", base | dict(lam=0.2)),
        "base-kl_mix-0.8": ("kl_mix", base | dict(lam=0.8)),
        "base-curriculum": ("curriculum", base | dict(on_closed="continue")),
        "base-curriculum-finer": ("curriculum", base | dict(on_closed="continue", lengths="6,9,12,15,18,21,32,96")),
        "base-curriculum-no_gate": ("curriculum", base | dict(h_min=0.0)),
        "grpo-opd": ("grpo", files | dict(student="opd")),
        "grpo-base-dagger": ("grpo", files | dict(student="base-dagger")),
        "grpo-base-opd": ("grpo", files | dict(student="base-opd")),
        "grpo-base-opd-must_finish": ("grpo", files | dict(student="base-opd", must_finish=True)),
    }


GAINS = ["grpo-base-opd", "base-dagger"], ["grpo-base-dagger", "base-opd"]
CLAIMS = [  # what, the sign that it gives an effect, the effect: a metric in these kinds of run, minus it in those
    ("Reverse KL solves more than forward KL", +1, "solved", ["opd"], ["dagger"]),
    ("Reverse KL has less entropy", -1, "entropy", ["opd"], ["dagger"]),
    ("Student prefixes solve more at equal steps", +1, "solved", ["dagger"], ["sft"]),
    ("Teacher prefixes solve more at equal FLOPs", +1, "solved at equal FLOPs", ["sft"], ["dagger"]),
    ("Long reverse KL finishes less often than short", -1, "finished", ["base-opd"], ["base-opd-8"]),
    ("Long reverse KL has less entropy than short", -1, "entropy", ["base-opd"], ["base-opd-8"]),
    ("Mixing in forward KL makes it more useful", +1, "useful", ["base-kl_mix-0.2"], ["base-opd"]),
    ("The curriculum is more useful than full length", +1, "useful", ["base-curriculum"], ["base-opd"]),
    ("RL gains less after reverse than after forward KL", -1, "solved", *GAINS),
    ("With merged end tokens reverse KL is more useful", +1, "useful", ["base-opd-merged"], ["base-opd"]),
]
FOUR = ["sft", "offline_rl", "dagger", "opd"]
FIGURES = {  # file: its message, what is drawn over steps, of which kinds of run
    "direction": ("Reverse KL solves more, and is less uncertain", ["solved", "entropy"], FOUR),
    "ending": (
        "A base student under reverse KL learns to solve, and forgets to finish",
        ["solved", "finished", "length"], [f"base-{kind}" for kind in FOUR],
    ),
    "useful": (
        "Four ways to keep the base student useful", ["useful", "entropy"],
        ["base-opd", "base-opd-8", "base-kl_mix-0.2", "base-curriculum", "base-opd-merged"],
    ),
    "rl": (
        "A reward for answers that finish repairs the loop",
        ["solved", "useful", "length"], ["grpo-base-opd", "grpo-base-opd-must_finish", "grpo-base-dagger"],
    ),
}  # fmt: skip


# Running


def run_one(script, arguments):
    """Run a script as its command line would, in this process. -> what went wrong, or None"""
    module = importlib.import_module(script)
    words = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            module.main(parse(module.Args, words))
        except SystemExit as end:
            return None if "is finished" in str(end.code) else f"{arguments['out_dir']}: {end.code}"


def run_all(args):
    """Build the worlds and run the plan, --workers at a time. -> {world: {kind: directories of its runs, by seed}}"""
    dirs, waves = {}, [[], [], []]  # worlds, runs, runs that start from what others have trained
    for i, world in enumerate(args.worlds.split(",")):
        if not os.path.exists(f"{world}/train.jsonl"):
            waves[0].append((build.main, world, int(re.search(r"\d*$", world)[0] or 0)))
        seeds, kinds, out = range(1 if i else args.seeds), plan(world), f"{args.out_dir}/{Path(world).name}"
        dirs[world] = {kind: [f"{out}/{kind}-seed-{seed}" for seed in seeds] for kind in kinds}
        for seed, (kind, (script, its)) in ((seed, run) for seed in seeds for run in kinds.items()):
            after = its["student"] in kinds
            student = f"{dirs[world][its['student']][seed]}/model" if after else its["student"]
            new = dict(student=student, seed=seed, out_dir=dirs[world][kind][seed])
            waves[1 + after].append((run_one, script, its | new))
    # spawn: a fresh interpreter for every worker, as torch's threads do not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    with contextlib.closing(tqdm(total=sum(map(len, waves)), desc="runs")) as bar:
        for wave in waves:
            for future in concurrent.futures.as_completed([pool.submit(*job) for job in wave]):
                if future.result():
                    pool.shutdown(cancel_futures=True)
                    refuse(future.result())
                bar.update()
    return dirs


# Reading and writing

METRICS = {  # the names of the texts, and of log.jsonl
    "solved": "avg_at_k", "finished": "eval_ended", "useful": "eval_useful", "Pass@k": "pass_at_k",
    "entropy": "eval_entropy", "length": "eval_len", "FLOPs": "flops",
}  # fmt: skip
T = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, 97.5 %, of 1 to 10 values


def read(path):
    """A run -> {"step": [...], metric: [...] at its evaluations, "gates": [[length, H_m in nats, open], ...]}"""
    rows = read_lines(f"{path}/log.jsonl")
    at = [row for row in rows if "avg_at_k" in row]
    if not at:
        refuse(f"{path!r} has no log, or no evaluation in it yet")
    run = {name: [float(f"{row.get(key, 0):.4g}") for row in at] for name, key in ({"step": "step"} | METRICS).items()}
    gates = [[row["train_len"], round(row["gate_entropy"], 4), row["gate_open"]] for row in rows if "gate_open" in row]
    return run | ({"gates": gates} if gates else {})


def mean_ci(values):
    """-> (mean, half the width of the 95 % t-interval; NaN for a single value)"""
    return np.mean(values, 0), T[len(values) - 1] * np.std(values, 0, ddof=len(values) > 1) / len(values) ** 0.5


def effect(kinds, metric, plus, minus):
    """(seeds,) differences between the last evaluations of runs of one seed; or between where both have used the FLOPs
    that the cheaper one has used in all."""
    last = lambda kind, name: np.array([run[name][-1] for run in kinds[kind]])  # noqa: E731
    if metric == "solved at equal FLOPs":
        least = np.minimum(last(plus[0], "FLOPs"), last(minus[0], "FLOPs"))
        at = lambda kind: [np.interp(x, run["FLOPs"], run["solved"]) for x, run in zip(least, kinds[kind])]  # noqa: E731
        return np.subtract(at(plus[0]), at(minus[0]))
    return sum(last(kind, metric) for kind in plus) - sum(last(kind, metric) for kind in minus)


def findings(worlds):
    """{world: {kind: runs by seed}} -> a table of CLAIMS"""
    first, *others = worlds.values()
    table = [f"| | of | effect | 95 % interval | {' | '.join(list(worlds)[1:])} | |"]
    table += ["|---" * (len(worlds) + 4) + "|"]
    for says, sign, metric, *kinds in CLAIMS:
        mean, ci = mean_ci(effect(first, metric, *kinds))
        signs = [effect(world, metric, *kinds).mean() for world in others]
        sure = abs(mean) > ci and all(x * mean > 0 for x in signs)
        verdict = "open" if not sure else "reproduced" if mean * sign > 0 else "**opposite**"
        verdict += "" if others else ", in one world"
        runs = f"{metric}: {' + '.join(kinds[0])} − {' − '.join(kinds[1])}"
        cells = [runs, f"{mean:+.3f}", f"{mean - ci:+.3f} to {mean + ci:+.3f}", *(f"{x:+.3f}" for x in signs)]
        table.append(f"| {says} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(table) + "\n"


def summary(kinds):
    """{kind: runs by seed} -> a table of the last evaluations, means ± half of the 95 % interval; of gates, H_m"""
    table = [f"| run | {' | '.join(METRICS)} | gates |", "|---" * (len(METRICS) + 2) + "|"]
    for kind, runs in kinds.items():
        cells = []
        for name in METRICS:
            form = {"FLOPs": "{:.2e}", "length": "{:.1f}"}.get(name, "{:.3f}")
            mean, ci = mean_ci([run[name][-1] for run in runs])
            cells.append(form.format(mean) + ("" if np.isnan(ci) else " ± " + form.format(ci)))
        of_gates = zip(*(run.get("gates", []) for run in runs))
        cells.append(", ".join(f"{at[0][0]}: {np.mean([nats for _, nats, _ in at]):.2f}" for at in of_gates))
        table.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(table) + "\n"


def draw(kinds, path, title, metrics, lines):
    """A row of panels, one metric over steps each: means over seeds with 95 % intervals. The colour-blind can
    distinguish Okabe and Ito's colours, and each line has its marker; a white ground is legible in a dark page, too."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.5})
    figure = Figure(figsize=(5.5 * len(metrics), 5.2), layout="constrained")
    figure.suptitle(title, weight="bold", parse_math=False)
    colors = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #000000".split()
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for i, runs in enumerate(kinds[kind] for kind in lines):
            style = dict(color=colors[i % 6], marker="sDo^vPX"[i % 7], markersize=8, capsize=3)
            mean, ci = mean_ci([run[metric] for run in runs])
            axis.errorbar(runs[0]["step"], mean, np.nan_to_num(ci), label=lines[i].replace("$", r"\$"), **style)
        axis.set(xlabel="step", title={"entropy": "entropy (nats)", "length": "length (tokens)"}.get(metric, metric))
    figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4 - len(lines) % 2
    )
    figure.savefig(path, dpi=80)


def main(args: Args):
    check_args(args)
    if args.seeds > len(T):
        refuse(f"--seeds is {args.seeds}, and must be at most {len(T)}: intervals are known up to there")
    out = Path("runs/together" if args.dirs and args.out_dir == Args.out_dir else args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if args.dirs:
        kinds, texts = {path: [read(path)] for path in args.dirs}, {}
        draw(kinds, out / "overlay.png", str(out), ["solved", "finished", "entropy", "length"], list(kinds))
    else:
        dirs = run_all(args)
        worlds = {Path(w).name: {k: [read(d) for d in runs] for k, runs in kinds.items()} for w, kinds in dirs.items()}
        kinds = next(iter(worlds.values()))
        for name, figure in FIGURES.items():
            draw(kinds, out / f"{name}.png", *figure)
        texts = {"results.json": json.dumps(worlds, separators=(",", ":")) + "\n", "findings.md": findings(worlds)}
    texts |= {"table.md": summary(kinds)}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    print("\n".join(text for name, text in texts.items() if name.endswith(".md")))
    print(f"tables, numbers and figures are in {out}")


if __name__ == "__main__":
    argv, dirs = sys.argv[1:], []
    while argv and not argv[0].startswith("-"):
        dirs.append(argv.pop(0))
    main(parse(Args, argv + (["--dirs", *dirs] if dirs else [])))
