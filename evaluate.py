"""Evaluate any checkpoint on any benchmark, or have a teacher respond to any prompts.

    python evaluate.py --model runs/opd/model                          the toy's evaluation set
    python evaluate.py --recipe recipes/qwen3-eval.txt --model Qwen/Qwen3-0.6B             the paper's four sets
    python evaluate.py --model TEACHER --eval_data PROMPTS --eval_k 1 --out_file FILE      FILE is --data as it stands
    python evaluate.py --model none --eval_data FILE       grades the responses in FILE, which any program may have made

Avg@k is the share of k samples a problem that solve it, Pass@k the unbiased estimate that at least one of k does; the
95 % intervals are over problems. A response is useful if it solves its problem and finishes. Where a file has
difficulty levels, each has its line. Prompts without answers get responses and no grades. --out_file is written as it
goes: the same command goes on after a kill.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import check_models, respond, seed_of, summarize
from plumbing.arguments import check_args, parse, refuse
from plumbing.data import load_problem_sets
from plumbing.grading import find_answer, grade
from plumbing.models import load_model, load_tokens
from plumbing.processes import is_main, say
from plumbing.run import append_lines, read_lines, start, write_file


@dataclass
class Args:
    model: str = "toy/student"  # checkpoint folder or hub name; none: grade the responses that stand in the data
    eval_data: str = "toy/eval.jsonl"  # problems: a file, or name[:config[:split]] on the hub; several by commas
    eval_problems: int = 0  # of each set, evenly spread; 0: all
    eval_k: int = 8  # k of Avg@k and Pass@k
    eval_n: int = 0  # samples per problem for them; 0: eval_k
    eval_temperature: float = 1.0  # of the sampler; 0 is greedy, and one sample
    top_p: float = 1.0  # nucleus of this probability; 1 is off
    top_k: int = 0  # only so many most likely tokens; 0 is off
    eval_max_new_tokens: int = 96  # tokens at which a response is cut
    eval_batch_size: int = 512  # responses sampled at once
    seed: int = 0  # of the sampler
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    columns: str = ""  # question=NAME,answer=NAME,response=NAME, where guessing the columns fails
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster one; fp32 for tiny models
    out_file: str = ""  # JSONL of all responses: prompt, answer, level, response, response_ids, ended, correct, ...


def main(args: Args):
    start()
    check_args(args)
    settings = {name: getattr(args, name) for name in ("model", "instruction", "thinking", "top_p", "top_k", "seed")}
    settings |= {"temperature": args.eval_temperature, "max_new_tokens": args.eval_max_new_tokens}
    settings |= {"eval_data": args.eval_data, "eval_problems": args.eval_problems, "n": args.eval_n or args.eval_k}
    path, known = Path(args.out_file), []
    if args.out_file:
        try:  # said now, not after an hour of sampling
            path.parent.mkdir(parents=True, exist_ok=True)
            begins = open(path, "rb").read(8) if path.exists() else b""
        except OSError as error:
            refuse(f"cannot write --out_file {args.out_file!r} ({error}): name another file")
        if begins not in (b"", b'{"set": '):
            refuse(f"--out_file {args.out_file!r} holds something else than responses: name another file")
        known = read_lines(path)
        before = known[0].get("settings", {}) if known else settings
        if changes := [name for name in settings if before.get(name) != settings[name]]:
            refuse(f"--out_file {args.out_file!r} holds responses made with another {', '.join(changes)}: name another")
    if args.model == "none":
        if args.out_file or args.eval_problems:
            refuse("--model none grades all responses of --eval_data: leave out --out_file and --eval_problems")
        sets = load_problem_sets(args.eval_data, 0, args.columns, needs="text")
        rows = [dict(set=name, **record) for name, problems in sets.items() for record in graded(problems)]
        return print_table(args, sets, rows)
    sets = load_problem_sets(args.eval_data, args.eval_problems, args.columns, needs="")
    tokens = load_tokens(args, [(*one, args.eval_max_new_tokens) for one in sets.items()])
    model = load_model(args.model, args.precision)
    check_models(model)

    n, rows, appending = (args.eval_n or args.eval_k) if args.eval_temperature else 1, [], False
    sampling = dict(max_new_tokens=args.eval_max_new_tokens, temperature=args.eval_temperature, top_p=args.top_p)
    longest = max(len(p.prompt) for problems in sets.values() for p in problems)
    sampling |= dict(top_k=args.top_k, batch_size=args.eval_batch_size, prompt_len=longest)
    for i, (name, problems) in enumerate(sets.items()):
        size = max(1, args.eval_batch_size // n)  # problems at a time
        for first in tqdm(range(0, len(problems), size), desc=name, leave=False, disable=not is_main()):
            part = problems[first : first + size]
            if len(known) >= len(rows) + n * len(part):  # done before a kill
                rows = known[: len(rows) + n * len(part)]
                continue
            records = respond(model, part, tokens, n, seed_of(args.seed, "evaluate", i, first), **sampling)
            new = [dict(set=name, **record | {"problem": record["problem"] + first}) for record in records]
            if not rows:
                new[0]["settings"] = settings
            if args.out_file and is_main():
                if not appending:  # what a kill has left of a batch is cut off
                    write_file(path, rows)
                append_lines(path, new)
                appending = True
            rows += new
    print_table(args, sets, rows)
    if args.out_file:
        say(f"the responses are in {args.out_file}")


def graded(problems):
    """Responses that stand in the data -> records as common.respond makes them; rows of one question are samples of one
    problem. What takes a model to know, lengths and entropies, is left open (NaN)."""
    keys = [str([*p.before, p.question]) for p in problems]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    for p, key in zip(problems, keys):
        right = None if p.answer is None else grade(p.response, p.answer)
        known = dict(problem=numbers[key], answer=p.answer, level=p.level, ended=p.ended, correct=right)
        yield known | dict(marked=find_answer(p.response) is not None, length=math.nan, nats=math.nan)


def print_table(args, sets, rows):
    """Print the metrics of records, a line for each set, and for each level in it."""
    k = min(args.eval_k, *Counter((row["set"], row["problem"]) for row in rows).values())
    heads = f"solved (Avg@{k}) | Pass@{k} | finished | useful | length | marked | entropy"
    say(f"| {args.model} | problems | {heads} |\n|{'---|' * 9}")
    for name, problems in sets.items():
        levels = sorted({p.level for p in problems if p.level is not None}, key=lambda x: (len(x), x))
        for level in [None, *levels]:
            m = summarize([r for r in rows if r["set"] == name and level in (None, r["level"])], k)
            solved, at_k = (f"{m[key]:.3f} ± {m[key + '_ci']:.3f}" for key in ("avg_at_k", "pass_at_k"))
            cells = [solved, at_k, f"{m['eval_ended']:.3f}", f"{m['eval_useful']:.3f}"]
            if all(p.answer is None for p in problems):
                cells[0] = cells[1] = cells[3] = "no answers"
            cells += [f"{m['eval_len']:.1f}", f"{m['eval_marked']:.3f}", f"{m['eval_entropy']:.3f}"]
            say(f"| {name if level is None else f'  level {level}'} | {m['problems']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(parse(Args))
