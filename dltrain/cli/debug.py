"""``dltrain debug show RUN`` and ``dltrain debug report RUN``"""

from __future__ import annotations

from argparse import _SubParsersAction
from collections.abc import Sequence

from dltrain.cli.main import Parser
from dltrain.run_folder import find_run


def run(arguments: Sequence[str]) -> int:
    """Tell what rules found in a run and how it went, on the terminal or as a page."""
    parser = Parser(prog="dltrain debug", description="See inside a run that was trained with --debugger.every.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_show(commands)
    report = commands.add_parser("report", help="one HTML file with findings and plots")
    report.add_argument("run", help=_RUN)
    report.add_argument("--output", default="", metavar="FILE", help="where to; RUN/debugger/report.html by default")
    known = parser.parse_args(arguments)
    from dltrain.debugger.smdebug.folder import is_smdebug  # which needs arrays, as what follows

    is_url = "://" in known.run or is_smdebug(known.run)
    url = known.run if is_url else str(find_run(known.run).path)
    if known.command == "report":
        from dltrain.debugger.report.writing import write_report

        print(write_report(url, known.output))
        return 0
    from dltrain.debugger.inspecting import show_names, show_tensor
    from dltrain.debugger.show import show_run

    if known.names is not None:
        return show_names(url, known.names)
    if known.tensor:
        return show_tensor(url, known.tensor)
    rules = None if known.rules is None else [each for word in known.rules for each in word.split(",") if each]
    return show_run(url, rules)


_RUN = "a run's folder or URL, or its name in runs/; it may still be going on"


def _add_show(commands: _SubParsersAction[Parser]) -> None:
    show = commands.add_parser("show", help="findings, and how it went")
    show.add_argument("run", help=f"{_RUN}; or a SageMaker Debugger trial's folder")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--rules", nargs="*", help="judge the run by these rules now, such as LossNotDecreasing")
    which.add_argument("--names", nargs="?", const="", metavar="REGEX", help="names of tensors by kind")
    which.add_argument("--tensor", metavar="NAME", help="one tensor's statistics over steps")
