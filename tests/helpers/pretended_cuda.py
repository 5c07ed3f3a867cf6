"""A pretended CUDA device: tensors that say they lie on cuda:0 and keep their numbers on the CPU.

It raises where CUDA would (operands on two devices, a generator of the other device, a CUDA index into a CPU
tensor, `.numpy()`), and counts what a GPU pays for, by line of source: launches (operations that are no
views) and synchronisations (reading a number, shapes that depend on values, copies of memory that is not
pinned). What has no kernel on a CPU (flash attention, fused norms' backward, products into fp32) is computed
in plain operations. Numbers are real: a run goes from end to end.

    with pretended_cuda() as counts:
        ...
        counts.launches.total(), counts.syncs.most_common()
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
VIEWS = frozenset(
    "view _unsafe_view reshape transpose t permute expand slice select split split_with_sizes chunk unsqueeze"
    " squeeze as_strided alias detach unbind diagonal unfold narrow _reshape_alias lift_fresh empty"
    " empty_like new_empty empty_strided new_empty_strided detach_ set_ resize_ view_as_real"
    " view_as_complex movedim squeeze_ unsqueeze_ transpose_ t_ is_pinned flatten unflatten".split()
)
SYNCHRONISE = frozenset(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive bincount equal"
    " is_nonzero repeat_interleave histc _linalg_check_errors linalg_svd".split()
)
INDEXING = frozenset("index index_put_ index_put _index_put_impl_ _unsafe_index _unsafe_index_put".split())
# operations that take no number of the CPU (a tensor without dimensions) beside tensors of the device
NO_SCALARS = frozenset(
    "mm bmm addmm baddbmm matmul index_select index_copy_ index_copy index_add_ index_add gather scatter"
    " scatter_ scatter_add scatter_add_ embedding cat stack linear".split()
)
IN_PLACE_SHAPE = frozenset("resize_ squeeze_ unsqueeze_ transpose_ t_".split())


class DeviceFault(RuntimeError):
    """What CUDA would have raised."""


@dataclass
class Counts:
    """What a GPU would have been asked for; (line of source, what) -> how often."""

    launches: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in (self.launches, self.operations, self.syncs):
            counter.clear()


class State:
    counts = Counts()
    # is `meta` this device, as the C++ side of torch knows it? Not while a network is loaded
    meta_is_cuda = True
    generators: dict[Any, str] = {}  # C++ generator -> type of its device


def source_line() -> str:
    """The line of luthier that is being run, else that of another library."""
    frame, other = sys._getframe(2), None
    while frame is not None:
        file = frame.f_code.co_filename
        if "/luthier/" in file and "/tests/" not in file:
            return f"{file.rpartition('/luthier/')[2]}:{frame.f_lineno}"
        if other is None and "/torch/" not in file and file != __file__:
            other = f"{file.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "autograd"


class Pretended(torch.Tensor):
    """A tensor on the pretended device. `inner`: the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("meta"),
            requires_grad=requires_grad,
        )

    def __init__(self, inner: Tensor, requires_grad: bool = False):
        self.inner = inner

    def __repr__(self, *args: Any, **how: Any) -> str:
        return f"Pretended({self.inner!r})"

    def __deepcopy__(self, memo: dict) -> Pretended:
        if id(self) not in memo:
            copied: Any = Pretended(self.inner.detach().clone())
            if isinstance(self, nn.Parameter) or getattr(self, "_is_param", False):
                copied = nn.Parameter(copied, requires_grad=self.requires_grad)
            elif self.requires_grad:
                copied.requires_grad_(True)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.inner.detach(), self.requires_grad, getattr(self, "_is_param", False))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **how: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def get_device(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        return torch.Tensor.__getitem__(self, _as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _as_tensors(index), value)

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner if isinstance(value, Pretended) else value

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **how: Any) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, **how)

    def tolist(self) -> Any:
        return self.detach().to("cpu").tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def storage_offset(self) -> Any:
        return self.inner.storage_offset()

    def cuda(self, *args: Any, **how: Any) -> Any:
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def _rebuilt(inner: Tensor, requires_grad: bool, is_parameter: bool) -> Any:
    tensor = Pretended(inner)
    if is_parameter:
        return nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


def _as_tensors(index: Any) -> Any:
    """Lists among indices, as tensors of the device."""
    if isinstance(index, list):
        return torch.tensor(index, device=CUDA)
    if isinstance(index, tuple):
        return tuple(torch.tensor(x, device=CUDA) if isinstance(x, list) else x for x in index)
    return index


def _is_here(device: Any) -> bool:
    if device is None:
        return False
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "meta" and State.meta_is_cuda)


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: checked, counted, and computed on the CPU."""
    name = func._schema.name.split("::")[-1]
    flat, spec = tree_flatten((args, kwargs))
    here = [x for x in flat if isinstance(x, Pretended)]
    device = kwargs.get("device")
    to_cuda = _is_here(device)
    if name in ("is_pinned", "pin_memory", "_pin_memory"):
        return False if name == "is_pinned" else args[0]
    _check_generator(flat, func, to_cuda or (device is None and bool(here)))
    if here and name not in ("_to_copy", "copy_", "_copy_from", "to", "_foreach_copy_"):
        _check_devices(name, func, args, kwargs, flat)
    _count(name, args, kwargs, flat, here, to_cuda)
    inner = []
    for x in flat:
        if isinstance(x, Pretended):
            x = x.inner
        elif isinstance(x, torch.device) and _is_here(x):
            x = torch.device("cpu")
        inner.append(x)
    inner_args, inner_kwargs = tree_unflatten(inner, spec)
    with _disable_current_modes():
        result = STAND_INS.get(func, func)(*inner_args, **inner_kwargs)
        if name == "_to_copy" and result is inner_args[0]:
            result = result.clone()
    on_cpu = (device is not None and not to_cuda) or (not here and not to_cuda)
    if name == "copy_":
        on_cpu = not isinstance(args[0], Pretended)
    known = {id(x.inner): x for x in here}
    known |= {id(x): x for x in flat if isinstance(x, Tensor) and not isinstance(x, Pretended)}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return x if on_cpu else Pretended(x)

    result = tree_map(wrapped, result)
    if name in IN_PLACE_SHAPE or on_cpu or not here or func in STAND_INS:
        return result
    try:
        return return_and_correct_aliasing(func, args, kwargs, result)
    except Exception:  # of operations without a schema for aliases
        return result


def _check_generator(flat: list, func: Any, on_cuda: bool) -> None:
    kind = "cuda" if on_cuda else "cpu"
    for x in flat:
        if isinstance(x, torch._C.Generator) and State.generators.get(x._cdata, "cpu") != kind:
            raise DeviceFault(f"Expected a '{kind}' device type for generator ({func})")


def _check_devices(name: str, func: Any, args: Any, kwargs: Any, flat: list) -> None:
    others = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Pretended)]
    if name in INDEXING:
        if not isinstance(args[0], Pretended):
            raise DeviceFault(f"indices should be on the same device as the indexed tensor (cpu) ({func})")
        value = args[2] if len(args) > 2 else None
        if isinstance(value, Tensor) and not isinstance(value, Pretended) and value.dim():
            raise DeviceFault(f"expected all values on cuda ({func})")
        if others:
            State.counts.syncs[source_line(), f"{name}: index on the CPU"] += 1
        return
    for x in others:
        written = (name.endswith("_") and x is args[0]) or kwargs.get("out") is x
        if x.dim() or name in NO_SCALARS or written:
            shapes = [(type(t).__name__, tuple(t.shape)) for t in flat if isinstance(t, Tensor)]
            raise DeviceFault(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func}: {shapes})"
            )


def _count(name: str, args: Any, kwargs: Any, flat: list, here: list, to_cuda: bool) -> None:
    counts, line = State.counts, source_line()
    if (to_cuda or here) and name not in VIEWS:
        counts.launches[line] += 1
        counts.operations[name] += 1
    source = args[1] if name == "copy_" else args[0] if args else None
    if name == "_to_copy":
        down = isinstance(source, Pretended) and kwargs.get("device") is not None and not to_cuda
        up = not isinstance(source, Pretended) and to_cuda
    elif name == "copy_":
        down = isinstance(source, Pretended) and not isinstance(args[0], Pretended)
        up = not isinstance(source, Pretended) and isinstance(args[0], Pretended)
    else:
        down = up = False
        masks = any(isinstance(x, Pretended) and x.dtype == torch.bool for x in flat[1:])
        if name in INDEXING and masks:
            counts.syncs[line, f"{name}: mask"] += 1
        elif name in SYNCHRONISE and here:
            known_size = name == "repeat_interleave" and "output_size" in kwargs
            if not known_size:
                counts.syncs[line, name] += 1
    if down:
        counts.syncs[line, "copy to the CPU"] += 1
    if up and not (getattr(source, "pinned", False) and kwargs.get("non_blocking")):
        counts.syncs[line, "copy from memory that is not pinned"] += 1


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            made = func(*args, **{**kwargs, "pin_memory": False})
            made.pinned = True
            return made
        if _is_here(kwargs.get("device")):
            return dispatch(func, args, kwargs)
        if any(isinstance(x, Pretended) for x in tree_flatten((args, kwargs))[0]):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


# ------------------------------------------------------------ what a CPU has no kernel for


def _segments(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, left: int) -> Tensor:
    """[q, H, d], [k, K, d] -> [H, q, k] in fp64; what may not be seen is -inf."""
    repeats = q.shape[1] // k.shape[1]
    wide = k.double().repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), wide) * scale
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if causal:
        hidden |= behind < 0
    if left >= 0:
        hidden |= behind > left
    return scores.masked_fill(hidden, -torch.inf)


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
    **_: Any,
) -> tuple[Tensor, ...]:
    """As flash attention answers: where there are no keys, 0 and a log-sum-exp of +inf."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.dtype in (torch.bfloat16, torch.float16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    causal = causal or window_size_right == 0
    out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.full((q.shape[1], len(q)), torch.inf)
    for own, keys in _segments(cu_q, cu_k):
        assert own.stop - own.start <= max_q and keys.stop - keys.start <= max_k
        if own.start == own.stop or keys.start == keys.stop:
            continue
        scores = _scores(q[own], k[keys], causal, scale, window_size_left)
        wide = v[keys].double().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide).to(q.dtype)
        lse[:, own] = scores.logsumexp(-1).float()
    empty = torch.zeros(2, dtype=torch.uint64)
    return out, lse, empty, torch.zeros(()), torch.zeros(())


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:
    """By the log-sum-exps and the output that it is handed, as flash attention does."""
    causal = causal or window_size_right == 0
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    along = (grad.double() * out.double()).sum(-1).T  # [H, q]
    repeats = q.shape[1] // k.shape[1]
    for own, keys in _segments(cu_q, cu_k):
        if own.start == own.stop or keys.start == keys.stop:
            continue
        scores = _scores(q[own], k[keys], causal, scale, window_size_left)
        p = (scores - lse[:, own, None].double()).exp()
        wide_k, wide_v = (x[keys].double().repeat_interleave(repeats, 1) for x in (k, v))
        d_p = torch.einsum("qhd,khd->hqk", grad[own].double(), wide_v)
        d_s = p * (d_p - along[:, own, None]) * scale
        d_q[own] += torch.einsum("hqk,khd->qhd", d_s, wide_k)
        by_head = torch.einsum("hqk,qhd->khd", d_s, q[own].double())
        d_k[keys] += by_head.unflatten(1, (-1, repeats)).sum(2)
        by_head = torch.einsum("hqk,qhd->khd", p, grad[own].double())
        d_v[keys] += by_head.unflatten(1, (-1, repeats)).sum(2)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _norm_forward(x: Tensor, shape: Any, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rate = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rate * weight.float()).to(x.dtype), rate


def _norm_backward(
    grad: Tensor, x: Tensor, shape: Any, rate: Tensor, weight: Tensor, needed: Any
) -> tuple[Tensor | None, Tensor | None]:
    wide, g = x.float() * rate, grad.float()
    scaled = g * weight.float()
    d_x = rate * (scaled - wide * (scaled * wide).mean(-1, keepdim=True))
    d_weight = (g * wide).flatten(0, -2).sum(0).to(weight.dtype) if needed[1] else None
    return d_x.to(x.dtype), d_weight


_norm_forward._schema = SimpleNamespace(name="aten::_fused_rms_norm")  # type: ignore[attr-defined]


def _fused_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
    """The operation, which on other devices than CUDA is taken to pieces before it is dispatched."""
    return dispatch(_norm_forward, (x, shape, weight, eps), {})


def _wide_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return (a.float() @ b.float()).to(out_dtype)


def _wide_addmm(
    base: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = (a.float() @ b.float()) * alpha
    return (product if beta == 0 else product + beta * base).to(out_dtype)


STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._flash_attention_forward.default: _flash_forward,
    aten._flash_attention_backward.default: _flash_backward,
    _norm_forward: _norm_forward,
    aten._fused_rms_norm_backward.default: _norm_backward,
    aten.mm.dtype: _wide_product,
    aten.addmm.dtype: _wide_addmm,
}


# ------------------------------------------------------------ in a process

RealGenerator = torch.Generator


class PretendedGenerator(RealGenerator):
    def __new__(cls, device: Any = "cpu") -> Any:
        made = RealGenerator.__new__(cls, "cpu")  # type: ignore[call-arg]
        State.generators[made._cdata] = torch.device(device).type
        return made

    def __init__(self, device: Any = "cpu"):
        self.kind = torch.device(device).type

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.kind)


def _apply(self: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which else would write into tensors in place."""
    State.meta_is_cuda, before = False, State.meta_is_cuda
    probe = fn(torch.zeros(1))
    State.meta_is_cuda = before
    every = [*self.parameters(), *self.buffers()]
    if not isinstance(probe, Pretended) and not any(isinstance(p, Pretended) for p in every):
        return REAL_APPLY(self, fn, recurse)
    moved: dict[int, Any] = {}

    def move(tensor: Any, parameter: bool) -> Any:
        if tensor is not None and id(tensor) not in moved:
            with torch.no_grad():
                new = fn(tensor)
            if parameter and new is not tensor:
                new = nn.Parameter(new.detach(), requires_grad=tensor.requires_grad)
            moved[id(tensor)] = (new, tensor)
        return None if tensor is None else moved[id(tensor)][0]

    for module in self.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = move(p, True)
        for name, b in list(module._buffers.items()):
            module._buffers[name] = move(b, False)
    return self


REAL_APPLY = nn.Module._apply


PROPERTIES = SimpleNamespace(
    name="pretended", total_memory=139 * 2**30, major=9, minor=0, multi_processor_count=132
)
ON_CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (130 * 2**30, 139 * 2**30),
    "memory_reserved": lambda device=None: 2**30,
    "memory_allocated": lambda device=None: 2**30,
    "max_memory_allocated": lambda device=None: 2**30,
    "max_memory_reserved": lambda device=None: 2**30,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "manual_seed_all": lambda seed: None,
    "manual_seed": lambda seed: None,
    "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    "set_rng_state": lambda state, device="cuda": None,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
}


@contextmanager
def pretended_cuda() -> Iterator[Counts]:
    """A machine with one GPU, for a while."""
    import accelerate
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, *args: Any, **how: Any) -> Any:
        State.meta_is_cuda, before = False, State.meta_is_cuda
        try:
            return load(cls, *args, **how)
        finally:
            State.meta_is_cuda = before

    class Accelerator(accelerate.Accelerator):
        def __init__(self, *args: Any, **how: Any):
            super().__init__(*args, **{**how, "cpu": True})

        device = property(lambda self: CUDA)  # type: ignore[assignment]

    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    State.counts.clear()
    with ExitStack() as stack:
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        for name, value in ON_CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", PretendedGenerator))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)))
        stack.enter_context(patch.object(accelerate, "Accelerator", Accelerator))
        stack.enter_context(patch.object(aten, "_fused_rms_norm", _fused_norm))
        stack.enter_context(Mode())
        yield State.counts
