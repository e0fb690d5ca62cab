"""What compare.py runs on an embedded world, what is claimed of it, and what is drawn: the paper's findings, each with
its cause switched on and off.

Settings were chosen on worlds and runs of seed 100 and above; then worlds 3, 4 and 5 were built and everything was run.
(Worlds 0, 1 and 2 belong to an earlier version of toy/build.py.)
"""

import os

import numpy as np

from plumbing.tasks import refuse

# Okabe and Ito's colours: told apart by the colour-blind too; every series has a marker of its own besides.
COLORS = BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9 #000000".split()

FOUR = ("sft_offpolicy", "offline_rl_distill", "dagger_onpolicy", "opd")
LAMBDAS = (0.2, 0.5, 0.8)
H_MIN = 0.3  # nats per token: in the trials .25 at 32 tokens before a collapse, and .36 and .37 without one


def plan(args, world):
    """All runs that the findings need: {name: (script, arguments)}. "student" may name another run of the plan, or
    one of make_variants."""
    short, middle, long = args.short, 4 * args.short, args.length
    if middle >= long:
        refuse(f"--short is {short} and --length {long}: there must be room between them for 4 times the short one")
    here = dict(student=f"{world}/student", data=f"{world}/train.jsonl", eval_data=f"{world}/eval.jsonl")
    here |= dict(max_new_tokens=long, eval_max_new_tokens=long, save_every=10**6)  # a run of seconds needs no states
    base = here | dict(teacher=f"{world}/teacher", steps=args.steps)
    gated = base | dict(lengths=f"{short},{middle},{long}", h_min=H_MIN, on_closed="continue")
    rl = here | dict(steps=args.rl_steps)
    runs = {
        **{script: (script, base) for script in FOUR},
        **{f"{script}-short": (script, base | dict(max_new_tokens=short)) for script in FOUR},
        **{f"{script}-middle": (script, base | dict(max_new_tokens=middle)) for script in FOUR[2:]},
        **{f"kl_mix-{lam}": ("kl_mix", base | dict(lam=lam)) for lam in LAMBDAS},
        "curriculum": ("curriculum", gated),
        "curriculum-no-gate": ("curriculum", gated | dict(h_min=0.0)),
        "curriculum-late": ("curriculum", gated | dict(lengths=f"{middle},{long}")),  # the first gate comes too late
        # Causes switched off: all endings count as one; the student ends as its teacher does, and a control for that
        **{f"{script}-as_one": (script, base | dict(ends="as_one")) for script in FOUR},
        **{f"{script}-short-as_one": (script, base | dict(max_new_tokens=short, ends="as_one")) for script in FOUR},
        "curriculum-as_one": ("curriculum", gated | dict(ends="as_one")),
        "opd-same-end": ("opd", base | dict(student="same-end")),
        "opd-untied": ("opd", base | dict(student="untied")),
        # One sampled token in place of the sum over the vocabulary
        "opd-sampled": ("opd", base | dict(estimator="sampled")),
        "opd-sampled-as_one": ("opd", base | dict(estimator="sampled", ends="as_one")),
        **{f"grpo-after-{name}": ("grpo", rl | dict(student=name)) for name in ("opd", "opd-short", "dagger_onpolicy")},
    }
    # Evaluation takes its time and changes nothing: on its way only a run whose course is drawn, or read at equal FLOPs
    drawn = {run for _, panels, lines in figures(args).values() if panels[0][0] == "step" for *_, run in lines}
    every = lambda name, steps: max(1, steps // 3) if name in drawn else steps  # noqa: E731
    return {name: (script, its | dict(eval_every=every(name, its["steps"]))) for name, (script, its) in runs.items()}


def make_variants(world, out_dir):
    """Two copies of the student, in out_dir/NAME/model, with a head of its own instead of one tied to the embedding:
    "untied" is otherwise as it was; in "same-end" the heads of <|endoftext|> and <|im_end|> are exchanged, so that it
    ends as its teacher does, exactly as often as it ended before, and is the same in everything else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("untied", "same-end"):
        path = os.path.join(out_dir, name, "model")
        if os.path.isdir(path):
            continue
        model, tokenizer = (kind.from_pretrained(f"{world}/student") for kind in (AutoModelForCausalLM, AutoTokenizer))
        head = model.get_input_embeddings().weight.detach().clone()
        if name == "same-end":
            ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
            head[ends] = head[ends[::-1]]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = type(model.lm_head.weight)(head)
        for part in (tokenizer, model):
            part.save_pretrained(path + ".partial")
        os.rename(path + ".partial", path)


def claims(args):
    """(axis, what the paper says or what should follow from a cause, the sign that this gives a number, the number):
    v(run, metric, flops) is Avg@8 or another metric of every seed, at the end of a run or after so many FLOPs."""
    short, long = f"{args.short} tokens", f"{args.length} tokens"

    def difference(metric, a, b):
        return lambda v: v(a, metric) - v(b, metric)

    def at_equal_flops(a, b):
        def number(v):
            least = np.minimum(v(a, "flops"), v(b, "flops"))
            return v(a, avg, least) - v(b, avg, least)

        return number

    def gain(v, start):
        return v(f"grpo-after-{start}") - v(start)

    avg, entropy, length = "avg_at_k", "eval_entropy", "eval_len"
    direction, rl, prefix, window = "KL direction", "RL after it", "Prefix source", "Training length"
    mixing, ladder, dagger = "KL mixing", "Curriculum", "dagger_onpolicy"
    return [  # two of each finding, then the causes switched off
        (direction, f"reverse KL is more accurate, {short}", +1, difference(avg, "opd-short", f"{dagger}-short")),
        (direction, f"reverse KL has less entropy, {long}", -1, difference(entropy, "opd", dagger)),
        # What a start has to gain depends on where it stands; the ends are in table.md.
        (rl, "GRPO gains less after OPD than after DAgger", -1, lambda v: gain(v, "opd") - gain(v, dagger)),
        (rl, f"it ends higher after OPD of {short} than of {long}", +1,
            difference(avg, "grpo-after-opd-short", "grpo-after-opd")),
        (prefix, f"student prefixes are better, forward KL, {long}", +1, difference(avg, dagger, "sft_offpolicy")),
        (prefix, "teacher prefixes win at equal FLOPs", -1, at_equal_flops(dagger, "sft_offpolicy")),
        (window, f"{long} are better than {short}, reverse KL", +1, difference(avg, "opd", "opd-short")),
        (window, f"responses grow under reverse KL, {long}", +1, difference(length, "opd", dagger)),
        (mixing, "λ = 0.2 is more accurate than λ = 0 and λ = 1", +1,
            lambda v: v("kl_mix-0.2") - np.maximum(v("opd"), v(dagger))),
        (mixing, "λ = 0.2 is shorter than reverse KL", -1, difference(length, "kl_mix-0.2", "opd")),
        (ladder, f"more accurate than {long} throughout", +1, difference(avg, "curriculum", "opd")),
        (ladder, f"shorter than {long} throughout", -1, difference(length, "curriculum", "opd")),
        ("Cause off", f"with ends as one reverse KL is more accurate, {long}", +1,
            difference(avg, "opd-as_one", f"{dagger}-as_one")),
        ("Cause off", "with ends as one responses are shorter", -1, difference(length, "opd-as_one", "opd")),
        ("Cause off", "so they are if the student ends as its teacher", -1,
            difference(length, "opd-same-end", "opd-untied")),
        ("Cause off", "with ends as one the curriculum's lead is smaller", +1,
            lambda v: v("curriculum") - v("opd") - (v("curriculum-as_one") - v("opd-as_one"))),
    ]  # fmt: skip


def figures(args):
    """{file: (what to look for, panels of (x, y), lines of (colour, marker, label, runs))}. x is "step" or "flops": a
    course; a metric: the ends of the runs; anything else: runs is {x: name}, the ends against a parameter."""
    short, long = args.short, args.length
    quality = ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")
    grid = [
        (ORANGE, "s", "teacher prefixes, forward KL (SFT)", "sft_offpolicy"),
        (PINK, "D", "teacher prefixes, reverse KL (offline RL)", "offline_rl_distill"),
        (BLUE, "o", "student prefixes, forward KL (DAgger)", "dagger_onpolicy"),
        (RED, "^", "student prefixes, reverse KL (OPD)", "opd"),
    ]
    as_one = (GREEN, "v", "student prefixes, reverse KL, ends as one", "opd-as_one")
    windows = {short: "-short", 4 * short: "-middle", long: ""}
    return {
        "direction": (
            f"KL direction: accuracy against entropy, {long} tokens",
            [("eval_entropy", "avg_at_k"), ("eval_entropy", "pass_at_k")],
            [*grid, as_one, (BLACK, "X", "teacher prefixes, reverse KL, ends as one", "offline_rl_distill-as_one")],
        ),
        "prefixes": (
            f"Prefix source: accuracy against steps and against compute, {long} tokens",
            [("step", "avg_at_k"), ("flops", "avg_at_k"), ("flops", "pass_at_k")],
            [*grid, as_one],
        ),
        "length": (
            "Training length: what a longer window does",
            [("window", y) for y in quality],
            [(*rest, {n: run + end for n, end in windows.items()}) for *rest, run in grid[2:]]
            + [(*as_one[:3], {long: "opd-as_one"})],
        ),
        "ending": (
            "Why responses grow: student and teacher end differently",
            [("step", "response_len"), ("step", "entropy"), ("step", "avg_at_k")],
            [
                (RED, "^", "OPD", "opd"),
                (GREEN, "v", "OPD, ends as one", "opd-as_one"),
                (SKY, "X", "OPD, a student that ends as its teacher", "opd-same-end"),
                (BLUE, "o", "DAgger", "dagger_onpolicy"),
            ],
        ),
        "mixing": (
            "KL mixing on student prefixes: from forward (λ = 0) to reverse (λ = 1)",
            [("lam", y) for y in quality],
            [(PINK, "o", "λ·reverse + (1−λ)·forward",
              {0.0: "dagger_onpolicy"} | {lam: f"kl_mix-{lam}" for lam in LAMBDAS} | {1.0: "opd"}),
             (*as_one[:3], {1.0: "opd-as_one"})],
        ),
        "curriculum": (
            "Entropy-gated curriculum against fixed lengths, reverse KL",
            [("step", "avg_at_k"), ("flops", "avg_at_k"), ("step", "eval_entropy"), ("step", "eval_len")],
            [
                (RED, "^", f"OPD, {long} tokens", "opd"),
                (ORANGE, "s", f"OPD, {short} tokens", "opd-short"),
                (BLUE, "o", "curriculum", "curriculum"),
                (PINK, "X", "curriculum without its gate", "curriculum-no-gate"),
                (GREEN, "v", "curriculum, ends as one", "curriculum-as_one"),
            ],
        ),
        "rl": (
            "The RL that follows: GRPO from three checkpoints",
            [("step", y) for y in quality],
            [
                (RED, "^", f"after OPD, {long} tokens", "grpo-after-opd"),
                (ORANGE, "s", f"after OPD, {short} tokens", "grpo-after-opd-short"),
                (BLUE, "o", f"after DAgger, {long} tokens", "grpo-after-dagger_onpolicy"),
            ],
        ),
    }  # fmt: skip
