"""A real pair, from weights to tables: every objective trains Qwen2.5-Coder 0.5B on its 1.5B, and what each did to it.

    python docs/real_pair.py                                     two hours and more on two cores with AMX
    python docs/real_pair.py --student FOLDER --teacher FOLDER --data FILE --eval_data FILE

Every run is an ordinary run of an ordinary script with recipes/laptop.txt; what is finished is not repeated, so the
same command continues after a kill. The instrument is the KL on held-out problems: EVAL_PROMPTS of the evaluation set,
never trained on; prefixes by the teacher (the same for all) and by the student that is measured; both KLs at every
token. Accuracy is that of evaluate.py, greedy, on ACCURACY_PROBLEMS of the set. Differences to the untrained student
are paired by problem; their 95 % intervals are bootstrapped over problems, and know nothing of other seeds.

Written to runs/laptop: measured/NAME.json for every model, responses, and, anew after each model, real_pair.json and
real_pair.md with all of them.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import opd  # noqa: E402
from common import entropy, forward_kl, reverse_kl, sample  # noqa: E402
from plumbing.fast import Head, response_hidden  # noqa: E402
from plumbing.models import load_model, load_vocab, resolve_precision  # noqa: E402
from plumbing.runs import parse, read_lines, write_file  # noqa: E402
from plumbing.tasks import load_evals, refuse  # noqa: E402

RECIPE, OUT = ROOT / "recipes" / "laptop.txt", Path("runs/laptop")
FEW = {"eval_problems": 1, "eval_max_new_tokens": 64}  # in their own logs: they are measured afterwards
RUNS = {  # name: script, seed, further arguments
    "opd-seed-0": ("opd", 0, {}),  # the recipe as it is
    "dagger-seed-0": ("dagger_onpolicy", 0, FEW),
    "offline_rl-seed-0": ("offline_rl_distill", 0, FEW),
    "sft-seed-0": ("sft_offpolicy", 0, FEW),
    "mix-0.2-seed-0": ("kl_mix", 0, FEW | {"lam": 0.2}),
    "opd-seed-1": ("opd", 1, FEW),
    "dagger-seed-1": ("dagger_onpolicy", 1, FEW),
}
EVAL_PROMPTS = 64  # for the KLs
ACCURACY_PROBLEMS, ACCURACY_TOKENS = 200, 320  # chosen before looking: ± .06 where a fifth of the answers change sides
SECOND_SEEDS = "-seed-1"  # of these the KLs are measured, not the accuracy


@dataclass
class Args:
    student: str = "Qwen/Qwen2.5-Coder-0.5B-Instruct"  # checkpoint folder or hub name
    teacher: str = "Qwen/Qwen2.5-Coder-1.5B-Instruct"  # checkpoint folder or hub name
    data: str = "openai/gsm8k:main:train"  # problems to train on
    eval_data: str = "openai/gsm8k:main:test"  # problems to measure on


def command(script, **arguments):
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, ROOT / f"{script}.py", "--recipe", RECIPE, *words], check=True)


@torch.no_grad()
def token_kls(student, teacher, rollouts, vocab):
    """-> for every rollout {forward, reverse, entropy, tokens}: sums over its tokens, nats."""
    rows, models = [], (student, teacher)
    for chunk in torch.arange(len(rollouts.ids)).split(8):
        micro, values = rollouts.take(chunk), []
        heads, hidden = [Head(model, vocab) for model in models], [response_hidden(model, micro) for model in models]
        for states in zip(*(x.split(64) for x in hidden)):  # in the order of tensor[micro.mask]: row after row
            q, p = (head(x) for head, x in zip(heads, states))
            values.append(torch.stack([forward_kl(q, p), reverse_kl(q, p), entropy(q)]))
        for of_row in torch.cat(values, 1).split(micro.mask.sum(1).tolist(), 1):
            sums = [round(x, 4) for x in of_row.sum(1).tolist()]
            rows.append(dict(zip(("forward", "reverse", "entropy"), sums)) | dict(tokens=of_row.shape[1]))
    return rows


def measure_kls(path, args):
    """Both KLs and the entropy of a student on the teacher's prefixes and on its own, each as in token_kls."""
    options = parse(opd.Args, ["--recipe", str(RECIPE)])
    options = dataclasses.replace(options, student=path, teacher=args.teacher, eval_data=args.eval_data)
    options.precision = resolve_precision(options)
    (problems,) = load_evals(args.eval_data, EVAL_PROMPTS).values()
    vocab, _ = load_vocab(options, [problems])
    student, teacher = load_model(path, options), load_model(args.teacher, options)
    prompts, keys = [p.prompt for p in problems], [(0, 0, i) for i in range(len(problems))]
    result = {}
    for source, model in (("teacher", teacher), ("student", student)):
        rollouts = sample(model, prompts, keys, vocab, options.max_new_tokens, stream="held-out")
        result[f"{source} prefixes"] = token_kls(student, teacher, rollouts, vocab)
    return result


def measure(name, path, args):
    """-> {"teacher prefixes", "student prefixes": ..., "responses": [...]}, from disk where it was measured before."""
    file, answers = OUT / "measured" / f"{name}.json", OUT / "measured" / f"{name}-responses.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_file(file.parent, file.name, measure_kls(path, args))
    result = json.loads(file.read_text())
    if not name.endswith(SECOND_SEEDS):
        if not answers.exists():
            subprocess.run(
                [sys.executable, ROOT / "evaluate.py", "--model", path, "--eval_data", args.eval_data,
                 "--eval_problems", str(ACCURACY_PROBLEMS), "--eval_k", "1", "--eval_temperature", "0",
                 "--eval_max_new_tokens", str(ACCURACY_TOKENS), "--eval_batch_size", "100",
                 "--instruction", parse(opd.Args, ["--recipe", str(RECIPE)]).instruction, "--out_file", answers],
                check=True,
            )  # fmt: skip
        keys = ("correct", "marked", "ended", "length", "nats")
        result["responses"] = [{key: row[key] for key in keys} for row in read_lines(answers)]
    return result


# ----------------------------------------------------------------------------------------------------------------
# Tables


def ratio(rows, key):
    """-> (mean of `key` per token, its values under 2,000 resamplings of the problems)"""
    x, n = np.array([[row[key], row["tokens"]] for row in rows]).T
    draws = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    return x.sum() / n.sum(), x[draws].sum(1) / n[draws].sum(1)


def share(rows, key):
    return ratio([dict(x=float(row[key]), tokens=1) for row in rows], "x")


def difference(now, before):
    """"0.208 (-0.041 [-0.066, -0.012])": now, and how much more than before; both are of the above, and paired, as both
    resample the same problems."""
    low, high = np.percentile(now[1] - before[1], [2.5, 97.5])
    return f"{now[0]:.3f} ({now[0] - before[0]:+.3f} [{low:+.3f}, {high:+.3f}])"


def tables(measured, logs):
    base = measured["untrained"]
    lines = ["| | forward KL, teacher prefixes | reverse KL, teacher prefixes | forward KL, student prefixes "
             "| reverse KL, student prefixes | entropy, student prefixes |", "|---|---|---|---|---|---|"]  # fmt: skip
    cells = [(f"{s} prefixes", key) for s in ("teacher", "student") for key in ("forward", "reverse")]
    cells.append(("student prefixes", "entropy"))
    for name, result in measured.items():
        values = [(ratio(result[s], key), ratio(base[s], key)) for s, key in cells]
        texts = [f"{now[0]:.3f}" if result is base else difference(now, before) for now, before in values]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines += ["", "| | accuracy | gained, lost | marked | cut | length (tokens) | entropy (nats) |", "|" + "---|" * 7]
    for name, result in measured.items():
        if "responses" not in result:
            continue
        rows, others = result["responses"], base["responses"]
        now, before = share(rows, "correct"), share(others, "correct")
        pairs = [(a["correct"], b["correct"]) for a, b in zip(rows, others)]
        moved = "" if result is base else f"{pairs.count((True, False))}, {pairs.count((False, True))}"
        length = np.mean([r["length"] for r in rows])
        nats = sum(r["nats"] for r in rows) / sum(r["length"] for r in rows)
        lines.append(
            f"| {name} | {f'{now[0]:.3f}' if result is base else difference(now, before)} | {moved} "
            f"| {np.mean([r['marked'] for r in rows]):.2f} | {1 - np.mean([r['ended'] for r in rows]):.2f} "
            f"| {length:.0f} | {nats:.3f} |"
        )
    lines += ["", "| | loss, first and last five steps | seconds a step | model FLOPs |", "|---|---|---|---|"]
    for name, rows in logs.items():
        first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:5], rows[-5:]))
        seconds = np.median(np.diff([row["seconds"] for row in rows]))
        lines.append(f"| {name} | {first:.3f}, {last:.3f} | {seconds:.0f} | {rows[-1]['flops']:.2e} |")
    return "\n".join(lines)


def main(args: Args):
    if "," in args.eval_data:
        refuse(f"--eval_data is {args.eval_data!r}: this script measures on one set")
    pair = OUT / "pair.json"  # measurements are kept by the names of runs: they must not be another pair's
    if pair.exists() and json.loads(pair.read_text()) != vars(args):
        refuse(f"{OUT} is of another pair: {pair.read_text()}; move or remove that folder")
    OUT.mkdir(parents=True, exist_ok=True)
    write_file(OUT, pair.name, vars(args))
    measured, logs = {}, {}
    for name in ("untrained", *RUNS):
        path = args.student
        if name in RUNS:
            (script, seed, more), path = RUNS[name], str(OUT / name / "model")
            if not Path(path).exists():
                command(script, **vars(args), out_dir=OUT / name, seed=seed, **more)
            logs[name] = [row for row in read_lines(OUT / name / "log.jsonl") if "loss" in row]
        measured[name] = measure(name, path, args)
        text = tables(measured, logs)
        numbers = json.dumps(dict(measured=measured, logs=logs), separators=(",", ":"))
        write_file(OUT, "real_pair.json", numbers + "\n")
        write_file(OUT, "real_pair.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(parse(Args))
