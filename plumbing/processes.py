"""One process or several (torchrun, FSDP2): all that is below works the same in both."""

import atexit
import os
import sys
import types
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm


def start_processes():
    """Join the other processes, if torchrun has started several."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    # cuDNN's attention is reported to give NaN gradients on H100s (pytorch#196678), and to plan anew for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(device_here())
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device_here() if on_gpu else None)
        atexit.register(dist.destroy_process_group)


def device_here():
    """The device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def rank_and_world():
    """-> (this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_world()[0] == 0


def say(text):
    """Print a text, above the progress bar if there is one; of several processes the first one does."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()  # a pipe would keep it back


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(value):
    """The sum of a number or tensor over all processes, in the type that was given."""
    if not dist.is_initialized():
        return value
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64).to(device_here())
    dist.all_reduce(tensor)
    return tensor if isinstance(value, torch.Tensor) else type(value)(tensor.item())


def mean_over_processes(value):
    """The mean of a number or tensor over all processes: what FSDP makes of gradients."""
    return sum_over_processes(value) / rank_and_world()[1]


def gather(items):
    """The lists of all processes, joined, on every process."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def layers(model):
    """The transformer blocks of any decoder: the ModuleList that is as long as the model is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)


def shard(model):
    """Split a model's weights, gradients and optimizer state over all processes, layer by layer. Its root keeps what it
    gathered after a forward pass: the LM head comes after it."""
    for layer in layers(model):
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False)
    model.body = types.MethodType(lambda self, *args, **kwargs: self.base_model(*args, **kwargs), model)
    register_fsdp_forward_method(model, "body")  # embedding and norm are the root's: gathered when its forward begins
    return model


def body(model):
    """The model without its LM head, to be called like the model: -> an output with last_hidden_state (B, T, H)."""
    return getattr(model, "body", model.base_model)


def whole(tensor):
    """A tensor that may be sharded, whole, on every process, which all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
