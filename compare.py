"""Compare runs: the paper's findings on the embedded world, over seeds, in tables and figures; or any runs you have.

    python compare.py                       all runs of the findings, 5 seeds, 2 at a time; then tables and figures
    python compare.py --quick               one seed and a fifth of the time: the shape of it all
    python compare.py runs/opd runs/sft_offpolicy        draw these output directories together, in runs/together

Every run is an ordinary run of an ordinary script, in --out_dir/NAME-seed-N. Finished runs are never repeated, and an
interrupted comparison continues where it was. What is written to --out_dir: table.md and runs.csv (means over seeds,
± half the width of the 95 % t-interval), findings.md (what the paper says against what these runs say, as differences
between runs of the same seed), and figures as PNG.
"""

import concurrent.futures
import contextlib
import csv
import importlib
import io
import json
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from plumbing.runs import parse
from plumbing.tasks import refuse

# Okabe and Ito's colours: told apart by the colour-blind too; every series has a marker of its own besides.
BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #000000".split()


@dataclass
class Args:
    dirs: list[str] = field(default_factory=list)  # output directories to draw together, instead of the findings
    out_dir: str = "runs/compare"  # where runs, tables and figures go
    seeds: int = 5  # runs of each kind, seeds 0, 1, ...
    workers: int = 2  # runs at the same time, one thread each
    quick: bool = False  # one seed: a fifth of the time
    steps: int = 200  # updates of every distillation run
    length: int = 48  # the long training length, tokens
    rl_steps: int = 60  # updates of the RL that follows


def plan(args):
    """All runs that the findings need: {name: (script, arguments)}. Findings share runs wherever they can."""
    steps = args.steps
    base = dict(steps=steps, eval_every=max(1, steps // 5), max_new_tokens=args.length, save_every=steps)
    runs = {
        "sft_offpolicy": ("sft_offpolicy", base),
        "offline_rl_distill": ("offline_rl_distill", base),
        "dagger_onpolicy": ("dagger_onpolicy", base),
        "opd": ("opd", base),
    }
    for length in lengths(args)[:-1]:
        for script in ("dagger_onpolicy", "opd"):
            runs[f"{script}-length-{length}"] = (script, base | dict(max_new_tokens=length))
    for lam in LAMBDAS:
        runs[f"kl_mix-{lam}"] = ("kl_mix", base | dict(lam=lam))
    for name, ladder, h_min in (("curriculum", lengths(args), H_MIN), ("two-lengths", lengths(args)[-2:], 0.0)):
        ladder = ",".join(map(str, ladder))
        runs[name] = ("curriculum", base | dict(lengths=ladder, h_min=h_min, on_closed="continue"))
    rl = dict(steps=args.rl_steps, eval_every=max(1, args.rl_steps // 4), max_new_tokens=args.length, save_every=10**6)
    for start in ("dagger_onpolicy", "opd"):
        runs[f"grpo-after-{start}"] = ("grpo", rl | dict(student=start))
    return runs


LAMBDAS = (0.25, 0.5, 0.75)
H_MIN = 0.25  # nats per token, just below the teacher's own 0.27


def lengths(args):
    """The ladder of training lengths, each twice the one before: L/8, L/4, L/2, L."""
    return [args.length // 8, args.length // 4, args.length // 2, args.length]


# ----------------------------------------------------------------------------------------------------------------
# Running


def run_one(script, arguments, out_dir):
    """Run a script as its command line would, in this process; a finished run is left alone. -> error or None"""
    if os.path.isdir(os.path.join(out_dir, "model")):
        return None
    module = importlib.import_module(script)
    argv = [word for name, value in {**arguments, "out_dir": out_dir}.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            module.main(parse(module.Args, argv))
        except SystemExit as end:
            return None if end.code in (0, None) else f"{out_dir}: {end.code}"
    return None


def run_all(args):
    """All runs of the plan over all seeds, --workers at a time. A run that starts from another waits for it."""
    runs = plan(args)
    where = lambda name, seed: os.path.join(args.out_dir, f"{name}-seed-{seed}")  # noqa: E731
    jobs = [(name, seed) for seed in range(args.seeds) for name in runs]
    # spawn: a fresh interpreter for every worker, as torch's threads do not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    futures, bar = {}, tqdm(total=len(jobs), desc="runs")
    try:
        waiting = list(jobs)
        while waiting or futures:
            for name, seed in list(waiting):
                script, arguments = runs[name]
                start = arguments.get("student")
                start = start if start in runs else None  # the name of another run, or a checkpoint of one's own
                if start and not os.path.isdir(os.path.join(where(start, seed), "model")):
                    continue
                waiting.remove((name, seed))
                arguments = arguments | {"seed": seed} | ({"student": where(start, seed) + "/model"} if start else {})
                futures[pool.submit(run_one, script, arguments, where(name, seed))] = name
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                bar.set_postfix_str(futures.pop(future))
                bar.update()
                if future.result():
                    refuse(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return {name: [where(name, seed) for seed in range(args.seeds)] for name in runs}


# ----------------------------------------------------------------------------------------------------------------
# Reading


def read(out_dir):
    """log.jsonl of a run -> its evaluations, each with what the step's line says."""
    rows = [{"flops": 0.0, **row} for row in _log(out_dir) if "avg_at_k" in row]
    if not rows:
        refuse(f"{out_dir!r} has no evaluation in its log yet")
    return rows


def read_steps(out_dir):
    """log.jsonl of a run -> its updates."""
    return [row for row in _log(out_dir) if "loss" in row]


def _log(out_dir):
    try:
        with open(os.path.join(out_dir, "log.jsonl")) as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        refuse(f"cannot read the log of {out_dir!r}: {error}")


def mean_ci(values):
    """-> (mean, half the width of the 95 % t-interval; NaN for a single value)."""
    n, values = len(values), np.asarray(values, float)
    if n == 1:
        return values.mean(), math.nan
    return values.mean(), t_quantile(n - 1) * values.std(ddof=1) / math.sqrt(n)


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t: from tables, and from 5 degrees of freedom on by Cornish and Fisher's series."""
    if freedom < 5:
        return (12.706, 4.303, 3.182, 2.776)[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


METRICS = {
    "avg_at_k": "Avg@8", "pass_at_k": "Pass@8", "eval_entropy": "entropy (nats)", "eval_len": "length (tokens)",
    "eval_clip_ratio": "cut at the cap", "flops": "model FLOPs",
}  # fmt: skip


@dataclass
class Claim:
    """One thing that the paper says, as a number per seed and the sign that the paper gives it."""

    axis: str
    says: str  # what the paper says
    sign: int  # +1: the number should be above 0; -1: below
    a: str  # the name of a run; the number is value(a) - value(b), over runs of the same seed
    b: str = ""  # another run, or nothing: then it is value(a)
    value: str = "avg_at_k"  # a metric, after the last step; see value_of
    equal_flops: bool = False  # compare after as many model FLOPs as the cheaper one of the two has used


def claims(args):
    short = lengths(args)[0]
    return [
        Claim("KL direction", "reverse is more accurate (Avg@8), student prefixes", +1, "opd", "dagger_onpolicy"),
        Claim("KL direction", "reverse is more accurate (Avg@8), teacher prefixes", +1, "offline_rl_distill", "sft_offpolicy"),
        Claim("KL direction", "reverse has less entropy, student prefixes", -1, "opd", "dagger_onpolicy", "eval_entropy"),
        Claim("KL direction", "reverse has less entropy, teacher prefixes", -1, "offline_rl_distill", "sft_offpolicy", "eval_entropy"),
        Claim("KL direction", "reverse has a lower Pass@8 / Avg@8, student prefixes", -1, "opd", "dagger_onpolicy", "pass_over_avg"),
        Claim("RL after it", "GRPO gains less Avg@8 from a reverse-KL start", -1, "grpo-after-opd", "grpo-after-dagger_onpolicy", "gain"),
        Claim("RL after it", "... and ends lower", -1, "grpo-after-opd", "grpo-after-dagger_onpolicy"),
        Claim("RL after it", "GRPO lowers Avg@8 of a reverse-KL start", -1, "grpo-after-opd", value="gain"),
        Claim("Prefix source", "student prefixes are better (Avg@8) at equal steps, forward KL", +1, "dagger_onpolicy", "sft_offpolicy"),
        Claim("Prefix source", "... reverse KL", +1, "opd", "offline_rl_distill"),
        Claim("Prefix source", "... Pass@8, forward KL", +1, "dagger_onpolicy", "sft_offpolicy", "pass_at_k"),
        Claim("Prefix source", "... Pass@8, reverse KL", +1, "opd", "offline_rl_distill", "pass_at_k"),
        Claim("Prefix source", "teacher prefixes can win (Avg@8) at equal FLOPs, forward KL", -1, "dagger_onpolicy", "sft_offpolicy", equal_flops=True),
        Claim("Prefix source", "... reverse KL", -1, "opd", "offline_rl_distill", equal_flops=True),
        Claim("Training length", f"{args.length} tokens beat {short} (Avg@8), forward KL", +1, "dagger_onpolicy", f"dagger_onpolicy-length-{short}"),
        Claim("Training length", "... reverse KL", +1, "opd", f"opd-length-{short}"),
        Claim("Training length", "long reverse-KL training has less entropy than the teacher", -1, "opd", value="entropy_below_teacher"),
        Claim("Training length", "... and inflates length, forward KL does not", +1, "opd", "dagger_onpolicy", "eval_len"),
        Claim("Training length", "... for more of the training (share of steps with most rollouts cut)", +1, "opd", "dagger_onpolicy", "inflated"),
        Claim("KL mixing", "λ = 0.25 keeps the accuracy (Avg@8) of reverse KL: not below it", +1, "kl_mix-0.25", "opd"),
        Claim("KL mixing", "λ = 0.25 has more entropy", +1, "kl_mix-0.25", "opd", "eval_entropy"),
        Claim("KL mixing", "λ = 0.25 is inflated for less of the training", -1, "kl_mix-0.25", "opd", "inflated"),
        Claim("KL mixing", "λ = 0.75 is inflated for more of the training than λ = 0.25", +1, "kl_mix-0.75", "kl_mix-0.25", "inflated"),
        Claim("Curriculum", f"better (Avg@8) than fixed {args.length} tokens, equal steps", +1, "curriculum", "opd"),
        Claim("Curriculum", "... equal FLOPs", +1, "curriculum", "opd", equal_flops=True),
        Claim("Curriculum", "better Pass@8, equal steps", +1, "curriculum", "opd", "pass_at_k"),
        Claim("Curriculum", "... equal FLOPs", +1, "curriculum", "opd", "pass_at_k", equal_flops=True),
        Claim("Curriculum", "shorter responses, equal steps", -1, "curriculum", "opd", "eval_len"),
        Claim("Curriculum", f"without gate, {args.length // 2} then {args.length} tokens: better Avg@8, equal steps", +1, "two-lengths", "opd"),
        Claim("Curriculum", "... equal FLOPs", +1, "two-lengths", "opd", equal_flops=True),
        Claim("Curriculum", "... Pass@8, equal FLOPs", +1, "two-lengths", "opd", "pass_at_k", equal_flops=True),
    ]  # fmt: skip


def value_of(path, name, flops=None):
    """A number that sums up a run: a metric after the last step, or after that many FLOPs, between two evaluations."""
    rows = read(path)
    if name == "pass_over_avg":
        return rows[-1]["pass_at_k"] / max(rows[-1]["avg_at_k"], 1e-9)
    if name == "gain":
        return rows[-1]["avg_at_k"] - rows[0]["avg_at_k"]
    if name == "entropy_below_teacher":
        return rows[-1]["eval_entropy"] - TEACHER_ENTROPY
    if name == "inflated":
        steps = read_steps(path)
        return sum(row["clip_ratio"] > 0.5 for row in steps) / len(steps)
    if flops is not None:
        return float(np.interp(flops, [row["flops"] for row in rows], [row[name] for row in rows]))
    return rows[-1][name]


TEACHER_ENTROPY = 0.271  # nats per token: python evaluate.py --model toy/teacher


def differences(claim, groups):
    """The claim's number for every seed."""
    numbers = []
    for i, a in enumerate(groups[claim.a]):
        b = groups[claim.b][i] if claim.b else None
        flops = min(read(a)[-1]["flops"], read(b)[-1]["flops"]) if claim.equal_flops else None
        numbers.append(value_of(a, claim.value, flops) - (value_of(b, claim.value, flops) if b else 0.0))
    return numbers


def write_findings(groups, args):
    """findings.md: every claim with its number, the interval, and whether that bears it out."""
    lines = ["| | the paper | here: difference over seeds | |", "|---|---|---|---|"]
    for claim in claims(args):
        mean, ci = mean_ci(differences(claim, groups))
        verdict = "undecided" if abs(mean) <= ci else "found" if mean * claim.sign > 0 else "the opposite"
        verdict = f"{verdict}, one seed" if math.isnan(ci) else verdict
        unit = {"eval_len": 1}.get(claim.value, 3)
        interval = "" if math.isnan(ci) else f" ± {ci:.{unit}f}"
        lines.append(f"| {claim.axis} | {claim.says} | {mean:+.{unit}f}{interval} | {verdict} |")
    with open(os.path.join(args.out_dir, "findings.md"), "w") as file:
        file.write("\n".join(lines) + "\n")
    return "\n".join(lines)


def write_tables(groups, out_dir):
    """runs.csv: the last evaluation of every run. table.md: means and intervals over the runs of a group."""
    last = {name: [read(path)[-1] for path in paths] for name, paths in groups.items()}
    with open(os.path.join(out_dir, "runs.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "directory", "step", *METRICS])
        for name, paths in groups.items():
            for path, row in zip(paths, last[name]):
                writer.writerow([name, path, row["step"], *(f"{row.get(key, math.nan):.6g}" for key in METRICS)])
    lines = ["| run | n | " + " | ".join(METRICS.values()) + " |", "|---|---|" + "---|" * len(METRICS)]
    for name, rows in last.items():
        cells = []
        for key in METRICS:
            mean, ci = mean_ci([row.get(key, math.nan) for row in rows])
            number = (
                (lambda x: f"{x:.2e}")
                if key == "flops"
                else (lambda x: f"{x:.1f}" if key == "eval_len" else f"{x:.3f}")
            )
            cells.append(number(mean) if math.isnan(ci) else f"{number(mean)} ± {number(ci)}")
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    with open(os.path.join(out_dir, "table.md"), "w") as file:
        file.write("\n".join(lines) + "\n")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------
# Drawing

STYLE = {
    "sft_offpolicy": (SKY, "s", "teacher prefixes, forward KL (SFT)"),
    "offline_rl_distill": (ORANGE, "D", "teacher prefixes, reverse KL (offline RL)"),
    "dagger_onpolicy": (BLUE, "o", "student prefixes, forward KL (DAgger)"),
    "opd": (RED, "^", "student prefixes, reverse KL (OPD)"),
    "curriculum": (GREEN, "P", "entropy-gated curriculum, reverse KL"),
    "two-lengths": (PINK, "X", "the last two lengths only, no gate"),
    "grpo-after-dagger_onpolicy": (BLUE, "o", "GRPO from forward KL (DAgger)"),
    "grpo-after-opd": (RED, "^", "GRPO from reverse KL (OPD)"),
}


LABELS = {"step": "step", "flops": "model FLOPs / 10¹²"}


def figure(columns, title):
    """A row of panels, in letters that can be read from the last row of a lecture hall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.5})
    fig, axes = plt.subplots(1, columns, figsize=(6 * columns, 5), layout="constrained", squeeze=False)
    fig.suptitle(title)
    return fig, axes[0]


def save(fig, out_dir, name):
    from matplotlib import pyplot as plt

    fig.savefig(os.path.join(out_dir, name), dpi=80)
    plt.close(fig)


def curve(axis, paths, x, y, style):
    """Mean of y over runs at every evaluation, with its 95 % interval as a band."""
    color, marker, label = style
    tables = [read(path) for path in paths]
    points = [[row.get(y, math.nan) for row in rows] for rows in zip(*tables)]
    xs = [np.mean([row[x] for row in rows]) / (1e12 if x == "flops" else 1) for rows in zip(*tables)]
    mean, ci = np.array([mean_ci(values) for values in points]).T
    axis.plot(xs, mean, color=color, marker=marker, label=label, markersize=7)
    axis.fill_between(xs, mean - np.nan_to_num(ci), mean + np.nan_to_num(ci), color=color, alpha=0.15, linewidth=0)


def by_parameter(axis, groups, named, y, style):
    """Final mean of y, with intervals, against a parameter: named is {value: name of the group}."""
    color, marker, label = style
    stats = [mean_ci([read(path)[-1].get(y, math.nan) for path in groups[name]]) for name in named.values()]
    mean, ci = np.array(stats).T
    axis.errorbar(
        list(named), mean, np.nan_to_num(ci), color=color, marker=marker, label=label, capsize=4, markersize=7
    )


def draw_findings(groups, args):
    """One figure for each axis of the paper; every title says what to look for."""
    out, grid = args.out_dir, ["sft_offpolicy", "offline_rl_distill", "dagger_onpolicy", "opd"]

    fig, (left, right) = figure(2, "KL direction: accuracy against entropy, after the same number of steps")
    for axis, y in ((left, "avg_at_k"), (right, "pass_at_k")):
        for name in grid:
            color, marker, label = STYLE[name]
            rows = [read(path)[-1] for path in groups[name]]
            x, dx = mean_ci([row["eval_entropy"] for row in rows])
            v, dv = mean_ci([row[y] for row in rows])
            axis.errorbar(
                x,
                v,
                np.nan_to_num(dv),
                np.nan_to_num(dx),
                color=color,
                marker=marker,
                label=label,
                capsize=4,
                markersize=10,
            )
        axis.set(xlabel="entropy (nats per token)", ylabel=METRICS[y])
    right.legend(frameon=False, fontsize=11)
    save(fig, out, "direction.png")

    fig, axes = figure(3, "Prefix source: quality against steps, and against compute (sampling and teacher included)")
    for axis, x, y in zip(axes, ("step", "flops", "flops"), ("avg_at_k", "avg_at_k", "pass_at_k")):
        for name in grid:
            curve(axis, groups[name], x, y, STYLE[name])
        axis.set(xlabel=LABELS[x], ylabel=METRICS[y])
    axes[0].legend(frameon=False, fontsize=11)
    save(fig, out, "prefixes.png")

    fig, axes = figure(4, "Training length: what longer rollouts buy, and what they cost")
    for axis, y in zip(axes, ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")):
        for script in ("dagger_onpolicy", "opd"):
            named = {n: f"{script}-length-{n}" for n in lengths(args)[:-1]} | {args.length: script}
            by_parameter(axis, groups, named, y, STYLE[script])
        axis.set(xlabel="training length (tokens)", ylabel=METRICS[y], xscale="log", xticks=lengths(args))
        axis.set_xticklabels(lengths(args))
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize=11)
    save(fig, out, "length.png")

    fig, axes = figure(4, "KL mixing on student prefixes: from forward (λ = 0) to reverse (λ = 1)")
    named = {0.0: "dagger_onpolicy"} | {lam: f"kl_mix-{lam}" for lam in LAMBDAS} | {1.0: "opd"}
    for axis, y in zip(axes, ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")):
        by_parameter(axis, groups, named, y, (PINK, "o", "λ·reverse + (1−λ)·forward"))
        axis.set(xlabel="λ", ylabel=METRICS[y], xticks=list(named))
    save(fig, out, "mixing.png")

    fig, axes = figure(3, "Learning to end: how many rollouts end before the cap, while training")
    names = {"dagger_onpolicy": STYLE["dagger_onpolicy"], "kl_mix-0.25": (GREEN, "s", "λ = 0.25"),
             "kl_mix-0.75": (PINK, "D", "λ = 0.75"), "opd": STYLE["opd"]}  # fmt: skip
    for axis, y in zip(axes, ("ended", "response_len", "entropy")):
        for name, (color, _, label) in names.items():
            tables = [read_steps(path) for path in groups[name]]
            mean = np.array([[row[y] for row in rows] for rows in tables]).mean(0)
            axis.plot([row["step"] for row in tables[0]], mean, color=color, label=label)
        label = {"ended": "rollouts that end", "response_len": "length (tokens)", "entropy": "entropy (nats)"}[y]
        axis.set(xlabel="step", ylabel=label)
    axes[0].legend(frameon=False, fontsize=11)
    save(fig, out, "ending.png")

    fig, axes = figure(4, "Entropy-gated curriculum against fixed lengths, reverse KL")
    for axis, x, y in zip(
        axes, ("step", "flops", "step", "step"), ("avg_at_k", "avg_at_k", "eval_entropy", "eval_len")
    ):
        for name in ("opd", "curriculum", "two-lengths"):
            curve(axis, groups[name], x, y, STYLE[name])
        axis.set(xlabel=LABELS[x], ylabel=METRICS[y])
    axes[0].legend(frameon=False, fontsize=11)
    save(fig, out, "curriculum.png")

    fig, axes = figure(3, "The RL that follows: GRPO from a forward-KL and from a reverse-KL start")
    for axis, y in zip(axes, ("avg_at_k", "pass_at_k", "eval_entropy")):
        for name in ("grpo-after-dagger_onpolicy", "grpo-after-opd"):
            curve(axis, groups[name], "step", y, STYLE[name])
        axis.set(xlabel="GRPO step", ylabel=METRICS[y])
    axes[0].legend(frameon=False, fontsize=11)
    save(fig, out, "rl.png")


def draw_together(groups, out_dir):
    """Any runs in one figure: accuracy, entropy and length against steps."""
    colors = [BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK]
    fig, axes = figure(4, "runs, together")
    for i, (name, paths) in enumerate(groups.items()):
        style = (colors[i % len(colors)], "o^sDPvX*"[i % 8], name)
        for axis, y in zip(axes, ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")):
            curve(axis, paths, "step", y, style)
            axis.set(xlabel="step", ylabel=METRICS[y])
    axes[0].legend(frameon=False, fontsize=11)
    save(fig, out_dir, "together.png")


def main(args: Args):
    if args.quick:
        args.seeds, args.out_dir = 1, args.out_dir + "-quick"
    if args.dirs and args.out_dir == Args.out_dir:  # not over the tables of the findings
        args.out_dir = "runs/together"
    os.makedirs(args.out_dir, exist_ok=True)
    if args.dirs:
        groups = {path: [path] for path in args.dirs}
        draw_together(groups, args.out_dir)
    else:
        groups = run_all(args)
        draw_findings(groups, args)
        print(write_findings(groups, args) + "\n")
    print(write_tables(groups, args.out_dir))
    print(f"\ntables, runs.csv and figures are in {args.out_dir}")


if __name__ == "__main__":
    argv, dirs = sys.argv[1:], []
    while argv and not argv[0].startswith("-"):
        dirs.append(argv.pop(0))
    main(parse(Args, argv + (["--dirs", *dirs] if dirs else [])))
