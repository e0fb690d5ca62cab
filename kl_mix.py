"""KL mixing: λ · reverse KL + (1−λ) · forward KL on the student's own prefixes.

    L(θ) = E_{s ~ d^S} [ λ · KL( q_θ(·|s) ‖ p_T(·|s) ) + (1−λ) · KL( p_T(·|s) ‖ q_θ(·|s) ) ]

                         forward KL(p_T‖q_θ)      reverse KL(q_θ‖p_T)
    teacher prefixes     sft_offpolicy.py         offline_rl_distill.py
    student prefixes     dagger_onpolicy.py  <-   kl_mix.py   ->  opd.py
                         (λ = 0)                  (λ = 1)

What it does. The same rollouts as opd.py and dagger_onpolicy.py, and a loss in between: gradients are linear in λ,

    ∇ L = λ · q · (log q − log p − KL) + (1−λ) · (q − p)        in logit space, KL = KL(q‖p) at this prefix,

so forward KL, however little of it, adds what reverse KL lacks, a pull on tokens that the student never says and the
teacher does: at q(y) → 0 the first term vanishes, the second tends to −(1−λ)·p(y). The paper's λ is .2, mostly forward.

What it leaves out, on purpose.
- It is not the generalised JSD of GKD and TRL, β·KL(p‖m) + (1−β)·KL(q‖m) with the mixture distribution
  m = β·p + (1−β)·q: that loss goes to 0 at both ends of β (where TRL puts the two KLs in its place).
- The prefixes count as data: no gradient flows through the choice of s.
- λ is a constant. (curriculum.py changes the training length instead.)

Run it.
    python kl_mix.py                                              CPU, the embedded toy: under a minute
    python kl_mix.py --recipe recipes/qwen3-4b.txt --out_dir DIR  Qwen3, one GPU; not run by us
    torchrun --nproc_per_node 4 kl_mix.py ...                     the same run on several GPUs
The same command again continues a run that was stopped. Results are in --out_dir: log.jsonl, responses, curves, model/.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from common import evaluate, mixed_kl, sample, weighted_kl
from plumbing.processes import average, full
from plumbing.runs import open_run, parse


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
    max_new_tokens: int = 8  # training length: tokens at which a rollout is cut; >= 1
    temperature: float = 1.0  # of the rollouts, so of the prefixes; the loss compares at T = 1; > 0
    top_p: float = 1.0  # of the rollouts: nucleus of this probability; 1 is off; > 0, <= 1
    top_k: int = 0  # of the rollouts: only so many most likely tokens; 0 is off; >= 0
    lam: float = 0.2  # λ, the share of reverse KL: 0 is dagger_onpolicy.py, 1 is opd.py; >= 0, <= 1
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


def main(args: Args):
    # (1) Data, models, optimizer. What is wrong with arguments or data is said before models load; a run that was
    # stopped continues where it was. `evaluate` is for the run to call, every --eval_every steps.
    run = open_run(args, evaluate)
    student, teacher = run.load(args.student, trainable=True), run.load(args.teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.resume(student, optimizer)  # or begin, with an evaluation
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, at_once=args.rollout_batch_size)

    for step in run.steps():
        batch = run.batch(step)  # its prompts, and keys: (seed, step, row) of each, which fix all that is drawn

        # (2) Prefixes. WHERE is supervision applied? On what the student itself says.
        rollouts = sample(student, batch.prompts, batch.keys, run.vocab, args.max_new_tokens, **sampling)

        # (3) Loss: a mean over the response tokens of the *global* batch. A mean of micro-batch means would let a
        # token in a short response count more than one in a long response.
        n_tokens = average(rollouts.mask.sum())  # per process: gradients are averaged, and so become global means
        loss = entropy = 0.0
        for micro in rollouts.split(args.micro_batch_size):
            token_weights = micro.mask / n_tokens  # (b, R)
            # HOW are the two distributions compared? By a mixture of both KLs.
            kl = partial(mixed_kl, lam=args.lam)
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

        # (5) Log, evaluate, save
        run.end_step(step, rollouts, loss=average(loss), entropy=average(entropy), grad_norm=grad_norm, lr=lr)

    run.finish()


if __name__ == "__main__":
    main(parse(Args))
