"""Look at rollouts: every token coloured by what the teacher says of it, log p(y|s) − log q(y|s).

    python look.py --student runs/opd/model                          in the terminal, and as a page: runs/look.html
    python look.py --student toy/base_student,runs/opd/model         before and after, on the same problems
    python look.py --student runs/opd/model --prefixes teacher       the teacher's responses, and both KLs on them

The colour is the reward of reverse KL's policy gradient (Proposition 1 (ii)): blue is what the teacher says more often
than the student, orange what it says less often. The page opens in any browser, without a network. Point at a token, or
go there by arrow keys, to see both distributions at its prefix, and where a step of either KL pushes the student.
"""

import json  # noqa: I001
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (
    check_models, entropy, forward_kl, head_of, log_probs, logits_of, merge_ends, response_hidden, reverse_kl, sample,
    seed_of,
)  # fmt: skip
from plumbing.arguments import check_args, parse, refuse
from plumbing.data import load_problem_sets
from plumbing.grading import grade
from plumbing.models import load_model, load_tokens
from plumbing.processes import is_main
from plumbing.run import start

BLUE, ORANGE, FULL = (86, 180, 233), (230, 159, 0), 4.0  # the colour-blind can distinguish these; FULL: nats of them
SLIP = 0.01  # a token to which the teacher gives less than this is marked as a slip
ANY_END = -1  # stands for all end tokens where they are merged


@dataclass
class Args:
    student: str = "toy/student"  # checkpoint folder or hub name; two of them, A,B, are compared
    teacher: str = "toy/teacher"  # checkpoint folder or hub name
    eval_data: str = "toy/eval.jsonl"  # problems: a file, or name[:config[:split]]; several by commas
    eval_problems: int = 4  # of each set, evenly spread; 0: all
    eval_max_new_tokens: int = 96  # tokens at which a response is cut
    eval_temperature: float = 1.0  # of the sampler; 0 is greedy
    prefixes: Literal["student", "teacher"] = "student"  # whose responses
    ends: Literal["apart", "as_one"] = "apart"  # as_one: all end tokens are one action in the comparison
    seed: int = 0  # of the sampler
    instruction: str = ""  # appended to every question, such as a request for an answer in \boxed{}
    thinking: bool = False  # ask for thinking mode in chat templates that have it
    columns: str = ""  # question=NAME,answer=NAME, where guessing the columns fails
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: the faster one; fp32 for tiny models
    page: str = "runs/look.html"  # the page to write


def inspect(student, teacher, rollouts, end_ids, ends="apart", vocab_size=None, top=8):
    """What both models say at the prefix of every response token -> B lists of dicts, in nats and probabilities:

    id; ratio: log p − log q of this token; p; entropy_p, entropy_q; forward, reverse: the two KLs; slips: how much of q
    lies on tokens that the teacher says with less than 1 %; top: [id, p, q, push of forward KL, push of reverse KL] of
    the `top` most probable tokens of either model, by falling probability. A push is minus the gradient in the
    student's logit: p − q, and q · (KL − log q/p)."""
    with torch.no_grad():
        models = [(model, response_hidden(model, rollouts), head_of(model, vocab_size)) for model in (student, teacher)]
    said, found = rollouts.ids[rollouts.mask], []
    for c in (slice(i, i + 64) for i in range(0, len(said), 64)):
        with torch.no_grad():
            q, p = (logits_of(model, hidden[c], *head).float() for model, hidden, head in models)  # (n, V)
        ids, y = torch.arange(q.shape[-1]), said[c].cpu()
        if ends == "as_one":
            is_end = torch.isin(ids, torch.tensor(end_ids))
            ids, y = torch.cat([ids[~is_end], torch.tensor([ANY_END])]), torch.where(is_end[y], ANY_END, y)
            q, p = merge_ends(q, end_ids), merge_ends(p, end_ids)
        q.requires_grad_()
        kls = [kl(q, p) for kl in (forward_kl, reverse_kl)]  # (n,) each
        pushes = [-torch.autograd.grad(kl.sum(), q)[0] for kl in kls]
        log_q, log_p = log_probs(q.detach()), log_probs(p)
        columns = [log_p.exp(), log_q.exp(), *pushes]  # (n, V) each
        at = [x.detach() for x in (entropy(p), entropy(q), *kls)]
        for t, token in enumerate(y.tolist()):
            i = (ids == token).nonzero().item()
            best = torch.cat([x[t].topk(min(top, len(ids))).indices for x in columns[:2]]).unique()
            best = best[torch.maximum(columns[0][t, best], columns[1][t, best]).argsort(descending=True)].tolist()
            numbers = dict(zip(("entropy_p", "entropy_q", "forward", "reverse"), (short(x[t]) for x in at)))
            numbers |= dict(id=token, ratio=short(log_p[t, i] - log_q[t, i]), p=short(columns[0][t, i]))
            numbers |= dict(slips=short(columns[1][t][columns[0][t] < SLIP].sum()))
            found.append(numbers | dict(top=[[int(ids[j]), *(short(x[t, j]) for x in columns)] for j in best]))
    tokens = iter(found)
    return [[next(tokens) for _ in range(n)] for n in rollouts.lengths()[0].tolist()]


def short(x):
    """Four digits of a number: a page must not hold more than it shows."""
    return float(f"{float(x):.4g}")


def repeats(ids, least=4, longest=8):
    """[(where, length of what is repeated, how often)]: what is said at least 4 times in a row, of 8 tokens at most."""
    found, i = [], 0
    while i < len(ids):
        best = (i, 1, 1)
        for unit in range(1, longest + 1):
            n = 1
            while ids[i + n * unit : i + (n + 1) * unit] == ids[i : i + unit]:
                n += 1
            best = max(best, (i, unit, n), key=lambda one: one[1] * one[2] if one[2] >= least else 1)
        found += [best] if best[2] >= least else []
        i += best[1] * best[2] if best[2] >= least else 1
    return found


def colour(x):
    """The colour (r, g, b), 0 to 255, of a log-ratio: from white to blue where it is above 0, to orange below."""
    full, share = (BLUE if x > 0 else ORANGE), min(1.0, abs(x) / FULL)
    return tuple(round(255 + share * (c - 255)) for c in full)


def visible(token):
    """A token's text on one line: an end of line, and whatever cannot be printed, are signs of their own."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else "·" for c in token)


def in_terminal(tokens, words, width=100):
    """A response as lines of at most `width` columns, black on colours of their own; what is repeated stands once."""
    lines, used, again = [""], 0, {i + unit: (i, unit, n) for i, unit, n in repeats([t["id"] for t in tokens])}
    t = 0
    while t < len(tokens):
        x, text = tokens[t]["ratio"], words[tokens[t]["id"]]
        word = visible(text) + (f"[{x:+.1f}]" if abs(x) > 0.5 else "")
        shown, t = "\033[30;48;2;{};{};{}m{}\033[0m".format(*colour(x), word), t + 1
        if t in again:
            i, unit, n = again[t]
            mean = sum(token["ratio"] for token in tokens[t : i + unit * n]) / (n - 1)
            word, shown = word + (more := f" × {n}, {mean:+.1f} nats on average "), shown + more
            t = i + unit * n
        if used + len(word) > width:
            lines, used = [*lines, ""], 0
        lines[-1], used = lines[-1] + shown, used + len(word)
        if text.endswith("\n"):
            lines, used = [*lines, ""], 0
    return "\n".join(lines)


def main(args: Args):
    start()
    check_args(args)
    paths = [path.strip() for path in args.student.split(",")]
    views, words, teacher = [], {}, None
    for path in paths:
        args.student = path
        sets = load_problem_sets(args.eval_data, args.eval_problems, args.columns, needs="")
        tokens = load_tokens(args, [(*one, args.eval_max_new_tokens) for one in sets.items()])
        problems = [p for one in sets.values() for p in one]
        student, teacher = load_model(path, args.precision), teacher or load_model(args.teacher, args.precision)
        check_models(student, teacher)
        speaker, prompts = {"student": student, "teacher": teacher}[args.prefixes], [p.prompt for p in problems]
        options = dict(temperature=args.eval_temperature, seed=seed_of(args.seed, "look"), vocab_size=tokens.vocab_size)
        rollouts = sample(speaker, prompts, tokens.end_ids, args.eval_max_new_tokens, **options)
        said = inspect(student, teacher, rollouts, tokens.end_ids, args.ends, tokens.vocab_size)
        for i, (ids, ended, numbers) in enumerate(zip(rollouts.responses(), rollouts.ended.tolist(), said)):
            right = None if problems[i].answer is None else grade(tokens.decode(ids), problems[i].answer)
            view = dict(student=path, problem=i, right=right, ended=ended, tokens=numbers)
            views.append(view | dict(repeats=repeats([t["id"] for t in numbers])))
            names = {t["id"] for t in numbers} | {row[0] for t in numbers for row in t["top"]}
            words |= {j: "any end token" if j == ANY_END else tokens.tokenizer.decode([j]) for j in names}
    if not is_main():
        return
    print("blue: the teacher says it more often; orange: less often; [x]: log p − log q in nats, beyond 0.5")
    views.sort(key=lambda view: view["problem"])  # responses to one problem stand side by side
    for view in views:
        p, total = problems[view["problem"]], sum(t["ratio"] for t in view["tokens"])
        verdict = {True: "right, ", False: "wrong, ", None: ""}[view["right"]]
        verdict += "finished" if view["ended"] else "cut"
        verdict += f", {len(view['tokens'])} tokens, Σ {total:+.1f} nats"
        whose = f"{view['student']}\n" if len(paths) > 1 else ""
        print(f"\n{whose}{' '.join(p.question.split())[:45]}   ({verdict})\n{in_terminal(view['tokens'], words)}")
    print()
    for path in paths:
        said = [t for view in views for t in view["tokens"] if view["student"] == path]
        forward, reverse, slips = (sum(t[key] for t in said) / len(said) for key in ("forward", "reverse", "slips"))
        kls = f"forward KL {forward:.3f} and reverse KL {reverse:.3f} nats a token"
        print(f"{path}: {kls}; {slips:.2%} of its probability on tokens that the teacher gives under 1 %")
    asked = [dict(question=p.question, answer=p.answer, prompt=tokens.tokenizer.decode(p.prompt)) for p in problems]
    page = dict(teacher=args.teacher, students=paths, prefixes=args.prefixes, ends=args.ends, problems=asked)
    page |= dict(views=views, words=words, full=FULL, slip=SLIP, end_ids=[ANY_END, *tokens.end_ids])
    write_page(args.page, page)
    print(f"the page is {args.page}: open it in a browser")


def write_page(path, page):
    """The template with its data, which no text in it can end early."""
    template = (Path(__file__).parent / "plumbing" / "look.html").read_text(encoding="utf-8")
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(path).write_text(template.replace("DATA", data), encoding="utf-8")
    except OSError as error:
        refuse(f"cannot write --page {path!r} ({error}): name another file")


if __name__ == "__main__":
    main(parse(Args))
