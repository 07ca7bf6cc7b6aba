"""Mutants of Triton kernels: changes of the syntax tree of functions under ``@triton.jit``, made in their text."""

import ast
from collections.abc import Iterator

from mutations.mutant import Mutant

SWAPPED_CALLS = {
    "tl.exp2": "tl.exp", "tl.exp": "tl.exp2", "tl.log2": "tl.log", "tl.log": "tl.log2",
    "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum", "tl.max": "tl.min", "tl.min": "tl.max",
}  # fmt: skip
COMPARISONS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
REDUCTIONS = ("tl.sum", "tl.max", "tl.min", "tl.cumsum")


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of the kernels of one file."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:  # the tree counts bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not _is_kernel(function):
            continue
        changes = _Changes(source, {a.arg for a in function.args.args})
        for statement in function.body:
            changes.visit(statement)
        for operator, node, replacement in changes.found:
            start = place(node.lineno, node.col_offset)
            stop = place(node.end_lineno or 0, node.end_col_offset or 0)
            before = source[start:stop]
            # Lines are kept, so that what is behind keeps its place: an expression of several is in brackets.
            missing = before.count("\n") - replacement.count("\n")
            ends = "\n" * missing
            replacement = f"({replacement}{ends})" if isinstance(node, ast.expr) else replacement + ends
            yield Mutant(file, function.name, operator, start, stop, replacement, source)


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)


class _Changes(ast.NodeVisitor):
    """(operator, node, text that it becomes), for all nodes of a kernel's body."""

    def __init__(self, source: str, arguments: set[str]) -> None:
        self.source = source
        self.strides = sorted(a for a in arguments if a.startswith("stride_") and len(a) == len("stride_xy"))
        self.found: list[tuple[str, ast.expr | ast.stmt, str]] = []

    def text(self, node: ast.AST) -> str:
        text = ast.get_source_segment(self.source, node) or ""
        return f"({text})" if isinstance(node, ast.BinOp | ast.Compare | ast.IfExp | ast.UnaryOp) else text

    def add(self, operator: str, node: ast.expr | ast.stmt, text: str) -> None:
        self.found.append((operator, node, text))

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        if name in SWAPPED_CALLS:
            self.add("another function", node.func, SWAPPED_CALLS[name])
        if name in ("tl.load", "tl.store") and "mask" in keywords:
            left = [self.text(a) for a in node.args]
            left += [f"{k.arg}={self.text(k.value)}" for k in node.keywords if k.arg not in ("mask", "other")]
            self.add("mask dropped", node, f"{name}({', '.join(left)})")
        if "other" in keywords:
            value = self.text(keywords["other"])
            self.add("other value", keywords["other"], "1" if value in ("0", "0.0") else "0")
        if name == "tl.where":
            self.add("choice", node, self.text(node.args[1]))
            self.add("choice", node, self.text(node.args[2]))
        if name == "tl.dot":
            if len(node.args) > 2:
                precision = "".join(f", {k.arg}={self.text(k.value)}" for k in node.keywords)
                product = f"{name}({self.text(node.args[0])}, {self.text(node.args[1])}{precision})"
                self.add("accumulator dropped", node, product)
            if "input_precision" in keywords:
                self.add("precision", keywords["input_precision"], '"tf32"')
        if name == "tl.fma":
            self.add("accumulator dropped", node, f"{self.text(node.args[0])} * {self.text(node.args[1])}")
        if name == "range":
            texts = [self.text(a) for a in node.args]
            stop = 0 if len(texts) == 1 else 1
            short = [*texts[:stop], f"{texts[stop]} - 1", *texts[stop + 1 :]]
            self.add("loop bound", node, f"range({', '.join(short)})")
            late = ["1", *texts] if stop == 0 else [f"{texts[0]} + 1", *texts[1:]]
            self.add("loop bound", node, f"range({', '.join(late)})")
        if name.endswith(".to") and isinstance(node.func, ast.Attribute):
            self.add("cast dropped", node, self.text(node.func.value))
        if name == "tl.cast":
            self.add("cast dropped", node, self.text(node.args[0]))
        if name in REDUCTIONS and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            self.add("axis", node.args[1], str(1 - int(node.args[1].value)))  # type: ignore[arg-type]
        if name == "tl.program_id" and isinstance(node.args[0], ast.Constant):
            self.add("axis", node.args[0], str((int(node.args[0].value) + 1) % 3))  # type: ignore[arg-type]
        # Shapes and numbers of lanes are no arithmetic; nor are axes, precisions and the axis of a reduction.
        if name not in ("tl.arange", "tl.zeros", "tl.full", "tl.program_id", "tl.num_programs"):
            for argument in node.args[: 1 if name in REDUCTIONS else None]:
                self.visit(argument)
            for keyword in node.keywords:
                if keyword.arg in ("mask", "other"):
                    self.visit(keyword.value)
        if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name):
            self.visit(node.func.value)  # what a method is called on

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self.text(node.left), self.text(node.right)
        kind = type(node.op)
        if kind is ast.Add:
            self.add("sign", node, f"{left} - {right}")
            self.add("term dropped", node, left)
        elif kind is ast.Sub:
            self.add("sign", node, f"{left} + {right}")
        elif kind in (ast.Mult, ast.Div):
            self.add("factor", node, left)
        elif kind is ast.FloorDiv:
            self.add("quotient", node, f"{left} % {right}")
        elif kind is ast.Mod:
            self.add("quotient", node, f"{left} // {right}")
        elif kind in (ast.BitAnd, ast.BitOr):
            self.add("condition", node, left)
            self.add("condition", node, right)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            operator = COMPARISONS[type(node.ops[0])]
            self.add("bound", node, f"{self.text(node.left)} {operator} {self.text(node.comparators[0])}")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        target, value = self.text(node.target), self.text(node.value)
        self.add("assigned, not accumulated", node, f"{target} = {value}")
        self.add("statement dropped", node, "pass")
        self.visit(node.value)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not isinstance(node.operand, ast.Constant):
            self.add("negation", node, self.text(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is int:
            self.add("off by one", node, str(node.value + 1))
        elif type(node.value) is float:
            self.add("number", node, repr(node.value * 2 + 1))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.strides:
            same = [s for s in self.strides if s[:-1] == node.id[:-1]]
            other = same[(same.index(node.id) + 1) % len(same)]
            if other != node.id:
                self.add("stride", node, other)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add("choice", node, f"{self.text(node.orelse)} if {self.text(node.test)} else {self.text(node.body)}")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if any(isinstance(s, ast.Return) for s in node.body) and not node.orelse:
            self.add("guard dropped", node.test, "False")
        elif not (isinstance(node.test, ast.Name) and node.test.id.isupper()):
            self.add("guard", node.test, f"not ({self.text(node.test)})")
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func)
            if name == "tl.debug_barrier":
                self.add("barrier removed", node, "pass")
                return
            if name == "tl.store":
                self.add("statement dropped", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
