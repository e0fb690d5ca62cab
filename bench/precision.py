"""What bf16 does to loss and gradient: one batch of the student's rollouts, scored in bf16 and in fp32.

    python bench/precision.py --recipe recipes/laptop.txt                  arguments of opd.py, all but --precision
    python bench/precision.py --recipe recipes/laptop.txt --student FOLDER --teacher FOLDER --data FILE

For both KLs and the same rollouts, which are sampled in bf16: the loss, and how far the gradient is from that in fp32,
as the norm of the difference relative to the norm. `as trained` is --precision bf16: the teacher's weights and the
student's products in bf16. In `teacher only` the student computes in fp32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.nn.utils import get_total_norm

import opd
from common import forward_kl, reverse_kl, sample, weighted_kl
from plumbing.models import load_model, load_vocab
from plumbing.runs import parse
from plumbing.tasks import load_problems

PRECISIONS = {"fp32": (False, "fp32"), "as trained": (True, "bf16"), "teacher only": (False, "bf16")}


def loss_and_gradients(divergence, student, teacher, rollouts, vocab, args):
    """-> the loss of opd.py's loop, and its gradients"""
    loss = 0.0
    for micro in rollouts.split(args.micro_batch_size):
        token_weights = micro.mask / rollouts.mask.sum()
        micro_loss, _ = weighted_kl(
            divergence, student, teacher, micro, token_weights, vocab, args.estimator, args.ends
        )
        micro_loss.backward()
        loss += micro_loss.item()
    gradients = [p.grad for p in student.parameters()]
    student.zero_grad()
    return loss, gradients


def main(args):
    problems = load_problems(args.data)[: args.batch_size]
    vocab, _ = load_vocab(args, [problems])
    args.precision = "bf16"
    student = load_model(args.student, args, trainable=True)
    prompts, keys = [p.prompt for p in problems], [(args.seed, 0, i) for i in range(len(problems))]
    sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, at_once=args.rollout_batch_size)
    rollouts = sample(student, prompts, keys, vocab, args.max_new_tokens, **sampling)
    exact = {}
    print("| | precision | loss | its error | the gradient's error |\n|" + "---|" * 5)
    for name, (student.autocasts, args.precision) in PRECISIONS.items():
        teacher = None  # frees the last one first
        teacher = load_model(args.teacher, args)
        for divergence in (forward_kl, reverse_kl):
            loss, gradients = loss_and_gradients(divergence, student, teacher, rollouts, vocab, args)
            right, exactly = exact.setdefault(divergence, (loss, gradients))
            apart = get_total_norm([a - b for a, b in zip(gradients, exactly)]) / get_total_norm(exactly)
            print(f"| {divergence.__name__} | {name} | {loss:.5f} | {loss / right - 1:+.2%} | {apart:.2%} |", flush=True)


if __name__ == "__main__":
    main(parse(opd.Args))
