"""`python -m launch report RUN... --out DIR`."""

from __future__ import annotations

from pathlib import Path

from conf.schema import Refused
from launch.arguments import Parser
from launch.report import tables
from launch.report.compare import Comparison, compare
from launch.report.content import content
from launch.report.page import as_html
from launch.report.plots.menu import PLOTS
from launch.report.written import as_json, as_markdown
from train.rundir import write_whole

PAGE = "index.html"


def main(arguments: list[str]) -> int:
    """Returns 0. Raises Refused for a directory that is no run, before anything is written."""
    parser = Parser("python -m launch report", description="Compare runs: tables, plots and one page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; seeds of one arm are grouped")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    comparison = write(options.runs, options.out)
    print(tables.plain(tables.numbers(comparison)))
    for note in comparison.notes:
        print(f"- {note}")
    print(f"{options.out / PAGE}: {len(comparison.arms)} arm(s), {len(options.runs)} run(s).")
    return 0


def write(runs: list[Path], out: Path) -> Comparison:
    """Compare `runs` and write report.md, report.json, the plots and index.html to `out`, over what is there.

    Raises Refused where a directory is no run, or `out` is one or cannot be written.
    """
    comparison = compare(runs)
    if (out / "config.yaml").exists():
        raise Refused(f"--out {out} is the directory of a run, which a report only reads; choose another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {out} cannot be made ({error.strerror}); choose another folder.") from None
    made = content(comparison)
    for plot in PLOTS:
        (out / plot.file).unlink(missing_ok=True)  # of an earlier report that had more to draw
    # a browser that has the old page open never sees half of a new one
    for picture in made.pictures:
        write_whole(out / picture.plot.file, picture.light)
    write_whole(out / "report.json", as_json(made))
    write_whole(out / "report.md", as_markdown(made))
    write_whole(out / PAGE, as_html(made))
    return comparison
