"""A training job's request in the words of SageMaker's two SDKs, as plain dictionaries: no SDK is needed here.

job = described("image/classify", "digits", {"data.train": "s3://..."}, options, "container")
estimator_arguments(job)  # {"image_uri": ..., "max_run": 86400, ...}
model_trainer_arguments(job)  # {"training_image": ..., "compute": {"instance_type": ...}, ...}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.degrees import degrees_of
from dltrain.errors import UserError, nearest
from dltrain.recipes import declarations, find
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import CODE
from dltrain.sagemaker.code import REQUIREMENTS, is_users, read_code
from dltrain.sagemaker.options import JobOptions
from dltrain.sagemaker.request import build, refuse_packages, settings_here

CONTAINER, SCRIPT = "container", "script"
"""What is started: our own entry point, or the recipe's file by what the SDK brings."""

COMMAND = "exec python -m dltrain.sagemaker"
"""In the place of the driver's shell, which would not hand on SageMaker's SIGTERM."""


_NAME_BEFORE_TIME = 48
"""Characters of a name that SDK v3 leaves whole: it cuts names of 63 at their end, where the time is."""

_OF_THE_TOOLKIT = 7
"""Hyperparameters that SDK v2 adds for a script: program, archive, job, region, level of logs, launcher, machine."""

_IGNORED = [".*", "__pycache__*"]


@dataclass(frozen=True)
class SdkJob:
    """``request`` is boto3's; ``folder`` is what goes to the container, None where the image has the recipe, and
    ``script`` the recipe's path there."""

    request: Mapping[str, Any]
    entry: str
    script: str
    folder: Path | None
    bucket: str
    nproc: int = 0

    @property
    def uploads(self) -> bool:
        """Whether the code comes by our own channel."""
        return self.folder is not None and self.entry == CONTAINER

    def hyperparameters(self) -> dict[str, str]:
        """JSON by name; a script is the recipe, and its ranks are counted by what starts it."""
        left_out = ("recipe", "nproc") if self.entry == SCRIPT else ()
        return {name: text for name, text in self.request["HyperParameters"].items() if name not in left_out}

    def channels(self) -> list[dict[str, Any]]:
        """Those of data."""
        return [each for each in self.request.get("InputDataConfig", []) if each["ChannelName"] != CODE]


def described(recipe: str, preset: str, settings: Mapping[str, Any], options: JobOptions, entry: str) -> SdkJob:
    """The job, checked as ``dltrain launch sagemaker`` checks it. Raises :class:`UserError`."""
    if entry not in (CONTAINER, SCRIPT):
        raise UserError(f"entry is {entry!r}; {nearest(entry, (CONTAINER, SCRIPT))}")
    config = declarations(recipe).configure(preset, settings_here(settings, options))
    if options.nproc:
        degrees_of(config.parallel, Environment(0, options.nproc * options.count, 0, options.nproc))
    request = build(recipe, preset, settings, config, options)
    file = find(recipe)
    script, folder = file.name, file.parent if entry == SCRIPT else None
    if is_users(recipe):
        code = read_code(recipe, options.source, options.ignore)
        refuse_packages(code, options)
        script, folder = code.recipe, code.folder
    return SdkJob(request, entry, script, folder, options.bucket, options.nproc)


def estimator_arguments(job: SdkJob) -> dict[str, Any]:
    """Of ``Estimator``, or of ``PyTorch`` where the entry is a script; ``tensorboard_output_config`` is a dictionary or
    None, for its class is the SDK's. Raises :class:`UserError` where there is no room for what the SDK adds."""
    request = job.request
    machines, algorithm, output = (request[n] for n in ("ResourceConfig", "AlgorithmSpecification", "OutputDataConfig"))
    network, board = request.get("VpcConfig", {}), request.get("TensorBoardOutputConfig")
    return {
        "role": request["RoleArn"],
        "image_uri": algorithm["TrainingImage"],
        "base_job_name": request["TrainingJobName"],
        "instance_type": machines["InstanceType"],
        "instance_count": machines["InstanceCount"],
        "volume_size": machines["VolumeSizeInGB"],
        "volume_kms_key": machines.get("VolumeKmsKeyId"),
        "keep_alive_period_in_seconds": machines.get("KeepAlivePeriodInSeconds"),
        "max_run": request["StoppingCondition"]["MaxRuntimeInSeconds"],
        "max_wait": request["StoppingCondition"].get("MaxWaitTimeInSeconds"),
        "use_spot_instances": request["EnableManagedSpotTraining"],
        "input_mode": algorithm["TrainingInputMode"],
        "output_path": output["S3OutputPath"],
        "output_kms_key": output.get("KmsKeyId"),
        "code_location": job.bucket,
        "checkpoint_s3_uri": request["CheckpointConfig"]["S3Uri"],
        "checkpoint_local_path": request["CheckpointConfig"]["LocalPath"],
        "subnets": network.get("Subnets"),
        "security_group_ids": network.get("SecurityGroupIds"),
        "enable_network_isolation": request["EnableNetworkIsolation"],
        "encrypt_inter_container_traffic": request["EnableInterContainerTrafficEncryption"],
        "environment": dict(request["Environment"]),
        "tags": list(request["Tags"]),
        "metric_definitions": list(algorithm["MetricDefinitions"]),
        "enable_sagemaker_metrics": algorithm["EnableSageMakerMetricsTimeSeries"],
        "tensorboard_output_config": board
        and {"s3_output_path": board["S3OutputPath"], "container_local_output_path": board["LocalPath"]},
        "debugger_hook_config": False,  # which is smdebug's, and would be asked for
        "disable_profiler": True,
        **_estimators_entry(job),
    }


def _estimators_entry(job: SdkJob) -> dict[str, Any]:
    if job.entry == CONTAINER or job.folder is None:
        command = job.request["AlgorithmSpecification"]["ContainerEntrypoint"]
        return {"container_entry_point": list(command), "hyperparameters": job.hyperparameters()}
    given = {name: json.loads(text) for name, text in job.hyperparameters().items()}  # PyTorch writes JSON by itself
    if job.nproc:
        given["sagemaker_mpi_num_of_processes_per_host"] = job.nproc  # which the toolkit's torchrun reads, too
    _refuse_full("hyperparameters", len(given), _OF_THE_TOOLKIT, 100)
    _refuse_full("channels", len(job.channels()), int(job.request["EnableNetworkIsolation"]), 20)  # one of the archive
    return {
        "entry_point": job.script,
        "source_dir": str(job.folder),
        "distribution": {"torch_distributed": {"enabled": True}},
        "hyperparameters": given,
    }


def estimator_inputs(job: SdkJob) -> dict[str, dict[str, Any]]:
    """Arguments of a ``TrainingInput`` by channel; that of our own upload, too."""
    channels = list(job.request.get("InputDataConfig", [])) if job.uploads else job.channels()
    return {
        each["ChannelName"]: {
            "s3_data": each["DataSource"]["S3DataSource"]["S3Uri"],
            "distribution": each["DataSource"]["S3DataSource"]["S3DataDistributionType"],
            "input_mode": each["InputMode"],
        }
        for each in channels
    }


def model_trainer_arguments(job: SdkJob) -> dict[str, Any]:
    """Of ``ModelTrainer`` and of its ``with_...``, dictionaries in the place of the SDK's classes.

    Raises :class:`UserError` where there is no room for the SDK's channels, and for a hyperparameter that its drivers
    would break on: they write each between quotes to a file for the shell, and the job ends with status 2 and without
    a reason.
    """
    _refuse_full("channels", len(job.channels()), 1 if job.folder is None else 2, 20)  # of drivers and code
    for name, text in job.hyperparameters().items():
        if "'" in text:
            raise UserError(
                f"{name.replace('__', '.')} is {text}, and SDK v3 cannot bring a ' to the container: give a value "
                "without it, or start the job with SDK v2 or dltrain launch sagemaker"
            )
    request, algorithm = job.request, job.request["AlgorithmSpecification"]
    given: dict[str, Any] = {
        "training_image": algorithm["TrainingImage"],
        "training_input_mode": algorithm["TrainingInputMode"],
        "role": request["RoleArn"],
        "base_job_name": request["TrainingJobName"][:_NAME_BEFORE_TIME].rstrip("-"),
        "source_code": _source_code(job),
        "compute": {
            **snaked(request["ResourceConfig"]),
            "enable_managed_spot_training": request["EnableManagedSpotTraining"],
        },
        "networking": {
            **snaked(request.get("VpcConfig", {})),
            "enable_network_isolation": request["EnableNetworkIsolation"],
            "enable_inter_container_traffic_encryption": request["EnableInterContainerTrafficEncryption"],
        },
        "stopping_condition": snaked(request["StoppingCondition"]),
        "output_data_config": snaked(request["OutputDataConfig"]),
        "checkpoint_config": snaked(request["CheckpointConfig"]),
        "input_data_config": snaked(job.channels()),
        "hyperparameters": job.hyperparameters(),
        "environment": dict(request["Environment"]),
        "tags": snaked(request["Tags"]),
        "metric_definitions": snaked(algorithm["MetricDefinitions"]),
    }
    if job.entry == SCRIPT:
        given["distributed"] = {"process_count_per_node": job.nproc or None}
    if "TensorBoardOutputConfig" in request:
        given["tensorboard_output_config"] = snaked(request["TensorBoardOutputConfig"])
    return given


def _source_code(job: SdkJob) -> dict[str, Any]:
    source = {} if job.folder is None else {"source_dir": str(job.folder), "ignore_patterns": _IGNORED}
    if job.entry == CONTAINER or job.folder is None:
        return {**source, "command": COMMAND}
    asked = {"requirements": REQUIREMENTS} if (job.folder / REQUIREMENTS).is_file() else {}
    return {**source, "entry_script": job.script, **asked}


def _refuse_full(what: str, ours: int, added: int, most: int) -> None:
    """The limits of SageMaker's API that hold for what is ours and for what an SDK adds together."""
    if ours + added > most:
        raise UserError(
            f"SageMaker would refuse this job: it has {ours} {what}, the SDK adds {added}, and {most} are the most; "
            "give fewer, or start it with dltrain launch sagemaker"
        )


def snaked(tree: Any) -> Any:
    """Names as SDK v3 writes them: ``VolumeSizeInGB`` as ``volume_size_in_gb``."""
    if isinstance(tree, Mapping):
        return {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower(): snaked(each) for name, each in tree.items()}
    return [snaked(each) for each in tree] if isinstance(tree, list) else tree
