"""Machine code as text -> instructions -> basic blocks -> natural loops.

Reads what `nvdisasm -c` prints for NVIDIA and what LLVM prints for AMD. Nothing here knows what
an instruction costs (`model.py`) or which loop matters (`loops.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Block", "Function", "Instruction", "Loop", "ParseError", "read_amdgcn", "read_sass"]


class ParseError(ValueError):
    """The machine code does not look as expected. It is never read as "nothing found"."""


@dataclass(frozen=True)
class Instruction:
    """`opcode` is the full mnemonic (`HGMMA.64x64x16.F32.BF16`), `guard` the predicate without
    the `@`, `target` the label of a branch."""

    opcode: str
    operands: str = ""
    guard: str = ""
    target: str = ""

    @property
    def base(self) -> str:
        """The mnemonic up to its first modifier."""
        return self.opcode.split(".", 1)[0]


@dataclass
class Block:
    """A basic block; `successors` are indices into `Function.blocks`."""

    labels: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: every block that reaches a back edge to `header` without passing it."""

    header: int
    blocks: frozenset[int]

    def inside(self, other: Loop) -> bool:
        return self.header != other.header and self.blocks < other.blocks


@dataclass
class Function:
    name: str
    blocks: list[Block]

    def instructions(self, blocks: Iterable[int] | None = None) -> list[Instruction]:
        chosen = range(len(self.blocks)) if blocks is None else sorted(blocks)
        return [i for b in chosen for i in self.blocks[b].instructions]

    def loops(self) -> list[Loop]:
        """All natural loops, in the order of their headers; loops with one header are merged."""
        dominators = _dominators(self.blocks)
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for b, block in enumerate(self.blocks):
            for s in block.successors:
                predecessors[s].append(b)
        bodies: dict[int, set[int]] = {}
        for b, block in enumerate(self.blocks):
            for header in block.successors:
                if header not in dominators[b]:
                    continue
                body = bodies.setdefault(header, {header})
                todo = [b]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo.extend(p for p in predecessors[at] if dominators[p])
        return [Loop(header, frozenset(bodies[header])) for header in sorted(bodies)]


def _dominators(blocks: Sequence[Block]) -> list[set[int]]:
    """The dominators of each block; empty for unreachable blocks."""
    reachable = {0}
    todo = [0]
    while todo:
        for s in blocks[todo.pop()].successors:
            if s not in reachable:
                reachable.add(s)
                todo.append(s)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for b in reachable:
        for s in blocks[b].successors:
            predecessors[s].append(b)
    result = [set(reachable) if b in reachable else set() for b in range(len(blocks))]
    result[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reachable - {0}):
            new = set.intersection(*(result[p] for p in predecessors[b])) | {b}
            if new != result[b]:
                result[b] = new
                changed = True
    return result


@dataclass(frozen=True)
class _Flow:
    """How control leaves an instruction."""

    target: str = ""
    falls_through: bool = True
    ends_block: bool = False


def _build(name: str, lines: list[str | tuple[Instruction, _Flow]]) -> Function:
    """Blocks from a list of labels (strings) and instructions."""
    blocks = [Block()]
    flows: list[_Flow] = [_Flow()]
    closed = False
    for line in lines:
        if isinstance(line, str):
            if blocks[-1].instructions:
                blocks.append(Block())
                flows.append(_Flow())
            blocks[-1].labels.append(line)
            closed = False
            continue
        instruction, flow = line
        if closed:
            blocks.append(Block())
            flows.append(_Flow())
        blocks[-1].instructions.append(instruction)
        flows[-1] = flow
        closed = flow.ends_block
    where = {label: b for b, block in enumerate(blocks) for label in block.labels}
    for b, (block, flow) in enumerate(zip(blocks, flows, strict=True)):
        if flow.target:
            if flow.target not in where:
                raise ParseError(f"{name}: a branch to {flow.target}, a label that is nowhere")
            block.successors.append(where[flow.target])
        if flow.falls_through and b + 1 < len(blocks) and b + 1 not in block.successors:
            block.successors.append(b + 1)
    return Function(name, blocks)


# -- NVIDIA ---------------------------------------------------------------------------------------
_SASS_LABEL = re.compile(r"^(\.L_[\w.]+|\.text\.[\w.$]+|[\w$]+):")
_SASS_LINE = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
)
_SASS_TARGET = re.compile(r"`\(([^)]+)\)")
_NVIDIA_BRANCHES = {"BRA", "JMP", "CALL"}
_NVIDIA_ENDS = {"EXIT", "RET", "KILL", "BPT"}


def _sass_flow(instruction: Instruction) -> _Flow:
    base = instruction.base
    if base in _NVIDIA_BRANCHES:
        # "BRA.U UP2, `(L)` has its condition among the operands. CALL.REL.NOINC is ptxas's way
        # to leave a loop; where it is not predicated it may come back.
        only_target = re.fullmatch(r"`\([^)]+\)", instruction.operands) is not None
        always = not instruction.guard and only_target and base != "CALL"
        return _Flow(instruction.target, not always, True)
    if base in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ParseError(f"{instruction.opcode}: an indirect branch, where no loop can be read")
    if base in _NVIDIA_ENDS:
        return _Flow("", bool(instruction.guard), True)
    return _Flow()


def read_sass(text: str, name: str = "") -> Function:
    """The entry function of `nvdisasm -c` output; `name` chooses one where there are several."""
    sections = re.split(r"^\s*//-+ (\.text\.[\w.$]+)\s+-+$", text, flags=re.MULTILINE)
    if len(sections) > 1:
        bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
        key = f".text.{name}" if name else next(iter(bodies))
        if key not in bodies:
            raise ParseError(f"no function {name!r} in the disassembly, only {', '.join(bodies)}")
        text, name = bodies[key], key.removeprefix(".text.")
    lines: list[str | tuple[Instruction, _Flow]] = []
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            lines.append(label.group(1))
        elif found := _SASS_LINE.match(line):
            guard, opcode, operands = found.groups()
            target = ""
            if opcode.split(".")[0] in _NVIDIA_BRANCHES and (t := _SASS_TARGET.search(operands)):
                target = t.group(1)
            instruction = Instruction(opcode, operands, guard or "", target)
            lines.append((instruction, _sass_flow(instruction)))
    if not any(isinstance(line, tuple) for line in lines):
        raise ParseError("no instruction in the disassembly")
    return _build(name, lines)


# -- AMD ------------------------------------------------------------------------------------------
_AMD_LABEL = re.compile(r"^([.\w$]+):")
_AMD_LINE = re.compile(r"^\s+([a-z]\w*)\s*(.*?)\s*$")
_AMD_INSTRUCTION = re.compile(r"^(s|v|ds|buffer|global|flat|scratch|image)_\w+$")


def _amd_flow(instruction: Instruction) -> _Flow:
    if instruction.opcode == "s_branch":
        return _Flow(instruction.target, False, True)
    if instruction.opcode.startswith("s_cbranch"):
        return _Flow(instruction.target, True, True)
    if instruction.opcode in ("s_endpgm", "s_setpc_b64", "s_trap"):
        return _Flow("", False, True)
    return _Flow()


def read_amdgcn(text: str, name: str = "") -> Function:
    """The one kernel of LLVM's assembly for AMD."""
    lines: list[str | tuple[Instruction, _Flow]] = []
    for raw in text.splitlines():
        line = raw.split(";", 1)[0].rstrip()
        if label := _AMD_LABEL.match(line):
            if label.group(1).startswith(".Lfunc_end"):
                break
            # .Ltmp labels only carry line numbers
            if not label.group(1).startswith(".Ltmp"):
                lines.append(label.group(1))
        elif (found := _AMD_LINE.match(line)) and _AMD_INSTRUCTION.match(found.group(1)):
            opcode, operands = found.groups()
            branches = opcode == "s_branch" or opcode.startswith("s_cbranch")
            instruction = Instruction(opcode, operands, "", operands if branches else "")
            lines.append((instruction, _amd_flow(instruction)))
    if not any(isinstance(line, tuple) for line in lines):
        raise ParseError("no instruction in the assembly")
    return _build(name, lines)
