"""Evaluate any checkpoint on any benchmark: Avg@k, Pass@k, response length, entropy, with 95 % intervals.

    python evaluate.py --model runs/opd/model                              the toy's evaluation set
    python evaluate.py --model Qwen/Qwen3-0.6B --eval_temperature 0.6 --eval_max_new_tokens 4096 \\
        --eval_data openai/gsm8k:main:test,HuggingFaceH4/MATH-500::test,math-ai/aime24::test,math-ai/amc23::test

Avg@k is the mean accuracy over k samples a problem, Pass@k the unbiased estimate that at least one of k is right; the
intervals are over problems (normal approximation). Where a file has difficulty levels, each has its line. The table
goes to stdout; --out_file keeps every response, one JSON line each.
"""

import json
from dataclasses import dataclass

from common import evaluate, summarize
from runs import check_args, is_main, load_model, load_vocab, parse, start_processes
from tasks import load_problems


@dataclass
class Args:
    model: str = "toy/student"  # checkpoint folder or hub name
    eval_data: str = "toy/eval.jsonl"  # problems with answers: a file, or name[:config[:split]]; several by commas
    eval_k: int = 8  # k of Avg@k and Pass@k
    eval_n: int = 0  # samples per problem for them; 0: eval_k
    eval_temperature: float = 1.0  # of the sampler; 0 is greedy
    top_p: float = 1.0  # nucleus of this probability; 1 is off
    top_k: int = 0  # only so many most likely tokens; 0 is off
    eval_max_new_tokens: int = 48  # tokens at which a response is cut
    eval_batch_size: int = 512  # responses sampled at once
    seed: int = 0  # of the sampler
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    precision: str = "auto"  # fp32, bf16, auto: bf16 on a GPU
    out_file: str = ""  # JSONL of all responses: prompt, response, answer, correct, length, ended


def main(args: Args):
    start_processes()
    check_args(args)
    evals = {name: load_problems(name, needs_answer=True) for name in args.eval_data.split(",")}
    vocab = load_vocab(args, list(evals.values()))
    model = load_model(args.model, args, trainable=False)
    table, responses = [], []
    for name, problems in evals.items():
        metrics, records = evaluate(
            model, problems, vocab, args.eval_k, args.eval_n, args.eval_temperature, args.eval_max_new_tokens,
            args.eval_batch_size, args.seed, args.top_p, args.top_k,
        )  # fmt: skip
        table.append((name, metrics))
        for level in sorted({p.level for p in problems if p.level is not None}):
            of_level = [i for i, p in enumerate(problems) if p.level == level]
            table.append((f"  level {level}", summarize(records, of_level, args.eval_k)))
        for r in records:
            p = problems[r["problem"]]
            responses.append({"set": name, "prompt": p.question, "answer": p.answer, "level": p.level, **r})
    if not is_main():
        return
    if args.out_file:
        with open(args.out_file, "w") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in responses)
    k = args.eval_k
    print(f"| {args.model} | problems | Avg@{k} | Pass@{k} | length | cut | entropy |\n|" + "---|" * 7)
    for name, m in table:
        print(
            f"| {name} | {m['problems']} | {m['avg_at_k']:.3f} ± {m['avg_at_k_ci']:.3f} "
            f"| {m['pass_at_k']:.3f} ± {m['pass_at_k_ci']:.3f} | {m['eval_len']:.1f} | {m['eval_clip_ratio']:.1%} "
            f"| {m['eval_entropy']:.3f} |"
        )


if __name__ == "__main__":
    main(parse(Args))
