"""The tensors of the pretended GPU, and what runs in place of their operations.

C++ believes that they are on the CPU. So a device that Python names is looked at where Python names it
(``Names``), and one that C++ fills in for an operation on a tensor of ours is taken for the tensor's own.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from gpu_rehearsal import vendor
from gpu_rehearsal.recording import MISALIGNED, MIXED, PRODUCTS, SYNC, UPLOAD, Recording

DEVICE, HOST = torch.device("cuda:0"), torch.device("cpu")
# The host must know a value, or how many there are.
SYNCS = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_consecutive", "unique_dim",
    "equal", "is_nonzero", "bincount", "allclose",
}  # fmt: skip
# Views, and memory that nothing is written to: no kernel. (``empty`` is 0 here, so that runs are alike.)
NO_KERNEL = {
    "view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "permute", "detach", "alias",
    "as_strided", "unbind", "split", "split_with_sizes", "unfold", "_unsafe_view", "reshape", "empty", "empty_like",
    "new_empty", "new_empty_strided", "empty_strided", "lift_fresh", "_reshape_alias", "diagonal", "is_same_size",
    "view_as_real", "chunk", "tensor_split", "resize_", "set_", "is_pinned", "record_stream",
}  # fmt: skip
# No kernel where the result is the operand, or a view of it.
PERHAPS_A_KERNEL = {
    "to", "contiguous", "flatten", "unflatten", "view_as", "expand_as", "reshape_as", "type_as", "float", "int", "long",
    "bool", "_to_copy",
}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
# Files between a mode and what it was called for.
_INNER = (
    "gpu_rehearsal/tensors.py", "_python_dispatch.py", "overrides.py", "_ops.py", "_pytree.py", "_contextlib.py",
    "eval_frame.py", "_compile.py",
)  # fmt: skip
_active: list[Recording] = []  # the innermost last
_operators: dict[str, Any] = {}  # "appo::frame_mass_forward" -> the function registered under it
_named_devices: list[bool] = []  # of the torch functions under way: whether Python named a device


def recording() -> Recording:
    return _active[-1]


class GpuTensor(Tensor):
    """Says that it is on the GPU; ``inner`` is on the host."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="cpu",
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        recording().note(SYNC, "tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretended GPU: {self.inner!r}"

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = GpuTensor(self.inner.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def host(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


def is_cuda(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: recorded, computed on the host, its results wrapped where they are on the GPU."""
    if func.namespace == "appo":
        return _run_operator(func, args, kwargs)
    name = func._schema.name.split("::")[1]
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, GpuTensor)]
    device = kwargs.get("device")
    if device is not None:
        filled_in = not (_named_devices and _named_devices[-1])
        if filled_in and (ours or (not tensors and _asked_by_autograd())):
            device = DEVICE
        device = torch.device(device)
        kwargs = kwargs | {"device": HOST if is_cuda(device) else device}
    on_gpu = is_cuda(device) if device is not None else bool(ours)
    _note(name, args, tensors, ours, device)
    inner_args, inner_kwargs = tree_map(host, args), tree_map(host, kwargs)
    out = _compute(func, name, inner_args, inner_kwargs)
    if on_gpu and name not in NO_KERNEL:
        unchanged = isinstance(out, Tensor) and tensors and out.data_ptr() == tensors[0].data_ptr()
        if not (name in PERHAPS_A_KERNEL and unchanged):
            recording().operation(name)
    if not on_gpu:
        return out
    out = tree_map(lambda x: GpuTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _asked_by_autograd() -> bool:
    """Whether C++ asks within a backward: for the zeros that stand for the gradient of a result nobody used."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.endswith(_INNER):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.endswith("autograd/graph.py")


def _note(name: str, args: Any, tensors: list[Tensor], ours: list[Any], device: torch.device | None) -> None:
    found = recording()
    if name == "copy_" or (name in ("_to_copy", "to") and device is not None):
        source = args[1] if name == "copy_" else args[0]
        from_gpu = isinstance(source, GpuTensor)
        to_gpu = isinstance(args[0], GpuTensor) if name == "copy_" else is_cuda(device)
        if from_gpu and not to_gpu:
            found.note(SYNC, "copy to the host")
        elif to_gpu and not from_gpu:
            found.note(UPLOAD, "copy to the GPU")
        return
    if not ours:
        return
    if name in SYNCS:
        found.note(SYNC, name)
    if name in PRODUCTS and not all(_aligned(x) for x in ours if x.dim() > 1):
        found.note(MISALIGNED, name)
    if name == "repeat_interleave" and len(tensors) > 0 and not _has_output_size(args):
        found.note(SYNC, name)
    strangers = [x for x in tensors if x.dim() and not isinstance(x, GpuTensor)]
    if name in INDEXING and isinstance(args[0], GpuTensor):
        indices = [x for x in args[1] if isinstance(x, Tensor)]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            found.note(SYNC, f"{name} by a mask")
        on_host = [x for x in indices if any(x is stranger for stranger in strangers)]
        if on_host:
            found.note(UPLOAD, f"{name} by an index on the host")
        strangers = [x for x in strangers if not any(x is index for index in on_host)]
    if strangers:
        found.note(MIXED, name)


def _aligned(matrix: GpuTensor) -> bool:
    """Whether it, and each of its rows or columns, starts at a multiple of 16 bytes."""
    inner = matrix.inner
    steps = [inner.storage_offset(), *(s for s, n in zip(inner.stride(), inner.shape, strict=True) if s != 1 and n > 1)]
    return all(step * inner.itemsize % 16 == 0 for step in steps)


def _has_output_size(args: Any) -> bool:
    return any(isinstance(x, int) and not isinstance(x, bool) for x in args[1:])


def _compute(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    overload = func._schema.overload_name
    stand_in = vendor.HOST.get(f"{name}.{overload}" if overload else name)
    if stand_in is not None:
        return stand_in(*args, **kwargs)
    out = func(*args, **kwargs)
    if name in ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided") and isinstance(out, Tensor):
        out.zero_()
    return out


def _run_operator(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A custom operator of ours: its body, on tensors that still say ``cuda``. Kernels write nothing, so the torch
    backend, unrecorded, then fills what they were to fill: values decide what code does next."""
    names = [argument.name for argument in func._schema.arguments]
    operands = dict(zip(names, args, strict=False)) | kwargs
    body = _operators[func._schema.name]
    with Names(), Operations():  # modes are off within a mode
        body(**operands)
        if operands["backend"] != "torch":
            with recording().pause():
                body(**operands | {"backend": "torch"})


class Operations(TorchDispatchMode):
    """Every operation, also those that make tensors out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Devices as Python code names them, before C++ sees them: it would ask a driver for "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name == "cuda":
            func, name, args, kwargs = Tensor.to, "to", (args[0], DEVICE), {}
        elif name == "cpu":
            func, name, args, kwargs = Tensor.to, "to", (args[0], HOST), {}
        if name in ("as_tensor", "tensor", "asarray") and args:
            return _as_tensor(func, args, kwargs)
        if name in ("__int__", "__float__", "__index__") and isinstance(args[0], GpuTensor):
            recording().note(SYNC, name)
            return func(args[0].inner)
        if name == "to":
            return _to(args, kwargs)
        named = kwargs.get("device") is not None
        if named and is_cuda(kwargs["device"]):
            kwargs["device"] = DEVICE
        _named_devices.append(named)
        try:
            return func(*args, **kwargs)
        finally:
            _named_devices.pop()


def _to(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """``Tensor.to``: between the devices a copy; on one of them what it always does."""
    tensor, *rest = args
    target = kwargs.get("device")
    if target is None:
        target = next((x for x in rest if isinstance(x, (str, torch.device)) or type(x) is int), None)
        if target is None:
            other = next((x for x in rest if isinstance(x, Tensor)), kwargs.get("other"))
            target = None if other is None else other.device
    dtype = kwargs.get("dtype") or next((x.dtype if isinstance(x, Tensor) else x for x in rest
                                         if isinstance(x, (torch.dtype, Tensor))), None)  # fmt: skip
    moves = target is not None and is_cuda(target) != isinstance(tensor, GpuTensor)
    if moves:
        _named_devices.append(True)
        try:
            device = DEVICE if is_cuda(target) else torch.device(target)
            tensor = torch.ops.aten._to_copy.default(tensor, device=device)
        finally:
            _named_devices.pop()
    options = {key: kwargs[key] for key in ("copy", "memory_format") if key in kwargs and not moves}
    return tensor if dtype is None and not options else Tensor.to(tensor, dtype or tensor.dtype, **options)


def _as_tensor(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    device = kwargs.pop("device", None)
    if isinstance(args[0], GpuTensor):
        return _to((args[0],), {"device": device, "dtype": kwargs.get("dtype")})

    def plain(value: Any) -> Any:
        if isinstance(value, GpuTensor):
            recording().note(SYNC, "a value for a list")
            return value.inner.tolist()
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    made = func(plain(args[0]), *args[1:], **kwargs)
    return made if not is_cuda(device) else _to((made,), {"device": DEVICE})
