"""Entropy-gated length curriculum: train on short responses first, and on longer ones while entropy holds.

    after stage m:   H_m = mean predictive entropy per token of q_θ on held-out prompts, at length L_m
    L_m -> L_{m+1}   if H_m >= H_min,     else back to the weights after stage m − 1: stop, or go on at L_{m−1}

                         forward KL(p‖q_θ)        reverse KL(q_θ‖p)
    teacher prefixes     sft_offpolicy.py         offline_rl_distill.py        here: any of the four, by
    student prefixes     dagger_onpolicy.py       opd.py                       --prefixes and --kl

Under reverse KL a base student may unlearn its own end token, and not learn its teacher's. Then responses go on to the
cap, and entropy falls. Short lengths hardly reach an end. The gate (arXiv 2605.16826) asks whether entropy holds.
Our reading, where the paper does not say: H_m is measured at T = 1, on rollouts for the last --held_out rows; all
lengths get the same number of steps, and a gate at the end; FLOPs leave out gates, as they leave out evaluation.

    python curriculum.py                                                      CPU, the toy: half a minute
    python curriculum.py --recipe recipes/qwen3-curriculum.txt --out_dir DIR  Qwen3, one GPU; not run by us
"""

from dataclasses import dataclass  # noqa: I001
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from common import (
    check_models, distillation_loss, evaluate, forward_kl, mixed_kl, respond, reverse_kl, sample, sampled_forward_kl,
    sampled_mixed_kl, sampled_reverse_kl, seed_of, teacher_rollouts,
)  # fmt: skip
from plumbing.arguments import refuse
from plumbing.models import load_student, load_teacher, refresh
from plumbing.run import Run, mean_over_processes, parse, say


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
    max_new_tokens: int = 96  # the longest training length: of --lengths only those up to here are used
    lengths: str = "8,32,96"  # the ladder of training lengths L_0,L_1,...; each gets an equal share of steps
    h_min: float = 0.4  # H_min, nats per token: below it a stage counts as unstable, and the gate closes
    held_out: int = 64  # last rows of data, kept from training, on whose prompts H_m is measured
    on_closed: Literal["stop", "continue"] = "stop"  # from the last stable checkpoint: end, or train on at its length
    prefixes: Literal["student", "teacher"] = "student"  # WHERE: sampled anew, or the responses in the data
    kl: Literal["forward", "reverse", "mixed"] = "reverse"  # HOW; mixed by lam
    lam: float = 0.2  # λ of --kl mixed, the share of reverse KL
    temperature: float = 1.0  # of the student's rollouts; the loss compares at T = 1
    top_p: float = 1.0  # of the student's rollouts: nucleus of this probability; 1 is off
    top_k: int = 0  # of the student's rollouts: only so many most likely tokens; 0 is off
    estimator: Literal["exact", "sampled"] = "exact"  # sum over the vocabulary, or one fresh token per prefix
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


def ladder_of(args):
    """The training lengths L_0, L_1, ... that --lengths and --max_new_tokens allow, in tokens; refuses bad ones."""
    lengths = [int(n) if n.isdecimal() else 0 for n in args.lengths.split(",")]
    if lengths != sorted(set(lengths)) or not 0 < lengths[0] <= args.max_new_tokens:
        refuse(f"--lengths is {args.lengths!r}: give rising numbers like 8,16,32, the first at most --max_new_tokens")
    ladder = [length for length in lengths if length <= args.max_new_tokens]
    if args.steps < len(ladder):
        refuse(f"--steps is {args.steps}, but --lengths has {len(ladder)} stages: each needs a step")
    return ladder


def main(args: Args):
    ladder = ladder_of(args)
    stage_ends = [args.steps * (m + 1) // len(ladder) for m in range(len(ladder))]  # after which steps H_m is measured
    run = Run(args, needs="response" if args.prefixes == "teacher" else "", steps_may_grow=False)
    held_out, run.problems = run.problems[-args.held_out :], run.problems[: -args.held_out]
    if not run.problems:
        refuse(f"--held_out is {args.held_out}, and leaves no row of {args.data} to train on")
    student, sampler = load_student(args)  # the sampler is the student, or a copy that decodes faster
    teacher = load_teacher(args)
    check_models(student, sampler, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    run.memory = {"stage": 0, "stable": 0, "closed": False}  # survives a kill
    run.resume(student, sampler, optimizer)
    divergence = {
        "forward": {"exact": forward_kl, "sampled": sampled_forward_kl},
        "reverse": {"exact": reverse_kl, "sampled": sampled_reverse_kl},
        "mixed": {"exact": partial(mixed_kl, lam=args.lam), "sampled": partial(sampled_mixed_kl, lam=args.lam)},
    }[args.kl][args.estimator]
    tokens = dict(end_ids=run.tokens.end_ids, vocab_size=run.tokens.vocab_size)
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, prompt_len=run.prompt_len)

    for step in run.steps():  # how many updates have been made
        # (1) Evaluate and log where the student stands
        state = run.memory
        last = step == args.steps or state["closed"] and args.on_closed == "stop"
        evaluation = evaluate(sampler, run.problem_sets, run.tokens, args) if run.eval_is_due(last) else None
        run.log(evaluation)
        if last:
            break

        # (2) Prefixes. WHERE is supervision applied? On the first L_m tokens of what student or teacher says.
        batch, seed, length = run.batch(step), seed_of(args.seed, "rollouts", step), ladder[state["stage"]]
        if args.prefixes == "student":
            rollouts = sample(sampler, batch.prompts, max_new_tokens=length, seed=seed, **sampling, **tokens)
        else:
            rollouts = teacher_rollouts(teacher, batch, length)

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

        # (5) The gate, at the end of a stage: go from L_m to L_{m+1} only if the student has kept H_m >= H_min.
        run.record(rollouts, {student: 3, teacher: 1}, loss=loss, entropy=entropy, grad_norm=grad_norm, lr=lr)
        run.row["train_len"] = length
        at_gate = not state["closed"] and step + 1 in stage_ends
        if at_gate:
            options = dict(max_new_tokens=length, batch_size=args.eval_batch_size, prompt_len=run.prompt_len)
            # The same draws at every gate of every run: what differs is the student.
            records = respond(sampler, held_out, run.tokens, 1, seed_of("gate"), **options)
            h = sum(r["nats"] for r in records) / sum(r["length"] for r in records)  # H_m
            run.row |= {"gate_entropy": h, "gate_open": h >= args.h_min}
            say(f"stage {state['stage']}: H = {h:.3f} at {length} tokens, {'open' if h >= args.h_min else 'closed'}")
            if h >= args.h_min:  # stable: this is now the checkpoint to fall back on
                state |= {"stable": step + 1, "stage": min(state["stage"] + 1, len(ladder) - 1)}
            else:  # back to the last stable weights and length, if there are any
                if state["stable"]:
                    run.load(state["stable"], student, sampler, optimizer)
                state |= {"stable": 0, "stage": max(0, state["stage"] - 1), "closed": True}

        # (6) Save
        if run.save_is_due() or at_gate:
            run.save(student, optimizer, keep=[state["stable"]])

    run.finish(student)


if __name__ == "__main__":
    main(parse(Args))
