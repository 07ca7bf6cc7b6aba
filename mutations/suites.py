"""Tests of the default suite (`make test`) that cover each kernel, the ones likeliest to notice first."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from mutations import cpp_source, triton_source
from mutations.mutant import Mutant, chosen

ROOT = Path(__file__).resolve().parents[1]
NUMBER = 160  # mutants, about half of them of csrc/


@dataclass(frozen=True)
class Suite:
    """One run of pytest, which stops at the first failure."""

    tests: tuple[str, ...]
    only: str = ""  # pytest's -k
    environment: tuple[tuple[str, str], ...] = ()
    head_dims: tuple[int, ...] | None = None
    """Those that the copy's csrc/ is built for, and all that the tests take; (): as it is; None: the tests use none."""

    def arguments(self) -> list[str]:
        """Of pytest."""
        quick = "not slow and not browser and not gpu and not vllm"
        chosen = ["-k", self.only] if self.only else []
        return ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", quick, *chosen, *self.tests]

    def __str__(self) -> str:
        return " ".join((*self.tests, *(("-k", self.only) if self.only else ())))


def _interpreted(*names: str) -> Suite:
    """Some of the tests that tests/ptx/test_interpreter.py runs, in the process that is asked to."""
    tests = tuple(f"tests/ptx/interpreted_kernels.py::test_{name}" for name in names)
    return Suite(tests, environment=(("TRITON_INTERPRET", "1"),))


def _cuda(*names: str) -> Suite:
    return Suite(tuple(f"tests/kernels/test_{name}.py" for name in names), "cuda", head_dims=(64,))


_EMULATED = ("tests/emulation/test_emulated_attention.py", "tests/emulation/test_operator_matrix.py")
_OTHER_HEAD_DIMS = "80 or 96 or 128 or 256"  # in the tests' names; that they compile under torch.compile is the host's
EMULATED = Suite(_EMULATED, f"not ({_OTHER_HEAD_DIMS} or opcheck or compiles)", head_dims=(64,))
EVERY_HEAD_DIM = Suite(_EMULATED, _OTHER_HEAD_DIMS, head_dims=())
PLANTED = Suite(("tests/emulation/test_faults.py",), "no_false_alarm", head_dims=(64,))
ON_EMULATED = (EMULATED, PLANTED, EVERY_HEAD_DIM)
ATTENTION = Suite(("tests/ptx/test_attention_kernels.py",))
LOGITS = Suite(("tests/ptx/test_logits_kernels.py", "tests/ptx/test_offsets.py"))
HOPPER = Suite(("tests/ptx/test_hopper.py",), "test_forward")
ONE_HEAD, MASS = "nothing_behind_a_head_is_read", ("frame_mass", "mass_where_rows_miss_the_end")
SMALL_FRAMES = "one_key_more_than_a_tile_of_small_frames"
INTERPRETED = _interpreted(ONE_HEAD, SMALL_FRAMES, *MASS, "attention")
BACKWARD = _interpreted(ONE_HEAD, SMALL_FRAMES, "attention")
ON_TOKENS = (
    "logits_weighted_surrogate",
    "weighted_surrogate",
    "weighted_surrogate_of_nothing",
    "gradients_are_scaled_in_place",
)
ROWS = _interpreted("one_column_more_than_a_block", "logits", *ON_TOKENS)
SURROGATES = _interpreted(*ON_TOKENS, "a_second_backward_says_when_it_cannot_be")

SUITES: dict[str, tuple[Suite, ...]] = {
    "csrc/attention_tiles.cuh": ON_EMULATED,
    "csrc/attention_forward.cuh": ON_EMULATED,
    "csrc/attention_backward.cuh": ON_EMULATED,
    "csrc/attention_backward_rows.cuh": ON_EMULATED,
    "csrc/attention_backward_keys.cuh": ON_EMULATED,
    "csrc/attention_backward.cu": ON_EMULATED,
    "csrc/frame_mass.cuh": ON_EMULATED,
    "csrc/frame_mass.cu": ON_EMULATED,
    "csrc/frame_sums.cuh": ON_EMULATED,
    "csrc/visibility.cuh": ON_EMULATED,
    "csrc/head_mean.cu": (EMULATED, PLANTED),
    "csrc/logit_rows.cuh": (_cuda("logits_weighted_surrogate", "group_divergence", "zero_rows", "tile_ends"), PLANTED),
    "csrc/group_divergence.cuh": (_cuda("group_divergence", "zero_rows", "tile_ends"), PLANTED),
    "csrc/weighted_surrogate.cuh": (_cuda("logits_weighted_surrogate", "zero_rows", "surrogate_kinds"), PLANTED),
    "appo_kernels/attention/triton_device.py": (INTERPRETED, ATTENTION, HOPPER),
    "appo_kernels/attention/triton_forward.py": (INTERPRETED, ATTENTION, HOPPER),
    "appo_kernels/attention/triton_delta.py": (BACKWARD, ATTENTION),
    "appo_kernels/attention/triton_backward.py": (BACKWARD, ATTENTION),
    "appo_kernels/attention/triton_mass.py": (_interpreted(SMALL_FRAMES, *MASS), ATTENTION),
    "appo_kernels/attention/triton_plan.py": (_interpreted("block_mask"), ATTENTION),
    "appo_kernels/ops/group_divergence/triton_fold.py": (_interpreted("logits"), LOGITS),
    "appo_kernels/ops/weighted_surrogate/triton_terms.py": (SURROGATES, LOGITS),
    "appo_kernels/vocabulary/triton_rows.py": (ROWS, LOGITS),
}


def of(file: str) -> tuple[Suite, ...]:
    return SUITES[file]


def candidates(file: str) -> list[Mutant]:
    source = (ROOT / file).read_text()
    return list((triton_source if file.endswith(".py") else cpp_source).mutants(file, source))


def plan(number: int, seed: int) -> list[Mutant]:
    """``number`` mutants, of each file as many as its share of all candidates, its square root, that is: small kernels
    are not forgotten."""
    found = {file: candidates(file) for file in SUITES}
    shares = {file: len(mutants) ** 0.5 for file, mutants in found.items()}
    total = sum(shares.values())
    picked = (chosen(found[file], round(number * shares[file] / total), seed) for file in SUITES)
    return list(itertools.chain.from_iterable(picked))
