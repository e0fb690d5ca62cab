"""Draw axes.png: the two choices of distillation in one picture.

    python -m figures.axes

The probabilities are an example. The arrows are computed, by common.py: how a step of gradient descent on each KL
pushes the student's logits, which is minus the gradient, p − q for forward KL and q · (KL − log q/p) for reverse KL.
"""

from pathlib import Path

import matplotlib
import torch

from common import forward_kl, reverse_kl

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BLUE, ORANGE = "#0072B2", "#D55E00"
# Next tokens: the teacher's good ways to go on are 8+5 or 5+7 first (=3), or 3+8 first (=1); the student knows =3.
TOKENS = ("=3", "=1", "=6", "=8", "=0")
PREFIXES = {
    "teacher": ("teacher prefixes", "3+8+5+7\n=1+5+7=1+2=3\n ?", "clean, made once"),
    "student": ("student prefixes", "3+8+5+7\n=1+5+7=1+4=5\n ?", "with its mistakes, made anew"),
}
PROBABILITIES = {  # whose prefixes: the teacher's p, the student's q
    "teacher": ((0.50, 0.38, 0.06, 0.03, 0.03), (0.40, 0.10, 0.32, 0.10, 0.08)),
    "student": ((0.40, 0.48, 0.06, 0.03, 0.03), (0.30, 0.12, 0.33, 0.13, 0.12)),
}
KLS = {"forward": (forward_kl, "forward KL: cover"), "reverse": (reverse_kl, "reverse KL: avoid")}
SCRIPTS = {
    ("teacher", "forward"): ("sft_offpolicy.py", "SFT"),
    ("teacher", "reverse"): ("offline_rl_distill.py", "offline RL"),
    ("student", "forward"): ("dagger_onpolicy.py", "DAgger"), ("student", "reverse"): ("opd.py", "OPD"),
}  # fmt: skip


def main():
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained", width_ratios=[1, 1, 1])
    for row, (whose, (heading, text, remark)) in zip(grid, PREFIXES.items()):
        row[0].axis("off")
        place = dict(transform=row[0].transAxes, va="top")
        row[0].text(0, 0.9, heading, weight="bold", fontsize=16, color=BLUE if whose == "teacher" else ORANGE, **place)
        row[0].text(0, 0.72, text, family="monospace", fontsize=15, **place)
        row[0].text(0, 0.2, remark, **place)
        for axis, (direction, (kl, words)) in zip(row[1:], KLS.items()):
            bars_and_arrows(axis, kl, *PROBABILITIES[whose])
            script, name = SCRIPTS[whose, direction]
            axis.set_title(f"{name}: {script}", fontsize=13)
            if whose == "teacher":
                axis.annotate(words, (0.5, 1.18), xycoords="axes fraction", ha="center", weight="bold", fontsize=16)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=BLUE, alpha=0.6),
        plt.Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=ORANGE, linewidth=3),
        plt.Line2D([], [], color="black", marker="^", linewidth=3),
    ]
    labels = ["teacher, p", "student, q", "push of a step on the student's logit (not where q will be)"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(Path(__file__).with_name("axes.png"), dpi=80, facecolor="white")


def bars_and_arrows(axis, kl, all_p, all_q):
    """Bars of p and q, and arrows for minus the gradient."""
    student = torch.tensor(all_q, dtype=torch.float64).log().requires_grad_()
    kl(student, torch.tensor(all_p, dtype=torch.float64).log()).backward()
    for x, (p, q, push) in enumerate(zip(all_p, all_q, (-student.grad).tolist())):
        axis.bar(x, p, 0.8, color=BLUE, alpha=0.6)
        axis.bar(x, q, 0.8, facecolor="none", edgecolor=ORANGE, linewidth=3)
        if abs(push) > 0.03:
            arrow = dict(arrowstyle="-|>,head_width=0.4,head_length=0.6", linewidth=3, color="black")
            axis.annotate("", (x, q + push), (x, q), arrowprops=arrow | dict(shrinkA=0, shrinkB=0))
    axis.set_xticks(range(len(TOKENS)), TOKENS, family="monospace")
    axis.set(ylim=(-0.15, 0.8), yticks=[0, 0.5], ylabel="probability")


if __name__ == "__main__":
    main()
