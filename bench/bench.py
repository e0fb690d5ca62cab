"""Speed and memory of one on-policy reverse-KL step, side by side with TRL.

The contestants do the same work on the same models and prompts (random weights, no end token, so that every response
has the same length): sample at T = 1, score with the teacher, reverse KL over the whole vocabulary, AdamW.

    ours               the calls of opd.py: sample -> weighted_kl(reverse_kl, ...) -> clip -> AdamW
    plain              what one would write first: generate(), all logits of both models, KL by autograd
    trl_distillation   trl.DistillationTrainer, beta=1: reverse KL in vocabulary tiles, recomputed in backward
    trl_gkd            trl.experimental.gkd.GKDTrainer, lmbda=1 and beta=1: reverse KL on the student's own responses
    trl_distillation_checkpointing, trl_gkd_checkpointing      the same with TRL's default gradient_checkpointing=True

TRL's sides run as their users run them, through trainer.train(), with gradient checkpointing off because ours is: it
trades time for memory and would blur both. Before a number counts, the loss and its gradient on fixed responses are
compared with ours: 1e-4 relative in fp32.

How it is measured. Every contestant and repeat is a fresh process, in turn (A, B, C, A, B, C, ...), so that a machine
that slows down slows all of them. A process makes one step to warm up, then --steps steps that are timed, then one
whose memory is measured. What counts is the fastest step of all repeats, and their median memory. On a CPU the time is
CPU-seconds, which other programs on the machine disturb less, and memory the peak resident set above the one between
two steps, where models and optimizer state are in place. On a GPU the time is the wall clock's, and memory what
torch's allocator handed out.

    python bench/bench.py --preset toy               V = 256, tiny models; a minute without TRL, five with it
    python bench/bench.py --preset real              V = 151,936, where the vocabulary is what costs; ten minutes
    python bench/bench.py --preset mid               V = 151,936, wider models, tied embeddings; ten minutes
    python bench/bench.py --kl_only --preset real    head and KL alone, 512 to 4,096 tokens; half an hour
    python bench/bench.py --preset h200              one GPU: Qwen3-0.6B <- 4B at full size, 1,024 tokens
    python bench/bench.py --preset h200 --student 1.7B --teacher 8B --max_new_tokens 4096 --micro_batch_size 2
    python bench/bench.py --preset h200 --shrink     the same path in small, on any CPU, in seconds
    python bench/bench.py --preset h200 --repeats 0  only the physical limits

TRL comes from bench/requirements.txt; where it is missing its sides are left out. What it leaves out, on purpose:
several GPUs, vLLM as TRL's sampler, and everything that a step does not do (evaluation, logs, checkpoints).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # nothing here needs a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from common import make_rollouts, reverse_kl, sample, sequence_flops, weighted_kl
from runs import Batch, Vocab, parse, total, whole
from tasks import refuse

PHASES = ("rollout", "teacher", "student", "update")
CONTESTANTS = ("ours", "plain", "trl_distillation", "trl_gkd")
REFERENCE = "trl_distillation"  # what the ratios are relative to
PRESETS = {  # models by name (see model_config), sizes in tokens and sequences
    "toy": dict(vocab=256, student="128x2", teacher="256x4", batch_size=16, prompt_len=32, max_new_tokens=64),
    "real": dict(vocab=151_936, student="64x2", teacher="128x2", batch_size=8, prompt_len=32, max_new_tokens=64),
    "mid": dict(
        vocab=151_936, student="256x4", teacher="512x8", batch_size=4, prompt_len=64, max_new_tokens=64, tied=True
    ),
    "h200": dict(
        vocab=151_936,
        student="0.6B",
        teacher="4B",
        batch_size=32,
        micro_batch_size=8,
        prompt_len=128,
        max_new_tokens=1024,
    ),
}
TARGETS = {  # what we want to reach: ours / trl_distillation, and on the GPU also in seconds and GiB
    "toy": dict(time=0.80, memory=0.90),
    "real": dict(time=0.40, memory=0.40),
    "mid": dict(time=0.70, memory=0.80),
    "h200": {"time": 0.33, "seconds a step": 5.0, "GiB in all": 40.0},
    "kl": dict(time=0.20, memory=0.10),  # from 4,096 tokens on
}
QWEN3 = {  # the published config.json files: hidden, intermediate, layers, heads, tied; 8 KV heads of 128 each
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
H200_BYTES, H200_FLOPS = 4.3e12, 790e12  # a second, as measured on such a card: memory reads, dense bf16 matmuls


@dataclass
class Args:
    preset: str = "toy"  # toy, real, mid or h200: sizes of models and batch
    contestants: str = ",".join(CONTESTANTS)  # which, separated by commas (see the top of this file)
    repeats: int = 3  # fresh processes per contestant; 0 prints the physical limits only
    steps: int = 0  # steps timed in each process; 0: 5 for toy, else 1
    kl_only: bool = False  # measure LM head and KL alone, at the preset's widths
    tokens: str = "512,1024,4096"  # for --kl_only: numbers of tokens
    shrink: bool = False  # the preset's code path with tiny widths, two layers and short responses
    student: str = ""  # instead of the preset's: WIDTHxLAYERS, or 0.6B, 1.7B, 4B, 8B for that Qwen3
    teacher: str = ""  # likewise
    batch_size: int = 0  # responses a step; 0: the preset's
    micro_batch_size: int = 0  # responses scored at once; 0: the preset's, or the whole batch
    max_new_tokens: int = 0  # tokens of every response; 0: the preset's
    device: str = "auto"  # cpu, cuda; auto: cuda where there is one
    precision: str = "auto"  # fp32; bf16: teacher and activations, student weights stay fp32; auto: bf16 on a GPU
    threads: int = 1  # CPU threads: ratios on a shared machine are steadier with one
    seed: int = 0  # of weights, prompts and responses
    out: str = ""  # append every measurement as a JSON line to this file


@dataclass
class Case:
    """What is measured: a preset with the command line's changes applied."""

    preset: str
    vocab: int
    student: str
    teacher: str
    batch_size: int
    prompt_len: int
    max_new_tokens: int
    micro_batch_size: int
    shrink: bool
    device: str
    bf16: bool
    steps: int
    threads: int
    seed: int
    tied: bool = False  # of models named WIDTHxLAYERS; a Qwen3 size knows for itself
    tokens: int = 0  # of --kl_only; 0: a whole step is measured
    lr: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __str__(self):
        size = f"{self.student} <- {self.teacher}, V = {self.vocab:,}"
        if self.tokens:
            return f"{size}, {self.tokens:,} tokens"
        micro = f" (micro-batches of {self.micro_batch_size})" if self.micro_batch_size < self.batch_size else ""
        return f"{size}, batch {self.batch_size}{micro}, prompt {self.prompt_len}, completion {self.max_new_tokens:,}"


def make_case(args, tokens=0):
    if args.preset not in PRESETS:
        refuse(f"--preset is {args.preset!r}, and must be one of {', '.join(PRESETS)}")
    sizes = dict(PRESETS[args.preset])
    sizes |= {k: getattr(args, k) for k in ("student", "teacher", "batch_size", "max_new_tokens") if getattr(args, k)}
    if args.shrink:
        sizes |= dict(
            vocab=1000, batch_size=4, prompt_len=8, max_new_tokens=args.max_new_tokens or 8, micro_batch_size=2
        )
    micro = args.micro_batch_size or sizes.get("micro_batch_size", sizes["batch_size"])
    sizes["micro_batch_size"] = micro = min(micro, sizes["batch_size"])
    if sizes["batch_size"] % micro:
        refuse(f"--micro_batch_size is {micro}, and must divide the batch of {sizes['batch_size']}")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device == "cuda")
    steps = args.steps or (5 if args.preset == "toy" else 1)
    return Case(
        args.preset, **sizes, shrink=args.shrink, device=device, bf16=bf16, steps=steps, threads=args.threads,
        seed=args.seed, tokens=tokens,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Models: random weights from a config, so that no network and no checkpoint is needed


def model_config(name, case):
    """A Qwen3 config: `0.6B` and its like as published, `128x2` as 128 wide with 2 layers in the same proportions."""
    if name in QWEN3:
        hidden, intermediate, layers, heads, tied = QWEN3[name]
        head_dim, kv_heads = 128, 8
    else:
        hidden, layers = map(int, name.split("x"))
        intermediate, tied = 3 * hidden, case.tied
        head_dim, heads, kv_heads = 32, hidden // 32, max(1, hidden // 64)
    if case.shrink:
        scale = 16 if name in QWEN3 else 1
        hidden, intermediate, layers, head_dim = hidden // scale, intermediate // scale, 2, 16
    return transformers.Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=0 if case.tokens else layers,  # --kl_only needs a head and something trainable below it
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied and not case.tokens,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=hidden**-0.5,  # logits of order one: near-uniform distributions would hide a wrong KL
        pad_token_id=0,
    )


def build(case, autocast=True):
    """-> student, teacher: as runs.load_model hands them over, student weights in fp32. TRL brings its own autocast."""
    models = []
    for name, trainable in ((case.student, True), (case.teacher, False)):
        torch.manual_seed(case.seed + trainable)
        dtype = torch.bfloat16 if case.bf16 and not trainable else torch.float32
        with torch.device(case.device):  # born where it will live: 8B random weights take minutes on a CPU
            model = transformers.AutoModelForCausalLM.from_config(model_config(name, case), dtype=dtype)
        model.requires_grad_(trainable).eval()
        model.autocasts = case.bf16 and trainable and autocast
        if model.autocasts:
            model.forward = torch.autocast(case.device, torch.bfloat16)(model.forward)
        models.append(model)
    return models


def random_ids(case, rows, n, stream):
    """`rows` tuples of n token ids, the same for every contestant; never 0, which is the padding."""
    generator = torch.Generator().manual_seed(1000 * case.seed + stream)
    return [tuple(row) for row in torch.randint(1, case.vocab, (rows, n), generator=generator).tolist()]


# ----------------------------------------------------------------------------------------------------------------
# The clock


class Clock:
    """CPU-seconds, seconds and peak memory of every step, split into phases.

    Phases nest: the teacher's forward pass runs inside the loss, and its time is taken out of the student's. What lies
    outside of all phases is `update`: the optimizer, and whatever else a trainer does between two steps.
    """

    def __init__(self, case):
        self.cuda, self.last_step = case.device == "cuda", case.steps + 1  # step 0 warms up, the last is for memory
        self.bar = tqdm(total=case.steps + 2, desc="steps", position=1, leave=False)
        self.steps, self.stack = [], ["update"]
        self._begin()

    @contextlib.contextmanager
    def during(self, phase):
        self._switch()
        self.stack.append(phase)
        try:
            yield
        finally:
            self._switch()
            self.stack.pop()

    def end_step(self):
        self._switch()
        self.steps.append(self.now)
        self.bar.update()
        self._begin()

    def _begin(self):
        if len(self.steps) == self.last_step:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that malloc keeps is not in use
            self.baseline = self._memory_now()
        self._reset_peak()
        self.now = dict(cpu=Counter(), wall=Counter(), peak=Counter())
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def _switch(self):
        if self.cuda:
            torch.cuda.synchronize()
        wall, cpu, phase = time.perf_counter(), time.process_time(), self.stack[-1]
        self.now["wall"][phase] += wall - self.wall
        self.now["cpu"][phase] += cpu - self.cpu
        if len(self.steps) == self.last_step:
            self.now["peak"][phase] = max(self.now["peak"][phase], self._peak() - self.baseline)
            self._reset_peak()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def _memory_now(self):
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def _peak(self):
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")

    def _reset_peak(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # Linux: forget the high-water mark of the resident set

    def result(self):
        """The fastest timed step, and the memory of the last one in bytes."""
        self.bar.close()
        clock = "wall" if self.cuda else "cpu"
        best = min(self.steps[1:-1], key=lambda step: step[clock].total())
        peak = self.steps[-1]["peak"]
        phase = max(peak, key=peak.get)
        return dict(
            cpu=dict(best["cpu"]), wall=dict(best["wall"]), peak=peak[phase], peak_phase=phase, baseline=self.baseline
        )


def _status(key):
    """Bytes, from Linux' /proc; elsewhere memory is not measured."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    return float("nan")


# ----------------------------------------------------------------------------------------------------------------
# The contestants. Each runs in a process of its own and returns what its clock says.


def run_ours(case, clock):
    student, teacher = build(case)
    teacher.base_model.forward = clock.during("teacher")(teacher.base_model.forward)
    vocab = Vocab(None, case.vocab, end_ids=(), pad_id=0)  # no end token: every response is as long as it may be
    args, world, u, sampling = case, 1, None, dict(max_new_tokens=case.max_new_tokens)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    for step in range(case.steps + 2):
        keys = [(case.seed, step, row) for row in range(case.batch_size)]
        batch = Batch(None, random_ids(case, case.batch_size, case.prompt_len, stream=step), [], [], keys)

        # From here to the end of the step, these are the lines of opd.py.
        with clock.during("rollout"):
            rollouts = sample(student, batch.prompts, batch.keys, vocab, **sampling)
        with clock.during("student"):
            n_rollouts, n_tokens = args.batch_size, total(rollouts.mask.sum().item())
            loss = entropy = 0.0
            for micro in rollouts.split(args.micro_batch_size):
                weights = micro.mask / n_tokens
                micro_loss, micro_entropy = weighted_kl(reverse_kl, student, teacher, micro, weights, vocab, u)
                (micro_loss * world).backward()
                loss, entropy = loss + micro_loss.item(), entropy + micro_entropy.item()
        with clock.during("update"):
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm)).item()
            optimizer.step()
            optimizer.zero_grad()
        assert math.isfinite(loss + grad_norm) and n_tokens == n_rollouts * case.max_new_tokens, "not the same work"
        clock.end_step()
    return dict(loss=loss)


def run_plain(case, clock):
    student, teacher = build(case)
    optimizer = torch.optim.AdamW(student.parameters(), lr=case.lr, weight_decay=case.weight_decay)
    teacher.base_model.forward = clock.during("teacher")(teacher.base_model.forward)
    generation = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)
    for step in range(case.steps + 2):
        prompts = torch.tensor(random_ids(case, case.batch_size, case.prompt_len, stream=step), device=case.device)
        with clock.during("rollout"):
            ids = student.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=case.max_new_tokens, **generation
            )
        with clock.during("student"):
            loss = 0.0
            for rows in ids.split(case.micro_batch_size):
                with torch.no_grad():
                    log_p = teacher(rows, use_cache=False).logits[:, case.prompt_len - 1 : -1].float().log_softmax(-1)
                log_q = student(rows, use_cache=False).logits[:, case.prompt_len - 1 : -1].float().log_softmax(-1)
                micro_loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean() * len(rows) / case.batch_size
                micro_loss.backward()
                loss += micro_loss.item()
                del log_p, log_q, micro_loss
        torch.nn.utils.clip_grad_norm_(student.parameters(), case.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.end_step()
    return dict(loss=loss)


def run_trl(case, clock, gkd, checkpointing):
    student, teacher = build(case, autocast=False)
    tokenizer = id_tokenizer(case.vocab)
    prompts = [
        ids for step in range(case.steps + 2) for ids in random_ids(case, case.batch_size, case.prompt_len, stream=step)
    ]
    with tempfile.TemporaryDirectory() as out_dir:
        options = dict(
            output_dir=out_dir, max_steps=case.steps + 2, per_device_train_batch_size=case.micro_batch_size,
            gradient_accumulation_steps=case.batch_size // case.micro_batch_size, gradient_checkpointing=checkpointing,
            learning_rate=case.lr, lr_scheduler_type="constant", weight_decay=case.weight_decay, beta=1.0, temperature=1.0,
            max_grad_norm=case.max_grad_norm, bf16=case.bf16, use_cpu=case.device == "cpu", seed=case.seed, report_to="none", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = trl_trainer(case, student, teacher, tokenizer, prompts, options, gkd)

        class EndStep(transformers.TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                clock.end_step()

        trainer.add_callback(EndStep())
        teacher.base_model.forward = clock.during("teacher")(teacher.base_model.forward)
        student.generate = clock.during("rollout")(student.generate)
        trainer.training_step = clock.during("student")(trainer.training_step)
        with contextlib.redirect_stdout(sys.stderr):  # its log; ours is the table
            trainer.train()
    return compare_losses(case, trainer, student, teacher, gkd)


def trl_trainer(case, student, teacher, tokenizer, prompts, options, gkd):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    data = Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in prompts]})
    if not gkd:
        config = DistillationConfig(**options, max_completion_length=case.max_new_tokens)
        return DistillationTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)

    def collate(rows):
        ids = torch.tensor(tokenizer([row["prompt"] for row in rows])["input_ids"])  # (b, P)
        # GKD divides by the number of labels in the batch *before* it puts the student's responses in their place. In
        # a run on real data that is some other number; here it is given the right one.
        whole = F.pad(ids, (0, case.max_new_tokens), value=1)
        labels = whole.masked_fill(torch.arange(whole.shape[1]) < case.prompt_len, -100)
        return dict(
            prompts=ids, prompt_attention_mask=torch.ones_like(ids), input_ids=whole, labels=labels,
            attention_mask=torch.ones_like(whole),
        )  # fmt: skip

    config = GKDConfig(**options, lmbda=1.0, max_new_tokens=case.max_new_tokens)
    return GKDTrainer(student, teacher, config, collate, train_dataset=data, processing_class=tokenizer)


def id_tokenizer(vocab):
    """A tokenizer whose words are the token ids, for trainers that only take text. Its end token is one past the
    vocabulary, so that no response can end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0} | {str(i): i for i in range(1, vocab)} | {"<end>": vocab}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


def compare_losses(case, trainer, student, teacher, gkd, rows=2):
    """Is it the same loss? The trainer's own compute_loss against weighted_kl, value and gradient, on fixed responses.

    -> the two losses and the relative difference of the gradients. Fails where the losses differ.
    """
    prompts = random_ids(case, rows, case.prompt_len, stream=500)
    responses = random_ids(case, rows, case.max_new_tokens, stream=501)
    vocab = Vocab(None, case.vocab, end_ids=(), pad_id=0)
    keys = [(case.seed, 0, row) for row in range(rows)]
    batch = make_rollouts(prompts, responses, [False] * rows, keys, vocab, case.device)
    n_tokens = batch.mask.sum()
    P, mask = batch.prompt_len, batch.mask.long()
    if gkd:
        labels = batch.ids.masked_fill(torch.arange(batch.ids.shape[1], device=case.device) < P, -100)
        inputs = dict(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids), labels=labels)
    else:
        inputs = dict(
            prompt_ids=batch.ids[:, :P], prompt_mask=batch.prompt_mask.long(), completion_ids=batch.ids[:, P:],
            completion_mask=mask, num_items_in_batch=n_tokens,
        )  # fmt: skip
    losses, gradients = [], []
    for which in ("ours", "theirs"):
        with torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
            if which == "ours":
                loss, _ = weighted_kl(reverse_kl, student, teacher, batch, batch.mask / n_tokens, vocab)
            else:
                loss = trainer.compute_loss(student, inputs)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.double().cpu() for p in student.parameters()])
        student.zero_grad()
    difference = sum((a - b).square().sum() for a, b in zip(*gradients)).sqrt()
    gradient_error = (difference / sum(a.square().sum() for a in gradients[0]).sqrt()).item()
    loss_error = abs(losses[0] - losses[1]) / abs(losses[0])
    tolerance = 2e-2 if case.bf16 else 1e-4  # in bf16 the two round logits at different places
    if max(loss_error, gradient_error / 10) > tolerance:
        raise AssertionError(f"not the same loss: ours {losses[0]}, theirs {losses[1]}, gradients {gradient_error:.1e}")
    return dict(loss=losses[1], our_loss=losses[0], loss_error=loss_error, gradient_error=gradient_error)


# ----------------------------------------------------------------------------------------------------------------
# Head and KL alone


def run_kl(case, clock, contestant):
    """LM head, reverse KL and their gradient, on the same `case.tokens` hidden states. A step is one such loss."""
    student, teacher = build(case)  # of no layers: an embedding, a norm (which keeps a gradient flowing) and the head
    student.get_input_embeddings().requires_grad_(False)
    vocab = Vocab(None, case.vocab, end_ids=(), pad_id=0)
    ids = random_ids(case, 1, case.tokens, stream=0)
    batch = make_rollouts([(1,)], ids, [False], [(0, 0, 0)], vocab, case.device)
    weights = batch.mask / case.tokens
    for step in range(case.steps + 2):
        with clock.during("student"):
            if contestant == "ours":
                loss, _ = weighted_kl(reverse_kl, student, teacher, batch, weights, vocab)
            else:
                with torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
                    with torch.no_grad():
                        teacher_hidden = teacher.base_model(batch.ids).last_hidden_state[:, :-1]  # (1, N, H_T)
                    hidden = student.base_model(batch.ids).last_hidden_state[:, :-1]  # (1, N, H)
                    loss = (plain_kl if contestant == "plain" else trl_kl)(
                        hidden, teacher_hidden, student.lm_head.weight, teacher.lm_head.weight, weights
                    )
            loss.backward()
        gradient = student.lm_head.weight.grad.norm().item()
        student.zero_grad()
        clock.end_step()
    return dict(loss=loss.item(), gradient=gradient)


def plain_kl(hidden, teacher_hidden, head, teacher_head, weights):
    log_q = F.linear(hidden, head).float().log_softmax(-1)  # (1, N, V)
    log_p = F.linear(teacher_hidden, teacher_head).float().log_softmax(-1)
    return ((log_q.exp() * (log_q - log_p)).sum(-1) * weights).sum()


def trl_kl(hidden, teacher_hidden, head, teacher_head, weights):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss(hidden, teacher_hidden, head, teacher_head, weights > 0, beta=1.0)[0]


# ----------------------------------------------------------------------------------------------------------------
# Measuring and reporting


def measure(contestant, case):
    """One contestant, once, in a process that does nothing else. -> a flat record"""
    torch.set_num_threads(case.threads)
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    clock = Clock(case)
    if case.tokens:
        outcome = run_kl(case, clock, contestant)
    elif contestant.startswith("trl"):
        outcome = run_trl(case, clock, gkd="gkd" in contestant, checkpointing="checkpointing" in contestant)
    else:
        outcome = dict(ours=run_ours, plain=run_plain)[contestant](case, clock)
    return dict(contestant=contestant, **clock.result(), **outcome)


def measure_all(case, contestants, args):
    """Every contestant `args.repeats` times, in turn. -> {contestant: [record]}; empty where it ran out of memory."""
    records = {name: [] for name in contestants}
    failed = set()
    rounds = [(repeat, name) for repeat in range(args.repeats) for name in contestants]
    for repeat, name in (bar := tqdm(rounds, desc=case.preset, leave=False)):
        if name in failed:
            continue
        bar.set_postfix_str(f"{name} {case.tokens or ''}")
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                record = pool.submit(measure, name, case).result()
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
            tqdm.write(f"{name} could not run ({case}): {type(error).__name__}", file=sys.stderr)
            failed.add(name)
            continue
        records[name].append(record)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(dict(**vars(case), repeat=repeat, **about(case), **record)) + "\n")
    return records


def about(case):
    """Where and with what: machine, date, versions."""
    if case.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = platform.processor() or platform.machine()
        with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
            machine = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
        machine += f", {os.cpu_count()} cores, {case.threads} thread{'s' if case.threads > 1 else ''}"
    names = [name for name in ("torch", "transformers", "trl", "accelerate") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in names}
    return dict(machine=machine, date=str(date.today()), python=platform.python_version(), **versions)


def limits(case):
    """Seconds that one H200 cannot go below, by phase: bytes over bandwidth for what reads, FLOPs over the matmul rate
    for what computes. Every decode step reads all weights (bf16) and all keys and values so far; AdamW reads weight,
    gradient and two moments and writes back three of them, in fp32."""
    with torch.device("meta"):
        student, teacher = (
            transformers.AutoModelForCausalLM.from_config(model_config(name, case))
            for name in (case.student, case.teacher)
        )
    config, parameters = student.config, student.num_parameters()
    matrices = parameters if config.tie_word_embeddings else parameters - student.get_input_embeddings().weight.numel()
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # K and V, bf16
    cached = case.batch_size * sum(range(case.prompt_len, case.prompt_len + case.max_new_tokens))
    lengths = torch.full((case.batch_size,), case.max_new_tokens), torch.full((case.batch_size,), case.prompt_len)
    return dict(
        rollout=(2 * matrices * case.max_new_tokens + per_token * cached) / H200_BYTES,
        teacher=sequence_flops(teacher, *lengths).sum().item() / H200_FLOPS,
        student=3 * sequence_flops(student, *lengths).sum().item() / H200_FLOPS,
        update=7 * 4 * parameters / H200_BYTES,
    )


def summary(case, records):
    """Over all repeats, the least time and the median memory, which malloc's luck moves both ways.

    -> {contestant: (seconds a step, peak bytes above baseline, and the records that have them)}. Seconds are
    CPU-seconds, on a GPU those on the wall.
    """
    clock = "wall" if case.device == "cuda" else "cpu"
    best = {}
    for name, rows in records.items():
        if rows:
            fastest = min(rows, key=lambda r: sum(r[clock].values()))
            median = sorted(rows, key=lambda r: r["peak"])[len(rows) // 2]
            best[name] = sum(fastest[clock].values()), median["peak"], fastest, median
    return best


def ratios(best, name):
    """time and memory of a contestant relative to REFERENCE, or {} where that is missing."""
    if not {name, REFERENCE} <= best.keys():
        return {}
    return dict(time=best[name][0] / best[REFERENCE][0], memory=best[name][1] / best[REFERENCE][1])


def step_table(case, records):
    """A Markdown table of one case, then whether the targets are met and how equal the losses are."""
    best = summary(case, records)
    clock, unit = ("wall", "s") if case.device == "cuda" or not best else ("cpu", "CPU-s")
    scale, memory = (2**30, "GiB") if case.device == "cuda" else (2**20, "MiB")
    head = ["", "rollout", "teacher", "student + KL", "update", f"**{unit} a step**", "s on the wall"]
    head += [f"**{memory} above baseline** (peak in)", f"{memory} in all", "time", "memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (seconds, peak, fastest, median) in best.items():
        cells = [name] + [f"{fastest[clock].get(phase, 0):.3g}" for phase in PHASES]
        cells += [f"**{seconds:.3g}**", f"{sum(fastest['wall'].values()):.3g}"]
        cells += [f"**{short(peak / scale)}** ({median['peak_phase']})", short((peak + median["baseline"]) / scale)]
        cells += [f"{ratio:.2f}" for ratio in ratios(best, name).values()] or ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    if case.preset == "h200":
        limit = limits(case)
        cells = ["*limit of one H200*"] + [f"{limit[phase]:.3g}" for phase in PHASES] + [f"{sum(limit.values()):.3g}"]
        lines.append("| " + " | ".join(cells + ["–"] * 5) + " |")
    lines.append("")
    if best and not case.shrink:
        reached = ratios(best, "ours")
        if case.device == "cuda" and "ours" in best:
            seconds, peak, _, median = best["ours"]
            reached |= {"seconds a step": seconds, "GiB in all": (peak + median["baseline"]) / 2**30}
        lines.append(verdict(case.preset, reached))
    for name, (*_, record) in best.items():
        if "our_loss" in record:
            lines.append(
                f"{name}: loss {record['loss']:.6f}, ours on the same responses {record['our_loss']:.6f} (relative "
                f"difference {record['loss_error']:.0e}; of the gradients {record['gradient_error']:.0e})."
            )
    return "\n".join(lines)


def kl_table(cases, results):
    """A Markdown table of --kl_only: a row for each number of tokens and contestant."""
    unit = "s" if cases[0].device == "cuda" else "CPU-s"
    lines = [f"| tokens | | {unit} | MiB above baseline | time | memory | loss |", "|---" * 7 + "|"]
    verdicts = []
    for case, records in zip(cases, results):
        best = summary(case, records)
        for name, (seconds, peak, record, _) in best.items():
            cells = [f"{case.tokens:,}", name, f"{seconds:.3g}", short(peak / 2**20)]
            cells += [f"{ratio:.2f}" for ratio in ratios(best, name).values()] or ["–", "–"]
            lines.append("| " + " | ".join(cells + [f"{record['loss']:.6f}"]) + " |")
        for quantity in ("loss", "gradient"):
            values = [record[quantity] for *_, record in best.values()]
            if max(values) - min(values) > (2e-2 if case.bf16 else 1e-4) * min(values):
                raise AssertionError(f"{case}: not the same {quantity}: {values}")
        if case.tokens >= 4096 and not case.shrink:
            verdicts.append(f"{case.tokens:,} tokens: {verdict('kl', ratios(best, 'ours'))}")
    return "\n".join(lines + [""] + verdicts)


def short(value):
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(preset, reached):
    """One line: which targets are met? reached: {quantity: value}."""
    said = [
        f"{quantity} {reached[quantity]:.2f}, target {target:.2f}: {'met' if reached[quantity] <= target else '**missed**'}"
        for quantity, target in TARGETS[preset].items()
        if quantity in reached
    ]
    return f"ours / {REFERENCE}: {'; '.join(said)}." if said else f"No ratios: they need ours and {REFERENCE}."


def main(args: Args):
    contestants = [name for name in args.contestants.split(",") if name]
    known = {*CONTESTANTS, "trl_distillation_checkpointing", "trl_gkd_checkpointing"}
    if unknown := set(contestants) - known:
        refuse(f"--contestants has {', '.join(sorted(unknown))}, and can have {', '.join(sorted(known))}")
    if importlib.util.find_spec("trl") is None and any(name.startswith("trl") for name in contestants):
        print("TRL is not installed (pip install -r bench/requirements.txt): its sides are left out.\n")
        contestants = [name for name in contestants if not name.startswith("trl")]
    case = make_case(args)
    where = about(case)
    print(f"{where.pop('machine')}, {where.pop('date')}, " + ", ".join(f"{k} {v}" for k, v in where.items()) + "\n")
    precision = "bf16" if case.bf16 else "fp32"
    if args.kl_only:
        contestants = [name for name in contestants if name in ("ours", "plain", REFERENCE)]
        cases = [make_case(args, int(n)) for n in args.tokens.split(",")]
        results = [measure_all(case, contestants, args) for case in cases]
        widths = " <- ".join(str(model_config(name, case).hidden_size) for name in (case.student, case.teacher))
        print(f"**LM head and reverse KL alone**: V = {case.vocab:,}, hidden sizes {widths}, {precision}\n")
        print(kl_table(cases, results))
    else:
        records = measure_all(case, contestants, args)
        measured = f", {precision}" if any(records.values()) else ""
        print(f"**{case.preset}{' in small' if case.shrink else ''}**: {case}{measured}\n")
        print(step_table(case, records))


if __name__ == "__main__":
    main(parse(Args))
