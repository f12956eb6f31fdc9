"""torchrun for one host of several, which says what became of its ranks.

    python -m dltrain.runtime.elastic REPORT --nnodes 2 --nproc-per-node 8 ... recipe.py train ...

The words after REPORT are torchrun's. torchrun itself makes status 1 of every failure; here ``REPORT`` gets a JSON
object besides: ``ranks`` of this host that failed with their statuses, and ``rendezvous``, why hosts did not meet.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from dltrain.runtime.parent import stop_with_parent


def main(arguments: Sequence[str]) -> int:
    """Returns 0, 1 after a failure, which the report tells of, or 128 and the signal that ended it."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # ranks tell more
    stop_with_parent()  # whose end would leave the ranks to themselves
    report, *words = arguments
    config, command, rest = config_from_args(parse_args(words))  # type: ignore[no-untyped-call]
    ranks: dict[str, int] = {}
    apart = ""
    try:
        elastic_launch(config, command)(*rest)
    except ChildFailedError as error:
        ranks = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
    except (RendezvousError, TimeoutError) as error:
        apart = f"{type(error).__name__}: {error}"
    except SignalException as error:
        return 128 + int(error.sigval)
    else:
        return 0
    Path(report).write_text(json.dumps({"ranks": ranks, "rendezvous": apart}))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
