"""Reading a compiled program's text: what travels between devices and what takes the cycles, loops counted."""

import dataclasses
import math
import re
from collections.abc import Iterator

KERNEL = "tpu_custom_call"  # a Pallas kernel
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # others end in their number of bits


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction.

    Attributes:
      name, kind: as in the text, but `KERNEL`; a collective that runs in the background counts once, at its start.
      source: path of the JAX operation that it comes from.
      times: how often one run of the program executes it; loops without a known count count once.
      bytes: of its result.
      cycles: that the compiler expects of one execution; None: it says nothing.
      background: a collective that runs beside other instructions.
    """

    name: str
    kind: str
    source: str
    times: int
    bytes: float
    cycles: int | None
    background: bool = False


def ops(text: str) -> list[Op]:
    """Every instruction of a compiled module that is executed by itself (what is inside of fusions is not)."""
    computations, entry = _computations(text)
    found: list[Op] = []

    channels: set[str] = set()  # a collective in the background is written down once per op that it runs beside
    beside = {
        channel
        for name, lines in computations.items()
        if "async_collective_fusion" in name  # the TPU compiler's name for such an op
        for channel in re.findall(r"channel_id=(\d+)", "\n".join(lines))
    }

    def visit(name: str, times: int, inside: bool, elsewhere: bool) -> None:
        for line in computations.get(name, ()):
            op = _parse(line, times)
            if op is None:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            if op.kind in COLLECTIVES and channel:
                if channel[1] not in channels:
                    background = op.background or elsewhere or channel[1] in beside
                    cycles = None if elsewhere else op.cycles
                    found.append(dataclasses.replace(op, background=background, cycles=cycles))
                channels.add(channel[1])
            elif not inside:
                found.append(op)
            offloaded = 'async_execution_thread="sparsecore"' in line
            for called, count, by_itself in _calls(op.kind, line, computations):
                visit(called, times * count, inside or offloaded or not by_itself, elsewhere or offloaded)

    visit(entry, 1, False, False)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of its instructions, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return computations, entry


def _parse(line: str, times: int) -> Op | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", line)
    if not match:
        return None
    name, shapes, kind = match.groups()
    if kind.endswith("-done") or kind == "async-update":
        return None
    background = kind.endswith("-start")
    source = re.search(r'op_name="([^"]*)"', line)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
    kind = kind.removesuffix("-start")
    if kind == "async":  # "async-start" names what it starts
        inner = re.search(r"calls=%?(" + "|".join(COLLECTIVES) + ")", line)
        kind = inner[1] if inner else kind
    if f'custom_call_target="{KERNEL}"' in line:
        kind = KERNEL
    return Op(
        name=name,
        kind=kind,
        source=source[1] if source else "",
        times=times,
        bytes=_result_bytes(kind, line, shapes),
        cycles=int(cycles[1]) if cycles else None,
        background=background,
    )


def _result_bytes(kind: str, line: str, shapes: str) -> float:
    sizes = [_BYTES.get(dtype) or int(re.sub(r"\D", "", dtype)[:2] or 8) / 8 for dtype, _ in _shapes(shapes)]
    parts = [
        size * math.prod(map(int, filter(None, dims.split(","))))
        for size, (_, dims) in zip(sizes, _shapes(shapes), strict=True)
    ]
    started = f"{kind}-start(" in line or "async-start(" in line
    # What a start returns is (operands, results, ...): the results are the larger of the two for a gather.
    return max(parts, default=0) if started and kind in COLLECTIVES else sum(parts)


def _shapes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]", text)


def _calls(kind: str, line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int, bool]]:
    """Computations that an instruction runs, how often, and whether their instructions are executed by themselves."""
    names = dict(re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line))
    if kind == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        # Else the condition compares the counter, which begins at 0, with a constant.
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(names["condition"], ())))
        yield names["body"], int(known[1] if known else limits[0] if len(limits) == 1 else 1), True
    elif kind == "call":
        yield names["to_apply"], 1, True
    elif kind == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        for name in re.findall(r"%?([\w.\-]+)", branches[1]) if branches else ():
            yield name, 1, True
    elif "calls" in names:
        yield names["calls"], 1, False
    elif kind in ("custom-call", KERNEL):
        called = re.search(r"called_computations=\{%?([\w.\-]+)\}", line)
        if called:
            yield called[1], 1, False
