# SPDX-License-Identifier: Apache-2.0
"""The import directions of docs/architecture.md, read from the sources.

A room imports only from rooms above it; construct stays in ``spec/``; sockets, asyncio and calls
on guest memory stay in the modules that are made for them.
"""

from __future__ import annotations

import ast

import pytest
from tests.roots import PACKAGES, modules

ROOMS = (
    "errors", "sizes", "native", "memory", "virtqueue", "skipmap", "virtio", "balloon",
    "vhost_user", "virtio_pci", "control", "fleet", "snapshot", "keeper", "cli",
)  # fmt: skip
"""From the ground up."""
FORBIDDEN_PAIRS = {
    ("vhost_user", "balloon"): "transports import virtio, never balloon",
    ("virtio_pci", "balloon"): "transports import virtio, never balloon",
    ("vhost_user", "virtio_pci"): "transports never import each other",
    ("virtio_pci", "vhost_user"): "transports never import each other",
}
KNOWN_THIRD = {
    "construct",
    "numpy",
    "qemu",
    "rich",
    "PIL",
    "prometheus_client",
    "pytest",
    "hypothesis",
}
OWN = set(PACKAGES)
MAY_IMPORT = {
    "virtio_formats": set(),
    "virtio_conformance": {"virtio_formats"},
    "vballoon_spec": {"virtio_formats"},
    "fdsocket": set(),
    "vfio_user": {"virtio_formats", "fdsocket"},
    "vballoon": {"virtio_formats", "vballoon_spec", "vfio_user", "fdsocket"},
}
"""Package to the other packages of the project that it may import."""
VFIO_USER_FORMATS = ("virtio_formats.wire", "virtio_formats.vfio_user", "virtio_formats.pci")
THIRD_PARTY = {
    "vballoon": {"numpy", "qemu", "rich", "PIL", "pyseccomp", "prometheus_client"},
    "virtio_formats": {"construct", "numpy"},
    "virtio_conformance": {"numpy", "pytest", "rich"},
    "vballoon_spec": {"construct", "numpy"},
    "fdsocket": set(),
    "vfio_user": {"numpy"},
}
IO = {"socket", "selectors", "asyncio"}
IO_ROOMS = {"control", "fleet", "snapshot", "keeper", "cli"}
MAPPING = {"mmap", "fcntl"}
MAPPING_MODULES = {
    "vballoon.skipmap.export": "seals the memory file that carries an export",
    "vballoon.native.guard": "names the type of a mapping, to find it under an array",
    "vballoon.memory": "maps guest memory",
    "vballoon.skipmap.store": "maps its own bitmap",
    "vballoon.vhost_user.inflight": "maps the inflight region, which is not guest memory",
}


def imports(tree: ast.AST, *, typing_too: bool = True) -> list[str]:
    """Return the dotted names that *tree* imports; ``from a import b`` gives ``a.b``."""
    found = []
    for node in ast.walk(tree) if typing_too else runtime_nodes(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def runtime_nodes(tree: ast.AST):
    """All nodes but those under ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


MODULES = modules()


def violations(module: str, source: str) -> list[str]:
    """Return a sentence for each import of *module* that is not allowed."""
    tree = ast.parse(source)
    names = imports(tree)
    return (
        _packages(module, names)
        + _rooms(module, names)
        + _io(module, imports(tree, typing_too=False))
    )


def _packages(module: str, names: list[str]) -> list[str]:
    """Between packages, and to third parties."""
    top = module.split(".")[0]
    allowed = THIRD_PARTY[top]
    said = []
    for name in names:
        other = name.split(".")[0]
        if (
            other in ("construct", "numpy", "qemu", "rich", "PIL", "pytest")
            and other not in allowed
        ):
            said.append(f"{module} imports {other}")
        if other in OWN - {top} and other not in MAY_IMPORT[top]:
            said.append(f"{module} imports {name}: {top} does not depend on {other}")
        if (
            top == "vfio_user"
            and other == "virtio_formats"
            and not name.startswith(VFIO_USER_FORMATS)
        ):
            said.append(f"{module} imports {name}: vfio_user knows no virtio")
    return said


def _rooms(module: str, names: list[str]) -> list[str]:
    """Between the rooms of vballoon."""
    if not module.startswith("vballoon."):
        return []
    room = module.split(".")[1]
    said = []
    for name in names:
        if not name.startswith("vballoon."):
            continue
        other = name.split(".")[1]
        if other not in ROOMS:
            said.append(f"{module} imports {name}: no such room")
        elif room != "__main__" and ROOMS.index(other) > ROOMS.index(room):
            said.append(f"{module} imports {name}: {other} is below {room}")
        if (room, other) in FORBIDDEN_PAIRS:
            said.append(f"{module} imports {name}: {FORBIDDEN_PAIRS[room, other]}")
    return said


def _io(module: str, names: list[str]) -> list[str]:
    """Sockets and loops in shells, mappings where they belong."""
    top, *rest = module.split(".")
    last = rest[-1] if rest else ""
    shell = (
        top == "fdsocket"
        or last in ("shell", "server", "run")
        or module in ("vfio_user.busy", "vfio_user.client")
        or (top == "vballoon" and rest and rest[0] in IO_ROOMS)
        or module.startswith("virtio_conformance")  # it drives back-ends over sockets
    )
    said = []
    for name in names:
        other = name.split(".")[0]
        if other in IO and not shell:
            said.append(f"{module} imports {other}: only shells do")
        if (
            other in MAPPING
            and top == "vballoon"
            and not any(module == m or module.startswith(m + ".") for m in MAPPING_MODULES)
            and rest[0] not in IO_ROOMS
        ):
            said.append(f"{module} imports {other}: only memory maps guest memory")
    return said


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_only(module):
    assert violations(module, MODULES[module].read_text()) == []


PLANTED = [
    ("vballoon.memory.pages", "from vballoon.virtqueue import base", "is below memory"),
    ("vballoon.skipmap.bits", "import vballoon.balloon", "is below skipmap"),
    ("vballoon.vhost_user.session", "from vballoon.balloon import Balloon", "never balloon"),
    ("vballoon.vhost_user.server", "from vballoon import virtio_pci", "never import each other"),
    ("vballoon.virtio_pci.state", "import vballoon.vhost_user.vring", "never import each other"),
    ("vballoon.snapshot.take", "import vballoon.keeper.journal", "is below snapshot"),
    ("vballoon.keeper.config", "from vballoon.cli import serve", "is below keeper"),
    ("vballoon.balloon.device", "import construct as c", "imports construct"),
    ("vballoon.balloon.device", "import asyncio", "only shells do"),
    ("vballoon.vhost_user.session", "def f():\n    import socket", "only shells do"),
    ("vballoon.balloon.device", "import mmap", "only memory maps"),
    ("vballoon.balloon.device", "from vballoon.engine import x", "no such room"),
    ("virtio_formats.wire", "from vballoon.errors import PeerError", "does not depend on vballoon"),
    ("virtio_formats.wire", "import pytest", "imports pytest"),
    ("fdsocket.stream", "import vfio_user", "does not depend on"),
    ("vfio_user.device", "from vballoon.errors import PeerError", "does not depend on"),
    ("vfio_user.device", "import virtio_formats.virtio.balloon", "knows no virtio"),
    ("vfio_user.session", "import socket", "only shells do"),
    ("virtio_formats.wire", "import socket", "only shells do"),
    ("virtio_conformance.ring", "import vballoon", "does not depend on vballoon"),
    ("vballoon.cli.conform", "import virtio_conformance", "does not depend on"),
]


@pytest.mark.parametrize(("module", "source", "says"), PLANTED, ids=[p[1] for p in PLANTED])
def test_a_planted_import_is_found(module, source, says):
    """The test above can fail: for every rule one import that breaks it."""
    assert module in MODULES
    assert any(says in sentence for sentence in violations(module, source))


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return the modules that each module imports, by name; *sources* are their texts.

    Imports under TYPE_CHECKING count too: two files that need each other's types are one file.
    """
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = set()
        for target in imports(ast.parse(source)):
            found.add(target if target in sources else target.rpartition(".")[0])
        edges[name] = found & sources.keys() - {name}
    return edges


def cycles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the groups of modules that import each other in a circle."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reached = {name: reach(name) for name in edges}
    return {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in edges
        if name in reached[name]
    }


def test_no_two_files_import_each_other():
    found = cycles(graph({name: path.read_text() for name, path in MODULES.items()}))
    assert {tuple(sorted(c)) for c in found} == set()


def test_a_planted_cycle_is_found():
    sources = {
        "p.a": "from p.b import B",
        "p.b": "def f():\n    import p.c",
        "p.c": "if TYPE_CHECKING:\n    from p.a import A",
        "p.d": "from p.a import A",
        "p": "from p.a import A",
    }
    assert cycles(graph(sources)) == {frozenset({"p.a", "p.b", "p.c"})}
    assert cycles(graph(sources | {"p.c": ""})) == set()
    assert cycles(graph({"p": "from p.a import A", "p.a": "from p import B"})) == {
        frozenset({"p", "p.a"})
    }


def test_every_room_is_in_the_list():
    there = {name.split(".")[1] for name in MODULES if name.startswith("vballoon.")}
    assert there - {"__main__"} <= set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_every_source_file_has_its_licence_and_says_what_it_is_for(module):
    text = MODULES[module].read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert text.count("\n") <= 500
