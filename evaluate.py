"""Evaluate any checkpoint on any benchmark, or have a teacher respond to any prompts.

    python evaluate.py --model runs/opd/model                          the toy's evaluation set
    python evaluate.py --recipe recipes/qwen3-eval.txt --model Qwen/Qwen3-0.6B             the paper's four sets
    python evaluate.py --model TEACHER --eval_data PROMPTS --eval_k 1 --out_file FILE      FILE is --data as it stands

Avg@k is the mean accuracy over k samples a problem, Pass@k the unbiased estimate that at least one of k is right; the
95 % intervals are over problems. Where a file has difficulty levels, each has its line. Prompts without answers get
responses and no grades. --out_file is written as it goes: the same command goes on after a kill.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import check_models, respond, seed_of, summarize
from plumbing.arguments import check_args, parse, refuse
from plumbing.data import load_problem_sets
from plumbing.models import load_model, load_tokens
from plumbing.processes import is_main
from plumbing.run import append_lines, read_lines, start, write_file


@dataclass
class Args:
    model: str = "toy/student"  # checkpoint folder or hub name
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
    columns: str = ""  # question=NAME,answer=NAME, where guessing the columns fails
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster one; fp32 for tiny models
    out_file: str = ""  # JSONL of all responses: prompt, answer, level, response, response_ids, ended, correct, ...


def main(args: Args):
    start()
    check_args(args)
    settings = {name: getattr(args, name) for name in ("model", "instruction", "thinking", "top_p", "top_k", "seed")}
    settings |= {"temperature": args.eval_temperature, "max_new_tokens": args.eval_max_new_tokens}
    settings |= {"eval_data": args.eval_data, "eval_problems": args.eval_problems, "n": args.eval_n or args.eval_k}
    path, known = Path(args.out_file), []
    if not path.parent.is_dir() or args.out_file and path.is_dir():  # said now, not after an hour of sampling
        refuse(f"cannot write --out_file {args.out_file!r}: it must be a file in a folder that is there")
    if args.out_file and path.exists():
        known = read_lines(path)
        if known and known[0].get("settings") != settings:
            refuse(f"--out_file {args.out_file!r} holds responses that were made otherwise: name another file")
    sets = load_problem_sets(args.eval_data, args.eval_problems, args.columns, needs="")
    tokens = load_tokens(args, list(sets.values()))
    model = load_model(args.model, args.precision)
    check_models(model)

    n, rows, appending = (args.eval_n or args.eval_k) if args.eval_temperature else 1, [], False
    sampling = dict(max_new_tokens=args.eval_max_new_tokens, temperature=args.eval_temperature, top_p=args.top_p)
    longest = max(len(p.prompt) for problems in sets.values() for p in problems)
    sampling |= dict(top_k=args.top_k, batch_size=args.eval_batch_size, prompt_len=longest)
    for name, problems in sets.items():
        size = max(1, args.eval_batch_size // n)  # problems at a time
        for first in tqdm(range(0, len(problems), size), desc=name, leave=False, disable=not is_main()):
            part = problems[first : first + size]
            if len(known) >= len(rows) + n * len(part):  # done before a kill
                rows = known[: len(rows) + n * len(part)]
                continue
            records = respond(model, part, tokens, n, seed_of(args.seed, "evaluate", name, first), **sampling)
            new = [dict(set=name, **record | {"problem": record["problem"] + first}) for record in records]
            if not rows:
                new[0]["settings"] = settings
            if args.out_file and is_main():
                if not appending:  # what a kill has left of a batch is cut off
                    write_file(path, rows)
                append_lines(path, new)
                appending = True
            rows += new
    if not is_main():
        return

    k = args.eval_k if args.eval_temperature else 1
    print(f"| {args.model} | problems | Avg@{k} | Pass@{k} | finished | length | marked | entropy |\n|" + "---|" * 8)
    for name, problems in sets.items():
        levels = sorted({p.level for p in problems if p.level is not None}, key=lambda x: (len(x), x))
        for level in [None, *levels]:
            m = summarize([r for r in rows if r["set"] == name and level in (None, r["level"])], args.eval_k)
            accuracy = [f"{m[key]:.3f} ± {m[key + '_ci']:.3f}" for key in ("avg_at_k", "pass_at_k")]
            if all(p.answer is None for p in problems):
                accuracy = ["no answers", "no answers"]
            print(
                f"| {name if level is None else f'  level {level}'} | {m['problems']} | {' | '.join(accuracy)} "
                f"| {m['eval_ended']:.1%} | {m['eval_len']:.1f} | {m['eval_marked']:.1%} | {m['eval_entropy']:.3f} |"
            )
    if args.out_file:
        print(f"the responses are in {args.out_file}")


if __name__ == "__main__":
    main(parse(Args))
