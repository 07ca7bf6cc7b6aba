"""``python -m ptxsim``: the opcodes and modifiers that the simulator executes."""

from ptxsim.instructions.table import CONTROL, TABLE


def listing() -> str:
    lines = []
    for name in sorted({*TABLE, *CONTROL}):
        modifiers = TABLE[name].modifiers if name in TABLE else CONTROL[name]
        # A shape of a product is a modifier too: 64 of them say no more than their ends.
        shapes = sorted((m for m in modifiers if m.startswith("m64n")), key=lambda m: int(m[4:].split("k")[0]))
        ends = [shapes[0], "...", shapes[-1]] if shapes else []
        lines.append(f"{name:16s} {' '.join([*sorted(modifiers - set(shapes)), *ends])}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(listing())
