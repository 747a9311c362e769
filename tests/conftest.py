"""What every test runs under: one thread, one seed, and uninitialised memory that reads as NaN."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

# Read once, at import or at start-up, by the libraries and by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest

from tests import skips
from tests.ranks import runner
from tests.settle import settle

WAITING = 2
"""Workers beyond one for each core: so many tests wait at a time, for SLURM, for a grace to pass, for a process that
was killed. A worker and its server of tests/ranks.py take about a gigabyte."""

LONGEST_FIRST = (
    "test_slurm",
    "test_resume",
    "test_readme",
    "test_engine",
    "test_add_a_scheme",
    "test_report",
    "test_study",
    "test_properties::test_compiled",
    "test_recompute",
    "test_report_page",
    "test_modes",
)
"""Files, or functions of one, whose tests take tens of seconds, or wait: begun last, one of them would leave the other
cores idle."""

# The machines that run this are shared and slow: an example that takes long to try, or to draw, is no failure.
# The suite tries the same examples each time, so that what fails is what was changed; `make search` looks for new ones.
UNHURRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("keyhole", **UNHURRIED, derandomize=True)
hypothesis.settings.register_profile("search", **UNHURRIED, max_examples=3000, print_blob=True)
hypothesis.settings.load_profile("keyhole")


@pytest.fixture(autouse=True)
def settled() -> None:
    """Every test starts from the same state, whatever the one before it did to its process."""
    settle()


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(world_size, function, *arguments, timeout=300)` runs a module-level function on that many gloo ranks.

    Returns what each rank returned, in rank order. Arguments and results are pickled. Fails with the traceback of
    every rank that raised, and with the stacks of those that hang past the timeout.
    """
    return runner(tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="the whole suite runs: an expected skip that is absent fails")
    parser.addoption("--plans", type=int, default=16, help="how many random layer plans are tried [16]")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + WAITING


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each worker is given an equal stretch of the order, and takes from the end of another's when it has no more: so
    each stretch begins with some of the longest files."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    stretches: list[list[pytest.Item]] = [[] for _ in range(workers)]
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    others: list[pytest.Item] = []
    places = [order.get(item.path.stem, order.get(_function(item), len(order))) for item in items]
    for place, item in sorted(zip(places, items, strict=True), key=itemgetter(0)):
        (stretches[place % workers] if place < len(order) else others).append(item)
    for place, stretch in enumerate(stretches):
        wanted = len(items) * (place + 1) // workers - len(items) * place // workers - len(stretch)
        stretch += others[: max(wanted, 0)]
        others = others[max(wanted, 0) :]
    items[:] = [item for stretch in [*stretches, others] for item in stretch]


def _function(item: pytest.Item) -> str:
    """`<file>::<function>`, whatever its parameters."""
    return f"{item.path.stem}::{getattr(item, 'originalname', item.name)}"


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it for garbage, again and again, takes a twentieth of the
    suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly:  # a worker: its controller compares
        return
    session.config.stash[skips.FOUND] = found = skips.compare(reporter, whole=session.config.option.whole)
    if found.wrong and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash.get(skips.FOUND, None)
    if found is not None:
        found.print(terminalreporter)
