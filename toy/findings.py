"""What compare.py runs on an embedded world, what is claimed of it, and what is drawn."""

import numpy as np

# Okabe and Ito's colours: told apart by the colour-blind too; every series has a marker of its own besides.
COLORS = BLUE, RED, GREEN, ORANGE, PINK, BLACK = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #000000".split()

FOUR = ("sft_offpolicy", "offline_rl_distill", "dagger_onpolicy", "opd")
LAMBDAS = (0.2, 0.8)
H_MIN = 0.3  # nats per token: in the trials .25 at 32 tokens before a collapse, and .36 and .37 without one


def plan(args, world):
    """All runs that the findings need: {name: (script, arguments)}. "student" may name another run of the plan."""
    short, long = args.short, args.length
    here = dict(student=f"{world}/student", data=f"{world}/train.jsonl", eval_data=f"{world}/eval.jsonl")
    here |= dict(max_new_tokens=long, eval_max_new_tokens=long, save_every=10**6)  # a run of seconds needs none
    base = here | dict(teacher=f"{world}/teacher", steps=args.steps)
    gated = base | dict(lengths=f"{short},{4 * short},{long}", h_min=H_MIN, on_closed="continue")
    rl = here | dict(steps=args.rl_steps)
    runs = {
        **{script: (script, base) for script in FOUR},
        **{f"{script}-short": (script, base | dict(max_new_tokens=short)) for script in FOUR},
        **{f"kl_mix-{lam}": ("kl_mix", base | dict(lam=lam)) for lam in LAMBDAS},
        "curriculum": ("curriculum", gated),
        "curriculum-no-gate": ("curriculum", gated | dict(h_min=0.0)),
        **{f"{script}-as_one": (script, base | dict(ends="as_one")) for script in FOUR},  # the cause switched off
        "opd-sampled": ("opd", base | dict(estimator="sampled")),
        **{f"grpo-after-{name}": ("grpo", rl | dict(student=name)) for name in ("opd", "opd-short", "dagger_onpolicy")},
    }
    # Evaluation takes its time and changes nothing: on its way only a run whose course is drawn, or read at equal FLOPs
    drawn = {run for _, panels, lines in figures(args).values() if panels[0][0] == "step" for *_, run in lines}
    every = lambda name, steps: max(1, steps // 3) if name in drawn | {"sft_offpolicy"} else steps  # noqa: E731
    return {name: (script, its | dict(eval_every=every(name, its["steps"]))) for name, (script, its) in runs.items()}


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

    avg, entropy, finished, dagger = "avg_at_k", "eval_entropy", "eval_ended", "dagger_onpolicy"
    return [
        ("KL direction", f"reverse KL is more accurate, {long}", +1, difference(avg, "opd", dagger)),
        ("KL direction", f"reverse KL has less entropy, {long}", -1, difference(entropy, "opd", dagger)),
        (
            "Prefix source",
            f"student prefixes are better, forward KL, {long}",
            +1,
            difference(avg, dagger, "sft_offpolicy"),
        ),
        ("Prefix source", "teacher prefixes win at equal FLOPs", -1, at_equal_flops(dagger, "sft_offpolicy")),
        ("Training length", f"{long} are better than {short}, reverse KL", +1, difference(avg, "opd", "opd-short")),
        ("Training length", f"fewer responses finish, {long}", -1, difference(finished, "opd", "opd-short")),
        ("KL mixing", "λ = 0.2 finishes more often than reverse KL", +1, difference(finished, "kl_mix-0.2", "opd")),
        ("Curriculum", f"finishes more often than {long} throughout", +1, difference(finished, "curriculum", "opd")),
        ("RL after it", "GRPO gains less after OPD than after DAgger", -1, lambda v: gain(v, "opd") - gain(v, dagger)),
        ("Cause off", "with ends as one OPD finishes", +1, difference(finished, "opd-as_one", "opd")),
    ]


def figures(args):
    """{file: (what to look for, panels of (x, y), lines of (colour, marker, label, run))}. x is "step": a course; a
    metric: the ends of the runs."""
    long = args.length
    grid = [
        (ORANGE, "s", "teacher prefixes, forward KL (SFT)", "sft_offpolicy"),
        (PINK, "D", "teacher prefixes, reverse KL (offline RL)", "offline_rl_distill"),
        (BLUE, "o", "student prefixes, forward KL (DAgger)", "dagger_onpolicy"),
        (RED, "^", "student prefixes, reverse KL (OPD)", "opd"),
    ]
    return {
        "direction": (
            f"Accuracy and the share finished against entropy, {long} tokens",
            [("eval_entropy", "avg_at_k"), ("eval_entropy", "eval_ended")],
            [*grid, (GREEN, "v", "student prefixes, reverse KL, ends as one", "opd-as_one")],
        ),
        "ending": (
            "Reverse KL learns to solve, and forgets to finish; with all ends as one it does not",
            [("step", "avg_at_k"), ("step", "response_len"), ("step", "entropy")],
            [
                (RED, "^", "OPD", "opd"),
                (GREEN, "v", "OPD, ends as one", "opd-as_one"),
                (BLUE, "o", "DAgger", "dagger_onpolicy"),
                (BLACK, "s", "curriculum", "curriculum"),
            ],
        ),
    }
