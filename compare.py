"""The paper's findings against runs on the toy, or any runs of yours in one figure and one table.

    python compare.py                                # the findings: 20 kinds of run, five seeds, two more worlds
    python compare.py runs/opd runs/sft_offpolicy    # overlay these: runs/together/overlay.png and table.md

Finished runs are not repeated. A missing world is built, with the seed that its name ends in. *Reproduced* means that
the 95 % interval of an effect over the first world's seeds excludes 0, and that all other worlds have its sign.
"""

import importlib
import json
import os
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from plumbing.arguments import check_args, parse, refuse
from plumbing.run import draw, read_lines, write_file


@dataclass
class Args:
    dirs: list[str] = field(default_factory=list)  # output directories to draw together, instead of the findings
    out_dir: str = "runs/compare"  # where runs, tables and figures go
    worlds: str = "toy,runs/toy-12,runs/toy-13"  # the first one gets all seeds, each other one seed 0
    seeds: Literal[1, 2, 3, 4, 5, 6, 7, 8, 9, 10] = 5  # runs of each kind in the first world, seeds 0, 1, ...
    workers: int = 2  # runs at the same time, one thread each


def plan(world, out, seed):
    """{kind: its command line, without --out_dir, which is out/kind-seed-N}"""
    files = f"--data {world}/train.jsonl --eval_data {world}/eval.jsonl --seed {seed} --save_every 1000000"
    chat, base = (f"--teacher {world}/teacher --student {world}/{name} {files}" for name in ("student", "base_student"))
    after = lambda kind: f"grpo.py --student {out}/{kind}-seed-{seed}/model {files}"
    return {
        "sft": f"sft_offpolicy.py {chat}",
        "offline_rl": f"offline_rl_distill.py {chat}",
        "dagger": f"dagger_onpolicy.py {chat}",
        "opd": f"opd.py {chat}",
        "opd-8": f"opd.py {chat} --max_new_tokens 8",
        "base-sft": f"sft_offpolicy.py {base}",
        "base-offline_rl": f"offline_rl_distill.py {base}",
        "base-dagger": f"dagger_onpolicy.py {base}",
        "base-opd": f"opd.py {base}",
        "base-opd-8": f"opd.py {base} --max_new_tokens 8",
        "base-opd-merged": f"opd.py {base} --ends as_one",
        "base-kl_mix-0.2": f"kl_mix.py {base} --lam 0.2",
        "base-kl_mix-0.8": f"kl_mix.py {base} --lam 0.8",
        "base-curriculum": f"curriculum.py {base} --on_closed continue",
        "base-curriculum-finer": f"curriculum.py {base} --on_closed continue --lengths 6,9,12,15,18,21,32,96",
        "base-curriculum-no_gate": f"curriculum.py {base} --h_min 0",
        "grpo-opd": after("opd"),
        "grpo-base-dagger": after("base-dagger"),
        "grpo-base-opd": after("base-opd"),
        "grpo-base-opd-must_finish": after("base-opd") + " --must_finish true",
    }


CLAIMS = [  # from before the runs: what, its sign, the effect: a metric in these kinds of run, minus it in those
    ("On student prefixes reverse KL solves more", +1, "solved", "opd", "dagger"),
    ("On student prefixes reverse KL has less entropy", -1, "entropy", "opd", "dagger"),
    ("Student prefixes solve more at equal steps", +1, "solved", "dagger", "sft"),
    ("Teacher prefixes solve more at equal FLOPs", +1, "solved at equal FLOPs", "sft", "dagger"),
    ("Long reverse KL finishes less often than short", -1, "finished", "base-opd", "base-opd-8"),
    ("Long reverse KL has less entropy than short", -1, "entropy", "base-opd", "base-opd-8"),
    ("Mixing in forward KL makes it more useful", +1, "useful", "base-kl_mix-0.2", "base-opd"),
    ("The curriculum is more useful than full length", +1, "useful", "base-curriculum", "base-opd"),
    ("RL gains less after reverse KL", -1, "solved", "grpo-base-opd + base-dagger", "grpo-base-dagger + base-opd"),
    ("With merged end tokens reverse KL is more useful", +1, "useful", "base-opd-merged", "base-opd"),
]
FIGURES = {  # file: its message, what is drawn over steps, of which kinds of run
    "direction": ("On student prefixes reverse KL solves more", "solved entropy", "sft offline_rl dagger opd"),
    "ending": ("A base student under reverse KL learns to solve, and forgets to finish",
               "solved finished length", "base-sft base-offline_rl base-dagger base-opd"),
    "useful": ("Four ways to keep the base student useful", "useful entropy",
               "base-opd base-opd-8 base-kl_mix-0.2 base-curriculum base-opd-merged"),
    "rl": ("A reward for answers that finish ends the loop", "solved useful length",
           "grpo-base-opd grpo-base-opd-must_finish grpo-base-dagger"),
}  # fmt: skip
METRICS = {  # the names of the texts, and of log.jsonl
    "solved": "avg_at_k", "finished": "eval_ended", "useful": "eval_useful", "Pass@k": "pass_at_k",
    "entropy": "eval_entropy", "length": "eval_len", "FLOPs": "flops",
}  # fmt: skip
T = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, 97.5 %, of 1 to 10 values


def run_one(command):
    """Run a script as its command line would, in this process. -> what went wrong, or None"""
    script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with open(os.devnull, "w", encoding="utf-8") as null, redirect_stdout(null), redirect_stderr(null):
        try:
            module.main(parse(module.Args, words))
        except SystemExit as end:
            return None if "is finished" in str(end.code) else f"{command}: {end.code}"


def run_all(args):
    """Build the worlds and run the plan, --workers at a time. -> {world: {kind: directories of its runs, by seed}}"""
    dirs, waves = {}, ([], [], [])  # worlds, runs, runs that start from what others have trained
    for i, world in enumerate(args.worlds.split(",")):
        if not os.path.exists(f"{world}/train.jsonl"):
            world_seed = re.search(r"\d*$", world)[0] or refuse(f"--worlds: no {world!r}, and no seed to build it by")
            waves[0].append(f"toy/build.py --out {shlex.quote(world)} --seed {world_seed}")
        found, out = dirs.setdefault(Path(world).name, {}), f"{args.out_dir}/{Path(world).name}"
        for seed in range(1 if i else args.seeds):
            for kind, command in plan(*map(shlex.quote, (world, out)), seed).items():
                found.setdefault(kind, []).append(f"{out}/{kind}-seed-{seed}")
                waves[1 + kind.startswith("grpo")].append(f"{command} --out_dir {shlex.quote(found[kind][-1])}")
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:  # torch's threads do not survive a fork
        for what, wave in zip(("worlds", "runs", "runs after them"), waves):
            for trouble in tqdm(pool.map(run_one, wave), what, len(wave), disable=not wave):
                if trouble:
                    pool.shutdown(cancel_futures=True)
                    refuse(trouble)
    return dirs


def read(path):
    """A run -> {"step": [...], metric: [...] at its evaluations, "gates": [[length, H_m in nats, open], ...]}"""
    rows = read_lines(f"{path}/log.jsonl")
    at = [row for row in rows if "avg_at_k" in row] or refuse(f"{path!r} has no log, or no evaluations in it")
    run = {name: [float(f"{row.get(key, 0):.4g}") for row in at] for name, key in ({"step": "step"} | METRICS).items()}
    gates = [[row["train_len"], round(row["gate_entropy"], 4), row["gate_open"]] for row in rows if "gate_open" in row]
    return run | {"gates": gates}


def mean_ci(values):
    """-> (mean, half the width of the 95 % t-interval; NaN for a single value)"""
    return np.mean(values, 0), T[len(values) - 1] * np.std(values, 0, ddof=len(values) > 1) / len(values) ** 0.5


def effect(kinds, metric, plus, minus):
    """(seeds,) differences at the end of two runs of one seed, or where both have used the FLOPs of the cheaper one."""
    last = lambda some, name: sum(np.array([run[name][-1] for run in kinds[kind]]) for kind in some.split(" + "))
    if metric == "solved at equal FLOPs":
        least = np.minimum(last(plus, "FLOPs"), last(minus, "FLOPs"))
        at = lambda kind: [np.interp(x, run["FLOPs"], run["solved"]) for x, run in zip(least, kinds[kind])]
        return np.subtract(at(plus), at(minus))
    return last(plus, metric) - last(minus, metric)


def findings(worlds):
    """{world: {kind: runs by seed}} -> a table of CLAIMS"""
    others = list(worlds)[1:]
    table = [["", "of", "effect", "95 % interval", *others, ""], ["---"] * (5 + len(others))]
    for says, sign, metric, plus, minus in CLAIMS:
        (mean, ci), *elsewhere = (mean_ci(effect(kinds, metric, plus, minus)) for kinds in worlds.values())
        sure = abs(mean) > ci and all(x * mean > 0 for x, _ in elsewhere)
        verdict = "open" if not sure else "reproduced" if mean * sign > 0 else "**opposite**"
        cells = [f"{mean:+.3f}", f"{mean - ci:+.3f} to {mean + ci:+.3f}", *(f"{x:+.3f}" for x, _ in elsewhere)]
        verdict += "" if others else ", in one world"
        table.append([says, f"{metric}: {plus} − {minus.replace('+', '−')}", *cells, verdict])
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def summary(kinds):
    """{kind: runs by seed} -> a table of the last evaluations, means ± half of the 95 % interval; of gates, H_m"""
    table = [["run", *METRICS, "gates"], ["---"] * (2 + len(METRICS))]
    forms = dict.fromkeys(METRICS, "{:.3f}") | {"FLOPs": "{:.2e}", "length": "{:.1f}"}
    for kind, runs in kinds.items():
        both = lambda name: [x for x in mean_ci([run[name][-1] for run in runs]) if not np.isnan(x)]
        cells = [" ± ".join(map(forms[name].format, both(name))) for name in METRICS]
        gates = (np.mean(at, 0) for at in zip(*(run["gates"] for run in runs)))
        table.append([kind, *cells, ", ".join(f"{length:.0f}: {nats:.2f}" for length, nats, _ in gates)])
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def main(args: Args):
    check_args(args)
    out = Path("runs/together" if args.dirs and args.out_dir == Args.out_dir else args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if args.dirs:
        kinds, said = {path: [read(path)] for path in args.dirs}, ""
        figures = {"overlay": (str(out), "solved finished entropy length", shlex.join(kinds))}
    else:
        worlds = {w: {k: [read(d) for d in dirs] for k, dirs in kinds.items()} for w, kinds in run_all(args).items()}
        kinds, said, figures = next(iter(worlds.values())), findings(worlds), FIGURES
        write_file(out / "results.json", json.dumps(worlds, separators=(",", ":")) + "\n")
        write_file(out / "findings.md", said)
    for name, (title, metrics, lines) in figures.items():
        points = lambda kind, name: (kinds[kind][0]["step"], *mean_ci([run[name] for run in kinds[kind]]))
        panels = {metric: {kind: points(kind, metric) for kind in shlex.split(lines)} for metric in metrics.split()}
        draw(out / f"{name}.png", title, panels)
    write_file(out / "table.md", summary(kinds))
    print(said, summary(kinds), f"tables, numbers and figures are in {out}", sep="\n")


if __name__ == "__main__":
    argv = sys.argv[1:]
    main(parse(Args, ["--dirs", *argv] if argv and not argv[0].startswith("-") else argv))
