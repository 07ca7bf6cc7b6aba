"""``python -m appo_kernels.doctor``: what is built, and which backend serves which operator on this machine.

For every operator each backend is asked, through the same ``unsupported`` that dispatch asks, about the dtypes and
head sizes that models use; a refusal is printed in the backend's own words.
"""

import itertools
import os
import pkgutil
import platform
from collections.abc import Iterator

import torch

import appo_kernels
from appo_kernels import backend_order, cuda_constants, cuda_library, dispatch, ops
from appo_kernels.closed_pipe import quiet_on_closed_pipe

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Of vision-language models in use; 72 and 112 stand for those that CUDA kernels are not built for.
HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 256)
WITH_HEADS = ("frame_mass", "frame_attention", "group_attention")


def operators() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(ops.__path__) if m.ispkg)


def devices() -> list[torch.device]:
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *cuda]


def problems(op: str, device: torch.device) -> Iterator[dispatch.Problem]:
    head_dims = HEAD_DIMS if op in WITH_HEADS else (0,)
    for dtype, head_dim, grad in itertools.product(DTYPES, head_dims, (False, True)):
        yield dispatch.Problem(op, device, dtype, head_dim, grad)


def describe(problem: dispatch.Problem) -> str:
    size = f", head size {problem.head_dim}" if problem.head_dim else ""
    return f"{str(problem.dtype).removeprefix('torch.')}{size}, {'with' if problem.needs_grad else 'without'} gradient"


def backend_lines(op: str, backend: str, device: torch.device) -> list[str]:
    """Answers of one backend to all problems of an operator, and the number of problems with each."""
    reasons: dict[str, list[dispatch.Problem]] = {}
    served = 0
    asked = list(problems(op, device))
    for problem in asked:
        try:
            reason = dispatch.why_not(problem, backend)
        except cuda_constants.StaleLibraryError:
            return [f"    {backend:7} no: its library was built from other sources, see above"]
        if reason is None:
            served += 1
        else:
            reasons.setdefault(reason, []).append(problem)
    if served == len(asked):
        return [f"    {backend:7} serves everything"]
    lines = [f"    {backend:7} serves {served} of {len(asked)} combinations of dtype, head size and gradient"]
    if not served and len(reasons) == 1:
        return [f"    {backend:7} no: {next(iter(reasons))}"]
    return lines + [f"            {len(concerned)} no: {reason}" for reason, concerned in reasons.items()]


def automatic_line(op: str, device: torch.device) -> str:
    """The choice of "auto": one backend for all problems, or one for each."""
    named = os.environ.get("APPO_BACKEND", "auto")
    if named != "auto":
        return f"    auto    is {named}: APPO_BACKEND is set"
    chosen: dict[str, list[str]] = {}
    for problem in problems(op, device):
        backend = dispatch.resolve(op, "auto", device, problem.dtype, problem.head_dim, problem.needs_grad)
        chosen.setdefault(backend, []).append(describe(problem))
    if len(chosen) == 1:
        return f"    auto    takes {next(iter(chosen))}"
    return "    auto    takes " + ", ".join(f"{b} for {len(what)} (such as {what[0]})" for b, what in chosen.items())


def order_lines() -> list[str]:
    """The rules by which "auto" asks backends, the first that fits a call deciding."""
    named = os.environ.get(backend_order.FILE)
    origin = f"{named} ({backend_order.FILE}), then the built-in table" if named else "the built-in table"
    return [
        f'Order in which "auto" asks backends, of {origin}. The first line that fits decides:',
        "  operator, dtype, compute capability, size of attention, order",
        *(f"  {rule}" for rule in backend_order.rules()),
    ]


def library_lines() -> list[str]:
    lines = []
    try:
        built_for = cuda_library.built_for()
    except cuda_constants.StaleLibraryError as error:
        return [f"CUDA kernels: cannot be used, and calls on a GPU that ask for them fail. {error}"]
    if built_for is None:
        lines.append(cuda_library.build_decision() or "CUDA kernels not built: the package was not installed with pip")
        lines.append(
            "  Install again where nvcc is on PATH; APPO_CUDA=ON makes it an error where they cannot be built."
        )
    else:
        lines.append(f"CUDA kernels: {cuda_library.path()}")
        lines.append(f"  built for {built_for}" + ("" if "compute" in built_for else " (no PTX: not for later GPUs)"))
        forward, backward = (", ".join(map(str, d)) for d in (cuda_constants.HEAD_DIMS, cuda_constants.GRAD_HEAD_DIMS))
        lines.append(f"  attention: head sizes {forward} forward, {backward} backward; Triton serves the others")
        lines.append(
            "  logits: logits_weighted_surrogate and group_divergence_from_logits; Triton serves the forms that"
        )
        lines.append("  start from hidden states (linear_weighted_surrogate, group_divergence) and token_logprobs")
    emulated = cuda_library.emulation_path()
    if emulated:
        lines.append(f"  emulated on the CPU by {emulated} (APPO_EMULATION_LIBRARY; for tests)")
    return lines


def report() -> str:
    lines = [
        f"appo_kernels {appo_kernels.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"torch sees {torch.cuda.device_count()} CUDA device(s); its CUDA is {torch.version.cuda or 'none'}",
    ]
    for device in devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        lines.append(f"  {device}: {properties.name}, sm_{properties.major}{properties.minor}")
    lines += library_lines()
    lines += ["", *order_lines()]
    for device in devices():
        lines += ["", f"On {device}:"]
        for op in operators():
            lines.append(f"  {op}")
            for backend in dispatch.MODULES:
                lines += backend_lines(op, backend, device)
            lines.append(automatic_line(op, device))
            if op == "group_attention":
                from appo_kernels.ops.group_attention import vendor

                lines.append(f"    torch   is made of: {vendor.describe(device)}")
    return "\n".join(lines)


if __name__ == "__main__":
    with quiet_on_closed_pipe():
        print(report())
