"""The command line: a flat dataclass, its comments as help, files of arguments, and checks that need no model."""

import argparse
import dataclasses
import inspect
import math
import os
import re
import shlex
import sys
from pathlib import Path

import transformers


def refuse(message):
    """End the program with one readable line on stderr and exit code 1 (SystemExit): bad input is not a bug. Of several
    processes, which all see the same input, the first one says it."""
    raise SystemExit("error: " + " ".join(str(message).split()) if os.environ.get("RANK", "0") == "0" else 1)


def parse(Args, argv=None):
    """The command line as an instance of the dataclass Args. A field's trailing comment is its --help text. A file that
    --recipe names holds arguments in lines like `--lr 5e-7  # a comment`; the command line wins over it."""
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(Args), re.M))
    for field in dataclasses.fields(Args):
        field.metadata = {"help": comments.get(field.name, "").replace("%", "%%") + " (default: %(default)s)"}
    text, as_it_stands = sys.modules[Args.__module__].__doc__, argparse.RawDescriptionHelpFormatter
    parser = transformers.HfArgumentParser(Args, allow_abbrev=False, description=text, formatter_class=as_it_stands)
    parser.error = lambda message: refuse(f"{message} (--help lists the arguments)")
    how = "files of arguments, read in this order before the command line: what comes later wins"
    parser.add_argument("--recipe", metavar="FILE", action="append", default=[], help=how)
    argv, words = sys.argv[1:] if argv is None else argv, []
    for recipe in parser.parse_known_args(argv)[0].recipe:
        try:
            words += shlex.split(Path(recipe).read_text(encoding="utf-8-sig"), comments=True)
        except (OSError, ValueError) as error:
            refuse(f"--recipe {recipe!r} cannot be read ({error}): name a file of lines like `--lr 5e-7`")
    if any(word.startswith("--recipe") for word in words):
        refuse("a recipe names another one by --recipe: name both on the command line")
    values = vars(parser.parse_args(words + argv))
    del values["recipe"]
    return Args(**values)


AT_LEAST_1 = (
    "steps", "batch_size", "micro_batch_size", "max_new_tokens", "eval_k", "eval_max_new_tokens", "eval_batch_size",
    "save_every", "held_out", "workers",
)  # fmt: skip
AT_LEAST_0 = (
    "warmup_steps", "top_k", "eval_every", "eval_problems", "eval_n", "eval_temperature", "seed", "h_min", "lam",
    "rollout_batch_size",
)  # fmt: skip
ABOVE_0 = ("lr", "temperature", "top_p", "max_grad_norm")
AT_MOST_1 = ("top_p", "lam")


def check_args(args):
    """Refuse, by name, what no run can use. Arguments that a script does not have are not asked for."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"--{name} is {value}, and must be a finite number")
        for names, fits, bound in (
            (AT_LEAST_1, lambda x: x >= 1, "at least 1"),
            (AT_LEAST_0, lambda x: x >= 0, "at least 0"),
            (ABOVE_0, lambda x: x > 0, "above 0"),
            (AT_MOST_1, lambda x: x <= 1, "at most 1"),
        ):
            if name in names and not fits(value):
                refuse(f"--{name} is {value}, and must be {bound}")
    if getattr(args, "group_size", 2) < 2:
        refuse(f"--group_size is {args.group_size}, and must be at least 2: an advantage compares responses")
    if getattr(args, "eval_n", 0) and args.eval_n < args.eval_k:
        refuse(f"--eval_k is {args.eval_k} but --eval_n is {args.eval_n}: Pass@k needs at least k samples a problem")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if getattr(args, "batch_size", world) % world:
        refuse(f"--batch_size is {args.batch_size}, and must be a multiple of the {world} processes")
