"""KL mixing: reverse and forward KL together, on the student's own prefixes.

    L(θ) = E_{s ~ d^S} [ λ KL(q_θ(·|s) ‖ p(·|s)) + (1 − λ) KL(p(·|s) ‖ q_θ(·|s)) ]        λ = --lam

                         λ = 0: forward KL        0 < λ < 1                λ = 1: reverse KL
    student prefixes     dagger_onpolicy.py       kl_mix.py <- this file   opd.py

Linear in λ, unlike the generalised JSD of GKD, which goes to 0 at both ends. The paper, arXiv 2605.16826, takes λ = .2.

    python kl_mix.py                                                CPU, the embedded toy: half a minute
    python kl_mix.py --recipe recipes/qwen3-4b.txt --out_dir DIR    Qwen3, one GPU, not run by us
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from common import check_models, distillation_loss, evaluate, mixed_kl, sample, sampled_mixed_kl, seed_of
from plumbing.models import load_student, load_teacher, refresh
from plumbing.run import Run, mean_over_processes, parse


@dataclass
class Args:  # what stands behind each argument is its --help text
    student: str = "toy/student"  # checkpoint folder or hub name; the model that is trained
    teacher: str = "toy/teacher"  # checkpoint folder or hub name; frozen
    data: str = "toy/train.jsonl"  # problems to train on: a file, or name[:config[:split]] on the hub
    eval_data: str = "toy/eval.jsonl"  # problems with answers to evaluate on, several by commas; or none
    out_dir: str = f"runs/{Path(__file__).stem}"  # everything the run writes
    steps: int = 150  # updates
    batch_size: int = 32  # prompts, and rollouts, per update, over all processes
    micro_batch_size: int = 64  # rollouts scored at once; less memory, same gradient
    max_new_tokens: int = 96  # training length: tokens at which a rollout is cut
    temperature: float = 1.0  # of the student's rollouts; the loss compares at T = 1
    top_p: float = 1.0  # of the student's rollouts: nucleus of this probability; 1 is off
    top_k: int = 0  # of the student's rollouts: only so many most likely tokens; 0 is off
    estimator: Literal["exact", "sampled"] = "exact"  # sum over the vocabulary, or one fresh token per prefix
    lam: float = 0.2  # λ, the share of reverse KL
    ends: Literal["apart", "as_one"] = "apart"  # as_one: all end tokens are one action in the comparison
    lr: float = 3e-4  # AdamW's learning rate, constant after the warm-up
    warmup_steps: int = 8  # updates over which lr rises from 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 25  # steps between evaluations; 0: only before and after
    eval_problems: int = 0  # of each set, evenly spread; 0: all
    eval_k: int = 8  # samples per problem: k of Avg@k and Pass@k
    eval_temperature: float = 1.0  # of the evaluation's rollouts; 0 is greedy, and one sample
    eval_max_new_tokens: int = 96  # tokens at which the evaluation's rollouts are cut
    eval_batch_size: int = 512  # the evaluation's rollouts sampled at once
    save_every: int = 50  # steps between checkpoints to continue from
    keep_checkpoints: bool = False  # all of them, not just the newest
    seed: int = 0  # of everything random
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    columns: str = ""  # question=NAME,answer=NAME,response=NAME, where guessing the columns fails
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster one; fp32 for tiny models
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more compute


def main(args: Args):
    run = Run(args)  # what is wrong with arguments or data is said before models load
    student, sampler = load_student(args)  # the sampler is the student, or a copy that decodes faster
    teacher = load_teacher(args)
    check_models(student, sampler, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    run.resume(student, sampler, optimizer)
    divergence = partial({"exact": mixed_kl, "sampled": sampled_mixed_kl}[args.estimator], lam=args.lam)  # HOW
    tokens = dict(end_ids=run.tokens.end_ids, vocab_size=run.tokens.vocab_size)
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, prompt_len=run.prompt_len)

    for step in run.steps():  # how many updates have been made
        # (1) Evaluate and log where the student stands
        evaluation = evaluate(sampler, run.problem_sets, run.tokens, args) if run.eval_is_due() else None
        run.log(evaluation)
        if step == args.steps:
            break

        # (2) Prefixes. WHERE is supervision applied? On what the student itself says.
        batch, seed = run.batch(step), seed_of(args.seed, "rollouts", step)
        rollouts = sample(sampler, batch.prompts, max_new_tokens=args.max_new_tokens, seed=seed, **sampling, **tokens)

        # (3) Loss. HOW are the two distributions compared? By `divergence`, in the mean over the response tokens of the
        # *global* batch: in a mean of micro-batch means a token in a short response would count more.
        torch.manual_seed(seed_of(args.seed, "loss", step))  # for the tokens that a sampled estimator draws
        n_tokens = mean_over_processes(rollouts.mask.sum())  # gradients are averaged, and so become global means
        loss = entropy = 0.0
        for micro in rollouts.split(args.micro_batch_size):
            micro_loss, micro_entropy = distillation_loss(
                divergence, student, teacher, micro, micro.mask / n_tokens, ends=args.ends, **tokens
            )
            micro_loss.backward()
            loss, entropy = loss + micro_loss.item(), entropy + micro_entropy.item()

        # (4) Update
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)  # before clipping
        optimizer.step()
        optimizer.zero_grad()
        refresh(sampler, student)

        # (5) Keep the numbers for the log, and how many forward passes were made: a backward pass costs two. Save.
        run.record(rollouts, {student: 3, teacher: 1}, loss=loss, entropy=entropy, grad_norm=grad_norm, lr=lr)
        if run.save_is_due():
            run.save(student, optimizer)

    run.finish(student)


if __name__ == "__main__":
    main(parse(Args))
