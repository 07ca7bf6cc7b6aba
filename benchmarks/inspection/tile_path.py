"""The instructions that a warp takes through one tile in a kernel's loop over tiles, read from compiled code.

``sass.read`` counts innermost loops. The CUDA kernels' loop over tiles has another inside, for tiles of several
frames, and branches around masks, so this follows the control flow: of all ways through the loop's body the one with
all of its matrix products and copies, and beyond these the fewest instructions. That is a tile that all rows see whole.
"""

import re
from collections import Counter
from pathlib import Path

from benchmarks.inspection import sass

Blocks = dict[str, list[str]]  # name -> opcodes
Edges = dict[str, list[str]]
BLOCK = re.compile(r'^"([^"]+)"\n\[label="(.*)"\]$', re.MULTILINE)
EDGE = re.compile(r'^"([^"]+)":\S+ -> "([^"]+)":', re.MULTILINE)
OPCODE = re.compile(r"^(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.x]*)")


def read(cubin: Path) -> dict[str, Counter[str]]:
    """By kernel: instructions of one pass by class, as ``sass.Code.loop``; "copies": from global to shared memory.

    Nothing is counted for kernels without tensor-core instructions.
    """
    graphs = re.split(r'^subgraph "cluster_([^"]+)" {$', sass.run("nvdisasm", "-bbcfg", cubin), flags=re.MULTILINE)
    kernels = zip(graphs[1::2], graphs[2::2], strict=True)
    return {name: _tile(graph) for name, graph in kernels if not name.startswith("$")}


def _tile(graph: str) -> Counter[str]:
    blocks, edges = _control_flow(graph)
    weights = {name: _mix(opcodes) for name, opcodes in blocks.items()}
    loops = [loop for loop in _loops(blocks, edges) if any(weights[name]["tensor"] for name in loop)]
    if not loops:
        return Counter()
    loop = max(loops, key=lambda names: sum(weights[name]["tensor"] for name in names))
    return _best_pass(loop, weights, edges, next(iter(blocks)))


def _control_flow(graph: str) -> tuple[Blocks, Edges]:
    blocks: Blocks = {}
    for name, label in BLOCK.findall(graph):
        lines = (re.sub(r"\\(.)", r"\1", line).strip() for line in re.split(r"\\l|\|<\w+>|<entry>", label))
        blocks[name] = [match[1] for line in lines if line.endswith(";") and (match := OPCODE.match(line))]
    edges: Edges = {name: [] for name in blocks}
    for start, end in EDGE.findall(graph):
        edges[start].append(end)
    return blocks, edges


def _mix(opcodes: list[str]) -> Counter[str]:
    mix = Counter(sass.NAMES.get(sass.base(opcode), "other") for opcode in opcodes)
    mix["copies"] = sum(sass.base(opcode) == "LDGSTS" for opcode in opcodes)
    mix["all"] = len(opcodes)
    return mix


def _loops(blocks: Blocks, edges: Edges) -> list[set[str]]:
    """Strongly connected components of more than one block, or of one that follows itself."""
    after = {name: _reachable(name, edges) for name in blocks}
    found: list[set[str]] = []
    for name in blocks:
        component = {other for other in after[name] if name in after[other]}
        if component and component not in found:
            found.append(component)
    return found


def _reachable(start: str, edges: Edges) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += edges[name]
    return seen


def _best_pass(loop: set[str], weights: dict[str, Counter[str]], edges: Edges, entry: str) -> Counter[str]:
    """From where the loop is entered, without repeating an inner loop, to where it starts again."""
    head = _entered_at(loop, edges, entry)
    order: list[str] = []
    back: set[tuple[str, str]] = set()
    _sort(head, loop, edges, order, back, set())
    best: dict[str, Counter[str]] = {}
    for name in order:  # what follows a block is before it
        inside = [end for end in edges[name] if end in loop and (name, end) not in back]
        ways = [best[end] for end in inside if end in best]
        if (name, head) in back:
            ways.append(Counter())
        if ways:
            best[name] = weights[name] + max(ways, key=lambda mix: (mix["tensor"], mix["copies"], -mix["all"]))
    return best[head]


def _entered_at(loop: set[str], edges: Edges, entry: str) -> str:
    seen: set[str] = set()
    waiting = [entry]
    while waiting:
        name = waiting.pop(0)
        if name in loop:
            return name
        if name not in seen:
            seen.add(name)
            waiting += edges[name]
    raise AssertionError("a loop that cannot be reached")


def _sort(
    name: str, loop: set[str], edges: Edges, order: list[str], back: set[tuple[str, str]], open_blocks: set[str]
) -> None:
    """Depth first: ``order`` from the last block to the first, ``back`` the edges that close a loop."""
    open_blocks.add(name)
    for end in edges[name]:
        if end not in loop:
            continue
        if end in open_blocks:
            back.add((name, end))
        elif end not in order:
            _sort(end, loop, edges, order, back, open_blocks)
    open_blocks.remove(name)
    order.append(name)
