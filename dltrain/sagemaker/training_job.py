"""One SageMaker training job as this host has it: a read-only snapshot of folders, hosts and what was asked for.

    job = TrainingJob.read()  # None outside SageMaker
    job.hosts, job.rank_of_host, job.checkpoints.folder

It is the same whether the job was started by SageMaker's training toolkit (SDK v2 and its containers), by the drivers
that SDK v3 sends along, or by the container's own entry point.

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dltrain.errors import UserError
from dltrain.sagemaker.channels import Channel, read_channels
from dltrain.sagemaker.folders import Folders, object_of
from dltrain.sagemaker.hyperparameters import Hyperparameters, read_hyperparameters

Way = Literal["toolkit", "drivers", "container"]

RESOURCES, CHECKPOINTS = "resourceconfig.json", "checkpointconfig.json"

INTERFACE = "eth0"
"""Where a host does not say by which network it reaches the others."""

_OF_DRIVERS = ("SM_DISTRIBUTED_CONFIG", "SM_ENTRY_SCRIPT", "SM_OUTPUT_FAILURE")
_OF_THE_TOOLKIT = ("SM_TRAINING_ENV", "SM_USER_ENTRY_POINT", "SM_FRAMEWORK_MODULE")


@dataclass(frozen=True)
class Group:
    """Hosts of one instance type."""

    name: str
    instance_type: str
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Synchronised:
    """A folder that SageMaker fills from S3 when a job starts or is started again, and copies there while it runs.

    What is deleted in the folder is deleted in S3. All hosts share one prefix.
    """

    folder: Path
    url: str


@dataclass(frozen=True)
class TrainingJob:
    """``hosts`` are those of all groups, by number: algo-2 comes before algo-10."""

    way: Way
    name: str
    region: str
    folders: Folders
    host: str
    hosts: tuple[str, ...]
    instance_type: str = ""
    interface: str = INTERFACE
    groups: tuple[Group, ...] = ()
    checkpoints: Synchronised | None = None
    channels: Mapping[str, Channel] = field(default_factory=dict)
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    framework: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that begin with ``sagemaker_``: the SDK's own."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> TrainingJob | None:
        """The job this process is of, or None where it is of none. Raises :class:`UserError` for descriptions that
        make no sense."""
        said = os.environ if variables is None else variables
        folders = Folders.read(said)
        way = _way(said, folders)
        if way is None:
            return None
        resources = _resources(said, folders)
        hosts = tuple(sorted(resources.get("hosts") or ("localhost",), key=_by_number))
        host = resources.get("current_host") or hosts[0]
        if host not in hosts:
            raise UserError(f"{RESOURCES} names the hosts {', '.join(hosts)}, and this host, {host!r}, is none of them")
        groups = _groups(resources)
        return cls(
            way=way,
            name=said.get("TRAINING_JOB_NAME") or said.get("SAGEMAKER_JOB_NAME") or "",
            region=said.get("AWS_REGION") or said.get("SAGEMAKER_REGION") or "",
            folders=folders,
            host=host,
            hosts=hosts,
            instance_type=resources.get("current_instance_type") or _type_of(host, groups),
            interface=resources.get("network_interface_name") or INTERFACE,
            groups=groups,
            checkpoints=_checkpoints(folders),
            channels=read_channels(said),
            hyperparameters=read_hyperparameters(said, folders),
            framework=object_of(said.get("SM_FRAMEWORK_PARAMS", ""), "SM_FRAMEWORK_PARAMS"),
        )

    @property
    def rank_of_host(self) -> int:
        return self.hosts.index(self.host)


def _way(said: Mapping[str, str], folders: Folders) -> Way | None:
    if any(name in said for name in _OF_DRIVERS):
        return "drivers"
    if any(name in said for name in _OF_THE_TOOLKIT):
        return "toolkit"
    in_container = "TRAINING_JOB_NAME" in said or (folders.config / RESOURCES).is_file()
    return "container" if in_container else None


def _resources(said: Mapping[str, str], folders: Folders) -> dict[str, Any]:
    found = folders.described(RESOURCES) or object_of(said.get("SM_RESOURCE_CONFIG", ""), "SM_RESOURCE_CONFIG")
    hosts = found.get("hosts", [])
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise UserError(f"{RESOURCES} has hosts {hosts!r}, which is no list of names")
    return found


def _groups(resources: Mapping[str, Any]) -> tuple[Group, ...]:
    return tuple(
        Group(each["instance_group_name"], each.get("instance_type", ""), tuple(each.get("hosts", ())))
        for each in resources.get("instance_groups") or ()
    )


def _type_of(host: str, groups: tuple[Group, ...]) -> str:
    return next((group.instance_type for group in groups if host in group.hosts), "")


def _checkpoints(folders: Folders) -> Synchronised | None:
    found = folders.described(CHECKPOINTS)
    if not found.get("LocalPath") and not found.get("S3Uri"):
        return None
    return Synchronised(Path(found.get("LocalPath") or folders.base / "checkpoints"), found.get("S3Uri") or "")


def _by_number(host: str) -> list[tuple[bool, int | str]]:
    """Numbers in a name by their size: SageMaker lists algo-1, algo-10, algo-2."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", host)]
