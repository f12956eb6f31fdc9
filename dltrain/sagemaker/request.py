"""The request for a training job, as boto3's ``create_training_job`` takes it, checked before it is sent.

request = build(recipe, preset, settings, config, options)
boto3.client("sagemaker").create_training_job(**request)
"""

from __future__ import annotations

import json
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dltrain.config import Config, Run
from dltrain.errors import UserError
from dltrain.hooks.printed import definitions
from dltrain.sagemaker.channels import CODE, FAST_FILE, FILE, PIPE, TRAIN, Channel, apply_channels
from dltrain.sagemaker.code import REQUIREMENTS, Code, is_users, place_in
from dltrain.sagemaker.folders import BASE
from dltrain.sagemaker.limits import check
from dltrain.sagemaker.network import variables_for
from dltrain.sagemaker.options import JobOptions, check_address
from dltrain.sagemaker.tensorboard import LOCAL_PATH

CHECKPOINTS = f"{BASE}/checkpoints"
"""The folder that SageMaker copies to S3 while the job runs."""

_EARLY = 0.05
"""Hours before SageMaker's limit by which the job stops by itself."""


def build(recipe: str, preset: str, settings: Mapping[str, Any], config: Config, options: JobOptions) -> dict[str, Any]:
    """The whole request. ``recipe`` is a shipped one's name or the user's file, ``settings`` are dotted names and
    values, ``config`` what they make. Raises :class:`UserError` for what SageMaker would refuse, and for what would
    fail there."""
    from dltrain.metrics.known import scores  # which imports torch

    _refuse_missing(options)
    config = with_channels(config, settings, options)
    _refuse_what_fails(config, options)
    name = options.name or job_name(recipe, preset)
    base = address_of(name, options)
    seconds = round(options.max_hours * 3600)
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": options.role,
        "AlgorithmSpecification": {
            "TrainingImage": options.image,
            "TrainingInputMode": FILE,
            "ContainerEntrypoint": ["python", "-m", "dltrain.sagemaker"],
            "MetricDefinitions": definitions((*scores(), config.evaluation.metric)),
            "EnableSageMakerMetricsTimeSeries": True,
        },
        "HyperParameters": hyperparameters(recipe, preset, settings, options),
        "OutputDataConfig": {"S3OutputPath": f"{options.bucket}/", **_key("KmsKeyId", options.kms_key)},
        "ResourceConfig": {
            "InstanceType": options.instance_type,
            "InstanceCount": options.count,
            "VolumeSizeInGB": options.volume,
            **_key("VolumeKmsKeyId", options.volume_kms_key),
            **({"KeepAlivePeriodInSeconds": options.keep_alive} if options.keep_alive else {}),
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds, **_waiting(options, seconds)},
        "EnableManagedSpotTraining": options.spot,
        "EnableNetworkIsolation": options.isolate,
        "EnableInterContainerTrafficEncryption": options.encrypt,
        "CheckpointConfig": {
            "S3Uri": options.checkpoints or f"{base}/checkpoints",
            "LocalPath": CHECKPOINTS,
        },
        "ProfilerConfig": {"DisableProfiler": True},  # or SageMaker attaches it
        "Environment": dict(options.environment),
        "Tags": [{"Key": key, "Value": value} for key, value in options.tags.items()],
    }
    channels = [_channel(channel, address) for channel, address in options.channels.items()]
    if is_users(recipe):
        channels.append(_channel(CODE, f"{base}/{CODE}"))
    if channels:
        request["InputDataConfig"] = channels
    if options.subnets:
        request["VpcConfig"] = {
            "Subnets": list(options.subnets),
            "SecurityGroupIds": list(options.security_groups),
        }
    if options.tensorboard:
        request["TensorBoardOutputConfig"] = {"S3OutputPath": f"{base}/tensorboard", "LocalPath": LOCAL_PATH}
    check(request)
    return request


def settings_here(settings: Mapping[str, Any], options: JobOptions) -> dict[str, Any]:
    """Settings as far as they can be checked on this machine: a run to go on with lies among the job's checkpoints.

    Raises :class:`UserError` where the job begins with none.
    """
    run = settings.get("run.resume", "auto")
    if run in ("auto", "never"):
        return dict(settings)
    if not options.checkpoints:
        raise UserError(f"run.resume is {run!r}; say among which checkpoints it lies: --checkpoints s3://bucket/prefix")
    return {**settings, "run.resume": "auto"}


def with_channels(
    config: Config, settings: Mapping[str, Any], options: JobOptions, tell: Callable[[str], None] = lambda line: None
) -> Config:
    """The config that the container will have: its channels count as :func:`apply_channels` says."""
    folders = {name: Channel(name, Path(BASE) / "input" / "data" / name) for name in options.channels}
    given = [name.replace("__", ".") for name, value in settings.items() if value not in ("", None)]
    return apply_channels(config, folders, given, tell)  # an empty hyperparameter does not arrive


def address_of(name: str, options: JobOptions) -> str:
    """Below which everything of a job of that name lies on S3."""
    return f"{options.bucket}/{name}"


def hyperparameters(recipe: str, preset: str, settings: Mapping[str, Any], options: JobOptions) -> dict[str, str]:
    """Text by name: values as JSON, dots as ``__``, which every launcher can make a variable of."""
    there = place_in(options.source, recipe) if is_users(recipe) else recipe
    words = {"recipe": there, "preset": preset, "nproc": options.nproc}
    given: dict[str, Any] = {name: value for name, value in words.items() if value}
    given |= {name.replace(".", "__"): value for name, value in settings.items()}
    given.setdefault("run__deadline", f"{max(options.max_hours - _EARLY, options.max_hours / 2):g}h")
    return {name: json.dumps(value) for name, value in given.items()}


def job_name(recipe: str, preset: str) -> str:
    """A name that no other job has: recipe, preset and time."""
    stem = re.sub(r"[^a-zA-Z0-9]+", "-", f"{Path(recipe).stem}-{preset}").strip("-")
    return f"{stem[:43]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def _refuse_missing(options: JobOptions) -> None:
    for name, example in (
        ("instance_type", "ml.p5.48xlarge"),
        ("image", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/dltrain:0.1"),
        ("role", "arn:aws:iam::123456789012:role/training"),
        ("bucket", "s3://my-bucket/training"),
    ):
        if not getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} is missing; give one, such as {example}")


def _refuse_what_fails(config: Config, options: JobOptions) -> None:
    """What SageMaker would take, and the job would then die of."""
    variables_for(options.instance_type, "eth0", options.count)
    urls = data_urls(config)
    remote = [url for url in urls if url.partition("://")[0] in ("s3", "http", "https")]
    if options.isolate and remote:
        raise UserError(
            f"--isolate leaves the container no network, and {remote[0]} is read over it; bring it as a channel: "
            "--channels '{train: ...}' and no data.train"
        )
    inside = tuple(f"{BASE}/input/data/{channel}" for channel in options.channels)
    local = [url for url in local_urls(config) if not url.startswith(inside or "\0")]
    if local:
        raise UserError(f"{local[0]} lies on this machine; upload it and give its s3:// address, or a channel of it")
    _refuse_lost(config, options)
    missing = not config.data.train and not config.data.sources and not set(options.channels) & set(TRAIN)
    if missing:
        raise UserError(f"there are no training data: give data.train or a channel {TRAIN[0]!r}")
    for channel in options.channels:
        if channel == CODE:
            raise UserError(f"a channel must not be named {CODE!r}: your code comes by it")


def _refuse_lost(config: Config, options: JobOptions) -> None:
    """What a job would write or wait for where SageMaker neither keeps it nor lets it."""
    folder = config.run.folder
    if folder != Run().folder and not Path(folder).is_relative_to(CHECKPOINTS):
        raise UserError(
            f"run.folder is {folder!r}, which SageMaker does not keep: leave it out, or give a folder "
            f"below {CHECKPOINTS}"
        )
    if config.run.deadline and config.run.deadline.seconds > options.max_hours * 3600:
        raise UserError(
            f"run.deadline is {config.run.deadline}, and SageMaker ends the job after max_hours {options.max_hours:g}; "
            "give more of these, or leave run.deadline out"
        )
    if config.run.stop_file:
        raise UserError(
            f"run.stop_file is {config.run.stop_file!r}, and nobody can put a file into the container: leave it out, "
            "and stop the job by aws sagemaker stop-training-job"
        )


def refuse_packages(code: Code, options: JobOptions) -> None:
    """Raises :class:`UserError` where the code asks for packages and the container would have no network to get them,
    unless they are files, or are looked for among the code itself and nowhere else."""
    if not options.isolate or REQUIREMENTS not in code.files:
        return
    text = (code.folder / REQUIREMENTS).read_text(errors="replace").replace("\\\n", " ")
    lines = [_COMMENT.sub("", line).strip() for line in text.splitlines()]
    asked = [line for line in lines if _is_asked(line, code)]
    given = " ".join(line for line in lines if line.startswith("-"))
    within = any(_is_among(code, folder) for folder in _FOLDER.findall(given))
    if asked and not (within and "--no-index" in given.split()):
        raise UserError(
            f"--isolate leaves the container no network, and {REQUIREMENTS} asks for {asked[0]!r}: put its packages "
            f"into the image and leave it out by --ignore {REQUIREMENTS}, or bring wheels beside it and begin it with "
            "--no-index and --find-links FOLDER, a folder of the code"
        )


_COMMENT = re.compile(r"(^|\s)#.*")

_FOLDER = re.compile(r"(?:^|\s)(?:--find-links|-f)[\s=]*(\S+)")
"""Where pip is to look for packages."""

_MORE = re.compile(r"(?:--requirement|-r)[\s=]*\S+")

_FILE = re.compile(r"(?:(?:--editable|-e)[\s=]*)?(?:file:)?([^\s\[@:]+)(?:\[[^\]]*\])?(?:\s.*)?")
"""A requirement that is no address: a path, or a name."""

_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def _is_asked(line: str, code: Code) -> bool:
    """Whether a line of requirements has pip look for a package: it names one, or a file that is not brought."""
    if _MORE.match(line):
        return True
    if not line or (line.startswith("-") and not line.startswith(("-e", "--editable"))):
        return False
    found = _FILE.fullmatch(line)
    path = found[1] if found else ""
    if not ("/" in path or path.startswith(".") or path.endswith(_ARCHIVES)):
        return True
    return not (path.startswith("/") or _is_among(code, path))  # whole ones are the image's


def _is_among(code: Code, path: str) -> bool:
    """Whether a file or folder, as seen from the code's own, is brought."""
    place = posixpath.normpath(path)
    return place == "." or any(file == place or file.startswith(f"{place}/") for file in code.files)


def data_urls(config: Config) -> list[str]:
    """Where training and held-out data come from."""
    return [config.data.train, config.data.evaluation, *(source.url for source in config.data.sources)]


def local_urls(config: Config) -> list[str]:
    """Of data and weights, those that lie on this machine."""
    urls = [*data_urls(config), getattr(config.model, "weights", "")]
    return [url for url in urls if url and ("://" not in url or url.startswith("file://"))]


def _channel(name: str, address: str) -> dict[str, Any]:
    url, mode = address, FILE
    for known in (FILE, FAST_FILE, PIPE):
        if address.endswith(f":{known}"):
            url, mode = address.removesuffix(f":{known}"), known
    if not url.startswith("s3://") or ":" in url.removeprefix("s3://"):
        raise UserError(f"channel {name!r} is {address!r}; give s3://bucket/prefix, with :FastFile or :Pipe behind it")
    try:
        check_address(url)
    except ValueError as error:
        raise UserError(f"channel {name!r} is {address!r}: {error}") from None
    source = {"S3DataType": "S3Prefix", "S3Uri": url, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": mode}


def _waiting(options: JobOptions, seconds: int) -> dict[str, int]:
    if not options.spot:
        return {}
    return {"MaxWaitTimeInSeconds": round(options.wait_hours * 3600) if options.wait_hours else 2 * seconds}


def _key(name: str, key: str) -> dict[str, str]:
    return {name: key} if key else {}
