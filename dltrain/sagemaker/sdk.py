"""A training job for SageMaker's own Python SDKs: the estimator of SDK v2, the model trainer of SDK v3.

    to_estimator("image/classify", "digits", {"data.train": "s3://..."}, options).fit()
    to_model_trainer("mine.py", "small", {"data.train": "s3://..."}, options).train()

Both send what :func:`dltrain.sagemaker.request.build` makes, and refuse what it refuses. They are for those who have
notebooks and pipelines of an SDK: ``dltrain launch sagemaker`` needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

from dltrain.errors import UserError
from dltrain.sagemaker.channels import CODE
from dltrain.sagemaker.code import read_code
from dltrain.sagemaker.options import JobOptions
from dltrain.sagemaker.request import address_of
from dltrain.sagemaker.sdk_arguments import (
    CONTAINER,
    SdkJob,
    described,
    estimator_arguments,
    estimator_inputs,
    model_trainer_arguments,
)

V2, V3 = "sagemaker>=2.257,<3", "sagemaker-train>=1.27"


def to_estimator(
    recipe: str,
    preset: str,
    settings: Mapping[str, Any],
    options: JobOptions,
    *,
    entry: str = CONTAINER,
    session: Any = None,
) -> Any:
    """An ``Estimator`` that starts our own entry point, or, with ``entry="script"``, a ``PyTorch`` estimator that
    starts the recipe's file under the toolkit's torchrun. Its ``fit()`` needs nothing: name and channels are known.

    ``session`` is a ``sagemaker.Session``; without one it is made of ``options.region`` and ``options.bucket``. Raises
    :class:`UserError` for what :func:`build` refuses, and where there is no SDK v2.
    """
    job = described(recipe, preset, settings, options, entry)
    session = session or _session(_imported("sagemaker.session", V2), options)
    arguments = estimator_arguments(job)
    board = arguments.pop("tensorboard_output_config")
    if board:
        arguments["tensorboard_output_config"] = _imported("sagemaker.debugger", V2).TensorBoardOutputConfig(**board)
    made: Any = _imported("sagemaker.estimator", V2).Estimator
    if entry != CONTAINER:
        made = _imported("sagemaker.pytorch", V2).PyTorch
    return _knowing_its_inputs(made, job, recipe, options)(**arguments, sagemaker_session=session)


def to_model_trainer(
    recipe: str,
    preset: str,
    settings: Mapping[str, Any],
    options: JobOptions,
    *,
    entry: str = CONTAINER,
    session: Any = None,
) -> Any:
    """A ``ModelTrainer`` whose drivers start our own entry point, or, with ``entry="script"``, the recipe's file under
    their torchrun. ``train()`` needs nothing: channels are known, and a time is added to the name.

    ``session`` is a ``sagemaker.core.helper.session_helper.Session``; without one it is made of ``options.region`` and
    ``options.bucket``, where the code goes. Raises :class:`UserError` for what :func:`build` refuses, for what the
    drivers cannot hand on, and where there is no SDK v3.
    """
    given = model_trainer_arguments(described(recipe, preset, settings, options, entry))
    train = _imported("sagemaker.train", V3)
    configs = _imported("sagemaker.core.training.configs", V3)
    distributed = _imported("sagemaker.train.distributed", V3)
    session = session or _session(_imported("sagemaker.core.helper.session_helper", V3), options)
    classes = {
        "source_code": configs.SourceCode,
        "compute": configs.Compute,
        "networking": configs.Networking,
        "stopping_condition": configs.StoppingCondition,
        "output_data_config": configs.OutputDataConfig,
        "checkpoint_config": configs.CheckpointConfig,
        "distributed": distributed.Torchrun,
    }
    for name, made in classes.items():
        if name in given:
            given[name] = made(**given[name])
    given["tags"] = [configs.Tag(**tag) for tag in given["tags"]]
    given["input_data_config"] = [_channel(configs, channel) for channel in given["input_data_config"]]
    metrics = [configs.MetricDefinition(**metric) for metric in given.pop("metric_definitions")]
    board = given.pop("tensorboard_output_config", None)
    trainer = train.ModelTrainer(**given, sagemaker_session=session).with_metric_definitions(metrics)
    return trainer.with_tensorboard_output_config(configs.TensorBoardOutputConfig(**board)) if board else trainer


def _knowing_its_inputs(base: Any, job: SdkJob, recipe: str, options: JobOptions) -> Any:
    """An estimator takes neither name nor channels when it is made, and a job without them would fail."""
    made = _imported("sagemaker.inputs", V2).TrainingInput
    name = job.request["TrainingJobName"]

    class Job(base):
        inputs: ClassVar[dict[str, Any]] = {channel: made(**given) for channel, given in estimator_inputs(job).items()}

        def fit(self, inputs: Any = None, wait: bool = True, logs: Any = "All", job_name: Any = None,
                experiment_config: Any = None) -> Any:  # fmt: skip
            """The SDK's own, where ``inputs`` are channels beside the job's; a second job's name has a time behind."""
            if inputs is not None and not isinstance(inputs, dict):
                inputs = {"training": inputs}  # as the SDK calls a single one
            if job.uploads:
                list(read_code(recipe, options.source, options.ignore).upload(f"{address_of(name, options)}/{CODE}"))
            channels = {**self.inputs, **(inputs or {})} or None
            return super().fit(channels, wait, logs, job_name or (None if self.jobs else name), experiment_config)

    return Job


def _channel(configs: Any, given: Mapping[str, Any]) -> Any:
    source = configs.S3DataSource(**given["data_source"]["s3_data_source"])
    return configs.Channel(**{**given, "data_source": configs.DataSource(s3_data_source=source)})


def _session(module: Any, options: JobOptions) -> Any:
    import boto3  # slow to import

    boto = boto3.session.Session(region_name=options.region or None)
    if not boto.region_name:
        raise UserError("AWS's region is not known; give it in the options (region), or set AWS_DEFAULT_REGION")
    bucket, _, prefix = options.bucket.removeprefix("s3://").partition("/")
    return module.Session(boto_session=boto, default_bucket=bucket, default_bucket_prefix=prefix or None)


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module} cannot be imported ({error}); pip install '{package}'") from None
