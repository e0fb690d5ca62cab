"""Group-relative policy optimisation (GRPO): the reinforcement learning that follows distillation.

    L(θ) = − E [ A_i · log q_θ(y_t|s_t) ]      over all tokens t of all responses i
    A_i = (r_i − mean r) / (std r + 1e-4)      of response i in the group of those to one prompt

The model responds to each prompt --group_size times. A response is worth 1 if its answer is right and 0 if not; under
--must_finish it must also have finished. Every token of it is reinforced by how much better its response was than the
others of its group. There is no teacher. Start from any checkpoint, also one that another script has written.

What it leaves out, on purpose, of GRPO (arXiv 2402.03300).
- No KL penalty towards a reference model.
- No mean over each response, and then over responses: as in DAPO, all tokens of the batch count alike.
- One update per batch of rollouts. Then the ratio q_θ/q_old, which GRPO has in place of log q_θ, is 1 and has the same
  gradient, and there is nothing to clip.

    python grpo.py                                                     CPU, the embedded toy's student: a minute
    python grpo.py --student runs/opd/model --out_dir runs/opd-grpo    after distillation
    python grpo.py --recipe recipes/qwen3-grpo.txt --out_dir DIR       Qwen3, one GPU; not run by us
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import check_models, evaluate, log_probs, sample, seed_of, weighted_loss
from plumbing.grading import grade
from plumbing.models import load_student, refresh
from plumbing.run import Run, mean_over_processes, parse


def group_advantages(rewards):
    """(prompts, group) rewards -> (prompts, group) advantages, standardised within the group; 0 where all are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, unbiased=False) + 1e-4)


@dataclass
class Args:  # what stands behind each argument is its --help text
    student: str = "toy/student"  # checkpoint folder or hub name; the model that is trained
    data: str = "toy/train.jsonl"  # problems with answers to train on: a file, or name[:config[:split]] on the hub
    eval_data: str = "toy/eval.jsonl"  # problems with answers to evaluate on, several by commas; or none
    out_dir: str = f"runs/{Path(__file__).stem}"  # everything the run writes
    steps: int = 60  # updates
    batch_size: int = 8  # prompts per update, over all processes
    group_size: int = 8  # responses to each of them
    must_finish: bool = False  # reward only right answers of responses that finish
    micro_batch_size: int = 64  # rollouts scored at once; less memory, same gradient
    rollout_batch_size: int = 0  # rollouts sampled at once; 0: all
    max_new_tokens: int = 96  # training length: tokens at which a rollout is cut
    temperature: float = 1.0  # of the rollouts; the loss takes probabilities at T = 1
    top_p: float = 1.0  # of the rollouts: nucleus of this probability; 1 is off
    top_k: int = 0  # of the rollouts: only so many most likely tokens; 0 is off
    lr: float = 5e-4  # AdamW's learning rate, constant after the warm-up
    warmup_steps: int = 3  # updates over which lr rises from 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 10  # steps between evaluations; 0: only before and after
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
    run = Run(args, needs="answer")  # what is wrong with arguments or data is said before models load
    student, sampler = load_student(args)  # the sampler is the student, or a copy that decodes faster
    check_models(student, sampler)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    run.resume(student, sampler, optimizer)
    tokens = dict(end_ids=run.tokens.end_ids, vocab_size=run.tokens.vocab_size)
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, prompt_len=run.prompt_len)
    sampling |= dict(batch_size=args.rollout_batch_size or None)

    for step in run.steps():  # how many updates have been made
        # (1) Evaluate and log where the student stands
        evaluation = evaluate(sampler, run.problem_sets, run.tokens, args) if run.eval_is_due() else None
        run.log(evaluation)
        if step == args.steps:
            break

        # (2) Rollouts: a group of responses to each prompt, and how much better each is than its group
        batch, seed = run.batch(step), seed_of(args.seed, "rollouts", step)
        prompts, answers = ([x for x in xs for _ in range(args.group_size)] for xs in (batch.prompts, batch.answers))
        rollouts = sample(sampler, prompts, max_new_tokens=args.max_new_tokens, seed=seed, **sampling, **tokens)
        right = [grade(run.tokens.decode(ids), answer) for ids, answer in zip(rollouts.responses(), answers)]
        rewards = torch.tensor(right).float().to(student.device)  # (B,)
        rewards = rewards * rollouts.ended if args.must_finish else rewards
        advantages = group_advantages(rewards.view(-1, args.group_size)).flatten()  # (B,)

        # (3) Loss: each token's log-probability, weighted by its advantage, in the mean over the response tokens of the
        # *global* batch
        n_tokens = mean_over_processes(rollouts.mask.sum())  # gradients are averaged, and so become global means
        loss = entropy = 0.0
        for micro in rollouts.split(args.micro_batch_size):
            said, advantage = micro.ids[micro.mask], advantages[micro.rows].repeat_interleave(micro.mask.sum(1))  # (N,)

            def policy_loss(logits, c):  # logits (n, V) of a slice c of these tokens -> (n,)
                return -advantage[c] * log_probs(logits).gather(-1, said[c, None])[:, 0]

            weights = micro.mask / n_tokens
            micro_loss, micro_entropy = weighted_loss(policy_loss, student, micro, weights, run.tokens.vocab_size)
            micro_loss.backward()
            loss, entropy = loss + micro_loss.item(), entropy + micro_entropy.item()

        # (4) Update
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)  # before clipping
        optimizer.step()
        optimizer.zero_grad()
        refresh(sampler, student)

        # (5) Keep the numbers for the log, and how many forward passes were made: a backward pass costs two. Save.
        reward = rewards.mean().item()
        run.record(rollouts, {student: 3}, loss=loss, entropy=entropy, grad_norm=grad_norm, lr=lr, reward=reward)
        if run.save_is_due():
            run.save(student, optimizer)

    run.finish(student)


if __name__ == "__main__":
    main(parse(Args))
