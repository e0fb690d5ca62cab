"""A run: its arguments, and its directory: args.json, log.jsonl, state-N/ (what resuming needs), model/, curves.png.

A Run is a record of what belongs together, and does what comes between two updates. The loop is the script's, and so is
the method: nothing here knows one.
"""

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from plumbing.fast import sequence_flops
from plumbing.models import load_model, load_vocab, resolve_precision
from plumbing.processes import barrier, full, gather, is_main, rank_and_world, start_processes, sum_over_processes
from plumbing.tasks import load_evals, load_problems, refuse

# ----------------------------------------------------------------------------------------------------------------
# Arguments

# What cannot change the result of a run, and may therefore differ when it is continued.
FREE_ARGS = {
    "out_dir", "micro_batch_size", "rollout_batch_size", "eval_batch_size", "save_every", "gradient_checkpointing",
    "teacher_device",
}  # fmt: skip


def parse(Args, argv=None):
    """The command line as an instance of the dataclass Args. A field's trailing comment is its --help text. A file that
    --recipe names holds arguments in lines like `--lr 5e-7  # a comment`; the command line wins over it."""
    comments = _comments(Args)
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
            words += shlex.split(Path(recipe).read_text("utf-8-sig"), comments=True)
        except (OSError, ValueError) as error:
            refuse(f"--recipe {recipe!r} cannot be read ({error}): name a file of lines like `--lr 5e-7`")
    if any(word.startswith("--recipe") for word in words):
        refuse("a recipe names another one by --recipe: name both on the command line")
    values = vars(parser.parse_args(words + argv))
    del values["recipe"]
    return Args(**values)


def _comments(Args):
    """{field: the comment behind it}. It is the field's --help text, and states its bounds: `# ...; > 0, <= 1`."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(Args), re.M))


def check_fields(args):
    """Refuse, by name, what a field says of itself that it cannot be: the values of a Literal, and the bounds in its
    comment. A number is always finite. Any dataclass will do, so a script of one's own needs no entry here."""
    comments, kinds = _comments(type(args)), typing.get_type_hints(type(args))
    tests = {">=": ("at least", float.__ge__), ">": ("above", float.__gt__), "<=": ("at most", float.__le__)}
    for name, value in vars(args).items():
        allowed = typing.get_args(kinds[name]) if typing.get_origin(kinds[name]) is typing.Literal else (value,)
        if value not in allowed:
            refuse(f"--{name} is {value!r}, and must be one of: {', '.join(allowed)}")
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"--{name} is {value}, and must be a finite number")
        for sign, bound in re.findall(r"(>=|<=|>) ?(\d[\d.]*)", comments.get(name, "")):
            words, holds = tests[sign]
            if not holds(float(value), float(bound)):
                refuse(f"--{name} is {value}, and must be {words} {bound}")


def check_args(args):
    """Refuse, by name, an argument that no run can use."""
    check_fields(args)
    if args.eval_n and args.eval_n < args.eval_k:
        refuse(f"--eval_k is {args.eval_k} but --eval_n is {args.eval_n}: Pass@k needs at least k samples a problem")
    world, device = int(os.environ.get("WORLD_SIZE", 1)), getattr(args, "teacher_device", "")
    if getattr(args, "batch_size", world) % world:
        refuse(f"--batch_size is {args.batch_size}, and must be a multiple of the {world} processes")
    if device and world > 1:
        refuse(f"--teacher_device is {device!r}, but torchrun shards the teacher like the student: leave it out")
    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:  # no such kind of device, or not so many of them
        reason = str(error).split("\n")[0]
        refuse(f"--teacher_device is {device!r}, and must be a device here such as cpu or cuda:1 ({reason})")


# ----------------------------------------------------------------------------------------------------------------
# A run


@dataclass
class Batch:
    """The prompts that one process works on in one step."""

    prompts: list  # b tuples of token ids
    rows: list  # their rows in the data set
    epochs: list  # how often each had been used before
    keys: list  # (seed, step, row of the global batch): what fixes all random numbers of the step


def open_run(args, evaluate, needs_answers=False):
    """-> the Run that args ask for. Everything that can go wrong without a model's weights goes wrong here: arguments,
    output directory (the program ends if the run is finished), data, and that the models can be compared.

    evaluate: common.evaluate. needs_answers: training problems need answers to reward by.
    """
    start_processes()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    run, ended = None, []  # the main process looks first: what it refuses, it alone reports, and all processes end
    if is_main():
        try:
            run = Run(args, evaluate, needs_answers)
        except SystemExit as exit:
            ended = [exit.code]
    for code in gather(ended):
        raise SystemExit(code if is_main() else bool(code))
    return run or Run(args, evaluate, needs_answers)


class Run:
    """What belongs to a run. Scripts read: args, vocab, tokenizer, prompts and answers (of the training data, by row),
    evals ({name: [Problem]}), and memory, a dict of the script's own that survives a kill."""

    def __init__(self, args, evaluate, needs_answers):
        check_args(args)
        args.precision = resolve_precision(args)
        data_hash = _check_out_dir(args)
        problems = load_problems(args.data, needs_answers, skip_unanswered=needs_answers)
        self.args, self.evaluate = args, evaluate
        self.evals = {} if args.eval_data == "none" else load_evals(args.eval_data, args.eval_problems)
        self.vocab, self.tokenizer = load_vocab(args, [problems, *self.evals.values()])
        self.prompts, self.answers = [p.prompt for p in problems], [p.answer for p in problems]
        asked = [self.prompts, self.answers, [[p.prompt, p.answer] for of in self.evals.values() for p in of]]
        self.data_hash = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        if data_hash not in (None, self.data_hash):  # a file may have been edited, a template may have changed
            names = f"--data {args.data!r} or --eval_data {args.eval_data!r}"
            refuse(f"{names} gives other prompts or answers than when {args.out_dir!r} began: choose another --out_dir")
        self.step, self.flops, self.seconds, self.memory = 0, 0.0, 0.0, {}  # updates done, and what they took
        self.models, self.student, self.optimizer, self.stop_asked = [], None, None, False

    def hold_out(self, n):
        """Take the last n prompts out of the training data. -> them"""
        if n >= len(self.prompts):
            refuse(f"--held_out is {n}, but {self.args.data} has {len(self.prompts)} rows: none is left to train on")
        self.prompts, held_out = self.prompts[:-n], self.prompts[-n:]
        return held_out

    def load(self, path, trainable=False):
        """-> the model, on its device, in its precision."""
        self.models.append((load_model(path, self.args, trainable), trainable))
        return self.models[-1][0]

    def resume(self, student, optimizer):
        """Begin, with an evaluation, or continue: load the last complete state into student and optimizer, and cut the
        log back to it."""
        self.student, self.optimizer, out = student, optimizer, self.args.out_dir
        if is_main():  # only now: a run that was refused leaves nothing behind
            os.makedirs(out, exist_ok=True)
            self.lock = _lock(out)
            about = {"code": _code(self.args), "data_hash": self.data_hash}
            write_file(out, "args.json", dataclasses.asdict(self.args) | about)
        barrier()
        states = sorted(int(name[6:]) for name in os.listdir(out) if re.fullmatch(r"state-\d+", name))
        if states:
            self.load_state(f"state-{states[-1]}")
        if is_main() and os.path.exists(os.path.join(out, "log.jsonl")):
            rows = [row for row in read_lines(os.path.join(out, "log.jsonl")) if states and row["step"] <= self.step]
            write_file(out, "log.jsonl", rows)
        if states and is_main():
            print(f"continuing {out} after step {self.step}")
        signal.signal(signal.SIGINT, self._ask_to_stop)
        if not states:
            self._log({"step": 0, **self._evaluate(0)})

    def _ask_to_stop(self, *_):
        """Ctrl-C asks the run to stop after the step under way; a second one stops it at once."""
        self.stop_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def steps(self):
        """The numbers of the steps to do, with a progress bar."""
        first, last = self.step + 1, self.args.steps
        for step in tqdm(range(first, last + 1), initial=first - 1, total=last, desc="steps", disable=not is_main()):
            self.began = time.perf_counter()
            yield step

    def batch(self, step):
        """The share of this process in step's global batch. Every epoch is a new permutation, and a batch may span two;
        all of it follows from (seed, step), so a resumed run needs to remember nothing."""
        (rank, world), n, seed = rank_and_world(), self.args.batch_size, self.args.seed
        places = [(step - 1) * n + i for i in range(rank, n, world)]
        epochs = [place // len(self.prompts) for place in places]
        order = {e: np.random.default_rng((seed, e)).permutation(len(self.prompts)) for e in set(epochs)}
        rows = [int(order[e][place % len(self.prompts)]) for e, place in zip(epochs, places)]
        keys = [(seed, step, i) for i in range(rank, n, world)]
        return Batch([self.prompts[row] for row in rows], rows, epochs, keys)

    def end_step(self, step, rollouts, passes=3, last=False, save=False, **numbers):
        """After an update: refuse what is not finite, log, and evaluate, save and stop where that is due.

        numbers: for the log's line, means over all processes. passes: what the update cost the trained model, in
        forward passes over the rollouts (a backward pass is two); a frozen one made one. last, save: end or save here.
        """
        args = self.args
        numbers = {name: x.item() if isinstance(x, torch.Tensor) else x for name, x in numbers.items()}
        if not math.isfinite(numbers["loss"] + numbers["grad_norm"]):
            bad = f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
            refuse(f"{bad}: lower --lr or look at the teacher; {args.out_dir} keeps the last good state")
        seconds = time.perf_counter() - self.began
        costs = [sequence_flops(model, *rollouts.lengths()).sum().item() for model, _ in self.models]
        passed = [passes if trainable else 1 for _, trainable in self.models]
        self.flops += sum_over_processes(rollouts.flops + sum(n * cost for n, cost in zip(passed, costs)))
        self.step, self.seconds = step, self.seconds + seconds
        n_rollouts, n_tokens, n_ended = (
            sum_over_processes(float(n)) for n in (len(rollouts.mask), rollouts.mask.sum(), rollouts.ended.sum())
        )
        row = dict(
            step=step, **numbers, response_len=n_tokens / n_rollouts, ended=n_ended / n_rollouts,
            clip_ratio=1 - n_ended / n_rollouts,  # the share cut at the cap: not the clipping of gradients
            tokens_per_s=n_tokens / seconds, seconds=self.seconds, flops=self.flops,
        )  # fmt: skip
        last = last or step == args.steps
        if last or (args.eval_every and step % args.eval_every == 0):
            row |= self._evaluate(step)
        self._log(row)
        if self.student.device.type == "cpu" and self.student.num_parameters() > 10e6:  # the toy's is not worth it
            release_memory()
        stop = sum_over_processes(int(self.stop_asked)) > 0  # all processes agree
        if last or save or stop or step % args.save_every == 0:
            self.save_state()
        if stop:
            raise SystemExit(f"stopped after step {step}; the same command continues from there" if is_main() else 1)

    def _evaluate(self, step):
        """evaluate() on every set; prints a line for each. -> metrics for the log: of several sets the plain keys hold
        the pooled value, and `key/name` the set's own."""
        if not self.evals:  # --eval_data none
            return {}
        args, results, responses = self.args, {}, []
        for name, problems in self.evals.items():
            results[name], records = self.evaluate(self.student, problems, self.vocab, self.tokenizer, args)
            responses += with_problems(name, problems, records)
            if is_main():
                tqdm.write(f"step {step:4d}  {name}: {in_words(results[name], args)}")
        if is_main():
            write_file(args.out_dir, f"responses-{step}.jsonl", responses)
        if len(results) == 1:
            return next(iter(results.values()))
        of_sets = {f"{key}/{name}": value for name, metrics in results.items() for key, value in metrics.items()}
        return pool(list(results.values())) | of_sets

    def _log(self, row):
        if is_main():
            with open(os.path.join(self.args.out_dir, "log.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")

    def save_state(self, name=None):
        """Write all that resuming needs to state-N/ and remove older ones; or to `name`/, and keep them all. A state
        exists under its name only once it is complete."""
        out = self.args.out_dir
        final, partial = (os.path.join(out, part) for part in (name or f"state-{self.step}", "state.partial"))
        model_state, optimizer_state = get_state_dict(self.student, self.optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
        if is_main():
            progress = dict(step=self.step, flops=self.flops, seconds=self.seconds, memory=self.memory)
            write_file(partial, "progress.json", progress)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            for old in os.listdir(out):
                if name is None and re.fullmatch(r"state-\d+", old) and old != os.path.basename(final):
                    shutil.rmtree(os.path.join(out, old))
        barrier()

    def load_state(self, name, keep_progress=False):
        """Load a state that save_state wrote, under any number of processes; keep_progress: only
        its weights and optimizer, while step, FLOPs and memory go on."""
        path = os.path.join(self.args.out_dir, name)
        try:
            model_state, optimizer_state = get_state_dict(self.student, self.optimizer)
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
            set_state_dict(self.student, self.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
            progress = json.loads(Path(path, "progress.json").read_text())
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception; its last line says why
            reason = str(error).strip().split("\n")[-1][:200]
            reason = f"{type(error).__name__}: {reason}"
            refuse(f"{path} is damaged ({reason}); remove {self.args.out_dir!r} to start afresh")
        if not keep_progress:
            vars(self).update(progress)

    def finish(self):
        """Write model/ (an ordinary checkpoint with tokenizer) and curves.png; the states are no longer needed."""
        if is_main():
            draw_curves(self.args.out_dir)
        ends = dict(eos_token_id=list(self.vocab.end_ids), pad_token_id=self.vocab.pad_id)
        self.student.generation_config = transformers.GenerationConfig(**ends)
        partial, final = (os.path.join(self.args.out_dir, name) for name in ("model.partial", "model"))
        whole = ((name, full(weight)) for name, weight in self.student.state_dict().items())
        weights = {name: weight.cpu() for name, weight in whole if is_main()}  # all gather them, one keeps them
        if is_main():
            self.student.save_pretrained(partial, state_dict=weights)
            self.tokenizer.save_pretrained(partial)
            os.rename(partial, final)
            for name in os.listdir(self.args.out_dir):
                if re.fullmatch(r"state-\d+|state\.partial|stable", name):
                    shutil.rmtree(os.path.join(self.args.out_dir, name))
            Path(self.lock.name).unlink(missing_ok=True)
            print(f"done: {final} is the trained student, {self.args.out_dir}/curves.png the course of the run")
        barrier()  # nobody leaves while the others still need him


def release_memory():
    """Give memory that was freed back to the system. glibc keeps it where a piece in use lies behind it, and batches of
    ever new lengths seldom fit into the gaps: on a CPU a real pair grew from 15 to 25 GB in 20 steps, and died of it."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ----------------------------------------------------------------------------------------------------------------
# The output directory


def _code(args):
    """{file: a hash of its syntax tree} of the script and of what it shares. Comments and docstrings do not count."""
    here = Path(__file__).resolve().parent
    paths = [Path(inspect.getfile(type(args))), here.parent / "common.py", *sorted(here.glob("*.py"))]
    return {path.name: _hash(path.read_text()) for path in paths}


@functools.cache
def _hash(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _check_out_dir(args):
    """Refuse a directory that belongs to another run; end the program if this run is finished. -> the hash of the data
    that the run began with, or None"""
    out = args.out_dir
    if not out:
        refuse("--out_dir is empty: name a directory")
    if any(parent.is_file() for parent in (Path(out), *Path(out).parents)):
        refuse(f"cannot write to --out_dir {out!r}: there is a file in its way; choose another directory")
    finished = os.path.isdir(os.path.join(out, "model"))
    path = os.path.join(out, "args.json")
    if not os.path.exists(path):
        if finished or os.path.exists(os.path.join(out, "log.jsonl")):
            refuse(f"--out_dir {out!r} holds results but no args.json saying of what: choose another directory")
        return
    try:
        before = dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError):
        refuse(f"{path} is damaged: choose another --out_dir, or remove {out!r} to start afresh")
    now, old_code = dataclasses.asdict(args), before.pop("code", None) or {}
    data_hash = before.pop("data_hash", None)
    names = [name for name in {**before, **now} if name not in FREE_ARGS and before.get(name) != now.get(name)]
    changes = [f"--{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names]
    changes += [f"{file} has been changed" for file, code in _code(args).items() if old_code.get(file) != code]
    if changes:
        refuse(f"{out!r} holds another run: {'; '.join(changes)}. Choose another --out_dir, or remove that one")
    if finished:
        if is_main():
            print(f"{out!r} holds this run, finished: model/ and curves.png are there. To start afresh: rm -r {out}")
        raise SystemExit(0)
    return data_hash


def _lock(out):
    """Keep other processes out of an output directory while this one is at work; the kernel frees it after a kill."""
    file = open(os.path.join(out, "lock"), "w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"another process is at work in --out_dir {out!r}: wait for it, or choose another directory")
    except (ImportError, OSError):  # Windows; a file system without locks
        pass
    return file


def write_file(directory, name, content):
    """Write a whole file, or leave the old one. content: a text, a list of rows for JSONL, or a dict for JSON."""
    path = os.path.join(directory, name)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    Path(path + ".partial").write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    os.replace(path + ".partial", path)


def read_lines(path):
    """The rows of a JSONL file that this program wrote; a line that a kill cut short is left out."""
    rows = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def with_problems(name, problems, records):
    """The records of common.evaluate on a set of this name, each with its question and answer: rows for a file."""
    of = [problems[record["problem"]] for record in records]
    return [dict(set=name, prompt=p.question, answer=p.answer, level=p.level, **r) for p, r in zip(of, records)]


def pool(results):
    """The metrics of several sets as one: means over sets, which count alike; half-widths of these means; how many
    problems in all."""
    pooled = {key: sum(m[key] for m in results) / len(results) for key in results[0]}
    for key in ("avg_at_k_ci", "pass_at_k_ci"):
        pooled[key] = math.sqrt(sum(m[key] ** 2 for m in results)) / len(results)
    return pooled | {"problems": sum(m["problems"] for m in results)}


def in_words(m, args):
    """A line about an evaluation, and a second one where most answers could not be read."""
    k, rule = args.eval_k, "  (unmarked answers: by their last number)" if args.grade == "last_number" else ""
    line = (
        f"Avg@{k} {m['avg_at_k']:.3f}  Pass@{k} {m['pass_at_k']:.3f}  entropy {m['eval_entropy']:.3f} nats  "
        f"length {m['eval_len']:.1f}  cut {m['eval_clip_ratio']:.1%}  marked {m['eval_marked']:.1%}{rule}"
    )
    if m["eval_marked"] < 0.5:
        line += (
            f"\nwarning: only {m['eval_marked']:.0%} of the responses mark an answer by \\boxed{{}} or ####: ask for "
            "it by --instruction, or let them finish by a larger --eval_max_new_tokens"
        )
    return line


class Store:
    """A teacher's responses on disk, by (row of the data, sample), one JSON line each. They lie beside out_dir, in
    teacher_rollouts/, in a file named by a hash of all that they depend on: the teacher's weights, the prompts' token
    ids, the end tokens, the seed and the sampling arguments. Whatever changes, the name does too: none is ever stale.
    Runs that go on side by side do not see what the other adds."""

    def __init__(self, teacher, run, sampling):
        # An exact checksum of the weights, whatever the order of summation and however they are sharded.
        local = [p.to_local() if hasattr(p, "to_local") else p for p in teacher.state_dict().values()]
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [p.contiguous().view(as_int[p.element_size()]).sum(dtype=torch.int64) for p in local]
        weights, vocab = sum_over_processes(torch.stack(sums)).tolist(), run.vocab
        identity = [weights, run.prompts, vocab.end_ids, vocab.size, run.args.seed, sorted(sampling.items())]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16] + ".jsonl"
        self.path = os.path.join(os.path.dirname(os.path.normpath(run.args.out_dir)), "teacher_rollouts", name)
        self.found = {}  # (row, sample) -> (token ids, did it end, the longest it was allowed to be)
        self._remember(gather(read_lines(self.path) if is_main() and os.path.exists(self.path) else []))

    def has(self, key, max_new_tokens):
        """Is there a response that ended, or that was allowed to be this long?"""
        return key in self.found and (self.found[key][1] or self.found[key][2] >= max_new_tokens)

    def get(self, key, max_new_tokens):
        """-> (token ids cut at max_new_tokens, whether the response ends within them)."""
        ids, ended, _ = self.found[key]
        return ids[:max_new_tokens], ended and len(ids) <= max_new_tokens

    def add(self, records):
        """Keep this process's records [(row, sample, token ids, did it end, cap)], on all processes and on disk."""
        records = gather(records)
        self._remember(records)
        if is_main():  # the only process that touches the file: the others may be on another machine
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a") as file:  # newline first: a line that a kill cut short stays alone
                file.writelines("\n" + json.dumps(record) for record in records)

    def _remember(self, records):
        self.found |= {(row, sample): found for row, sample, *found in records}  # the last one is the longest


def draw_curves(out_dir):
    """curves.png from log.jsonl: loss, entropy, response length, accuracy over steps."""
    from matplotlib.figure import Figure

    rows = read_lines(os.path.join(out_dir, "log.jsonl"))
    panels = {
        "loss (nats per response token)": {"loss": "-"},
        "entropy (nats per token)": {"entropy": "-", "eval_entropy": "o--"},
        "response length (tokens)": {"response_len": "-", "eval_len": "o--"},
        "accuracy on eval_data": {"reward": "-", "avg_at_k": "o-", "pass_at_k": "s--"},
    }
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axis, (title, styles) in zip(figure.subplots(2, 2).flat, panels.items()):
        for name, style in styles.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points), style, label=name, markersize=4)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False)
    figure.suptitle(out_dir, parse_math=False)
    figure.savefig(os.path.join(out_dir, "curves.png"), dpi=110)
