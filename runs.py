"""What a run needs and the lesson does not: arguments, processes, data and models, the output directory.

A run lives in one directory: `args.json`, `log.jsonl`, `state-N/` (what resuming needs), `model/`, `curves.png`.
Nothing here knows a method.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import dataclasses
import glob
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
import tempfile
import types
import typing
import warnings
from dataclasses import dataclass

import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from tasks import encode_prompts, load_problems, refuse

# ----------------------------------------------------------------------------------------------------------------
# Arguments

# What cannot change the result of a run, and may therefore differ when it is continued.
FREE_ARGS = {
    "out_dir", "micro_batch_size", "rollout_batch_size", "eval_batch_size", "save_every", "gradient_checkpointing",
    "teacher_device",
}  # fmt: skip


def _comments(Args):
    """{field: the comment behind it}. It is the field's --help text, and states its bounds: `# ...; > 0, <= 1`."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(Args), re.M))


def parse(Args, argv=None):
    """The command line as an instance of the dataclass Args. A field's trailing comment is its --help text."""
    comments = _comments(Args)
    for field in dataclasses.fields(Args):
        field.metadata = {"help": comments.get(field.name, "").replace("%", "%%")}
    parser = transformers.HfArgumentParser(
        Args, allow_abbrev=False, description=sys.modules[Args.__module__].__doc__,
        formatter_class=_HelpFormatter,
    )  # fmt: skip
    parser.error = lambda message: refuse(f"{message} (--help lists the arguments)")
    parser.add_argument("--recipe", metavar="FILE", help="a file of arguments, read first: the command line wins")
    argv = _with_recipe(sys.argv[1:] if argv is None else argv)
    args, *_, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        refuse(f"unknown argument {unknown[0]} (--help lists the arguments)")
    return args


def _with_recipe(argv):
    """Put the arguments that stand in the file of `--recipe FILE` before those of the command line, which win."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--recipe=") else [word])]
    if "--recipe" not in words:
        return argv
    at = words.index("--recipe")
    if at + 1 == len(words) or "--recipe" in words[at + 1 :]:
        refuse("--recipe needs the name of one file")
    path = words[at + 1]
    try:
        with open(path) as file:
            recipe = shlex.split(file.read(), comments=True)
    except (OSError, ValueError) as error:
        refuse(f"--recipe {path!r} cannot be read ({error}): name a file of lines like `--lr 5e-7  # a comment`")
    return recipe + words[:at] + words[at + 2 :]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and every default."""


def check_args(args):
    """Refuse, by name, an argument that no run can use.

    What a field says of itself is checked for any dataclass, so that a script of one's own needs no entry here: the
    values of a Literal, and the bounds in its comment. A number is always finite.
    """
    comments, types_ = _comments(type(args)), typing.get_type_hints(type(args))
    tests = {">=": ("at least", float.__ge__), ">": ("above", float.__gt__), "<=": ("at most", float.__le__)}
    for name, value in vars(args).items():
        allowed = typing.get_args(types_[name]) if typing.get_origin(types_[name]) is typing.Literal else (value,)
        if value not in allowed:
            refuse(f"--{name} is {value!r}, and must be one of: {', '.join(allowed)}")
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"--{name} is {value}, and must be a finite number")
        for sign, bound in re.findall(r"(>=|<=|>) ?(\d[\d.]*)", comments.get(name, "")):
            words, holds = tests[sign]
            if not holds(float(value), float(bound)):
                refuse(f"--{name} is {value}, and must be {words} {bound}")
    _check_estimator(args)
    if args.eval_n and args.eval_n < args.eval_k:
        refuse(f"--eval_k is {args.eval_k} but --eval_n is {args.eval_n}: Pass@k needs at least k samples a problem")
    names = args.eval_data.split(",")
    if "" in names or len(set(names)) < len(names):
        refuse(f"--eval_data is {args.eval_data!r}: each name between its commas must be there, and only once")
    if hasattr(args, "lengths"):
        lengths = [int(n) if n.isdecimal() else 0 for n in args.lengths.split(",")]
        if lengths != sorted(set(lengths)) or not 0 < lengths[0] <= args.max_new_tokens:
            refuse(
                f"--lengths is {args.lengths!r}: give rising numbers like 8,16,32, the first at most --max_new_tokens"
            )
        stages = sum(length <= args.max_new_tokens for length in lengths)
        if args.steps < stages:
            refuse(f"--steps is {args.steps}, but --lengths has {stages} stages: each needs a step")
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = getattr(args, "teacher_device", "")
    if device and world > 1:
        refuse(
            f"--teacher_device is {device!r}, but under torchrun the teacher is sharded like the student: leave it out"
        )
    try:
        if device:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind of device, or not so many of them
        reason = str(error).split("\n")[0]
        refuse(f"--teacher_device is {device!r}, and must be a device here such as cpu or cuda:1 ({reason})")
    if getattr(args, "batch_size", world) % world:
        refuse(f"--batch_size is {args.batch_size}, and must be a multiple of the {world} processes")


def _check_estimator(args):
    """Where tokens are sampled, the divergence in the script's marked line must know what to do with them."""
    script = sys.modules[type(args).__module__]
    if getattr(args, "estimator", "exact") == "exact" or not hasattr(script, "main"):
        return
    for call in ast.walk(ast.parse(inspect.getsource(script.main))):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "weighted_kl":
            name = getattr(call.args[0], "id", "")
            divergence = getattr(script, name, None)  # None: made in main itself, as by partial
            if divergence and "u" not in inspect.signature(divergence).parameters:
                refuse(f"--estimator is {args.estimator!r}, but {name} has no argument `u` to sample by: use exact")


# ----------------------------------------------------------------------------------------------------------------
# Processes: everything below works the same in one process and under torchrun


def start_processes():
    """Join the other processes, if torchrun has started several; and keep libraries quiet."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # cuDNN's attention has given NaN gradients on H100s (pytorch#196678), and plans anew, for 0.4 s, for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(_device())
        device = _device() if torch.cuda.is_available() else None
        dist.init_process_group("nccl" if device else "gloo", device_id=device)
        atexit.register(dist.destroy_process_group)


def rank_and_world():
    """-> (this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_world()[0] == 0


def total(value):
    """The sum of a number or tensor over all processes, in the type that was given."""
    if not dist.is_initialized():
        return value
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64).to(_device())
    dist.all_reduce(tensor)
    return tensor if isinstance(value, torch.Tensor) else type(value)(tensor.item())


def gather(items):
    """The lists of all processes, joined, on every process."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


@contextlib.contextmanager
def whole_weights(model):
    """Keep the gathered weights of a sharded model between forward passes: a decode step then needs no collective,
    and processes may decode different numbers of steps. Does nothing to a model that is not sharded."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def shard(model):
    """Split a model's weights, gradients and optimizer state over all processes (FSDP2), layer by layer. The model
    stays an ordinary module. Its root keeps what it gathered after a forward pass: the LM head comes after it."""
    for layer in layers(model):
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False)
    model.body = types.MethodType(lambda self, *args, **kwargs: self.base_model(*args, **kwargs), model)
    register_fsdp_forward_method(model, "body")  # embedding and norm are the root's: gathered when its forward begins
    return model


def whole(tensor):
    """A tensor that may be sharded, whole, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


# ----------------------------------------------------------------------------------------------------------------
# Data and models


@dataclass(eq=False)
class Vocab:
    """What teacher and student must agree on before their distributions can be compared."""

    tokenizer: object  # the student's, with the template that both are asked with
    size: int  # logits in use
    end_ids: tuple[int, ...]  # the end tokens of both models: a rollout stops at any of them
    pad_id: int  # fills what the masks exclude; may well be an end token


@dataclass
class Batch:
    """The prompts that one process works on in one step."""

    dataset: Prompts
    prompts: list  # b tuples of token ids
    rows: list  # their rows in the dataset
    epochs: list  # how often each had been used before
    keys: list  # (seed, step, row of the global batch): what fixes all random numbers of the step


class Prompts(list):
    """A data set as a list of prompts (tuples of token ids) in the order of the file."""

    __hash__ = object.__hash__  # one data set is one key, however many prompts it holds

    def batch(self, step, batch_size, seed):
        """The share of this process in step's global batch. Every epoch is a new permutation, and a batch may span
        two; all of it follows from (seed, step), so a resumed run needs to remember nothing."""
        rank, world = rank_and_world()
        places = [(step - 1) * batch_size + i for i in range(rank, batch_size, world)]
        epochs = [place // len(self) for place in places]
        order = {e: np.random.default_rng((seed, e)).permutation(len(self)) for e in set(epochs)}
        rows = [int(order[e][place % len(self)]) for e, place in zip(epochs, places)]
        keys = [(seed, step, i) for i in range(rank, batch_size, world)]
        return Batch(self, [self[row] for row in rows], rows, epochs, keys)


def start(args):
    """Everything that can go wrong without a model's weights goes wrong here -> (train, evals, vocab).

    Checks the arguments, the output directory (ends the program if the run is finished), the data, and that the
    models can be compared: tokenizers, templates, end tokens, context lengths. train: Prompts; evals: {name: [Problem]}.
    """
    start_processes()
    if not dist.is_initialized():
        return _start(args)
    end = [None]  # the main process looks first: what it refuses, it alone reports, and all processes end
    if is_main():
        try:
            started = _start(args)
        except SystemExit as exit:
            end = [exit.code]
    dist.broadcast_object_list(end)
    if end != [None]:
        raise SystemExit(end[0] if is_main() or end == [0] else 1)
    return started if is_main() else _start(args)


def _start(args):
    check_args(args)
    args.precision = resolve_precision(args)
    _check_out_dir(args)
    rewarded = hasattr(args, "group_size")  # rewards need answers, teachers do not
    train = load_problems(args.data, needs_answer=rewarded, skip_unanswered=rewarded)
    if getattr(args, "held_out", 0) >= len(train):
        refuse(
            f"--held_out is {args.held_out}, but {args.data} has {len(train)} rows: nothing would be left to train on"
        )
    evals = load_evals(args)
    vocab = load_vocab(args, [train, *evals.values()])
    prompts = Prompts(p.prompt for p in train)
    prompts.answers = [p.answer for p in train]
    return prompts, evals, vocab


def load_evals(args):
    """{name: [Problem]} of all sets of --eval_data; of each, --eval_problems of them, evenly spread."""
    evals = {name: load_problems(name, needs_answer=True) for name in args.eval_data.split(",")}
    n = args.eval_problems
    return {
        name: [problems[i * len(problems) // n] for i in range(n)] if 0 < n < len(problems) else problems
        for name, problems in evals.items()
    }


def resolve_precision(args):
    """What --precision auto stands for here: bf16 on a GPU; on a CPU for models of more than 10 million parameters, if
    the processor multiplies bf16 matrices itself (others take five times as long with them as with fp32)."""
    if args.precision != "auto":
        return args.precision
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    path = args.student if hasattr(args, "student") else args.model
    return "bf16" if torch.cuda.is_available() or (able and not is_toy(_load_config(path, "student"))) else "fp32"


def is_toy(config):
    """Whether a model of this config has less than 10 million parameters."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).num_parameters() < 10e6


def _load_config(path, role):
    config = _load(transformers.AutoConfig, path, role)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        refuse(f"--{role} {path!r} is a {config.model_type} model: give a causal language model")
    return config


def load_vocab(args, problem_sets):
    """Load the tokenizers and configs of the models that args names (student and teacher, student, or model), encode
    the prompts of all problem sets, and refuse what cannot work, down to the weight files' headers. -> Vocab"""
    paths = {role: getattr(args, role) for role in ("student", "teacher", "model") if hasattr(args, role)}
    configs, tokenizers = {}, {}
    for role, path in paths.items():
        configs[role] = _load_config(path, role).get_text_config()
        tokenizers[role] = _load(transformers.AutoTokenizer, path, role)
        for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))):
            try:
                with safetensors.safe_open(file, "pt"):
                    pass
            except Exception as error:
                refuse(f"{file} is damaged ({error}): copy or download --{role} again")
    student = next(iter(tokenizers.values()))
    asker = tokenizers.get("teacher", student)
    for problems in problem_sets:
        encode_prompts(problems, asker, args.thinking, args.instruction)
        _check_known(problems, asker)
    if "teacher" in paths:
        ordinary = [
            {t: i for t, i in tok.get_vocab().items() if t not in tok.get_added_vocab()} for tok in (student, asker)
        ]
        if ordinary[0] != ordinary[1]:
            refuse(
                f"the tokenizers of student ({len(ordinary[0])} tokens) and teacher ({len(ordinary[1])} tokens) differ: "
                "their distributions are over different things; choose --student and --teacher from one family"
            )
        student.chat_template = asker.chat_template  # the teacher's template serves both
        probes = [dataclasses.replace(p) for p in problem_sets[0][:256]]
        encode_prompts(probes, student, args.thinking, args.instruction)
        if any(a.prompt != b.prompt for a, b in zip(probes, problem_sets[0])):
            refuse("--student and --teacher tokenize the same prompt differently: choose both from one family")
    sizes = {role: config.vocab_size for role, config in configs.items()}
    needed, size = max(max(tok.get_vocab().values()) + 1 for tok in tokenizers.values()), min(sizes.values())
    if needed > size:
        refuse(
            f"the tokenizer has ids up to {needed - 1}, but the vocabulary sizes in config.json are {sizes}: the tokenizer "
            "is another model's, or model.resize_token_embeddings was forgotten"
        )
    if len(set(sizes.values())) > 1:
        size = needed
        if is_main():
            print(f"vocabulary sizes are {sizes}: logits cropped to the tokenizer's {size}")
    end_ids = set()
    for role, path in paths.items():
        try:
            generation = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        except Exception as error:  # most often there is none, which is fine
            generation = None
            if os.path.exists(os.path.join(path, "generation_config.json")):
                refuse(f"generation_config.json in {path!r} is damaged: mend or delete it ({error})")
        for ids in (configs[role].eos_token_id, generation, tokenizers[role].eos_token_id):
            end_ids.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    end_ids = tuple(sorted(i for i in end_ids if 0 <= i < size))
    if not end_ids:
        refuse(f"no response could ever end: set an end token, eos_token_id below {size}, in a model's config.json")
    longest = max((p for problems in problem_sets for p in problems), key=lambda p: len(p.prompt))
    for role, config in configs.items():
        room = getattr(config, "max_position_embeddings", None) or math.inf
        new = max(getattr(args, "max_new_tokens", 0), args.eval_max_new_tokens)
        if len(longest.prompt) + new > room:
            refuse(
                f"the longest prompt has {len(longest.prompt)} tokens; with {new} new ones it exceeds the {role}'s context "
                f"of {room}: lower --max_new_tokens and --eval_max_new_tokens or leave out {longest.question[:60]!r}..."
            )
    pad_id = student.pad_token_id if student.pad_token_id is not None else end_ids[0]
    return Vocab(student, size, end_ids, pad_id)


def _check_known(problems, tokenizer):
    """Refuse questions that the tokenizer has no words for: a model learns nothing from them, without complaint."""
    known = [sum(i == tokenizer.unk_token_id for i in p.prompt) / len(p.prompt) for p in problems]
    share = sum(known) / len(known)
    if share > 0.05:
        example = problems[known.index(max(known))]
        refuse(
            f"{share:.0%} of the prompts' tokens are unknown to the tokenizer of {tokenizer.name_or_path!r}, as in "
            f"{example.question[:60]!r}: models and data do not belong together"
        )


def load_model(path, args, trainable):
    """A causal LM on this process's device: the trained one with fp32 weights, which small learning rates need."""
    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 and not trainable else torch.float32
    device = _device() if trainable else getattr(args, "teacher_device", "") or _device()
    model = _load(transformers.AutoModelForCausalLM, path, "model", dtype=dtype).to(device)
    if trainable and model.num_parameters() > 10e6 and args.lr == type(args).lr and is_main():
        print(f"warning: --lr {args.lr} is made for the toy; models of this size take 1e-6 to 1e-5, see recipes/")
    if model.device.type == "cpu" and model.num_parameters() < 10e6:
        torch.set_num_threads(1)  # threads cost tiny matrices more than they give; on a busy machine ten times as much
    model.requires_grad_(trainable).eval()  # eval mode always: dropout would make sampler and scorer disagree
    model.autocasts = bf16 and trainable  # see precision()
    if trainable and args.gradient_checkpointing:
        for layer in layers(model):  # transformers' own switch needs train mode, and with it dropout
            layer.forward = recomputed(layer.forward)
    return shard(model) if dist.is_initialized() else model


def layers(model):
    """The transformer blocks of any decoder: the ModuleList that is as long as the model is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)


def recomputed(forward):
    """A forward pass whose activations are not kept but computed again in the backward pass; when sampling, as it is."""

    def checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


def precision(model):
    """The region in which a model with fp32 weights computes in bf16, if it is to: the copies of its weights that this
    takes are made once in it, so one region goes around many decode steps."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "autocasts", False))


def body(model):
    """The model without its LM head, to be called like the model: -> an output with last_hidden_state (B, T, H)."""
    return getattr(model, "body", model.base_model)


def _load(auto_class, path, role, **options):
    """auto_class.from_pretrained, which explains itself at length, fills in weights that are missing at random, and
    makes an empty tokenizer where there is none: each of these is refused here, in one line."""
    where = "is no folder here, and cannot be had from the hub by this name"
    if os.path.isdir(path):
        where, names = "is damaged or incomplete, so copy or download it again", " ".join(os.listdir(path))
        parts = {
            "config.json": r"\bconfig\.json",
            "tokenizer": "tokenizer|vocab|spiece",
            "weights": r"\.safetensors|\.bin",
        }
        missing = [part for part, pattern in parts.items() if not re.search(pattern, names)]
        if missing:
            refuse(f"the {role} {path!r} has no {missing[0]}: save model and tokenizer there with save_pretrained")
    try:
        if auto_class is not transformers.AutoModelForCausalLM:
            return auto_class.from_pretrained(path, **options)
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
        model, report = auto_class.from_pretrained(path, **options)
    except Exception as error:  # the hub, the file system, the format: transformers raises them all
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        refuse(f"the {role} {path!r} {where} ({auto_class.__name__}: {reason})")
    wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if wrong:
        trouble = f"{len(wrong)} missing or of another shape, such as {wrong[0]}"
        refuse(f"the weights in {path!r} do not fit its config.json ({trouble}): copy or download it again")
    return model


# ----------------------------------------------------------------------------------------------------------------
# Teacher rollouts on disk


class RolloutStore:
    """Responses of one teacher to one list of prompts, by (row, sample), in an append-only JSONL file.

    The file is named by a hash of all that the responses depend on: the teacher's weights, the token ids of the
    prompts (data, template and tokenizer), the end tokens and the sampling arguments. Whatever changes, the name
    does too, so a stale store is never read.
    """

    def __init__(self, directory, teacher, prompts, vocab, sampling):
        # An exact checksum, whatever the order of summation and however the weights are sharded.
        local = [p.to_local() if hasattr(p, "to_local") else p for p in teacher.state_dict().values()]
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [p.contiguous().view(as_int[p.element_size()]).sum(dtype=torch.int64) for p in local]
        weights = total(torch.stack(sums)).tolist()
        ingredients = json.dumps([weights, prompts, vocab.end_ids, vocab.size, sampling])
        self.path = os.path.join(directory, hashlib.sha256(ingredients.encode()).hexdigest()[:16] + ".jsonl")
        self.found = {}  # (row, sample) -> (token ids, did it end, the longest it was allowed to be)
        on_disk = []
        if is_main():  # the only process that touches the file; the others may be on another machine
            os.makedirs(directory, exist_ok=True)
            on_disk = _read_lines(self.path) if os.path.exists(self.path) else []
        self._keep(gather(on_disk))

    def _keep(self, records):
        for row, sample, ids, ended, cap in records:
            if (row, sample) not in self.found or self.found[row, sample][2] < cap:
                self.found[row, sample] = (ids, ended, cap)

    def has(self, key, max_new_tokens):
        """Is there a response that ended, or that was allowed to be this long?"""
        return key in self.found and (self.found[key][1] or self.found[key][2] >= max_new_tokens)

    def get(self, key, max_new_tokens):
        """-> (token ids cut at max_new_tokens, whether the response ends within them)."""
        ids, ended, _ = self.found[key]
        return ids[:max_new_tokens], ended and len(ids) <= max_new_tokens

    def add(self, records):
        """Keep records [(row, sample, token ids, did it end, cap)], the same on all processes, and write them down."""
        self._keep(records)
        if is_main():
            with (
                writing(self.path),
                open(self.path, "a") as file,
            ):  # newline first: a line cut short by a kill stays alone
                file.writelines("\n" + json.dumps(record) for record in records)


# ----------------------------------------------------------------------------------------------------------------
# The output directory


@dataclass
class Progress:
    """How far a run has come; all else that resuming needs is weights and optimizer."""

    step: int = 0  # updates done
    flops: float = 0.0  # model FLOPs so far: sampling, teacher, student
    seconds: float = 0.0  # wall time of the steps so far, evaluation and saving not counted
    more: dict = dataclasses.field(default_factory=dict)  # what a script of its own has to remember


def _code(args):
    """{file: a hash of its syntax tree} of the script and of what it shares. Comments and docstrings do not count."""
    here, code = os.path.dirname(os.path.abspath(__file__)), {}
    shared = [os.path.join(here, name) for name in ("common.py", "evaluate.py", "runs.py", "tasks.py")]
    for path in [inspect.getfile(type(args)), *shared]:
        with open(path) as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(getattr(body[0], "value", None), ast.Constant):
                del body[0]
        code[os.path.basename(path)] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return code


def _check_out_dir(args):
    """Refuse a directory that belongs to another run or cannot be written; end the program if this run is finished."""
    out = args.out_dir
    if not out:
        refuse("--out_dir is empty: name a directory")
    parent = os.path.abspath(out)
    while not os.path.exists(parent):  # nothing is made before all else is found right: look at what is there
        parent = os.path.dirname(parent)
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        refuse(f"cannot write to --out_dir {out!r}: {parent}: {error.strerror}; choose another directory")
    finished = os.path.isdir(os.path.join(out, "model"))
    path = os.path.join(out, "args.json")
    if not os.path.exists(path):
        if finished or os.path.exists(os.path.join(out, "log.jsonl")):
            refuse(f"--out_dir {out!r} holds results but no args.json saying of what: choose another directory")
        return
    try:
        with open(path) as file:
            before = dict(json.load(file))
    except (OSError, ValueError, TypeError):
        refuse(f"{path} is damaged: choose another --out_dir, or remove {out!r} to start afresh")
    now, old_code = dataclasses.asdict(args), before.pop("code", None) or {}
    names = [name for name in {**before, **now} if name not in FREE_ARGS and before.get(name) != now.get(name)]
    changes = [f"--{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names]
    changes += [f"{file} has been changed" for file, code in _code(args).items() if old_code.get(file) != code]
    if changes:
        refuse(f"{out!r} holds another run: {'; '.join(changes)}. Choose another --out_dir, or remove that one")
    if finished:
        if is_main():
            print(f"{out!r} holds this run, finished: model/ and curves.png are there. To start afresh: rm -r {out}")
        raise SystemExit(0)


def resume(args, student, optimizer):
    """Begin or continue: load the last complete state, if there is one, into student and optimizer, and cut the log
    back to it. -> Progress"""
    if is_main():  # only now: a run that was refused leaves nothing behind
        os.makedirs(args.out_dir, exist_ok=True)
        _write(args.out_dir, "args.json", dataclasses.asdict(args) | {"code": _code(args)})
    barrier()
    states = sorted(int(name[6:]) for name in os.listdir(args.out_dir) if re.fullmatch(r"state-\d+", name))
    progress = load_state(args, student, optimizer, f"state-{states[-1]}") if states else Progress()
    log_path = os.path.join(args.out_dir, "log.jsonl")
    if is_main() and os.path.exists(log_path):
        rows = [row for row in _read_lines(log_path) if row["step"] <= progress.step and states]
        _write(args.out_dir, "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if states and is_main():
        print(f"continuing {args.out_dir} after step {progress.step}")
    return progress


def load_state(args, student, optimizer, name):
    """Load weights and optimizer from a state that save_state wrote, under any number of processes. -> Progress"""
    path = os.path.join(args.out_dir, name)
    try:
        model_state, optimizer_state = get_state_dict(student, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        set_state_dict(student, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        with open(os.path.join(path, "progress.json")) as file:
            return Progress(**json.load(file))
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception; its last line says why
        reason = str(error).strip().split("\n")[-1][:200]
        refuse(f"{path} is damaged ({type(error).__name__}: {reason}); remove {args.out_dir!r} to start afresh")


@contextlib.contextmanager
def writing(path):
    """Say in one line that a disk is full or a directory gone. Nothing is written in place, so what was there stays."""
    try:
        yield
    except (OSError, safetensors.SafetensorError, dcp.api.CheckpointException) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[-1][:200]
        refuse(
            f"cannot write {path} ({reason}); the last good state is intact: make room, then run the same command again"
        )


def log(args, row):
    """Append one line to log.jsonl."""
    path = os.path.join(args.out_dir, "log.jsonl")
    if is_main():
        with writing(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def save_state(args, progress, student, optimizer, name=None):
    """Write all that resuming needs to state-N/ and remove older ones; or to `name`/, and keep them all. A state
    exists under its name only once it is complete."""
    final, partial = (os.path.join(args.out_dir, part) for part in (name or f"state-{progress.step}", "state.partial"))
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    model_state, optimizer_state = get_state_dict(student, optimizer)
    with writing(final):
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
        if is_main():
            _write(partial, "progress.json", dataclasses.asdict(progress))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
    if is_main():
        for old in os.listdir(args.out_dir):
            if name is None and re.fullmatch(r"state-\d+", old) and old != os.path.basename(final):
                shutil.rmtree(os.path.join(args.out_dir, old))
    barrier()


def finish(args, student, vocab):
    """Write model/ (an ordinary checkpoint with tokenizer) and curves.png; the states are no longer needed."""
    with writing(os.path.join(args.out_dir, "curves.png")):
        draw_curves(args.out_dir)
    ends = dict(eos_token_id=list(vocab.end_ids), pad_token_id=vocab.pad_id)
    student.generation_config = transformers.GenerationConfig(**ends)
    partial, final = (os.path.join(args.out_dir, name) for name in ("model.partial", "model"))
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        with writing(final):
            student.save_pretrained(partial, state_dict=weights)
            vocab.tokenizer.save_pretrained(partial)
            os.rename(partial, final)
        for name in os.listdir(args.out_dir):
            if re.fullmatch(r"state-\d+|state\.partial|stable", name):
                shutil.rmtree(os.path.join(args.out_dir, name))
        print(f"done: {final} is the trained student, {args.out_dir}/curves.png the course of the run")
    barrier()  # nobody leaves while the others still need him


def barrier():
    if dist.is_initialized():
        dist.barrier()


class CtrlC:
    """Ctrl-C asks the run to stop after the step under way; a second one stops it at once."""

    def __init__(self):
        self.asked = False
        with contextlib.suppress(ValueError):  # not in the main thread: then leave Ctrl-C alone
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        return total(int(self.asked)) > 0  # all processes agree


def draw_curves(out_dir):
    """curves.png from log.jsonl: loss, entropy, response length, accuracy over steps."""
    if not is_main():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _read_lines(os.path.join(out_dir, "log.jsonl"))
    panels = [
        ("loss (nats per response token)", ["loss"]),
        ("entropy (nats per token)", ["entropy", "eval_entropy"]),
        ("response length (tokens)", ["response_len", "eval_len"]),
        ("accuracy on eval_data", ["reward", "avg_at_k", "pass_at_k"]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                style = {"avg_at_k": "o-", "pass_at_k": "s--"}.get(name, "o--" if name.startswith("eval_") else "-")
                axis.plot(*zip(*points), style, label=name, markersize=4)
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False)
    figure.suptitle(out_dir)
    figure.savefig(os.path.join(out_dir, "curves.png"), dpi=110)
    plt.close(figure)


def _write(directory, name, content):
    """Write a whole file or leave the old one: never half of it."""
    path = os.path.join(directory, name)
    with writing(path):
        with open(path + ".partial", "w") as file:
            file.write(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".partial", path)


def _read_lines(path):
    """The rows of a JSONL file that this program wrote; a line that a kill cut short is left out."""
    rows = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def log_samples(args, step, name, problems, records):
    """Keep the three best and the three worst problems of an evaluation readable, in samples-STEP.jsonl."""
    if not is_main():
        return
    by_problem = {}
    for r in records:
        by_problem.setdefault(r["problem"], []).append(r)
    ranked = sorted(by_problem, key=lambda i: -sum(r["correct"] for r in by_problem[i]))
    chosen = dict.fromkeys(ranked[:3] + ranked[-3:])
    rows = [
        dict(
            set=name,
            prompt=problems[i].question,
            answer=problems[i].answer,
            response=r["response"],
            correct=r["correct"],
        )
        for i in chosen
        for r in by_problem[i][:2]
    ]
    _write(args.out_dir, f"samples-{step}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def steps(first, last):
    """range(first, last + 1) with a progress bar."""
    return tqdm(range(first, last + 1), initial=first - 1, total=last, desc="steps", disable=not is_main())
