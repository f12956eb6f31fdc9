"""One rank as torchrun's agent starts it: a recipe as a program, which leaves word where it fails before its own main.

    python -m dltrain.runtime.rank recipe.py train ...

``main(task)`` tells of every failure from then on; one while the file is read (a package that is missing, a fault in
its first lines) would leave a status alone. Imports no torch.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

from dltrain.runtime.word import Failure, has_failed, is_of_words, report_failure


def main() -> None:
    """Run the recipe as ``python recipe.py ...`` does: ``__main__``, its folder first on the path, the same words."""
    recipe = sys.argv[1]
    sys.argv = sys.argv[1:]
    folder = str(Path(recipe).resolve().parent)
    if sys.flags.safe_path:
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder  # which was the working folder, for ``-m``
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0) and not is_of_words(error):  # its main's own statuses are told already
            _tell(error, error.code if isinstance(error.code, int) else 1)
        raise
    except Exception as error:
        _tell(error, 1)
        raise


def _tell(error: BaseException, status: int) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if not has_failed(rank):
        message = f"dltrain: rank {rank} failed as {Path(sys.argv[0]).name} was read:\n{traceback.format_exc()}"
        report_failure(Failure.of(error, rank, message, status))


if __name__ == "__main__":
    main()
