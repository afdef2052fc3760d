# SPDX-License-Identifier: Apache-2.0
"""Systematic faults: each comparison, constant, bound and order of chosen files, changed by one.

``python -m tests.conformance.systematic --count 40 --seed 1`` draws a sample, runs the suite over a
copy of our back-end for each fault, and writes ``docs/conformance/systematic.md``: the share that
is caught, and every fault that is not.  Nobody chose these faults, so the share says what the
suite misses; faults that change no behaviour are among those that are not caught.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from tests.conformance.mutants import ROOT, STILLBORN, Mutant, expect_sound, judge
from tests.roots import SUITE

TABLE = ROOT / "docs" / "conformance" / "systematic.md"
DEVICE = ROOT / "device"
VHOST, VFIO = "vhost-user", "vfio-user"
RINGS = ("test_ring_*.py", "test_vhost_user_rings.py", "test_vhost_user_inflight.py")
BALLOON = ("test_balloon*.py", "test_ring_requests.py")


@dataclass(frozen=True)
class Area:
    """Files whose faults the same part of the suite ought to catch."""

    name: str
    files: tuple[str, ...]
    suite: tuple[str, ...]
    protocol: str = VHOST


AREAS = (
    Area("rings", ("vballoon/virtqueue/*.py",), RINGS),
    Area("vhost-user", ("vballoon/vhost_user/*.py",), ("test_vhost_user_*.py",)),
    Area("vfio-user", ("vfio-user/vfio_user/*.py", "vballoon/virtio_pci/*.py"),
         ("test_vfio_user_*.py", "test_pci_*.py"), VFIO),
    Area("balloon", ("vballoon/balloon/inflate.py", "vballoon/balloon/reporting.py",
                     "vballoon/balloon/stats.py", "vballoon/balloon/hinting.py",
                     "vballoon/balloon/roles.py", "vballoon/balloon/config.py",
                     "vballoon/memory/discard.py", "vballoon/memory/ranges.py",
                     "vballoon/memory/gather.py", "vballoon/memory/table.py"), BALLOON),
)  # fmt: skip
LEFT_OUT = ("resume", "state", "persist", "serving", "compiled", "packing", "testing", "client")
"""Parts of names of files: not used in this run, or no concern of a conformance suite."""
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+"}
BOUNDS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True)
class Fault:
    """One changed place."""

    file: str
    line: int
    what: str
    text: str
    """The whole file with the change."""


class Source:
    """A source file in which places can be replaced."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._lines = [0]
        for line in text.encode().splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Return where a node begins and ends, in bytes."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = self._lines[node.lineno - 1] + node.col_offset
        return begin, self._lines[node.end_lineno - 1] + node.end_col_offset

    def replaced(self, begin: int, end: int, new: str) -> str:
        """Return the text with one span replaced."""
        raw = self.text.encode()
        return (raw[:begin] + new.encode() + raw[end:]).decode()

    def part(self, begin: int, end: int) -> str:
        """Return a span of the text."""
        return self.text.encode()[begin:end].decode()


def faults(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, description and changed text for each place of a source."""
    source = Source(text)
    for function in ast.walk(source.tree):
        if isinstance(function, ast.FunctionDef):
            for node in _inside(function):
                yield from _changes(source, node)


def _inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Walk the body of a function, without functions in it, annotations and messages."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop(0)
        yield node
        if isinstance(node, (ast.FunctionDef, ast.JoinedStr, ast.Raise)):
            continue
        todo += [
            child
            for child in ast.iter_child_nodes(node)
            if not (isinstance(node, ast.AnnAssign) and child is node.annotation)
        ]


def _changes(source: Source, node: ast.AST) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        new = COMPARISONS[type(node.ops[0])]
        yield _between(source, node, node.left, node.comparators[0], new)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield _between(source, node, node.left, node.right, ARITHMETIC[type(node.op)])
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        begin, end = source.span(node)
        new = str(node.value + 1)
        yield node.lineno, f"{source.part(begin, end)} is {new}", source.replaced(begin, end, new)
    elif isinstance(node, ast.Call):
        name = node.func
        word = name.id if isinstance(name, ast.Name) else getattr(name, "attr", "")
        if word in BOUNDS:
            _, end = source.span(name)
            changed = source.replaced(end - len(word), end, BOUNDS[word])
            yield node.lineno, f"{word} is {BOUNDS[word]}", changed
    elif isinstance(node, (ast.FunctionDef, ast.If, ast.For, ast.While, ast.With)):
        yield from _orders(source, node.body)


def _between(
    source: Source, node: ast.expr, left: ast.expr, right: ast.expr, new: str
) -> tuple[int, str, str]:
    """Replace the operator between two operands, whatever brackets are around them."""
    begin, end = source.span(left)[1], source.span(right)[0]
    old = source.part(begin, end)
    operator = old.strip(" ()\n\\")
    changed = source.replaced(begin, end, old.replace(operator, new, 1))
    return node.lineno, f"{operator} is {new}", changed


def _orders(source: Source, body: Sequence[ast.stmt]) -> Iterator[tuple[int, str, str]]:
    """Swap neighbours that are plain statements."""
    plain = (ast.Assign, ast.AugAssign, ast.Expr)
    for first, second in pairwise(body):
        if isinstance(first, plain) and isinstance(second, plain) and not _is_text(first):
            (a, b), (c, d) = source.span(first), source.span(second)
            new = source.part(c, d) + source.part(b, c) + source.part(a, b)
            yield (
                first.lineno,
                "this statement and the next are swapped",
                source.replaced(a, d, new),
            )


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def all_faults(area: Area) -> list[Fault]:
    """Return every fault of an area whose text still compiles, in a fixed order."""
    found: list[Fault] = []
    for pattern in area.files:
        for path in sorted(DEVICE.glob(pattern)):
            if any(part in path.name for part in LEFT_OUT):
                continue
            name = str(path.relative_to(DEVICE))
            for line, what, text in faults(path.read_text(encoding="utf-8")):
                if _compiles(text):
                    found.append(Fault(name, line, what, text))
    return found


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def sample(seed: int, count: int) -> list[tuple[Area, Fault]]:
    """Return *count* faults, the areas in equal shares and in turn, by *seed*."""
    dice = random.Random(seed)
    shares = [
        dice.sample(all_faults(area), count // len(AREAS) + (number < count % len(AREAS)))
        for number, area in enumerate(AREAS)
    ]
    rows = zip_longest(*shares)
    return [(area, one) for row in rows for area, one in zip(AREAS, row, strict=True) if one]


def as_mutant(area: Area, fault: Fault) -> Mutant:
    """Return the fault in the form that :func:`~tests.conformance.mutants.judge` takes."""
    files = sorted({path.name for pattern in area.suite for path in SUITE.glob(pattern)})
    name = f"{fault.file}:{fault.line}"
    return Mutant(name, fault.file, fault.what, [], files, area.protocol, text=fault.text)


def judged(drawn: Sequence[tuple[Area, Fault]], jobs: int) -> list[tuple[Area, Mutant]]:
    """Judge the sample, *jobs* at a time."""

    def one(pair: tuple[Area, Fault]) -> tuple[Area, Mutant]:
        mutant = as_mutant(*pair)
        judge(mutant)
        told = mutant.caught_by[0] if mutant.caught_by else "NOT CAUGHT"
        print(f"{mutant.id}: {mutant.what}: {told} ({mutant.seconds:.0f} s)", flush=True)
        return pair[0], mutant

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, drawn))


def started(results: Sequence[tuple[Area, Mutant]]) -> list[tuple[Area, Mutant]]:
    """Return the faults whose program still starts; only these are valid."""
    return [pair for pair in results if pair[1].caught_by != [STILLBORN]]


def table(results: Sequence[tuple[Area, Mutant]], seed: int) -> Iterator[str]:
    """Yield the page as Markdown."""
    valid = started(results)
    caught = sum(bool(mutant.caught_by) for _, mutant in valid)
    yield "# Systematic mutants"
    yield ""
    yield "Generated by `python -m tests.conformance.systematic`; do not edit."
    yield ""
    yield f"{caught} of {len(valid)} faults are caught (seed {seed}; compiled loops off). Faults"
    yield "that change no behaviour are among the others, and have not been sorted out."
    yield f"{len(results) - len(valid)} more were drawn whose program does not start or never"
    yield "answers; they are not counted."
    yield ""
    yield "| area | faults there are | drawn | caught |"
    yield "| --- | --- | --- | --- |"
    for area in AREAS:
        mine = [mutant for one, mutant in valid if one == area]
        hit = sum(bool(mutant.caught_by) for mutant in mine)
        yield f"| {area.name} | {len(all_faults(area))} | {len(mine)} | {hit} |"
    yield ""
    yield "| place | fault | caught by (first) |"
    yield "| --- | --- | --- |"
    for _, mutant in valid:
        test = f"`{mutant.caught_by[0]}`" if mutant.caught_by else "**not caught**"
        yield f"| `{mutant.id}` | {mutant.what} | {test} |"


def main() -> int:
    """Judge a sample and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the sample, judge nothing")
    args = parser.parse_args()
    drawn = sample(args.seed, args.count)
    if args.list:
        for area, fault in drawn:
            print(f"{area.name}: {fault.file}:{fault.line}: {fault.what}")
        return 0
    for protocol in (VHOST, VFIO):
        expect_sound(protocol)
    results = judged(drawn, args.jobs)
    TABLE.write_text("\n".join(table(results, args.seed)) + "\n", encoding="utf-8")
    valid = started(results)
    caught = sum(bool(mutant.caught_by) for _, mutant in valid)
    print(f"{caught} of {len(valid)} caught; {len(results) - len(valid)} did not start")
    return 0


if __name__ == "__main__":
    sys.exit(main())
