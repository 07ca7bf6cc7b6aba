"""Mutants of csrc/: rules over the text, outside comments, strings and preprocessor lines."""

import re
from collections.abc import Callable, Iterator

from mutations.mutant import Mutant

Replace = str | Callable[[re.Match[str]], str]

NOT_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.DOTALL | re.MULTILINE
)
FUNCTION = re.compile(
    r"(?:__device__|__global__|^APPO_EXPORT|^cudaError_t)[^;{}()]*?(?:__launch_bounds__\([^()]*\)[^;{}()]*?)?"
    r"\b(?!__launch_bounds__)(\w+)\s*\(",
    re.MULTILINE,
)
# What a compiler decides, and what is not arithmetic: no fault of a kernel.
LEFT_ALONE = re.compile(r"static_assert|__launch_bounds__|template <|^\s*using |operator|sizeof \*params|_CASE")

OPPOSITES = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&", "+": "-", "-": "+",
    ">>": "<<", "<<": ">>", "max": "min", "min": "max", "fmaxf": "fminf", "fminf": "fmaxf", "logf": "log2f",
    "expm1f": "expf", "platform::exp2": "expf", "0": "1", "kStages - 2": "kStages - 1", "INT_MAX": "0",
    "INFINITY": "0.f", "-INFINITY": "0.f", "-FLT_MAX": "0.f",
}  # fmt: skip


def opposite(match: re.Match[str]) -> str:
    return OPPOSITES[match[0]]


# operator, what is looked for, what it becomes. Comparisons and sums have spaces around them, templates' brackets none.
RULES: list[tuple[str, str, Replace]] = [
    ("barrier removed", r"__sync(?:threads|warp)\(\);", ";"),
    ("wait removed", r"platform::wait_for_copies<[^>]*>\(\);", ";"),
    ("one group too many in flight", r"(?<=wait_for_copies<)(?:kStages - 2|0)(?=>)", opposite),
    ("commit removed", r"platform::commit_copies\(\);", ";"),
    ("bound", r"(?<= )(?:<=|>=|<|>)(?= )", opposite),
    ("comparison", r"(?<= )(?:==|!=)(?= )", opposite),
    ("condition", r"(?<= )(?:&&|\|\|)(?= )", opposite),
    ("sign", r"(?<=[\w)\]] )[-+](?= )", opposite),
    ("negation", r"(?<=[(,=?:] )-(?=[\w(])|(?<=\()-(?=[\w(])", ""),
    ("factor", r" [*/] [\w.]+(?:\[[^\[\]]*\])*(?![\w.(<\[]|::|->)", ""),
    ("remainder", r"(?<= )%(?= )", "/"),
    ("quotient", r"(?<= )/(?= )", "%"),
    ("off by one", r"(?<![\w.])\d+(?![\w.])", lambda m: str(int(m[0]) + 1)),
    ("shift", r"(?<= )(?:>>|<<)(?= )", opposite),
    ("assigned, not accumulated", r"(?<= )\+=(?= )", "="),
    ("subtracted the wrong way", r"(?<= )-=(?= )", "+="),
    ("not scaled", r"(?<= )\*=(?= )", "="),
    ("smallest and largest", r"\b(?:fmaxf|fminf|max|min)(?=\()", opposite),
    ("base of exp or log", r"platform::exp2(?=\()|\b(?:logf|expm1f)(?=\()", opposite),
    ("start value", r"-INFINITY|(?<![-\w])INFINITY|-FLT_MAX|INT_MAX", opposite),
    ("guard dropped", r"^([ \t]+)if \(.*\) (?:continue|return|break);", lambda m: m[1] + ";"),
    ("guard always true", r"(?<=[^e] if \()(?!constexpr)[^()]*(?:\([^()]*\)[^()]*)*(?=\))", "true"),
    ("choice", r"(?<![\w.-])[a-z][\w.]*(?= \? )", lambda m: f"!{m[0]}"),
    ("32 bits", r"static_cast<int64_t>(?=\()", "static_cast<int>"),
    ("lane", r"__shfl_xor_sync\((\w+), (\w+), (\w+)\)", lambda m: m[2]),
    ("pair swapped", r"\[0\](.{1,12})\[1\]", lambda m: f"[1]{m[1]}[0]"),
    ("not transposed", r"load_matrix_x4_transposed", "load_matrix_x4"),
    ("statement dropped", r"^([ \t]+)[\w.\[\]>*-]+(?:\([^;=]*\)|(?: [-+*]?= )[^;{}]*);$", lambda m: m[1] + ";"),
]  # fmt: skip
STRIDE = re.compile(r"\b(\w*stride_)([a-z])\b")


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of one file that the rules find."""
    code = NOT_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), source)
    functions = [(m.start(), m[1]) for m in FUNCTION.finditer(code)]

    def made(operator: str, match: re.Match[str], replacement: str) -> Iterator[Mutant]:
        line = code[code.rfind("\n", 0, match.start()) + 1 : code.find("\n", match.start())]
        if LEFT_ALONE.search(line) or replacement == match[0] or not match[0].strip():
            return
        function = next((name for at, name in reversed(functions) if at <= match.start()), "constants")
        # The text that is replaced may have held a comment.
        lines = "\n" * (source.count("\n", match.start(), match.end()) - replacement.count("\n"))
        yield Mutant(file, function, operator, match.start(), match.end(), replacement + lines, source)

    for operator, pattern, replace in RULES:
        for match in re.finditer(pattern, code, re.MULTILINE):
            yield from made(operator, match, replace if isinstance(replace, str) else replace(match))
    strides: dict[str, list[str]] = {}
    for match in STRIDE.finditer(code):
        letters = strides.setdefault(match[1], [])
        if match[2] not in letters:
            letters.append(match[2])
    for match in STRIDE.finditer(code):
        letters = strides[match[1]]
        other = letters[(letters.index(match[2]) + 1) % len(letters)]
        yield from made("stride", match, match[1] + other)
