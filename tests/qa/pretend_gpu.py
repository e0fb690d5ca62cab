"""A GPU that is pretended on a CPU: what would crash on a real one crashes here, and the numbers are a CPU's.

Tensors say that they are on cuda:N, and operations look where their operands are, as CUDA's do: two devices are an
error. So is, while a graph is recorded, whatever spoils a real recording: waiting for a value, or copying from or to
the CPU. A recording changes nothing; replaying runs the recorded operations again, on the very tensors that were
recorded. Nothing is learned here about kernels: neither their speed nor their rounding.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}  # the host needs a value
COPIES = {aten._to_copy.default, aten.copy_.default}  # may have operands on two devices
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # may have indices on the CPU


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU. Its numbers are in `here`; to torch's C++ code it is on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here, device):
        self = torch.Tensor._make_subclass(cls, here)
        self.here, self.where = here, device
        return self

    device = property(lambda self: self.where)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device = GPU.named(device or self.where)
        dtype = dtype or self.dtype
        return self if (device, dtype) == (self.where, self.dtype) else aten._to_copy(self, dtype=dtype, device=device)

    def cpu(self):
        return self.to(CPU)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return GPU.now.__torch_dispatch__(function, types, args, kwargs)


def here(x):
    return x.here if isinstance(x, OnGPU) else CPU if isinstance(x, torch.device) else x


class GPU(TorchDispatchMode):
    """While this is active there is one. It counts waits and replays."""

    now = None

    def __init__(self):
        super().__init__()
        self.recording, self.waits, self.replays = None, 0, 0

    @staticmethod
    def named(device):
        device = torch.device(device)
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A CPU's tensor without dimensions is a number, and may come from anywhere.
        devices = {x.device for x in tensors if isinstance(x, OnGPU) or x.dim()}
        asked = self.named(kwargs["device"]) if kwargs.get("device") else None
        if torch._C._current_graph_task_id() != -1 and asked == CPU:
            asked = next(iter(devices), CPU)  # autograd, in C++, believes in the CPU: where its operand is, it means
        if devices | {asked} <= {CPU, None}:
            return function(*args, **kwargs)
        if len(devices) > 1 and function not in COPIES | INDEXING:
            raise RuntimeError(f"{function}: operands on {sorted(map(str, devices))}")
        target = asked or (args[0].device if function in COPIES | INDEXING else next(iter(devices)))
        waits = function in WAITS or (function in COPIES and len(devices | {target}) > 1)
        waits |= function in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.waits += waits
        if self.recording and waits:
            raise RuntimeError(f"{function} while a graph is recorded")
        if self.recording:
            for x, argument in zip(args, function._schema.arguments):
                if argument.alias_info and argument.alias_info.is_write:
                    self.recording.before += [(t, t.here.clone()) for t in tree_leaves(x)]
        if function is aten.mm.dtype:  # a CPU has no such product
            found = torch.mm(*(x.here.to(args[2]) for x in args[:2]))
        else:
            found = function(*tree_map(here, args), **tree_map(here, kwargs))
        known = {id(x.here): x for x in tensors if isinstance(x, OnGPU)}  # what is written in place stays what it is
        wrap = lambda x: known.get(id(x)) if id(x) in known else OnGPU(x, target)  # noqa: E731
        result = tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) and target != CPU else x, found)
        if self.recording:
            self.recording.operations.append((function, args, kwargs, result))
        return result


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations, self.before = [], []

    def replay(self):
        GPU.now.replays += 1
        for function, args, kwargs, result in self.operations:
            again = function(*tree_map(here, args), **tree_map(here, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, OnGPU) and old.here is not new:
                    old.here.copy_(new)


@contextlib.contextmanager
def record(graph, stream):
    """In place of torch.cuda.graph."""
    GPU.now.recording = graph
    try:
        yield
    finally:
        GPU.now.recording = None
    for tensor, before in reversed(graph.before):
        tensor.here.copy_(before)


@contextlib.contextmanager
def pretended(monkeypatch):
    autocast, move = torch.autocast, torch.Tensor.to
    named = lambda x: GPU.named(x) if isinstance(x, (str, torch.device)) else x  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: move(self, *map(named, args), **options))
    monkeypatch.setattr(torch, "autocast", lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs))
    null, none = contextlib.nullcontext, lambda *args: 0  # the first may be given a device
    stand_ins = dict(_lazy_init=none, CUDAGraph=Graph, graph=record, Stream=null, device=null, synchronize=none)
    stand_ins |= dict.fromkeys(("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"), none)
    stand_ins["device_count"] = lambda: 2
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    torch.__future__.set_swap_module_params_on_conversion(True)  # by which tied weights stay tied
    torch._C._set_only_lift_cpu_tensors(True)
    GPU.now = GPU()
    try:
        with GPU.now:
            yield GPU.now
    finally:
        GPU.now = None
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
