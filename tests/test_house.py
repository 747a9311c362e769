"""The laws of the house that a machine can check: who imports whom, and what must not grow.

Each test gathers every place that breaks its rule, so that a failure is a list to work through.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent

# Each floor and the floors it may import; everybody may import conf.schema.
FLOORS: dict[str, set[str]] = {
    "conf": set(),
    "models": set(),
    "data": set(),
    "parallel": {"models"},
    "train": {"conf", "data", "models", "parallel"},
    "launch": {"conf", "data", "models", "parallel", "train"},
}

# What a lower floor may import from outside, by the longest matching path; the others what pyproject.toml declares.
OUTSIDE: dict[str, set[str]] = {
    "conf/": {"hydra", "omegaconf", "yaml"},
    "conf/schema.py": set(),
    "models/": {"torch"},
    "models/cores/flash.py": {"torch", "flash_attn"},
    "parallel/": {"torch"},
}

# These parts of models/ read and write files for people, and may compose a configuration; no mechanism imports them.
MODELS_EDGE = (
    "models/families/",
    "models/claims/",
    "models/commands/",
    "models/__main__.py",
    "models/catalog.py",
    "models/checkpoint.py",
    "models/shards.py",
    "models/weights.py",
)
EDGE_OUTSIDE = {"torch", "numpy", "safetensors", "tokenizers", "yaml"}

# Import names that differ from the name of the distribution which provides them.
DISTRIBUTIONS = {"hydra": "hydra-core", "omegaconf": "hydra-core", "megatron": "megatron-core", "yaml": "pyyaml"}

SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = [
    *SOURCES,
    *TESTS,
    *(path for place in ("conf", "docs", "slurm", "tests") for path in (ROOT / place).rglob("*.[!p]*")),
    *(path for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/run") for path in ROOT.glob(pattern)),
]


@functools.cache  # not while tests are collected, which every worker does
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(tree: ast.AST, package: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `tree`, in function bodies too; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: 1 - node.level or None]
                base = ".".join([*parents, base] if base else parents)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def file_imports(path: Path) -> Iterator[tuple[int, str]]:
    return imports(tree_of(path), ".".join(path.relative_to(ROOT).parent.parts))


def gather(pattern: str, paths: list[Path]) -> list[str]:
    """Every line that matches, as `file:line: text`."""
    return [
        f"{name(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def is_edge(path: Path) -> bool:
    return name(path).startswith(MODELS_EDGE)


def test_no_floor_imports_a_higher_one() -> None:
    wrong = []
    for path in SOURCES:
        floor = floor_of(path)
        allowed = FLOORS[floor] | {floor} | ({"conf"} if is_edge(path) else set())
        for line, imported in file_imports(path):
            other = imported.split(".")[0]
            schema = imported == "conf" or imported.startswith("conf.schema")
            if other in FLOORS and other not in allowed and not schema:
                wrong.append(f"{name(path)}:{line} imports {imported}")
    assert not wrong


def test_lower_floors_import_little_from_outside() -> None:
    wrong = []
    for path in SOURCES:
        places = [place for place in OUTSIDE if name(path).startswith(place)]
        if not places:
            continue
        allowed = EDGE_OUTSIDE if is_edge(path) else OUTSIDE[max(places, key=len)]
        for line, imported in file_imports(path):
            other = imported.split(".")[0]
            if other not in FLOORS and other not in sys.stdlib_module_names and other not in allowed:
                wrong.append(f"{name(path)}:{line} imports {imported}")
    assert not wrong


def test_mechanisms_know_no_files_and_no_other_devices() -> None:
    edge_modules = tuple(prefix.removesuffix(".py").strip("/").replace("/", ".") for prefix in MODELS_EDGE)
    wrong = []
    for path in SOURCES:
        if floor_of(path) != "models":
            continue
        for line, imported in file_imports(path):
            if imported.startswith("torch.distributed") or (not is_edge(path) and imported.startswith(edge_modules)):
                wrong.append(f"{name(path)}:{line} imports {imported}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                wrong.append(f"{name(path)}:{node.lineno} uses torch.distributed")
    assert not wrong


def test_a_scheme_is_named_by_its_own_folder_alone() -> None:
    schemes = {f"models.attention.{path.stem}" for path in (ROOT / "models/attention").glob("[!_]*.py")}
    wrong = [
        f"{name(path)}:{line} imports {imported}"
        for path in SOURCES
        if path.parent != ROOT / "models/attention"
        for line, imported in file_imports(path)
        if imported in schemes
    ]
    assert not wrong


def test_nothing_is_chosen_by_a_name() -> None:
    names = re.compile(r"(scheme|model|family|arch)(_name|_type)?")
    wrong = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Compare) or not isinstance(node.left, ast.Name | ast.Attribute):
                continue
            left = node.left.id if isinstance(node.left, ast.Name) else node.left.attr
            literals = [item for side in node.comparators for item in ast.walk(side) if isinstance(item, ast.Constant)]
            if names.fullmatch(left) and any(isinstance(item.value, str) for item in literals):
                wrong.append(f"{name(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


def schemes_named(tree: ast.AST) -> set[int]:
    """Lines that hold the name of a scheme of attention, residual or injection as a text."""
    folders = (ROOT / "models" / folder for folder in ("attention", "residual", "injection"))
    # "plain" is a word of many meanings; what nobody chooses by it, the other test of names finds
    schemes = {path.stem for folder in folders for path in folder.glob("[!_]*.py")} - {"plain"}
    return {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in schemes}


def schemes_decided_on(tree: ast.AST) -> set[int]:
    """Lines that compare something with the name of a scheme, match it, or look it up in a table of such names."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.match_case):
            found |= schemes_named(node if isinstance(node, ast.Compare) else node.pattern)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            found |= schemes_named(node.value)
    return found


def test_no_behaviour_goes_by_the_name_of_a_scheme() -> None:
    translated, as_data = "models/families/", ("models/claims/", "launch/demo/")
    wrong = []
    for path in SOURCES:
        if name(path).startswith(translated):  # config.json to plans and back: names are its matter
            continue
        lines = schemes_decided_on(tree_of(path)) if name(path).startswith(as_data) else schemes_named(tree_of(path))
        wrong += [f"{name(path)}:{line}" for line in sorted(lines)]
    assert not wrong


@pytest.mark.parametrize(
    ("code", "decides"),
    [
        pytest.param('plan["scheme"] == "mla"', True, id="compared"),
        pytest.param('"csa" in schemes', True, id="looked for"),
        pytest.param('scheme in ("gqa", "hca")', True, id="one of several"),
        pytest.param('{"mla": 1, "gqa": 2}[scheme]', True, id="a table"),
        pytest.param('match scheme:\n    case "mhc" | "affine":\n        pass', True, id="matched"),
        pytest.param('plan = {"scheme": "swa", "heads": 4}', False, id="a plan"),
        pytest.param('role == "projection"', False, id="another name"),
    ],
)
def test_decisions_by_name_are_found(code: str, decides: bool) -> None:
    assert bool(schemes_decided_on(ast.parse(code))) == decides


def test_submitting_jobs_needs_no_torch() -> None:
    modules = {name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}

    def loaded(module: str, seen: set[str]) -> set[str]:
        """All modules that importing `module` runs, outside function bodies."""
        if module in seen:
            return seen
        seen.add(module)
        parent = module.rpartition(".")[0]
        if parent:
            loaded(parent, seen)
        path = modules.get(module)
        if path is not None:
            for statement in tree_of(path).body:
                if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                    for _, imported in imports(statement, ".".join(path.relative_to(ROOT).parent.parts)):
                        loaded(imported, seen)
        return seen

    needs = [module for module in modules if module.startswith("launch.slurm") and "torch" in loaded(module, set())]
    assert not needs
    assert "torch" in loaded("models.contract", set())  # the search itself finds what is there


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", text, maxsplit=1)[0].lower() for text in requirements}

    base = names(project["dependencies"])
    extras = {extra: names(texts) for extra, texts in project["optional-dependencies"].items()}
    imported = {
        module.split(".")[0]
        for path in SOURCES
        for _, module in file_imports(path)
        if module.split(".")[0] not in FLOORS and module.split(".")[0] not in sys.stdlib_module_names
    }
    used = {DISTRIBUTIONS.get(module, module.replace("_", "-")).lower() for module in imported}
    assert used - base - extras["deepspeed"] - extras["flash"] == set(), "imported, but not declared in pyproject.toml"
    assert base - used == set(), "declared in pyproject.toml, but never imported"
    pinned = names([line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()])
    assert (base | extras["dev"]) - pinned == set(), "declared, but constraints.txt has no tested version"


def test_no_file_grows_beyond_500_lines() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: length for path, length in lengths.items() if length > 500}


def test_an_init_file_holds_little_code() -> None:
    def code(path: Path) -> int:
        """Lines of statements, the docstring, imports and `__all__` left out."""
        lines = 0
        for node in tree_of(path).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if not (docstring or exports or isinstance(node, ast.Import | ast.ImportFrom)):
                lines += (node.end_lineno or node.lineno) - node.lineno + 1
        return lines

    lengths = {name(path): code(path) for path in SOURCES if path.name == "__init__.py"}
    assert not {path: length for path, length in lengths.items() if length > 50}


def test_every_file_says_what_it_is() -> None:
    assert not [
        name(path) for path in [*SOURCES, *TESTS] if path.stat().st_size and not ast.get_docstring(tree_of(path))
    ]


def test_every_scheme_names_its_paper_on_its_first_line() -> None:
    paper = re.compile(r"arXiv[ :]?\d{4}\.\d{4,5}|\breport\b", re.IGNORECASE)
    first_lines = {
        name(path): (ast.get_docstring(tree_of(path)) or "").partition("\n")[0]
        for path in (ROOT / "models/attention").glob("[!_]*.py")
    }
    assert first_lines
    assert not {path: line for path, line in first_lines.items() if not paper.search(line)}


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        pytest.param(r"/(work|root|farm|home|tmp/bash_jobs)/", TEXTS, id="paths of one machine"),
        pytest.param(r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b", TEXTS, id="promises"),
        pytest.param(r"raise NotImplemented", SOURCES, id="stubs"),
        pytest.param(r"\b([m]ock|[M]agicMock)\b", TESTS, id="mocks"),
    ],
)
def test_absent(pattern: str, paths: list[Path]) -> None:
    assert not gather(pattern, paths)


class UniqueKeys(yaml.SafeLoader):
    """YAML lets a key that is given twice win in silence; a shipped file must not rely on it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def test_every_configuration_file_is_a_mapping_with_unique_keys() -> None:
    wrong = []
    for path in sorted((ROOT / "conf").rglob("*.y*ml")):
        try:
            content = yaml.load(path.read_text(), UniqueKeys)
        except yaml.YAMLError as error:
            wrong.append(f"{name(path)}: {error}")
            continue
        if not isinstance(content, dict | None) or path.suffix != ".yaml":
            wrong.append(f"{name(path)}: a mapping in a file that ends in .yaml is needed")
    assert not wrong


def test_every_path_that_the_docs_name_exists() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    places = "|".join([*FLOORS, "docs", "slurm", "tests"])
    named = {
        (name(document), path)
        for document in documents
        for path in re.findall(rf"(?<![\w./-])((?:{places})/[\w./-]*)", document.read_text())
    }
    assert named
    assert not {(document, path) for document, path in named if not (ROOT / path.rstrip(".")).exists()}
