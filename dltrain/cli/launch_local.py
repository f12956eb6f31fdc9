"""``dltrain launch local RECIPE [--as-sagemaker --hosts N] [--nproc N] [--preset NAME] [--section.key value ...]``

As SageMaker: each host gets its own ``/opt/ml`` below ``--base`` and the real entry point, so that what would fail
there fails here, before it is paid for: a recipe of yours is brought with what lies beside it, as it would be uploaded,
and its requirements.txt is installed. The same command once more goes on from the checkpoints of the first, as a job
does that was interrupted.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

from dltrain.cli import train
from dltrain.cli.main import Parser
from dltrain.config import split_arguments
from dltrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from dltrain.recipes import declarations
from dltrain.runtime.environment import cores
from dltrain.runtime.logs import outlive_readers
from dltrain.sagemaker.channels import CODE
from dltrain.sagemaker.code import is_users, read_code
from dltrain.sagemaker.fabricated import INSTANCE, Fabricated
from dltrain.sagemaker.failure import OF_PEERS
from dltrain.sagemaker.holding import held
from dltrain.sagemaker.limits import check_value
from dltrain.sagemaker.options import patterns
from dltrain.sagemaker.request import local_urls

BASE = "sagemaker-local"
"""Folder of the hosts, where none is named."""


def run(arguments: Sequence[str]) -> int:
    """Train here, or in fabricated containers; returns the exit status."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain launch local", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--as-sagemaker", action="store_true")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--preset", default="")
    parser.add_argument("--base", default="", help=f"folder of the hosts and of what they leave; {BASE}")
    parser.add_argument("--channel", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--instance-type", default="", help=f"by which hosts are told what they are; {INSTANCE}")
    parser.add_argument("--source", default="", help="folder with your recipe; its own if this is left out")
    parser.add_argument("--ignore", action="extend", type=patterns, default=[], help="patterns of what is not brought")
    known = parser.parse_args(words)
    if not known.as_sagemaker:
        if given := [option for option, value in _of_containers(known).items() if value]:
            one = len(given) == 1
            are, them = ("an option", "it") if one else ("options", "them")
            raise UserError(f"{' and '.join(given)}: {are} of containers; add --as-sagemaker, or leave {them} out")
        options = [f"--preset={known.preset}"] * bool(known.preset) + [f"--nproc={known.nproc}"]
        return train.run([known.recipe, *options, *(f"--{key}={value}" for key, value in overrides.items())])
    if known.hosts < 1 or known.nproc < 1:
        raise UserError(f"--hosts is {known.hosts} and --nproc {known.nproc}; give 1 or more of each")
    checked = {name: value for name, value in overrides.items() if name != "run.resume"}  # of what the hosts have
    config = declarations(known.recipe).configure(known.preset, checked)  # refused here, not by each host
    for url in local_urls(config):
        _tell_of_local(url)
    made = _fabricated(known, overrides)
    outlive_readers()  # as | head has it: hosts end well all the same
    with held(made.root) as lock:
        made.lay_down()
        print(f"{known.hosts} host(s) in {known.base or BASE}", file=sys.stderr, flush=True)
        statuses = _run_hosts(made, cores() // known.hosts, lock)
        made.collect()
    return told(made, statuses)


def _of_containers(known: Namespace) -> dict[str, bool]:
    """Whether options were given that mean nothing without hosts."""
    names = ("base", "channel", "instance_type", "source", "ignore")
    return {"--hosts": known.hosts != 1} | {f"--{name.replace('_', '-')}": bool(getattr(known, name)) for name in names}


def _tell_of_local(url: str) -> None:
    """Raises :class:`UserError` where a container, which starts in a folder of its own, would not find it."""
    there = f"{url} lies on this machine, where a real container does not see it"
    if not Path(url.removeprefix("file://")).is_absolute():
        raise UserError(f"{there}: give data as a channel, --channel train=FOLDER, or an address on S3")
    print(f"warning: {there}; give data as a channel, or an address on S3", file=sys.stderr)


def _fabricated(known: Namespace, overrides: Mapping[str, str]) -> Fabricated:
    base = Path(known.base or BASE).resolve()
    code = read_code(known.recipe, known.source, known.ignore) if is_users(known.recipe) else None
    channels = _channels(known.channel)
    for folder in (*([code.folder] if code else []), *channels.values()):
        _refuse_on_a_host(folder, base)
    given = {"recipe": known.recipe if code is None else code.recipe, "preset": known.preset, "nproc": known.nproc}
    given |= {name.replace(".", "__"): value for name, value in overrides.items()}
    if known.instance_type:
        check_value("ResourceConfig.InstanceType", known.instance_type, "--instance-type")
    return Fabricated(base, known.hosts, given, channels, known.instance_type or INSTANCE, code=code)


def _refuse_on_a_host(folder: Path, base: Path) -> None:
    whole = folder.resolve()
    if any(each.parent == base and each.name.startswith("algo-") for each in (whole, *whole.parents)):
        raise UserError(f"{folder} lies on a host in {base}, which is made anew for each job; copy it elsewhere")


def _channels(words: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not Path(folder).is_dir():
            raise UserError(f"--channel is {word!r}; give NAME=FOLDER, a folder that there is")
        if name == CODE:
            raise UserError(f"a channel must not be named {CODE!r}: your code comes by it")
        if not _CHANNEL.fullmatch(name):
            raise UserError(f"a channel is named {name!r}; give 1 to 64 letters, digits, dots, dashes and underscores")
        if name in found:
            raise UserError(f"channel {name!r} is given twice, as {found[name]} and as {folder}; give it once")
        found[name] = Path(folder)
    return found


_CHANNEL = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9.\-_]{1,64}")
"""As SageMaker names them; not the two names that are folders already."""


def _run_hosts(made: Fabricated, threads: int, lock: int) -> dict[str, int]:
    """Start the entry point of each host, and hand on signals to all, as a stop of the job would; statuses by host."""
    variables = {"OMP_NUM_THREADS": str(max(1, threads // int(made.hyperparameters["nproc"])))}
    processes = {host: made.start(host, variables, lock) for host in made.names}

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        readers = [prefixed(f"algo-{made.names.index(host) + 1}", process) for host, process in processes.items()]
        statuses = {host: process.wait() for host, process in processes.items()}
        for reader in readers:
            reader.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return statuses


def prefixed(name: str, process: subprocess.Popen[str]) -> threading.Thread:
    """What a host prints, line by line with its name, as a log of SageMaker's has it."""

    def copy(stream: IO[str]) -> None:
        for line in stream:
            with suppress(OSError):  # of a full disk, say: a host whose output nobody takes away stands still
                print(f"[{name}] {line}", end="", flush=True)

    if process.stdout is None:
        raise AssertionError("it was started with a pipe")
    reader = threading.Thread(target=copy, args=(process.stdout,))
    reader.start()
    return reader


def told(made: Fabricated, statuses: Mapping[str, int]) -> int:
    """Say how each host has ended; the exit status of all together: of the one to blame, a failure before a stop."""
    reasons = {host: made.failure(host) for host in statuses}
    for place, (host, status) in enumerate(statuses.items()):
        print(f"algo-{place + 1} {_how(status, reasons[host])}", file=sys.stderr)
    hosts = [host for host, status in statuses.items() if status not in (0, EXIT_STOPPED)]
    hosts.sort(key=lambda host: (OF_PEERS in reasons[host], statuses[host] == EXIT_INTERRUPTED))
    failed = [abs(statuses[host]) + 128 * (statuses[host] < 0) for host in hosts]
    if not failed and max(statuses.values()) == 0:
        model = made.bucket / "model"
        print(f"model: {model}; output: {made.bucket / 'output'}; checkpoints: {made.bucket / 'checkpoints'}")
    return failed[0] if failed else max(statuses.values())


def _how(status: int, reason: str) -> str:
    if status == 0:
        return "ended well"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name} and could not say why"
    return f"ended with status {status}: {reason or 'it left no reason, the lines above may have it'}"
