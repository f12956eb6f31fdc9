"""What one says of a training job beside the recipe: machines, time, places, network. A YAML file, or options.

options = read_options(Path("job.yaml"), {"count": "2"})
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dltrain.config import Section
from dltrain.config.load import explain
from dltrain.errors import UserError, nearest

LONGEST = 28 * 24
"""Hours that SageMaker lets a job run at most."""

_BUCKET = re.compile(r"(?!xn--|.*\.\.|\d+\.\d+\.\d+\.\d+$)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def check_address(value: str) -> None:
    """Raises ``ValueError`` for what is no ``s3://bucket/prefix``."""
    bucket = value.removeprefix("s3://").partition("/")[0]
    if not value.startswith("s3://") or not bucket:
        raise ValueError("give an address on S3, as s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"no bucket can be named {bucket!r}: 3 to 63 small letters, digits, dots and dashes")


class JobOptions(Section):
    """Options of a training job."""

    instance_type: str = ""
    """Such as ml.p5.48xlarge."""
    count: int = Field(default=1, ge=1)
    """Instances of it."""
    nproc: int = Field(default=0, ge=0)
    """Ranks of each instance; 0 is one for each GPU."""
    image: str = ""
    """Container image with dltrain in it: yours, built from launch/Dockerfile."""
    role: str = ""
    """ARN of the role that the job has."""
    bucket: str = ""
    """s3://bucket/prefix: code, checkpoints and results go below it, to folders of the job's name."""
    name: str = ""
    """The job's name; empty makes one of recipe, preset and time."""
    checkpoints: str = ""
    """s3:// prefix of the checkpoints, to go on with those of an earlier job; empty is the job's own."""
    region: str = ""
    """AWS's region; empty is that of your credentials."""
    spot: bool = False
    """Take spot capacity: cheaper, and interrupted now and then."""
    max_hours: float = Field(default=24.0, gt=0, le=LONGEST, allow_inf_nan=False)
    """Hours that the job may run; it saves and stops by itself before."""
    wait_hours: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """With spot: hours that it may run and wait for capacity together; 0 is twice max_hours."""
    keep_alive: int = Field(default=0, ge=0)
    """Seconds that instances stay for the next job (a warm pool)."""
    volume: int = Field(default=100, ge=1)
    """GB of disk of each instance."""
    channels: dict[str, str] = Field(default={})
    """Input channels: name and s3:// address, with :FastFile or :Pipe behind it where not File."""
    source: str = ""
    """Folder with your recipe and requirements.txt; empty is the recipe file's own, where it is yours."""
    ignore: tuple[str, ...] = ()
    """Names and patterns of files and folders there that are not uploaded; hidden ones and runs never are."""
    environment: dict[str, str] = Field(default={})
    """Variables of the container."""
    tags: dict[str, str] = Field(default={})
    """Tags of the job."""
    subnets: tuple[str, ...] = ()
    """Subnets of a VPC to run in."""
    security_groups: tuple[str, ...] = ()
    """Security groups there."""
    kms_key: str = ""
    """KMS key of what is written to S3."""
    volume_kms_key: str = ""
    """KMS key of the disks."""
    isolate: bool = False
    """No network at all for the container: data come by channels, results by SageMaker's own copies."""
    encrypt: bool = False
    """Encrypt what instances send each other; slower."""
    tensorboard: bool = True
    """Let SageMaker copy TensorBoard's events to S3 while the job runs."""

    @field_validator("bucket", "checkpoints")
    @classmethod
    def _is_on_s3(cls, value: str) -> str:
        if value:
            check_address(value)
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.wait_hours and not self.spot:
            raise ValueError("wait_hours is for spot capacity; add spot, or leave it out")
        if self.spot and self.wait_hours and self.wait_hours < self.max_hours:
            raise ValueError(f"wait_hours is {self.wait_hours:g}, less than max_hours {self.max_hours:g}")
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("a VPC needs both subnets and security_groups")
        if self.spot and self.keep_alive:
            raise ValueError("spot instances cannot be kept alive; leave keep_alive out, or spot")
        return self


def patterns(text: str) -> list[str]:
    """Of one ``--ignore "*.ckpt, notebooks"``: plain text, with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_options(file: Path | None, given: Mapping[str, Any]) -> JobOptions:
    """From a YAML file, and over it what is ``given``. Raises :class:`UserError` that names the option."""
    tree: Any = {}
    if file is not None:
        try:
            tree = yaml.safe_load(file.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"cannot read the job's options from {file}: {error}".replace("\n", " ")) from None
        if not isinstance(tree, dict):
            raise UserError(f"{file} is no mapping of options")
    for name in tree:
        if name not in JobOptions.model_fields:
            raise UserError(
                f"{file} has an option {name!r}, which there is not; {nearest(name, JobOptions.model_fields)}"
            )
    try:
        return JobOptions.model_validate({**tree, **given})
    except ValidationError as error:
        raise UserError(_placed(error, file, given)) from None


def _placed(error: ValidationError, file: Path | None, given: Mapping[str, Any]) -> str:
    """The complaint, and where the value stands: an option keeps its dashes, one of the file has the file's name."""
    place, told = error.errors()[0]["loc"], explain(error)
    if place and place[0] in given:
        name = str(place[0])
        return told.replace(f"--{name}", f"--{name.replace('_', '-')}", 1)
    also = " and of the command line" if given and not place else ""
    return told.removeprefix("--") + (f" (in {file}{also})" if file is not None else "")
