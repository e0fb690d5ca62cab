"""Evaluate any checkpoint on any benchmark: Avg@k, Pass@k, response length, entropy, with 95 % intervals.

    python evaluate.py --model runs/opd/model                              the toy's evaluation set
    python evaluate.py --recipe recipes/qwen3-eval.txt --model Qwen/Qwen3-0.6B      the paper's four sets

Avg@k is the mean accuracy over k samples a problem, Pass@k the unbiased estimate that at least one of k is right; the
intervals are over problems (normal approximation). Where a file has difficulty levels, each has its line. The table
goes to stdout; --out_file keeps every response, one JSON line each. The training scripts evaluate with the same lines.
"""

import os
from dataclasses import dataclass
from typing import Literal

from common import evaluate, summarize
from plumbing.models import load_model, load_vocab, resolve_precision
from plumbing.processes import is_main, start_processes
from plumbing.runs import check_args, in_words, parse, with_problems, write_file
from plumbing.tasks import load_evals, refuse


@dataclass
class Args:
    model: str = "toy/student"  # checkpoint folder or hub name
    eval_data: str = "toy/eval.jsonl"  # problems with answers: a file, or name[:config[:split]]; several by commas
    eval_problems: int = 0  # of each set, evenly spread; 0: all; >= 0
    eval_k: int = 8  # k of Avg@k and Pass@k; >= 1
    eval_n: int = 0  # samples per problem for them; 0: eval_k; >= 0
    eval_temperature: float = 1.0  # of the sampler; 0 is greedy; >= 0
    top_p: float = 1.0  # nucleus of this probability; 1 is off; > 0, <= 1
    top_k: int = 0  # only so many most likely tokens; 0 is off; >= 0
    eval_max_new_tokens: int = 96  # tokens at which a response is cut; >= 1
    eval_batch_size: int = 512  # responses sampled at once; >= 1
    grade: Literal["marked", "last_number"] = "marked"  # last_number: where no answer is marked, the last number counts
    seed: int = 0  # of the sampler; >= 0
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 if it is fast
    out_file: str = ""  # JSONL of all responses: set, prompt, answer, level, problem, sample, response, correct, ...


def main(args: Args):
    start_processes()
    check_args(args)
    args.precision = resolve_precision(args)
    folder, out_file = os.path.split(args.out_file)
    if folder and not os.path.isdir(folder) or os.path.isdir(args.out_file):  # said now, not after an hour of sampling
        refuse(f"cannot write --out_file {args.out_file!r}: it must be a file in a folder that is there")
    evals = load_evals(args.eval_data, args.eval_problems)
    vocab, tokenizer = load_vocab(args, list(evals.values()))
    model = load_model(args.model, args)
    table, responses = [], []
    for name, problems in evals.items():
        metrics, records = evaluate(model, problems, vocab, tokenizer, args, args.top_p, args.top_k)
        table.append((name, metrics))
        for level in sorted({p.level for p in problems if p.level is not None}, key=lambda x: (len(str(x)), str(x))):
            of_level = [i for i, p in enumerate(problems) if p.level == level]
            table.append((f"  level {level}", summarize(records, of_level, args.eval_k)))
        responses += with_problems(name, problems, records)
    if not is_main():
        return
    k = args.eval_k
    print(f"| {args.model} | problems | Avg@{k} | Pass@{k} | length | cut | marked | entropy |\n|" + "---|" * 8)
    for name, m in table:
        print(
            f"| {name} | {m['problems']} | {m['avg_at_k']:.3f} ± {m['avg_at_k_ci']:.3f} "
            f"| {m['pass_at_k']:.3f} ± {m['pass_at_k_ci']:.3f} | {m['eval_len']:.1f} | {m['eval_clip_ratio']:.1%} "
            f"| {m['eval_marked']:.1%} | {m['eval_entropy']:.3f} |"
        )
    for name, m in table:
        if name in evals:
            print(f"\n{name}: {in_words(m, args)}")
    if args.out_file:
        write_file(folder, out_file, responses)


if __name__ == "__main__":
    main(parse(Args))
