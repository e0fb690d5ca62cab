"""Evaluate any checkpoint on any benchmark: Avg@k, Pass@k, response length, entropy, with 95 % intervals.

    python evaluate.py --model runs/opd/model                              the toy's evaluation set
    python evaluate.py --model Qwen/Qwen3-0.6B --eval_temperature 0.6 --eval_max_new_tokens 4096 \\
        --eval_data openai/gsm8k:main:test,HuggingFaceH4/MATH-500::test,math-ai/aime24::test,math-ai/amc23::test

Avg@k is the mean accuracy over k samples a problem, Pass@k the unbiased estimate that at least one of k is right; the
intervals are over problems (normal approximation). Where a file has difficulty levels, each has its line. The table
goes to stdout; --out_file keeps every response, one JSON line each. The training scripts evaluate with the same lines.
"""

import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from common import pass_at_k, sample
from runs import check_args, gather, is_main, load_evals, load_model, load_vocab, log_samples, parse, rank_and_world
from runs import resolve_precision, start_processes, total
from tasks import find_answer, grade


def evaluate(
    model, problems, vocab, k=8, n=0, temperature=1.0, max_new_tokens=1024, batch_size=256, seed=0, top_p=1.0, top_k=0,
    grading="marked",
):  # fmt: skip
    """Sample n >= k responses to every problem (n = 0: k of them) and grade them. -> (metrics, records)

    metrics: see summarize. records: one dict per response, in the order of problems and samples. Random numbers are
    keyed by (seed, problem, sample), so two evaluations differ only by the model, and processes share the problems.
    """
    n = n or k
    rank, world = rank_and_world()
    mine = [(i, j) for i in range(rank, len(problems), world) for j in range(n)]
    mine.sort(key=lambda pair: len(problems[pair[0]].prompt))  # prompts of a length share a batch: less padding
    records = []
    steps = math.ceil(math.ceil(len(problems) / world) * n / batch_size)  # the same on every process
    for b in tqdm(range(steps), desc="evaluate", leave=False, disable=not is_main()):
        pairs = mine[b * batch_size : (b + 1) * batch_size] or [(0, 0)]  # out of work: keep the others company
        prompts, keys = [problems[i].prompt for i, _ in pairs], [(seed, i, j) for i, j in pairs]
        rollouts = sample(
            model, prompts, keys, vocab, max_new_tokens, temperature, top_p, top_k, stream="evaluate", entropies=True
        )
        entropies = (rollouts.entropy * rollouts.mask).sum(1).tolist()
        for (i, j), ids, ended, nats in zip(pairs, rollouts.responses(), rollouts.ended.tolist(), entropies):
            if b * batch_size < len(mine):
                text = vocab.tokenizer.decode(ids, skip_special_tokens=True)
                result = dict(response=text, correct=grade(text, problems[i].answer, grading), length=len(ids))
                result |= dict(marked=find_answer(text) is not None)
                records.append(dict(problem=i, sample=j, **result, ended=ended, nats=nats))
    records = sorted(gather(records), key=lambda r: (r["problem"], r["sample"]))
    return summarize(records, range(len(problems)), k), records


def summarize(records, problems, k):
    """What evaluate's records say about some of the problems (their numbers).

    -> avg_at_k (mean accuracy), pass_at_k (unbiased), avg_at_k_ci and pass_at_k_ci (half the width of the normal 95 %
    interval over problems), eval_len (mean response length, tokens), eval_clip_ratio (fraction cut at the cap),
    eval_marked (fraction with a marked answer), eval_entropy (mean predictive entropy at T = 1 per token of these
    rollouts, nats), problems (how many).
    """
    by_problem = {i: [] for i in problems}
    for record in records:
        by_problem.get(record["problem"], []).append(record)
    flat = [r for group in by_problem.values() for r in group]
    avg = [np.mean([r["correct"] for r in group]) for group in by_problem.values()]
    passed = [pass_at_k(len(group), sum(r["correct"] for r in group), k) for group in by_problem.values()]
    tokens = sum(r["length"] for r in flat)

    def half_width(values):
        return float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.5

    return {
        "avg_at_k": float(np.mean(avg)),
        "pass_at_k": float(np.mean(passed)),
        "avg_at_k_ci": half_width(avg),
        "pass_at_k_ci": half_width(passed),
        "eval_len": tokens / len(flat),
        "eval_clip_ratio": float(np.mean([not r["ended"] for r in flat])),
        "eval_marked": float(np.mean([r["marked"] for r in flat])),
        "eval_entropy": sum(r["nats"] for r in flat) / tokens,
        "problems": len(by_problem),
    }


def mean_entropy(model, prompts, vocab, max_new_tokens, batch_size=256):
    """Mean predictive entropy (T = 1, nats per token) of the model's own rollouts of at most max_new_tokens on prompts.

    -> (entropy, model FLOPs of measuring it). The same random numbers every time: two measurements differ by the model.
    """
    rank, world = rank_and_world()
    mine, nats, tokens, flops = range(rank, len(prompts), world), 0.0, 0, 0.0
    for b in range(math.ceil(math.ceil(len(prompts) / world) / batch_size)):
        rows = mine[b * batch_size : (b + 1) * batch_size]
        keys = [(0, 0, i) for i in rows or [0]]  # a process out of rows keeps the others company
        batch = [prompts[i] for i in rows or [0]]
        rollouts = sample(model, batch, keys, vocab, max_new_tokens, stream="gate", entropies=True)
        if rows:
            nats += (rollouts.entropy * rollouts.mask).sum().item()
            tokens, flops = tokens + rollouts.mask.sum().item(), flops + rollouts.flops
    return total(nats) / total(tokens), total(flops)


def evaluate_all(model, evals, vocab, args, step):
    """evaluate() on every set of evals, {name: [Problem]}; prints a readable line for each. -> metrics for the log.

    With several sets the plain keys hold the mean over sets (half-widths that of the mean, `problems` the sum), and
    `key/name` the set's own value.
    """
    results = {}
    for name, problems in evals.items():
        results[name], records = evaluate(
            model, problems, vocab, args.eval_k, args.eval_n, args.eval_temperature, args.eval_max_new_tokens,
            args.eval_batch_size, args.seed, grading=args.grade,
        )  # fmt: skip
        log_samples(args, step, name, problems, records)
        if is_main():
            m, k = results[name], args.eval_k
            tqdm.write(
                f"step {step:4d}  {name}: Avg@{k} {m['avg_at_k']:.3f}  Pass@{k} {m['pass_at_k']:.3f}  "
                f"entropy {m['eval_entropy']:.3f} nats  length {m['eval_len']:.1f}  cut {m['eval_clip_ratio']:.1%}  "
                f"marked {m['eval_marked']:.1%}{by_last_number(args)}"
            )
            warn_of_unmarked(name, m)
    if len(results) == 1:
        return next(iter(results.values()))
    pooled = pool(list(results.values()))
    return pooled | {f"{key}/{name}": value for name, metrics in results.items() for key, value in metrics.items()}


def pool(results):
    """The metrics of several sets as one: means over sets, which count alike; half-widths of these means; how many
    problems in all."""
    pooled = {key: float(np.mean([m[key] for m in results])) for key in results[0]}
    for key in ("avg_at_k_ci", "pass_at_k_ci"):
        pooled[key] = math.sqrt(sum(m[key] ** 2 for m in results)) / len(results)
    return pooled | {"problems": sum(m["problems"] for m in results)}


def by_last_number(args):
    return "  (unmarked answers: by their last number)" if args.grade == "last_number" else ""


def warn_of_unmarked(name, metrics):
    if metrics["eval_marked"] < 0.5:
        tqdm.write(
            f"warning: {name}: only {metrics['eval_marked']:.0%} of the responses mark an answer by \\boxed{{}} or ####: "
            "ask for it by --instruction, or let them finish by a larger --eval_max_new_tokens"
        )


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
    eval_max_new_tokens: int = 48  # tokens at which a response is cut; >= 1
    eval_batch_size: int = 512  # responses sampled at once; >= 1
    grade: Literal["marked", "last_number"] = "marked"  # last_number: where no answer is marked, the last number counts
    seed: int = 0  # of the sampler; >= 0
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 if it is fast
    out_file: str = ""  # JSONL of all responses: prompt, response, answer, correct, length, ended


def main(args: Args):
    start_processes()
    check_args(args)
    args.precision = resolve_precision(args)
    evals = load_evals(args)
    vocab = load_vocab(args, list(evals.values()))
    model = load_model(args.model, args, trainable=False)
    table, responses = [], []
    for name, problems in evals.items():
        metrics, records = evaluate(
            model, problems, vocab, args.eval_k, args.eval_n, args.eval_temperature, args.eval_max_new_tokens,
            args.eval_batch_size, args.seed, args.top_p, args.top_k, args.grade,
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
    print(f"| {args.model} | problems | Avg@{k} | Pass@{k} | length | cut | marked | entropy |\n|" + "---|" * 8)
    for name, m in table:
        print(
            f"| {name} | {m['problems']} | {m['avg_at_k']:.3f} ± {m['avg_at_k_ci']:.3f} "
            f"| {m['pass_at_k']:.3f} ± {m['pass_at_k_ci']:.3f} | {m['eval_len']:.1f} | {m['eval_clip_ratio']:.1%} "
            f"| {m['eval_marked']:.1%} | {m['eval_entropy']:.3f} |"
        )
    if by_last_number(args):
        print(f"\n{by_last_number(args).strip()}")
    for name, m in table:
        warn_of_unmarked(name, m)


if __name__ == "__main__":
    main(parse(Args))
