"""``dltrain launch kubernetes RECIPE --preset NAME --image IMG --nodes N --gpus G --claim PVC ... [--apply]``

Fills in ``launch/kubernetes.yaml``: an Indexed Job and the Service that its pods find each other by. A pod that is
evicted has the job save and go on. It is printed, written with ``--output``, or applied.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from dltrain.cli.main import Parser
from dltrain.cli.templates import filled, hand_over, settings_of, stem_of
from dltrain.config import Config, split_arguments
from dltrain.errors import UserError

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST = 50
"""Characters of a name, so that with a pod's number behind it it is still one of a host."""


def run(arguments: Sequence[str]) -> int:
    """Check it, fill it in, and print, write or apply it; returns 0, or the status of ``kubectl``."""
    words, overrides = split_arguments(arguments)
    known = _parser().parse_args(words)
    known.name = known.name or stem_of(known.recipe, known.preset)[:_LONGEST].strip("-")
    _check(known, overrides)
    nproc = known.nproc or known.gpus or 1
    own = {"run.name": known.name, "run.folder": "/runs", "run.grace": str(known.grace), "run.resume": "auto"}
    settings = {**own, **overrides}
    config = settings_of(known.recipe, known.preset, settings, known.nodes, nproc)
    _refuse_endless(config)
    if not config.run.folder.startswith("/"):
        raise UserError(f"--run.folder is {config.run.folder!r}; give the whole path that the claim is mounted at")
    text = filled("kubernetes.yaml", _values(known, settings, config.run.folder, nproc))
    return hand_over(text, known.output, ["kubectl", "apply", "--filename=-"] if known.apply else [])


def _parser() -> Parser:
    parser = Parser(prog="dltrain launch kubernetes", description=__doc__)
    parser.add_argument("recipe", help="one that comes with dltrain, or a file of yours as its path is in the image")
    parser.add_argument("--preset", default="")
    parser.add_argument("--image", required=True, help="with dltrain in it, such as one of launch/Dockerfile")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim that runs are written to")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("--nproc", type=int, default=0, help="ranks of each node; its GPUs, if it is not given")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--name", default="", help="of Job, Service and run")
    parser.add_argument("--service-account", default="", help="that pods have, such as one with a role for S3")
    parser.add_argument("--shm", type=int, default=16, help="GiB of shared memory for loader processes")
    parser.add_argument("--grace", type=int, default=120, help="seconds that a pod has to save: run.grace")
    parser.add_argument("--retries", type=int, default=3, help="failures of the job until it is given up")
    parser.add_argument("--output", type=Path, help="write the manifest to this file")
    parser.add_argument("--apply", action="store_true", help="hand it to kubectl apply")
    return parser


def _check(known: Namespace, overrides: Mapping[str, str]) -> None:
    for name in ("name", "namespace", "claim", "service_account"):
        value = getattr(known, name)
        if value and not (_LABEL.fullmatch(value) and len(value) <= _LONGEST):
            raise UserError(
                f"--{name.replace('_', '-')} is {value!r}; give at most {_LONGEST} of a-z, 0-9 and -, a letter first"
            )
    for name, least in (("gpus", 0), ("nproc", 0), ("shm", 1), ("grace", 1), ("retries", 0)):
        if getattr(known, name) < least:
            raise UserError(f"--{name} is {getattr(known, name)}; give {least} or more")
    if "run.grace" in overrides:
        raise UserError("--run.grace is not for Kubernetes; take --grace")


def _refuse_endless(config: Config) -> None:
    """What stops a run by itself: the Job would start its pods again, with a clock that begins anew."""
    for name, value, instead in (
        ("run.stop_file", config.run.stop_file, "kubectl delete job"),
        (
            "run.deadline",
            config.run.deadline,
            "--run.length in hours, or activeDeadlineSeconds of the Job,",
        ),
    ):
        if value:
            raise UserError(
                f"{name} is {str(value)!r}, which is not for Kubernetes: pods that have stopped start again; take "
                f"{instead} to end it"
            )


def _values(known: Namespace, settings: Mapping[str, str], folder: str, nproc: int) -> dict[str, str | int]:
    command = ["python", "-m", "dltrain", "node", known.recipe, *([f"--preset={known.preset}"] * bool(known.preset))]
    command += [f"--{name}={value}" for name, value in settings.items()]
    return {
        "name": known.name,
        "namespace": known.namespace,
        "nodes": known.nodes,
        "nproc": nproc,
        "gpus": known.gpus or "",
        "backoff": known.retries * known.nodes,
        "grace": known.grace,
        "service_account": known.service_account,
        "image": json.dumps(known.image),
        "command": json.dumps([word.replace("$(", "$$(") for word in command]),  # not one of Kubernetes' variables
        "folder": json.dumps(folder),
        "claim": known.claim,
        "shm": known.shm,
    }
