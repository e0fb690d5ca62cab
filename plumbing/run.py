"""A run and its directory: args.json, log.jsonl, responses-N.jsonl, checkpoint-N/, and at the end model/, curves.png.

A Run holds what belongs together and does what is the same for every method. The loop is the script's.
"""

import contextlib  # noqa: I001
import ctypes
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict
from tqdm import tqdm

from plumbing.arguments import check_args, parse, refuse  # noqa: F401  parse is for the scripts
from plumbing.data import check_columns, load_problem_sets, load_problems
from plumbing.models import identity, load_tokens, refresh, sequence_flops
from plumbing.processes import (
    barrier, is_main, mean_over_processes, rank_and_world, say, start_processes, sum_over_processes, whole,
)  # fmt: skip

# What changes memory, and at most which random numbers are drawn: it may differ when a run is continued.
FREE_ARGS = {
    "out_dir", "micro_batch_size", "rollout_batch_size", "eval_batch_size", "save_every", "keep_checkpoints",
    "gradient_checkpointing",
}  # fmt: skip

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # not all weights have had a gradient


@dataclass
class Batch:
    """What one process works on in one step: b prompts, and, if the data have them, a teacher's responses."""

    prompts: list  # b tuples of token ids
    responses: list  # b lists of token ids, or None
    ended: list  # b bools: whether these responses finish
    answers: list  # b references to grade by, or None
    first_use: list  # b bools: whether the run has not used this row before


def start():
    """What every program does first: join other processes, and keep libraries quiet."""
    start_processes()
    signal.signal(signal.SIGINT, stop_now)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def stop_now(*_):
    refuse("stopped; the same command goes on from what has been written, if anything has")


class Run:
    """What belongs to a run. Scripts read args, tokens, problems (to train on), problem_sets (to evaluate on),
    prompt_len (the longest prompt); they write row (for the log) and memory (a dict that survives a kill).

    What can go wrong without a model's weights goes wrong here: arguments, output directory, data, tokenizers. needs:
    "response" or "answer", what every training row must have. steps_may_grow: more --steps only make a run longer."""

    def __init__(self, args, needs="", steps_may_grow=True):
        start()
        check_args(args)
        self.args, self.out = args, Path(args.out_dir)
        before = self.before = _read_args(args, steps_may_grow)
        self.step, self.row, self.memory = max(checkpoints(self.out), default=0), {"step": 0}, {}
        self.logged, self.stop_asked, self.stopping, self.idle = False, False, False, 0
        self.problems, columns, settings = load_problems(args.data, needs, args.columns)
        self.problem_sets, sets = {}, (args.eval_data, args.eval_problems, args.columns)
        if args.eval_data != "none":
            more = dict(chosen=[columns], remedy=", or evaluate nothing by --eval_data none")
            self.problem_sets = load_problem_sets(*sets, **more)
        else:
            check_columns(args.columns, [columns])
        sets = [(name, problems, args.eval_max_new_tokens) for name, problems in self.problem_sets.items()]
        self.tokens = load_tokens(args, sets := [(args.data, self.problems, args.max_new_tokens), *sets])
        self.prompt_len = max(len(p.prompt) for p in self.problems)
        read = json.dumps([[p.prompt, p.answer, p.response_ids] for _, problems, _ in sets for p in problems])
        self.inputs = {"data": hashlib.sha256(read.encode()).hexdigest()[:16], "processes": rank_and_world()[1]}
        self.inputs |= {f"files of the {role}": identity(getattr(args, role, None)) for role in ("student", "teacher")}
        barrier()  # all have read what the main process will write
        first = self.tokens.tokenizer.decode(self.problems[0].prompt)
        first = "    " + (first if len(first) < 600 else first[:600] + " ...").replace("\n", "\n    ").rstrip()
        chosen = ", ".join(f"{what}={column}" for what, column in columns.items() if column)
        say(f"{args.data}: {len(self.problems)} problems ({chosen}). The first prompt:\n{first}")
        for name, value in self.inputs.items():
            if before.get("inputs", self.inputs).get(name) != value:
                say(f"warning: the {name} changed since {args.out_dir!r} began: what follows is not the same run")
        if needs == "response":
            if cut := sum(len(p.response_ids) > args.max_new_tokens for p in self.problems):
                say(f"{cut} of {len(self.problems)} responses are longer than --max_new_tokens, and are cut")
            for name in ("instruction", "thinking", "temperature"):
                if settings.get(name, getattr(args, name)) != getattr(args, name):
                    say(f"warning: the responses in {args.data} were made with --{name} {settings[name]!r}")

    # ------------------------------------------------------------------------------------------------------------
    # The loop

    def resume(self, student, sampler, optimizer):
        """Begin, or load the newest checkpoint and cut the log back to it."""
        if self.step:
            self.row, self.memory = self.load(self.step, student, sampler, optimizer)
        log = self.out / "log.jsonl"
        rows = [row for row in read_lines(log) if self.step and row["step"] <= self.step]
        self.logged = any(row["step"] == self.step for row in rows)
        barrier()
        if is_main():  # only now: a run that was refused leaves nothing behind
            if not self.before and (self.out / "args.json").exists():
                refuse(f"another run has begun in --out_dir {self.args.out_dir!r}: choose another directory")
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self.out / "model", ignore_errors=True)  # of a run that now gets longer
                of_run = {"inputs": self.inputs, "script": script_of(self.args)}
                write_file(self.out / "args.json", dataclasses.asdict(self.args) | of_run)
                write_file(log, rows)
            except OSError as error:
                refuse(f"cannot write to --out_dir {self.args.out_dir!r} ({error}): choose another directory")
        if self.step:
            say(f"continuing {self.args.out_dir} after step {self.step}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number, _):
        """Ask the run to stop after the step under way; a second signal stops it at once."""
        self.stop_asked = True
        signal.signal(number, stop_now if number == signal.SIGINT else signal.SIG_DFL)
        say("stopping: the step under way is finished and saved first; once more stops at once")

    def steps(self):
        """How many updates have been made: 0, or what the checkpoint says, up to --steps; with a progress bar."""
        total = self.args.steps
        self.bar = tqdm(total=total, initial=self.step, desc="steps", disable=not is_main(), dynamic_ncols=True)
        for step in range(self.step, total + 1):
            if self.stopping:
                self.bar.close()
                raise SystemExit(f"stopped after step {step}; the same command goes on from there" if is_main() else 1)
            self.began = time.perf_counter()
            yield step
        self.bar.close()

    def batch(self, step):
        """This process's share of the batch after `step` updates. Every epoch is a new permutation, and a batch may
        span two; all of it follows from (seed, step), so a run that goes on needs to remember nothing."""
        (rank, world), n, seed = rank_and_world(), self.args.batch_size, self.args.seed
        places = [step * n + i for i in range(rank, n, world)]
        epochs = [place // len(self.problems) for place in places]
        order = {e: np.random.default_rng((seed, e)).permutation(len(self.problems)) for e in set(epochs)}
        rows = [self.problems[order[e][place % len(self.problems)]] for e, place in zip(epochs, places)]
        lists = ([getattr(p, name) for p in rows] for name in ("prompt", "response_ids", "ended", "answer"))
        return Batch(*lists, [e == 0 for e in epochs])

    def record(self, rollouts, passes, **numbers):
        """After an update: refuse what is not finite, keep the row for the log, and show it. passes: {model: how many
        forward passes over the rollouts it made}. numbers: of this process, or the same in all."""
        numbers = {name: mean_over_processes(float(whole(x))) for name, x in numbers.items()}
        step, flops = self.step + 1, rollouts.flops
        flops += sum(n * sequence_flops(model, *rollouts.lengths()) for model, n in passes.items())
        if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
            bad = f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
            refuse(f"{bad}: lower --lr or look at the teacher; {self.args.out_dir} keeps the last checkpoint")
        self.idle = 0 if numbers["grad_norm"] else self.idle + 1
        if self.idle == 10:
            say(
                "warning: the gradient was 0 for ten steps, so nothing is learned. In grpo.py, where all responses to a"
                " prompt were worth the same: give other problems, a larger --group_size or --max_new_tokens"
            )
        seconds = time.perf_counter() - self.began
        sums = len(rollouts.mask), rollouts.mask.sum(), rollouts.ended.sum(), flops
        n, tokens, ended, flops = (sum_over_processes(float(x)) for x in sums)
        self.row = dict(
            step=step, **numbers, response_len=tokens / n, ended=ended / n, tokens_per_s=tokens / seconds,
            seconds=self.row.get("seconds", 0.0) + seconds, flops=self.row.get("flops", 0.0) + flops,
        )  # fmt: skip
        self.step, self.logged = step, False
        shown = {"loss": f"{numbers['loss']:.3f}", "entropy": f"{numbers['entropy']:.2f}"}
        self.bar.set_postfix(shown | {"length": f"{tokens / n:.1f}", "finished": f"{ended / n:.0%}"}, refresh=False)
        self.bar.update()
        if max(model.num_parameters() for model in passes) > 10e6:  # the toy's is not worth it
            release_memory()

    def eval_is_due(self, last=False):
        """Every --eval_every steps (0: only before and after), where there is something to evaluate on."""
        every, last = self.args.eval_every, last or self.step in (0, self.args.steps)
        return bool(self.problem_sets) and not self.logged and (last or every > 0 and self.step % every == 0)

    def save_is_due(self):
        """Every --save_every steps, after the last one, and where a signal has asked to stop."""
        self.stopping = sum_over_processes(int(self.stop_asked)) > 0  # all processes agree
        return self.stopping or self.step == self.args.steps or self.step % self.args.save_every == 0

    def log(self, evaluation=None):
        """Write the row to log.jsonl, and, of an evaluation, its metrics, too, its responses to a file, and a line."""
        if evaluation:
            self.row |= evaluation[0]
        if is_main() and not self.logged:
            if evaluation:
                write_file(self.out / f"responses-{self.step}.jsonl", evaluation[1])
            append_lines(self.out / "log.jsonl", [self.row])
        if evaluation:
            say(f"step {self.step:4d}  {in_words(self.row, self.args.eval_k if self.args.eval_temperature else 1)}")
        self.logged = True

    # ------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self, student, optimizer, keep=()):
        """Write checkpoint-N/: an ordinary checkpoint, and what a run needs to go on. It has its name only once it is
        complete; older ones are removed, but for those of the steps in `keep`."""
        state = get_optimizer_state_dict(student, optimizer, options=WHOLE)
        final = self.out / f"checkpoint-{self.step}"
        training_state = {"optimizer": state, "row": self.row, "memory": self.memory}
        write_checkpoint(final, student, self.tokens, training_state)
        if is_main() and not self.args.keep_checkpoints:
            for step in set(checkpoints(self.out)) - {self.step, *keep}:
                shutil.rmtree(self.out / f"checkpoint-{step}")
        barrier()

    def load(self, step, student, sampler, optimizer):
        """Load checkpoint-`step` into student and optimizer. -> its row and memory"""
        path = self.out / f"checkpoint-{step}"
        try:
            saved = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            weights, state = model.state_dict(), saved["optimizer"]
            set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=state, options=WHOLE)
            refresh(sampler, student)
            return saved["row"], saved["memory"]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            refuse(f"{path} is damaged ({reason}): remove it, or {self.args.out_dir!r} to start afresh")

    def finish(self, student):
        """Write model/ and curves.png."""
        if is_main():
            draw_curves(self.out)
        write_checkpoint(self.out / "model", student, self.tokens)
        say(f"done: {self.out / 'model'} is the trained student, {self.out / 'curves.png'} the course of the run")
        barrier()  # nobody leaves while the others still need him


def write_checkpoint(path, model, tokens, training_state=None):
    """Save model and tokenizer in `path`, which exists only once it is complete."""
    buffers = {name: x for name, x in model.state_dict().items() if name in dict(model.named_buffers())}
    weights = {name: whole(x) for name, x in {**dict(model.named_parameters()), **buffers}.items()}  # all gather them
    if is_main():
        ends = dict(eos_token_id=list(tokens.end_ids), pad_token_id=tokens.end_ids[0])
        model.generation_config = transformers.GenerationConfig(**ends)
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # what a kill has left
        try:
            model.save_pretrained(partial, state_dict={name: x.detach().cpu() for name, x in weights.items()})
            tokens.tokenizer.save_pretrained(partial)
            if training_state is not None:
                torch.save(training_state, partial / "training_state.pt")
            shutil.rmtree(path, ignore_errors=True)
            os.rename(partial, path)
        except Exception as error:  # a full disk, above all: each library raises it as something else
            refuse(f"cannot write {path} ({type(error).__name__}: {error}): make room; the last checkpoint is intact")
    barrier()


def checkpoints(out):
    """The steps of which there is a complete checkpoint."""
    names = os.listdir(out) if os.path.isdir(out) else []
    steps = [int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    return [step for step in steps if (Path(out) / f"checkpoint-{step}" / "training_state.pt").exists()]


def script_of(args):
    """The file that these arguments belong to."""
    return Path(sys.modules[type(args).__module__].__file__).name


def _read_args(args, steps_may_grow):
    """The args.json of the run that is in --out_dir already, or {}. Refuses a directory that belongs to another run, or
    in which this run is finished."""
    out = Path(args.out_dir)
    if not args.out_dir or any(parent.is_file() for parent in (out, *out.parents)):
        refuse(f"cannot write to --out_dir {args.out_dir!r}: name a directory in whose way there is no file")
    if not (out / "args.json").exists():
        if (out / "model").exists() or (out / "log.jsonl").exists():
            refuse(f"--out_dir {args.out_dir!r} holds results, and no args.json says of what: choose another directory")
        return {}
    try:
        before = dict(json.loads((out / "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        refuse(f"{out / 'args.json'} is damaged: choose another --out_dir, or remove this one to start afresh")
    if before.get("script", script_of(args)) != script_of(args):
        refuse(f"--out_dir {args.out_dir!r} holds a run of {before['script']}: choose another directory")
    if args.precision == "auto":
        args.precision = before.get("precision", "auto")
    grows = steps_may_grow and args.steps >= before.get("steps", 0)
    free = FREE_ARGS | {"steps"} if grows else FREE_ARGS
    changed = [name for name, value in vars(args).items() if name not in free and before.get(name) != value]
    if changed:
        changes = "; ".join(f"--{name} was {before.get(name)!r}, now {getattr(args, name)!r}" for name in changed)
        refuse(f"{args.out_dir!r} holds another run: {changes}. Choose another --out_dir, or remove that one")
    if (out / "model").is_dir() and args.steps == before["steps"]:
        more = " or more --steps," if steps_may_grow else ""
        refuse(f"the run in {args.out_dir!r} is finished: choose another --out_dir,{more} or remove it to start afresh")
    return before


def release_memory():
    """Give freed memory back to the system. glibc keeps it where a piece in use lies behind it, and batches of ever new
    lengths seldom fit into the gaps: on a CPU a real pair grew from 15 to 25 GB in 20 steps, and died of it."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ----------------------------------------------------------------------------------------------------------------
# Files


def write_file(path, content):
    """Write a whole file, or leave the old one. content: a text, a list of rows for JSONL, or a dict for JSON."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    partial = Path(str(path) + ".partial")
    partial.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def append_lines(path, rows):
    """Append rows to a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    """The rows of a JSONL file that this program wrote, if it did; a line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").split("\n") if os.path.exists(path) else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def in_words(row, k):
    """A line about an evaluation, and a second one where most answers could not be read."""
    line = f"solved (Avg@{k}) {row['avg_at_k']:.3f}  Pass@{k} {row['pass_at_k']:.3f}  finished {row['eval_ended']:.1%}"
    line += f"  length {row['eval_len']:.1f}  entropy {row['eval_entropy']:.3f}"
    if row["eval_marked"] < 0.5:
        line += (
            f"\nwarning: only {row['eval_marked']:.0%} of the responses mark an answer: ask for it by --instruction,"
        )
        line += "\nor let them finish by a larger --eval_max_new_tokens"
    return line


def draw_curves(out):
    """curves.png from log.jsonl. Grey lines are the rollouts of training, points are evaluations."""
    rows, panels = read_lines(out / "log.jsonl"), {}
    for title, lines in {
        "loss": {"loss": "training"}, "gradient norm": {"grad_norm": "training"},
        "entropy": {"entropy": "training", "eval_entropy": "evaluation"},
        "length": {"response_len": "training", "eval_len": "evaluation"},
        "finished": {"ended": "training", "eval_ended": "evaluation"},
        "solved": {"reward": "training", "avg_at_k": "evaluation", "eval_useful": "useful", "pass_at_k": "Pass@k"},
    }.items():  # fmt: skip
        points = {label: [(row["step"], row[name], 0) for row in rows if name in row] for name, label in lines.items()}
        panels[title] = {label: tuple(zip(*found)) for label, found in points.items() if found}
    draw(out / "curves.png", str(out), panels)


def draw(path, title, panels):
    """Draw panels, {metric: {label: (steps, values, half-widths of intervals)}}. The colour-blind can distinguish Okabe
    and Ito's colours, and each line has its marker; a white ground is legible in a dark page, too."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.5})
    colors, units = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #000000".split(), {"length": " (tokens)"}
    units |= {"loss": " (nats)", "entropy": " (nats)"}
    labels = dict.fromkeys(label for lines in panels.values() for label in lines if label != "training")
    looks = {label: dict(color=colors[i % 6], marker="sDo^vPX"[i % 7], markersize=8) for i, label in enumerate(labels)}
    columns, handles = 3 if len(panels) > 4 else len(panels), {}
    n = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.6 * n + 0.6), layout="constrained")
    figure.suptitle(title, weight="bold", parse_math=False)
    for axis, (metric, lines) in zip(figure.subplots(n, columns, squeeze=False).flat, panels.items()):
        for label, (steps, values, ci) in lines.items():
            look = looks.get(label) or dict(color="0.6", linewidth=1.5)
            look |= dict(yerr=np.nan_to_num(ci), capsize=3) if np.any(np.nan_to_num(ci)) else {}
            handles[label.replace("$", r"\$")] = axis.errorbar(steps, values, **look)
        axis.set(xlabel="step", title=metric + units.get(metric, ""))
        axis.set(ylim=(-0.03, 1.03)) if metric == "finished" else None
    place = dict(loc="outside lower center", ncols=4 - len(handles) % 2, frameon=False)
    figure.legend(handles.values(), handles.keys(), **place)
    figure.savefig(path, dpi=80)
