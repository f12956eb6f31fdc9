"""``dltrain debug show RUN [--rules NAME ...]``"""

from __future__ import annotations

from collections.abc import Sequence

from dltrain.cli.main import Parser
from dltrain.run_folder import find_run


def run(arguments: Sequence[str]) -> int:
    """Tell what rules found in a run, or find now."""
    parser = Parser(prog="dltrain debug", description="See inside a run that was trained with --debugger.every.")
    show = parser.add_subparsers(dest="command", required=True).add_parser("show", help="findings, and how it went")
    show.add_argument("run", help="a run's folder or URL, its name in runs/, or a SageMaker Debugger trial's folder")
    show.add_argument("--rules", nargs="*", help="judge the run by these rules now, such as LossNotDecreasing")
    known = parser.parse_args(arguments)
    from dltrain.debugger.show import show_run  # what it shows needs arrays
    from dltrain.debugger.smdebug.folder import is_smdebug

    is_url = "://" in known.run or is_smdebug(known.run)
    url = known.run if is_url else str(find_run(known.run).path)
    return show_run(url, known.rules)
