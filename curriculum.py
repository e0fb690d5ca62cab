"""Entropy-gated length curriculum: train on short responses first, and on longer ones while entropy holds.

    after stage m:   H_m = mean predictive entropy per token of q_θ on held-out prompts, at length L_m
    L_m -> L_{m+1}   if H_m >= H_min,     else back to the weights after stage m − 1: stop, or go on at L_{m−1}

                         forward KL(p_T‖q_θ)      reverse KL(q_θ‖p_T)
    teacher prefixes     sft_offpolicy.py         offline_rl_distill.py        here: any of the four, by
    student prefixes     dagger_onpolicy.py       opd.py                       --prefixes and --kl

Why. Training lengths that reach the ending cost more and can go wrong: under reverse KL a student that has lost its own
ending, and not learned its teacher's, rambles to the cap, and entropy falls. Short lengths hardly get there. The gate
(arXiv 2605.16826) lengthens training while the student is stable.

Where this is our reading, and not the paper's words.
- H_m is measured on the student's own rollouts at T = 1 and length L_m, on --held_out prompts of the training data.
- Every length gets the same number of steps until a gate closes; every stage, also the last, ends with one gate.
- A closed gate ends training, and the result is the last stable checkpoint: the one after stage m − 1 (that of stage 0
  if there is no other). With --on_closed continue, training goes on from it at its length, and no gate is asked again.
- The optimizer's state is kept across stages, and the learning rate has one warm-up.

Run it.
    python curriculum.py                                                      CPU, the toy: half a minute, a gate closes
    python curriculum.py --recipe recipes/qwen3-curriculum.txt --out_dir DIR  Qwen3, one GPU; not run by us
    torchrun --nproc_per_node 4 curriculum.py ...                             the same run on several GPUs
The same command again continues a run that was stopped. Results are in --out_dir: log.jsonl, responses, curves, model/.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common import TeacherRollouts, evaluate, forward_kl, mean_entropy, mixed_kl, reverse_kl, sample, weighted_kl
from plumbing.processes import average, full, is_main
from plumbing.runs import open_run, parse
from plumbing.tasks import refuse


@dataclass
class Args:  # behind each argument: its --help text, with the bounds that plumbing/runs.py checks
    student: str = "toy/student"  # checkpoint folder or hub name; the model that is trained
    teacher: str = "toy/teacher"  # checkpoint folder or hub name; frozen
    data: str = "toy/train.jsonl"  # prompts to train on: a file, or name[:config[:split]] on the hub
    eval_data: str = "toy/eval.jsonl"  # problems with answers to evaluate on, several by commas; or none
    out_dir: str = f"runs/{Path(__file__).stem}"  # everything the run writes
    steps: int = 150  # updates; >= 1
    batch_size: int = 32  # prompts, and rollouts, per update, over all processes; >= 1
    micro_batch_size: int = 64  # rollouts scored at once; less memory, same gradient; >= 1
    rollout_batch_size: int = 0  # rollouts sampled at once; 0: all; less memory, same rollouts; >= 0
    max_new_tokens: int = 96  # the longest training length; of --lengths only those up to here are used; >= 1
    lengths: str = "8,32,96"  # the ladder of training lengths L_0,L_1,..., tokens; each gets an equal share of steps
    h_min: float = 0.3  # H_min, nats per token: below it a stage counts as unstable, and the gate closes; >= 0
    held_out: int = 64  # last rows of data, kept from training, on whose prompts H_m is measured; >= 1
    on_closed: Literal["stop", "continue"] = "stop"  # with the last stable checkpoint: end, or train on at its length
    prefixes: Literal["student", "teacher"] = "student"  # WHERE: sampled anew, or once and stored
    kl: Literal["forward", "reverse", "mixed"] = "reverse"  # HOW; mixed by lam
    lam: float = 0.2  # λ of --kl mixed, the share of reverse KL; >= 0, <= 1
    teacher_samples: int = 1  # of --prefixes teacher: responses per prompt; epochs take turns; >= 1
    temperature: float = 1.0  # of the rollouts, so of the prefixes; the loss compares at T = 1; > 0
    top_p: float = 1.0  # of the rollouts: nucleus of this probability; 1 is off; > 0, <= 1
    top_k: int = 0  # of the rollouts: only so many most likely tokens; 0 is off; >= 0
    estimator: Literal["exact", "sampled"] = "exact"  # sum over the vocabulary, or one token per prefix: Proposition 1
    ends: Literal["apart", "as_one"] = "apart"  # as_one: all end tokens are one action in the comparison
    lr: float = 5e-4  # AdamW's learning rate, constant after the warm-up; > 0
    warmup: float = 0.05  # fraction of the steps over which lr rises from 0; >= 0, <= 1
    weight_decay: float = 0.0  # AdamW's; >= 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; > 0
    eval_every: int = 50  # steps between evaluations; 0: only before and after; >= 0
    eval_problems: int = 0  # of each set, evenly spread; 0: all; >= 0
    eval_k: int = 8  # k of Avg@k and Pass@k; >= 1
    eval_n: int = 0  # samples per problem for them; 0: eval_k; >= 0
    eval_temperature: float = 1.0  # of the evaluation's rollouts; 0 is greedy; >= 0
    eval_max_new_tokens: int = 96  # tokens at which they are cut, whatever the training length; >= 1
    eval_batch_size: int = 512  # of them sampled at once; >= 1
    grade: Literal["marked", "last_number"] = "marked"  # last_number: where no answer is marked, the last number counts
    save_every: int = 50  # steps between states to continue from; >= 1
    seed: int = 0  # of everything random; >= 0
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: teacher, student's products; auto: where it is fast
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more compute
    teacher_device: str = ""  # where the frozen teacher runs, such as cuda:1 or cpu; empty: beside the student


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
    # (1) As in opd.py, and the ladder.
    ladder = ladder_of(args)
    stage_ends = [args.steps * (m + 1) // len(ladder) for m in range(len(ladder))]  # after which steps H_m is measured
    run = open_run(args, evaluate)
    held_out = run.hold_out(args.held_out)
    student, teacher = run.load(args.student, trainable=True), run.load(args.teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.memory = {"stage": 0, "closed": False}  # survives a kill
    run.resume(student, optimizer)  # or begin, with an evaluation
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, at_once=args.rollout_batch_size)
    if args.prefixes == "teacher":
        teacher_rollouts = TeacherRollouts(teacher, run, args.teacher_samples, longest=ladder[-1], **sampling)
    kl = {"forward": forward_kl, "reverse": reverse_kl, "mixed": partial(mixed_kl, lam=args.lam)}[args.kl]

    for step in run.steps():
        state = run.memory
        if state["closed"] and args.on_closed == "stop":
            break
        length = ladder[state["stage"]]  # L_m
        batch = run.batch(step)

        # (2) Prefixes. WHERE is supervision applied? On the first L_m tokens of what student or teacher says.
        if args.prefixes == "student":
            rollouts = sample(student, batch.prompts, batch.keys, run.vocab, length, **sampling)
        else:
            rollouts = teacher_rollouts(batch, length)

        # (3) Loss: a mean over the response tokens of the *global* batch. A mean of micro-batch means would let a
        # token in a short response count more than one in a long response.
        n_tokens = average(rollouts.mask.sum())  # per process: gradients are averaged, and so become global means
        loss = entropy = 0.0
        for micro in rollouts.split(args.micro_batch_size):
            token_weights = micro.mask / n_tokens  # (b, R)
            # HOW are the two distributions compared? By the KL that was asked for.
            micro_loss, micro_entropy = weighted_kl(
                kl, student, teacher, micro, token_weights, run.vocab, args.estimator, args.ends
            )
            micro_loss.backward()
            loss, entropy = loss + micro_loss.item(), entropy + micro_entropy.item()

        # (4) Update
        lr = args.lr * min(1.0, step / max(1.0, args.warmup * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = full(torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm))  # before clipping
        optimizer.step()
        optimizer.zero_grad()

        # (5) The gate, at the end of a stage: go from L_m to L_{m+1} only if the student has kept H_m >= H_min.
        gate, at_gate = {}, not state["closed"] and step in stage_ends
        if at_gate:
            h, gate_flops = mean_entropy(student, held_out, run.vocab, length, args.eval_batch_size)  # H_m
            run.flops += gate_flops
            gate = {"gate_entropy": h, "gate_open": h >= args.h_min}
            state["closed"] = not gate["gate_open"]
            if gate["gate_open"]:  # stable: this is now the checkpoint to fall back on
                run.save_state("stable")
                state["stage"] = min(state["stage"] + 1, len(ladder) - 1)
            elif state["stage"] > 0:  # back to the last stable weights and length
                run.load_state("stable", keep_progress=True)
                state["stage"] -= 1
            elif is_main():
                tqdm.write(f"stage 0 is unstable (H_m {h:.3f} < {args.h_min}): no earlier weights, these stay")

        # (6) Log, evaluate, save; also at every gate: "stable" must not be newer than what a killed run continues from.
        means = dict(loss=average(loss), entropy=average(entropy), grad_norm=grad_norm, lr=lr)
        last = state["closed"] and args.on_closed == "stop"
        run.end_step(step, rollouts, last=last, save=at_gate, train_len=length, **gate, **means)

    run.finish()


if __name__ == "__main__":
    main(parse(Args))
