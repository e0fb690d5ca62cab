"""Group-relative policy optimisation (GRPO): the reinforcement learning that follows distillation.

    L(θ) = − E [ min( ρ_t A_i, clip(ρ_t, 1−ε, 1+ε) A_i ) ]     ρ_t = q_θ(y_t|s_t) / q_old(y_t|s_t), before this update
    A_i = (r_i − mean r) / (std r + 1e-4)                      of response i in the group of those to one prompt

What it does. The model responds to each prompt --group_size times; a response is worth 1 if its answer is right and 0
if not; every token of it is reinforced by how much better its response was than the others of its group. No teacher.
Start it from any checkpoint, also one that another script has written (`--student runs/opd/model`). The paper says that
what a distilled model still gains depends on the entropy it was left with; on the toy it is a matter of which of its
answers counts (docs/results.md).

What it leaves out, on purpose, of GRPO (arXiv 2402.03300).
- No KL penalty towards a reference model.
- The mean over each response, and then over responses: here, as in DAPO, it is over all tokens of the batch, which
  count alike, however long their responses are.
- More than one update per batch of rollouts, unless asked for: ρ is 1 and clipping does nothing. --updates_per_step k
  makes k passes over them; the log is about the last, and `clipped_fraction` says how many tokens were silenced.

Run it.
    python grpo.py                                                     CPU, the embedded toy's student: a minute
    python grpo.py --student runs/opd/model --out_dir runs/opd-grpo    after distillation
    python grpo.py --recipe recipes/qwen3-grpo.txt --out_dir DIR       Qwen3, one GPU; not run by us
    torchrun --nproc_per_node 4 grpo.py ...                            the same run on several GPUs
The same command again continues a run that was stopped. Results are in --out_dir: log.jsonl, responses, curves, model/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import entropy, evaluate, sample
from plumbing.fast import token_log_probs, weighted_loss
from plumbing.processes import average, full, sum_over_processes
from plumbing.runs import open_run, parse
from plumbing.tasks import grade, text_of


def clipped_surrogate(log_probs, old_log_probs, advantages, clip):
    """−min(ρA, clip(ρ, 1−ε, 1+ε)A) at every token, ρ = exp(log_probs − old_log_probs). All (n,) -> (n,)."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def group_advantages(rewards):
    """(prompts, group) rewards -> (prompts, group) advantages, standardised within the group; 0 where all are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, unbiased=False) + 1e-4)


@dataclass
class Args:  # behind each argument: its --help text, with the bounds that plumbing/runs.py checks
    student: str = "toy/student"  # checkpoint folder or hub name; the model that is trained
    data: str = "toy/train.jsonl"  # problems with answers to train on: a file, or name[:config[:split]] on the hub
    eval_data: str = "toy/eval.jsonl"  # problems with answers to evaluate on, several by commas; or none
    out_dir: str = f"runs/{Path(__file__).stem}"  # everything the run writes
    steps: int = 60  # batches of rollouts, each of --updates_per_step updates; >= 1
    batch_size: int = 8  # prompts per step, over all processes; >= 1
    group_size: int = 8  # responses to each of them; >= 2
    updates_per_step: int = 1  # passes over the same rollouts; >= 1
    clip: float = 0.2  # ε: how far the ratio ρ may leave 1 before a token stops counting; > 0
    micro_batch_size: int = 64  # rollouts scored at once; less memory, same gradient; >= 1
    rollout_batch_size: int = 0  # rollouts sampled at once; 0: all; less memory, same rollouts; >= 0
    max_new_tokens: int = 96  # training length: tokens at which a rollout is cut; >= 1
    temperature: float = 1.0  # of the rollouts; the loss always takes probabilities at T = 1; > 0
    top_p: float = 1.0  # of the rollouts: nucleus of this probability; 1 is off; > 0, <= 1
    top_k: int = 0  # of the rollouts: only so many most likely tokens; 0 is off; >= 0
    lr: float = 5e-4  # AdamW's learning rate, constant after the warm-up; > 0
    warmup: float = 0.05  # fraction of the steps over which lr rises from 0; >= 0, <= 1
    weight_decay: float = 0.0  # AdamW's; >= 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; > 0
    eval_every: int = 20  # steps between evaluations; 0: only before and after; >= 0
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: all but the weights; auto: where it is fast
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more compute


def main(args: Args):
    # (1) Data, model, optimizer. What is wrong with arguments or data is said before models load; a run that was
    # stopped continues where it was. `evaluate` is for the run to call, every --eval_every steps.
    run = open_run(args, evaluate, needs_answers=True)
    student = run.load(args.student, trainable=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.resume(student, optimizer)  # or begin, with an evaluation
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, at_once=args.rollout_batch_size)
    off_policy = args.updates_per_step > 1  # with one update q_old is q_θ, and needs no pass of its own

    for step in run.steps():
        batch = run.batch(step)  # its prompts, and keys: (seed, step, row) of each, which fix all that is drawn

        # (2) Rollouts: a group of responses to each prompt, and how much better each is than its group
        members = [(i, g) for i in range(len(batch.prompts)) for g in range(args.group_size)]
        prompts, keys = [batch.prompts[i] for i, _ in members], [(*batch.keys[i], g) for i, g in members]
        rollouts = sample(student, prompts, keys, run.vocab, args.max_new_tokens, **sampling)
        texts = [text_of(ids, run.tokenizer, run.vocab) for ids in rollouts.responses()]
        answers = [run.answers[batch.rows[i]] for i, _ in members]
        rewards = torch.tensor([float(grade(text, answer, args.grade)) for text, answer in zip(texts, answers)])
        advantages = group_advantages(rewards.view(-1, args.group_size)).flatten()
        advantage_of = dict(zip(keys, advantages.tolist()))  # by key: a split sorts rows by length
        n_tokens = average(rollouts.mask.sum())  # per process: gradients are averaged, and so become global means
        micros = list(rollouts.split(args.micro_batch_size))
        old = [token_log_probs(student, micro, run.vocab) if off_policy else None for micro in micros]

        for update in range(args.updates_per_step):
            # (3) Loss: the clipped surrogate, a mean over the response tokens of the *global* batch
            loss = mean_entropy = clipped = 0.0
            for micro, old_log_probs in zip(micros, old):
                advantage = torch.tensor([advantage_of[key] for key in micro.keys], device=micro.mask.device)
                advantage = advantage[:, None].expand(micro.mask.shape)[micro.mask]  # (N,)
                tokens = micro.ids[:, micro.prompt_len :][micro.mask]  # (N,)

                def surrogate(logits, c):
                    nonlocal clipped
                    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[c, None])[:, 0]
                    before = old_log_probs[c] if off_policy else log_probs.detach()
                    losses = clipped_surrogate(log_probs, before, advantage[c], args.clip)
                    unclipped = -(log_probs - before).exp() * advantage[c]
                    clipped += (losses > unclipped).sum().item()
                    return losses

                token_weights = micro.mask / n_tokens  # (b, R)
                micro_loss, micro_entropy = weighted_loss(surrogate, entropy, student, micro, token_weights, run.vocab)
                micro_loss.backward()
                loss, mean_entropy = loss + micro_loss.item(), mean_entropy + micro_entropy.item()

            # (4) Update
            lr = args.lr * min(1.0, step / max(1.0, args.warmup * args.steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            grad_norm = full(torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # (5) Log, evaluate, save. A backward pass costs what two forward passes do.
        passes, reward = off_policy + 3 * args.updates_per_step, average(rewards.mean().item())
        fraction = sum_over_processes(clipped) / sum_over_processes(rollouts.mask.sum().item())
        means = dict(loss=average(loss), entropy=average(mean_entropy), reward=reward, clipped_fraction=fraction)
        run.end_step(step, rollouts, passes, grad_norm=grad_norm, lr=lr, **means)

    run.finish()


if __name__ == "__main__":
    main(parse(Args))
