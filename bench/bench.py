"""Speed and memory of one on-policy reverse-KL step, side by side with TRL.

    ours    the lines of opd.py
    plain   the same loop around what one would write first: generate(), all logits of both models, KL by autograd
    trl     trl.DistillationTrainer.train() with beta=1, and without gradient checkpointing, as ours is

All do the same work on the same models and random prompts, every second one of them half as long, so that padding is
part of it; no token ends a response. TRL counts only if its first training_step has our loss and gradient: to 1e-4 and
1e-3 relative in fp32; in bf16 to .01 and .1, and to ours in fp32 beside the bf16 teacher, which is what TRL 1.16
computes there: its loss goes past the forward pass that accelerate wraps, and only generate() is under autocast.

Every contestant and repeat is a fresh process, in turn, so that a machine that slows down slows all of them: one step
to warm up, --steps steps that are timed, one whose memory is measured. What counts is the fastest step of all repeats
and the median memory. On a CPU: CPU-seconds, which other programs disturb less, and the peak resident set above the one
between two steps (Linux). On a GPU: wall time, and what torch's allocator handed out.

    python bench/bench.py --preset toy             V = 256, tiny models: what a step costs besides the vocabulary
    python bench/bench.py --preset real            V = 151,936 over tiny models: the vocabulary is nearly all
    python bench/bench.py --preset mid             V = 151,936, wider models, tied embeddings; mid-bf16: in bf16
    python bench/bench.py --preset pair --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-1.7B     any two checkpoints
    python bench/bench.py --preset real --kl_only  models without layers: head and KL, 512 to 4,096 tokens
    python bench/bench.py --preset h200            one GPU: Qwen3-0.6B <- 4B
    python bench/bench.py --preset h200 --shrink   the same path in small, on any CPU, in seconds
"""

import contextlib
import ctypes
import gc
import json
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's runs in a thread of the process that is measured

import torch
import transformers
from tqdm import tqdm

from common import Rollouts, make_rollouts, reverse_kl, sample, weighted_kl
from plumbing.fast import autocast
from plumbing.models import Vocab
from plumbing.processes import average, full, start_processes
from plumbing.runs import Batch, parse
from plumbing.tasks import refuse

PRESETS = {  # models by name (see model_config), sizes in tokens and sequences
    "toy": dict(vocab=256, student="128x2", teacher="256x4", batch_size=16, prompt_len=32, steps=5),
    "real": dict(student="64x2", teacher="128x2", batch_size=8, prompt_len=32),
    "mid": dict(student="256x4", teacher="512x8", batch_size=4, prompt_len=64),
    "mid-bf16": dict(student="256x4", teacher="512x8", batch_size=4, prompt_len=64, precision="bf16"),
    "pair": dict(batch_size=8, micro_batch_size=4, prompt_len=96),
    "h200": dict(student="0.6B", teacher="4B", batch_size=32, micro_batch_size=8, prompt_len=128, max_new_tokens=1024)
    | dict(precision="bf16"),
}
QWEN3 = {  # the published config.json files: hidden, intermediate, layers, heads, KV heads, head_dim, tied
    "0.6B": (1024, 3072, 28, 16, 8, 128, True),
    "4B": (2560, 9728, 36, 32, 8, 128, True),
    "8B": (4096, 12288, 36, 32, 8, 128, False),
}
RANDOM_WEIGHTS = re.compile("|".join([r"\d+x\d+", *map(re.escape, QWEN3)]))  # names of models that are no checkpoints


@dataclass
class Case:
    """What is measured, and the command line: what that leaves out, or gives as 0, is the preset's."""

    preset: Literal[tuple(PRESETS)] = "toy"  # models and sizes
    vocab: int = 0  # V of models with random weights
    student: str = ""  # WIDTHxLAYERS, or 0.6B, 4B, 8B for that Qwen3, or a checkpoint: a folder or a hub name
    teacher: str = ""  # likewise
    batch_size: int = 0  # responses a step
    prompt_len: int = 0  # tokens of the longer prompts
    max_new_tokens: int = 0  # tokens of every response
    micro_batch_size: int = 0  # responses scored at once
    shrink: bool = False  # tiny models, unless they are checkpoints, and short responses
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["", "fp32", "bf16"] = ""  # bf16: all but the student's weights
    steps: int = 0  # steps timed in each process
    threads: int = 1  # CPU threads: ratios on a shared machine are steadier with one
    kl_only: bool = False  # LM head and KL alone: no layers, and a step is only what the student's phase is
    contestants: str = "ours,plain,trl" if util.find_spec("trl") else "ours,plain"  # separated by commas
    repeats: int = 3  # fresh processes per contestant
    out: str = ""  # append every measurement as a JSON line to this file
    lr, weight_decay, max_grad_norm, estimator, ends = 1e-7, 0.0, 1.0, "exact", "apart"  # lr: all steps alike


def resolved(case):
    """The case with its preset's values where it has none of its own."""
    values = dict(vocab=151_936, max_new_tokens=64, steps=1, precision="fp32") | PRESETS[case.preset]
    if case.shrink:
        values |= dict(vocab=1000, student="64x2", teacher="128x2", prompt_len=8, max_new_tokens=8)
    case = replace(case, **{name: value for name, value in values.items() if not getattr(case, name)})
    if "" in (case.student, case.teacher):
        refuse(f"--preset {case.preset} needs --student and --teacher: checkpoints, each a folder or a hub name")
    vocab = min(model_config(name, case).get_text_config().vocab_size for name in (case.student, case.teacher))
    return replace(case, vocab=vocab, micro_batch_size=case.micro_batch_size or case.batch_size)


def model_config(name, case):
    """`0.6B` and its like as published, `128x2` as 128 wide with 2 layers in the same proportions, or as saved."""
    if not RANDOM_WEIGHTS.fullmatch(name):
        return transformers.AutoConfig.from_pretrained(name)
    if not (shape := QWEN3.get(name)):
        hidden, layers = map(int, name.split("x"))
        shape = hidden, 3 * hidden, layers, hidden // 32, max(1, hidden // 64), 32, case.preset.startswith("mid")
    hidden, intermediate, layers, heads, kv_heads, head_dim, tied = shape
    return transformers.Qwen3Config(
        vocab_size=case.vocab, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_hidden_layers=0 if case.kl_only else layers, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=40_960, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, pad_token_id=0,
        tie_word_embeddings=tied and not case.kl_only, initializer_range=hidden**-0.5,  # logits of order one
    )  # fmt: skip


def build(case):
    """-> student, teacher: as runs.load_model hands them over, the student's weights in fp32."""
    models, auto = [], transformers.AutoModelForCausalLM
    for name, trainable in ((case.student, True), (case.teacher, False)):
        dtype = torch.float32 if trainable or case.precision == "fp32" else torch.bfloat16
        config, random = model_config(name, case), RANDOM_WEIGHTS.fullmatch(name)
        torch.manual_seed(trainable)
        with torch.device(case.device) if random else contextlib.nullcontext():  # 8B of them take minutes on a CPU
            model = auto.from_config(config, dtype=dtype) if random else auto.from_pretrained(name, dtype=dtype)
        model.config.get_text_config().eos_token_id = None
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no end token, no filters
        model.autocasts = trainable and case.precision == "bf16"  # see fast.autocast
        models.append(model.to(case.device).requires_grad_(trainable).eval())
    models[0].get_input_embeddings().requires_grad_(not case.kl_only)
    return models


def random_prompts(case, step):
    """Lists of token ids, every second one half as long: the same for every contestant. Never 0, the padding."""
    P, generator = case.prompt_len, torch.Generator().manual_seed(step)
    ids = torch.randint(1, case.vocab, (case.batch_size, P), generator=generator).tolist()
    return [row[: P // (1 + i % 2)] for i, row in enumerate(ids)]


class Clock:
    """Seconds of every step by phase, and the peak memory of the last step. The teacher's forward pass is timed inside
    the student's phase, and not counted there; `update` is all that is left, as what a trainer does between steps."""

    def __init__(self, case):
        self.cuda, self.n_steps = case.device.startswith("cuda"), case.steps + 2
        self.time = time.perf_counter if self.cuda else time.process_time
        self.steps, self.phase, self.since, self.seconds = [], "update", self.time(), Counter()

    def enter(self, phase):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[self.phase] += self.time() - self.since
        self.phase, self.since = phase, self.time()

    @contextlib.contextmanager
    def during(self, phase):
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)

    def end_step(self):
        self.enter("update")
        self.steps.append(self.seconds)
        if len(self.steps) == self.n_steps - 1:  # the next one is for memory
            gc.collect()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that malloc keeps is not in use
                Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of the resident set
            self.baseline = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")
        elif len(self.steps) == self.n_steps:
            self.peak = (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.baseline
        self.since, self.seconds = self.time(), Counter()


def resident(key):
    return 1024 * int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def train(case, clock, student, teacher, sample, weighted_kl):
    vocab = Vocab(case.vocab, end_ids=(), pad_id=0)  # no end token: every response is as long as it may be
    args, run, sampling = case, SimpleNamespace(vocab=vocab), {}
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    for step in range(clock.n_steps):
        batch = Batch(random_prompts(case, step), [], [], [(0, step, row) for row in range(case.batch_size)])
        # From here to the end of the step, these are the lines of opd.py.
        clock.enter("rollout")
        rollouts = sample(student, batch.prompts, batch.keys, run.vocab, args.max_new_tokens, **sampling)
        clock.enter("student")
        n_tokens = average(rollouts.mask.sum())
        loss = entropy = 0.0
        for micro in rollouts.split(args.micro_batch_size):
            token_weights = micro.mask / n_tokens
            micro_loss, micro_entropy = weighted_kl(
                reverse_kl, student, teacher, micro, token_weights, run.vocab, args.estimator, args.ends
            )
            micro_loss.backward()
            loss, entropy = loss + micro_loss.item(), entropy + micro_entropy.item()
        clock.enter("update")
        grad_norm = full(torch.nn.utils.clip_grad_norm_(student.parameters(), args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        clock.end_step()
        assert n_tokens == args.batch_size * case.max_new_tokens and 0 < grad_norm < float("inf"), "not the same work"
    return dict(loss=loss)


def plain_sample(model, prompts, keys, vocab, max_new_tokens):
    rollouts = make_rollouts(prompts, [()] * len(prompts), [False] * len(prompts), keys, vocab, model.device)
    options = dict(attention_mask=rollouts.prompt_mask.long(), max_new_tokens=max_new_tokens, do_sample=True, top_k=0)
    with autocast(model):
        rollouts.ids = model.generate(rollouts.ids, **options)  # (B, P+R)
    rollouts.mask = torch.ones_like(rollouts.ids[:, rollouts.prompt_len :], dtype=torch.bool)
    return rollouts


def plain_kl(divergence, student, teacher, batch, token_weights, vocab, estimator, ends):
    mask, R = torch.cat([batch.prompt_mask, batch.mask], 1).long(), slice(batch.prompt_len - 1, -1)
    inputs = dict(input_ids=batch.ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
    inputs |= {} if mask.all() else dict(attention_mask=mask)
    with torch.no_grad():
        log_p = teacher(**inputs).logits[:, R, : vocab.size].float().log_softmax(-1)  # (b, R, V)
    with autocast(student):
        log_q = student(**inputs).logits[:, R, : vocab.size].float().log_softmax(-1)
    return ((log_q.exp() * (log_q - log_p)).sum(-1) * token_weights).sum(), torch.zeros(())


def train_trl(case, clock, student, teacher):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DistillationConfig, DistillationTrainer
    # It takes text, so here the words are the token ids. The end token is one past V: no response can end.
    words = {"<pad>": 0} | {str(i): i for i in range(1, case.vocab)} | {"<end>": case.vocab}
    numbers = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=numbers, eos_token="<end>", pad_token="<pad>")
    prompts = [ids for step in range(clock.n_steps) for ids in random_prompts(case, step)]
    data = [{"prompt": " ".join(map(str, ids))} for ids in prompts]
    config = DistillationConfig(
        output_dir="/tmp", save_strategy="no", report_to="none", disable_tqdm=True, beta=1.0,
        max_steps=clock.n_steps, per_device_train_batch_size=case.micro_batch_size, shuffle_dataset=False,
        gradient_accumulation_steps=case.batch_size // case.micro_batch_size, max_completion_length=case.max_new_tokens,
        gradient_checkpointing=False, disable_dropout=True, learning_rate=case.lr, lr_scheduler_type="constant",
        bf16=case.precision == "bf16", use_cpu=case.device == "cpu",
    )  # fmt: skip
    callback = transformers.TrainerCallback()
    callback.on_step_end = lambda *args, **kwargs: clock.end_step()
    trainer = DistillationTrainer(student, teacher, config, data, processing_class=tokenizer, callbacks=[callback])
    trainer.remove_callback(transformers.PrinterCallback)
    step, errors = clock.during("student")(trainer.training_step), {}

    def training_step(*args):
        loss = step(*args)
        if not errors:  # in the step to warm up, before the first update
            errors.update(compare(trainer, case, teacher, loss.item()))
        return loss

    trainer.training_step = training_step
    trainer.train()
    return errors


def compare(trainer, case, teacher, loss):
    """Is it our loss? That of the trainer's first micro-batch and its gradient, and weighted_kl's on the same."""
    inputs, student = trainer._buffered_inputs[0], trainer.model
    n, ids = inputs["num_items_in_batch"], torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    assert n == case.batch_size * case.max_new_tokens, "not the same work"
    batch = Rollouts(ids, inputs["prompt_mask"].bool(), inputs["completion_mask"].bool(), None, [])
    student.autocasts = False  # as TRL computes its student's part
    our_loss, _ = weighted_kl(reverse_kl, student, teacher, batch, batch.mask / n, Vocab(case.vocab, (), 0))
    parameters = [p for p in student.parameters() if p.requires_grad]
    ours = torch.autograd.grad(our_loss, parameters)
    norm, differences = torch.nn.utils.get_total_norm, [a - p.grad for a, p in zip(ours, parameters)]
    errors = dict(our_loss=our_loss.item(), loss=loss, loss_error=abs(1 - loss / our_loss.item()))
    errors["gradient_error"] = (norm(differences) / norm(ours)).item()
    tolerance = 1e-2 if case.precision == "bf16" else 1e-4
    assert errors["loss_error"] < tolerance and errors["gradient_error"] < 10 * tolerance, errors
    return errors


def measure(contestant, case):
    """One contestant, once, in a process that does nothing else. -> a record"""
    torch.set_num_threads(case.threads)
    transformers.logging.set_verbosity_error()
    if contestant == "ours":
        start_processes()  # as every script: without cuDNN's attention
    (student, teacher), clock = build(case), Clock(case)
    teacher.base_model.forward = clock.during("teacher")(teacher.base_model.forward)
    student.generate = clock.during("rollout")(student.generate)
    run = dict(ours=[train, sample, weighted_kl], plain=[train, plain_sample, plain_kl], trl=[train_trl])[contestant]
    outcome = run[0](case, clock, student, teacher, *run[1:])
    timed = clock.steps[1:-1]
    outcome |= dict(seconds=min(timed, key=Counter.total), steps=[step.total() for step in timed])
    return dict(contestant=contestant, peak=clock.peak, baseline=clock.baseline, **outcome)


def report(case, records):
    """Print a Markdown table, then how long all steps took and how equal the losses are."""
    unit, memory, scale = ("s", "GiB", 2**30) if case.device.startswith("cuda") else ("CPU-s", "MiB", 2**20)
    columns = ["rollout", "teacher", "student", "update", f"{unit} a step"]
    columns += [f"{memory} above baseline", f"{memory} in all", "time", "memory"]
    table = {}
    for name, rows in records.items():
        seconds = min((row["seconds"] for row in rows), key=lambda seconds: sum(seconds.values()))
        peak, baseline = sorted((row["peak"], row["baseline"]) for row in rows)[len(rows) // 2]
        step = seconds["student"] if case.kl_only else sum(seconds.values())
        table[name] = seconds | dict(zip(columns[4:], [step, peak / scale, (peak + baseline) / scale]))
    for row in table.values() if "trl" in table else ():
        row |= {ratio: row[column] / table["trl"][column] for ratio, column in zip(columns[7:], columns[4:6])}
    print("| | " + " | ".join(columns) + " |", "|---" * 10 + "|", sep="\n")
    for name, row in table.items():
        print(f"| {name} |", " | ".join(f"{row[key]:.4g}" if key in row else "–" for key in columns), "|")
    for name, rows in records.items() if case.steps > 1 else ():
        print(f"\n{name}: {case.steps} steps in", ", ".join(f"{sum(row['steps']):.4g}" for row in rows), unit)
    for row in records.get("trl", [])[:1]:
        print("\ntrl and ours on the same responses:", {k: v for k, v in row.items() if k.endswith(("loss", "error"))})


def main(case):
    contestants = case.contestants.split(",")
    if unknown := set(contestants) - {"ours", "plain", "trl"}:
        refuse(f"--contestants has {', '.join(sorted(unknown))}, and can have ours, plain and trl")
    where = {p: metadata.version(p) for p in ("torch", "transformers", "trl") if util.find_spec(p)}
    cpu = re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())[1]
    where |= dict(machine=cpu if case.device == "cpu" else torch.cuda.get_device_name(), date=time.strftime("%F"))
    kl_cases = [replace(case, batch_size=16, micro_batch_size=16, max_new_tokens=n) for n in (32, 64, 256)]
    for case in map(resolved, kl_cases if case.kl_only else [case]):
        records = {}
        for name in tqdm(contestants * case.repeats, leave=False):
            with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
                record = pool.submit(measure, name, case).result()
            records.setdefault(name, []).append(record)
            with open(case.out or os.devnull, "a") as file:
                file.write(json.dumps(vars(case) | where | record) + "\n")
        print(f"\n{case}\n{where}\n")
        report(case, records)


if __name__ == "__main__":
    main(parse(Case))
