"""Look at rollouts: every token coloured by what the teacher says of it, log p_T(y|s) − log q_θ(y|s).

    python look.py --student runs/opd/model                            what the student says, in the terminal
    python look.py --student runs/opd/model --prefixes teacher         the teacher's own responses instead
    python look.py --student runs/opd/model --picture look.png         and as a picture

It is the reward of reverse KL's policy gradient, token by token (Proposition 1 (ii)): blue is what the teacher would
say more often than the student does, orange what it would say less often; white is agreement. Numbers are nats, and
stand behind a token where they exceed 0.5 either way. On the teacher's prefixes a blue token is one that the student
has yet to learn, by SFT for example.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from common import check_models, sample, seed_of, token_log_probs
from plumbing.arguments import check_args, parse
from plumbing.data import load_problem_sets
from plumbing.grading import grade
from plumbing.models import load_model, load_tokens
from plumbing.processes import is_main
from plumbing.run import start

BLUE, ORANGE, FULL = (0, 114, 178), (213, 94, 0), 4.0  # told apart by the colour-blind; FULL: nats of the full colour


@dataclass
class Args:
    student: str = "toy/student"  # checkpoint folder or hub name
    teacher: str = "toy/teacher"  # checkpoint folder or hub name
    eval_data: str = "toy/eval.jsonl"  # problems with answers: a file, or name[:config[:split]]; several by commas
    eval_problems: int = 3  # of each set, evenly spread; 0: all
    eval_max_new_tokens: int = 96  # tokens at which a response is cut
    eval_temperature: float = 1.0  # of the sampler; 0 is greedy
    prefixes: Literal["student", "teacher"] = "student"  # whose responses
    seed: int = 0  # of the sampler
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster one; fp32 for tiny models
    picture: str = ""  # a file to draw the same to, such as look.png


@torch.no_grad()
def log_ratios(student, teacher, rollouts, vocab_size=None):
    """log p_T(y|s) − log q_θ(y|s) of every response token, nats. -> B lists of floats"""
    ratio = token_log_probs(teacher, rollouts, vocab_size) - token_log_probs(student, rollouts, vocab_size)
    return [row.tolist() for row in ratio.split(rollouts.mask.sum(1).tolist())]


def in_numbers(ratios):
    """A line on where models disagree: on all tokens a little, or on a few of them."""
    sizes = sorted((abs(x) for x in ratios), reverse=True)
    n, few = len(sizes), math.ceil(len(sizes) / 100)
    share, beyond = sum(sizes[:few]) / (sum(sizes) or 1.0), sum(x > FULL for x in sizes) / n
    return (
        f"{n} tokens, |log-ratio| {sum(sizes) / n:.2f} nats on average; the largest {few} carry {share:.0%} of all; "
        f"beyond {FULL:.0f} nats: {beyond:.1%}"
    )


def colour(x):
    """The colour (r, g, b), 0 to 255, of a log-ratio: from white to blue where it is above 0, to orange below."""
    full, share = (BLUE if x > 0 else ORANGE), min(1.0, abs(x) / FULL)
    return tuple(round(255 + share * (c - 255)) for c in full)


def visible(token):
    """A token's text on one line: an end of line, and whatever cannot be printed, are signs of their own."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else "·" for c in token)


def in_terminal(pieces):
    """[(text, log-ratio)] as one string with colours; black on a background of its own, on any terminal."""
    words = []
    for text, x in pieces:
        r, g, b = colour(x)
        number = f"[{x:+.1f}]" if abs(x) > 0.5 else ""
        words.append(f"\033[30;48;2;{r};{g};{b}m{visible(text)}{number}\033[0m" + "\n" * text.endswith("\n"))
    return "".join(words)


def draw(responses, path, title):
    """[(heading, [(text, log-ratio)])] as a picture, each token a box, in lines of at most 100 letters."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    boxes, y = [], 0
    for heading, pieces in responses:
        boxes.append((0, y, heading, None))
        x, y = 0, y + 1
        for text, ratio in pieces:
            word = visible(text) + (f" {ratio:+.1f}" if abs(ratio) > 0.5 else "")
            if x + len(word) > 100:
                x, y = 0, y + 1
            boxes.append((x, y, word, ratio))
            x += len(word) + 0.4
        y += 2
    figure = Figure(figsize=(12, 0.28 * y + 0.6), layout="constrained")
    axis = figure.subplots()
    style = dict(family="monospace", fontsize=11, color="black", va="center")
    for x, row, word, ratio in boxes:
        if ratio is not None:
            face = [c / 255 for c in colour(ratio)]
            axis.add_patch(Rectangle((x, row - 0.45), len(word), 0.9, facecolor=face, edgecolor="0.8", linewidth=0.5))
        axis.text(x + 0.1, row, word.replace("$", r"\$"), weight="bold" if ratio is None else "normal", **style)
    axis.set(xlim=(-0.5, 101), ylim=(y - 1, -1))
    axis.set_title(title, parse_math=False)
    axis.axis("off")
    figure.savefig(path, dpi=110, facecolor="white")


def main(args: Args):
    start()
    check_args(args)
    problems = [p for one in load_problem_sets(args.eval_data, args.eval_problems).values() for p in one]
    tokens = load_tokens(args, [problems])
    student, teacher = load_model(args.student, args.precision), load_model(args.teacher, args.precision)
    check_models(student, teacher)
    speaker, prompts = {"student": student, "teacher": teacher}[args.prefixes], [p.prompt for p in problems]
    options = dict(temperature=args.eval_temperature, seed=seed_of(args.seed, "look"), vocab_size=tokens.vocab_size)
    rollouts = sample(speaker, prompts, tokens.end_ids, args.eval_max_new_tokens, **options)
    all_ratios, responses = log_ratios(student, teacher, rollouts, tokens.vocab_size), []
    if not is_main():
        return
    for p, ids, ratios in zip(problems, rollouts.responses(), all_ratios):
        right = grade(tokens.decode(ids), p.answer)
        verdict = f"{'right' if right else 'wrong'}, reference {p.answer}; {len(ids)} tokens, Σ {sum(ratios):+.1f} nats"
        pieces = list(zip([tokens.tokenizer.decode([i]) for i in ids], ratios))
        responses.append((f"{' '.join(p.question.split())[:60]}   ({verdict})", pieces))
        print(f"\n{responses[-1][0]}\n{in_terminal(pieces)}")
    print("\n" + in_numbers([x for _, pieces in responses for _, x in pieces]))
    if args.picture:
        os.makedirs(os.path.dirname(args.picture) or ".", exist_ok=True)
        draw(responses, args.picture, f"{args.prefixes} prefixes: log p_T − log q_θ, nats; {args.student}")
        print(f"\nthe picture is {args.picture}")


if __name__ == "__main__":
    main(parse(Args))
