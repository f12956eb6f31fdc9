"""The server from a shell: prints its URL and serves until it is interrupted.

python -m dltrain.testing.faulty_s3 --folder DIR --latency 0.03 --bandwidth 60e6 --port 9000
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from dltrain.errors import EXIT_USER_ERROR, UserError
from dltrain.testing.faulty_s3.faults import Faults
from dltrain.testing.faulty_s3.objects import Objects
from dltrain.testing.faulty_s3.server import Server
from dltrain.testing.faulty_s3.wire import S3Error


def main(words: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = _parser().parse_args(words)
    try:
        with _server(options) as server:
            if options.until_stdin_closes:
                threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()
            print(server.url, flush=True)
            server.serve_forever()
    except UserError as error:
        print(f"faulty_s3: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        pass
    return 0


@contextmanager
def _server(options: argparse.Namespace) -> Iterator[Server]:
    faults = Faults(**{field.name: getattr(options, field.name) for field in fields(Faults)})
    with ExitStack() as opened:
        folder = options.folder or opened.enter_context(_own_folder())
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; make it, with a folder for each bucket inside")
        objects = opened.enter_context(Objects(Path(folder)))
        try:
            for bucket in options.bucket or ([] if options.folder else ["data"]):
                objects.create_bucket(bucket)
            server = opened.enter_context(Server(objects, options.port))
        except S3Error as error:
            raise UserError(f"{bucket!r} is no name of a bucket; write letters, digits, - and .") from error
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on port {options.port} with folder {folder}: {error}") from error
        server.state.set(faults)
        yield server


def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="faulty-s3-", ignore_cleanup_errors=True)


def _outlive(parent: int) -> None:
    """End this process when its parent closes the pipe, or is gone though a sister holds the pipe open."""
    while os.getppid() == parent:
        if select.select([0], [], [], 1.0)[0] and not os.read(0, 1 << 12):
            break
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python -m dltrain.testing.faulty_s3 [--folder DIR] [--port N] [--FAULT X ...]",
        description="An S3 endpoint that fails on demand: prints its URL and serves until it is interrupted.",
    )
    parser.add_argument("--folder", help="serve FOLDER/BUCKET/KEY; default: a folder that is removed at the end")
    parser.add_argument("--bucket", action="append", help="make this bucket; default: data, unless there is a folder")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this")
    faults = parser.add_argument_group("faults", "as in dltrain.testing.faulty_s3.Faults")
    texts = _field_texts()
    for field in fields(Faults):
        word, text = f"--{field.name.replace('_', '-')}", texts[field.name]
        if field.type == "bool":
            faults.add_argument(word, action="store_true", help=text)
        else:
            kind = _READERS[str(field.type)]
            faults.add_argument(word, type=kind, default=field.default, metavar=_METAVARS[kind], help=text)
    return parser


def _field_texts() -> dict[str, str]:
    """What stands beneath each field."""
    body = ast.parse(inspect.getsource(Faults)).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): text.value.value.replace("``", "").replace("%", "%%")
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
    }


def _whole(text: str) -> int:
    return int(float(text))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_READERS: dict[str, Callable[[str], Any]] = {
    "float": float,
    "int": _whole,
    "int | None": _whole,
    "str": str,
    "tuple[str, ...]": _names,
}
_METAVARS: dict[Callable[[str], Any], str] = {float: "X", _whole: "N", str: "GLOB", _names: "ID,ID"}

if __name__ == "__main__":
    sys.exit(main())
