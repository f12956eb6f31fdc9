"""The typed tree that every recipe extends.

Each section is frozen and strict: an unknown key is an error that names the nearest one. The string under a field is
its documentation, shown by ``dltrain train --help``. A recipe derives :class:`Config` and replaces ``model`` by a
section of its own; a preset is a function that returns a config.

    @preset
    def digits() -> Config:
        return Config(data=Data(train="bundled://digits/train"), run=Run(length=Length.parse("15ep")))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from dltrain.config.debugger import Debugger, Profiler
from dltrain.config.deepspeed import DeepSpeed, refuse_other_layouts
from dltrain.config.length import Length
from dltrain.config.section import Section

NotNegative = Field(default=0, ge=0)

AUTO = -1
"""The number that 'auto' stands for."""


def _samples(value: Any) -> int:
    if value in ("auto", AUTO):
        return AUTO
    if not str(value).isdecimal():
        raise ValueError("give a number of samples, 0 for all of them, or auto")
    return int(value)


MicroBatch = Annotated[
    int,
    BeforeValidator(_samples),
    PlainSerializer(lambda value: "auto" if value == AUTO else value, when_used="json"),
]


class Run(Section):
    """The run: its name and place, how long it lasts, what makes it repeatable."""

    name: str = ""
    """Folder of the run under `folder`; empty makes a fresh name from the recipe, the preset and the time."""
    folder: str = "runs"
    """Local folder that holds all runs."""
    length: Length = Length.parse("10ep")
    """How long to train: epochs, steps or hours."""
    resume: str = "never"
    """'never' starts anew, 'auto' continues the named (or latest unfinished) run, a path continues that run."""
    seed: int = NotNegative
    """Seed of initial weights, order of data, augmentation and dropout."""
    deterministic: bool = False
    """Refuse operations without a deterministic form, so that two runs on a GPU agree bit for bit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; 'auto' takes CUDA where there is one."""
    threads: int = NotNegative
    """CPU threads of each rank; 0 divides the cores by the ranks on this host."""
    check_every: Length = Length.parse("0st")
    """Interval in steps between checks that ranks hold the same weights, buffers and learning rates; 0st makes none."""
    collect_every: int = NotNegative
    """Collect Python's garbage after so many steps, on all ranks at once, and never between; 0 leaves it to Python."""
    deadline: Length = Length.parse("0h")
    """Hours from the start of the job by which it has saved and stopped, as SageMaker's and Slurm's limits want it; 0h
    sets none."""
    stop_file: str = ""
    """A file whose appearance on any host asks the run to save and stop."""
    grace: float = Field(default=120.0, gt=0)
    """Seconds that a signal to stop leaves until the end by force: SageMaker's are 120, Kubernetes' 30. Where saving
    was seen to take longer, that is told."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a gradient that is not finite. Either way the update is skipped on the device."""


class Source(Section):
    """One data set of a mixture; its URL alone will do."""

    url: str
    """URL of its shards."""
    weight: int = NotNegative
    """Share of the samples beside the other weights; where all are 0, shares follow the sources' sizes."""
    limit: int = NotNegative
    """Keep so many samples of it, the same in every epoch; 0 keeps all."""
    repeat: int = Field(default=1, ge=1)
    """Passes over it in one epoch of the mixture."""

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class Data(Section):
    """Where the samples lie and in what order they are read."""

    train: str = ""
    """URL of the training shards (file://, s3://, http(s)://, bundled://), or a local folder."""
    sources: tuple[Source, ...] = ()
    """A mixture instead of `train`: URLs, or [{url: URL, weight: 3}, ...] with limit and repeat as well."""
    evaluation: str = ""
    """URL of the held-out shards; empty trains without evaluation."""
    global_batch_size: int = Field(default=64, gt=0)
    """Samples of one optimizer step over all ranks."""
    tail: Literal["carry", "drop", "pad"] = "carry"
    """The last, smaller batch of an epoch: filled from the next epoch, left out, or padded with weight 0."""
    lanes: int = Field(default=16, gt=0, le=65536)
    """Pieces the shuffled line of shards is cut into and read from in turn. Part of the order: keep it on resume."""
    window: int = Field(default=4096, gt=0)
    """Samples shuffled together within a lane. Part of the order: keep it on resume."""
    workers: int = NotNegative
    """Loader processes of each rank; 0 loads in the training process."""
    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
    """How loader processes start; fork is quickest, and unsafe once threads run."""
    prefetch: int = Field(default=2, gt=0)
    """Batches each worker prepares ahead."""
    bad_samples: int = NotNegative
    """Training samples that a rank may find bad: they are replaced, and listed in the run's quarantine folder."""
    decode: Literal["host", "device"] = "host"
    """Who decodes the images that a task leaves encoded (`encode_crop`): loader processes, or a GPU's nvJPEG."""
    cache: str = ""
    """Folder on each node's disk for copies of remote shards; empty is one under the temporary folder, 'off' none."""
    cache_gib: float = Field(default=0.0, ge=0)
    """GiB the node's copies may take; 0 is three quarters of what is free."""
    ahead_mib: int = Field(default=1024, ge=0)
    """MiB fetched ahead beyond the current and the next window, at least."""
    ahead_seconds: float = Field(default=30.0, ge=0)
    """Seconds of training fetched ahead, at least."""


class Storage(Section):
    """How S3 and web servers are reached; endpoint, region and credentials are AWS's own settings unless given here."""

    endpoint_url: str = ""
    """S3 endpoint; empty takes AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's."""
    path_style: bool = False
    """Write the bucket into the path instead of the host name, as many other servers want it."""
    profile: str = ""
    """Profile of the AWS configuration; empty takes AWS_PROFILE."""
    role: str = ""
    """ARN of a role to act under; its credentials are renewed while the run goes on."""
    anonymous: bool = False
    """Send requests unsigned, for public buckets."""
    requester_pays: bool = False
    """Pay for requests to buckets whose readers pay."""
    sse_customer_key: str = ""
    """File with the 32 bytes of a customer's key (SSE-C)."""
    kms_key: str = ""
    """KMS key under which new objects are encrypted (SSE-KMS); reading needs no setting."""
    part_mib: int = Field(default=8, gt=0, le=512)
    """MiB of one ranged request."""
    in_flight: int = Field(default=16, gt=0, le=256)
    """Requests of one process at a time; fewer while a server asks to slow down."""
    node_in_flight: int = Field(default=64, ge=0, le=4096)
    """Requests of all processes of a node at a time; 0 is no limit."""
    attempts: int = Field(default=10, gt=0)
    """Attempts without progress before a read is given up."""
    timeout: float = Field(default=20.0, gt=0)
    """Seconds a connection may be silent."""


class Model(Section):
    """The model; each recipe has its own fields here."""

    weights: str = ""
    """Start from these: a safetensors or torch file (here or s3://), a run's folder, or that of a checkpoint."""
    weights_skip: tuple[str, ...] = ()
    """Parameter-name patterns left at their initial values, such as 'head.*'; each must match something."""

    @model_validator(mode="after")
    def _skips_something(self) -> Self:
        if self.weights_skip and not self.weights:
            raise ValueError("weights_skip leaves out some of `weights`, and none are given; give model.weights, too")
        return self


class Optim(Section):
    """The optimizer, and how it is computed."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate; not scaled by batch size or ranks."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay (AdamW) or L2 (SGD), for parameters of two or more dimensions."""
    no_decay: tuple[str, ...] = ()
    """Further parameter-name patterns left without decay, such as '*.position'; each must match something."""
    frozen: tuple[str, ...] = ()
    """Parameter-name patterns that are not trained, such as 'blocks.*'; each must match something."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's term for numerical stability."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's momentum."""
    nesterov: bool = False
    """SGD with Nesterov's momentum."""
    implementation: Literal["auto", "fused", "foreach"] = "auto"
    """One kernel for all ('fused'), which also skips a bad step without the host looking, or one for each operation;
    'auto' is fused wherever torch has it: not for SGD of sharded or split layers."""
    max_norm: float = NotNegative
    """Clip the global gradient norm at this value; 0 measures it without clipping."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the weights' average over the steps, which is evaluated in their stead; 0 keeps none."""
    ema_warmup: bool = True
    """Average over few steps at first, so that initial weights are forgotten, as timm does."""


class Schedule(Section):
    """Learning rate over the run, as a multiple of `optim.learning_rate`."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    """Cosine to `final`, a factor `gamma` at each milestone, or constant; each after the warm-up."""
    warmup: Length = Length.parse("0st")
    """Linear rise from 0, in steps or epochs."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine ends."""
    milestones: tuple[Length, ...] = ()
    """Where 'step' multiplies by `gamma`, in steps or epochs."""
    gamma: float = Field(default=0.1, gt=0)
    """Factor of each milestone."""


class Precision(Section):
    """Number formats and compilation."""

    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 keep fp32 master weights and fp32 gradient reduction; fp16 scales losses, as GradScaler does."""
    float8: bool = False
    """Linear layers inside the plan's units multiply in float8, by torchao: Hopper and newer; emulated on a CPU."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """FSDP2: number format in which gradients are added up, of micro-batches and of ranks. bf16 sends and holds half
    the bytes, and rounds every sum."""
    matmul: Literal["highest", "high"] = "highest"
    """'high' lets fp32 matrix products use TF32 on a GPU."""
    batch_norm: Literal["local", "synchronised"] = "local"
    """Statistics of batch norm in training: of each rank's own samples, or of all data ranks' (of one micro-batch)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep 4-D weights and images channels last."""


class Parallel(Section):
    """How the ranks divide the work: degrees multiply to the number of ranks."""

    engine: Literal["plain", "deepspeed"] = "plain"
    """Who runs a step: torch's own DDP, FSDP2 and split layers, or DeepSpeed's ZeRO."""
    dp_replicate: int = Field(default=-1, ge=-1)
    """Replicas of the (sharded) model; -1 takes the ranks that are left, 1 where dp_shard takes them."""
    dp_shard: int = Field(default=1, ge=-1)
    """Ranks that share one sharded copy (FSDP2); -1 takes the ranks that are left, 1 is DDP."""
    tp: int = Field(default=1, ge=1)
    """Ranks that share each layer of the model, where its plan says how, and read the same samples."""
    sequence: bool = False
    """With tp: between split layers each rank keeps its part of the tokens, for less memory (sequence parallelism)."""
    cp: int = Field(default=1, ge=1)
    """Ranks that share the tokens of the same samples, where the model's plan says how: long series, large images."""
    cp_attention: Literal["auto", "gather", "ring"] = "auto"
    """With cp: gather keys and values of all tokens, or pass them round a ring, which never holds all of them and sends
    while it computes. auto takes the ring on CUDA in bf16 or fp16, where the plan allows it."""
    prove: bool = True
    """With tp or cp: before the first step, two samples through the whole model and through its shares must give the
    same losses and gradients."""
    pp: int = Field(default=1, ge=1)
    """Parts of a pipeline: the model is cut where its plan says how, and each part of the ranks has its stages."""
    schedule: Literal[
        "gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v"
    ] = "1f1b"
    """In which order a pipeline takes its micro-batches through its stages."""
    stages_per_rank: int = NotNegative
    """Stages on each rank of a pipeline; 0 takes 1 for gpipe and 1f1b, 2 for the others."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass (ZeRO-3) or keep them for the backward pass (ZeRO-2)."""
    micro_batch: MicroBatch = 0
    """Most samples per rank in one forward pass; gradients accumulate over the rest. 0 takes all at once, and in a
    pipeline as many micro-batches as it has stages, at least twice `pp`. 'auto' measures, before the run, what every
    rank has the GPU memory for."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds a collective may wait for the other ranks."""
    backend: Literal["auto", "nccl", "gloo", "smddp"] = "auto"
    """What ranks talk by. auto takes NCCL on GPUs and gloo on CPUs, and SageMaker's smddp where the job asks for it and
    it is installed."""
    offload: bool = False
    """FSDP2: parameters, gradients and optimizer live in the host's memory, and updates are computed there."""
    prefetch: int = NotNegative
    """FSDP2: units gathered ahead of the one at work, forward and backward; 0 leaves it to torch, which gathers one."""
    bucket_mib: float = Field(default=0.0, ge=0)
    """DDP: MiB of gradients that are reduced at a time; 0 leaves it to torch, which takes 25."""
    find_unused_parameters: bool = False
    """DDP: look in every step for parameters without a gradient, where steps differ in which those are. Parameters that
    no step uses are found, and this is switched on, by itself."""
    compress: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    """DDP: send gradients in half the size, or (PowerSGD) as products of small matrices, whose rest is not resumed."""
    powersgd_rank: int = Field(default=1, ge=1)
    """PowerSGD: rank of the matrices; more is closer to the gradient, and longer to send."""
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = "none"
    """Compute activations of the plan's units again in the backward pass: all; all but matrix products and attention;
    or what the compiler chooses within `activation_budget`."""
    activation_budget: float = Field(default=0.5, ge=0, le=1)
    """With 'budget': share of the activations that are kept; 0 keeps what enters a unit alone."""
    meta: bool = False
    """Build the model without memory and fill each rank's share layer by layer, by `reset_parameters()` of each: for
    models larger than a rank's memory. Other initial weights than without it, the same in every layout."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Settings of the engine of that name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "deepspeed":
            refuse_other_layouts(self)
        return self


class Checkpoint(Section):
    """What is saved, how often, and how many are kept."""

    every: Length = Length.parse("1ep")
    """Interval between checkpoints; 0st saves at the end alone."""
    keep: int = Field(default=2, gt=0)
    """Last checkpoints kept, beside the best one."""


class Logging(Section):
    """What the run shows while it trains."""

    every: Length = Length.parse("10st")
    """Interval between records in metrics.jsonl and TensorBoard."""
    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """A live line on a terminal ('rich'), a line per record elsewhere ('plain')."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    tensorboard_folder: str = ""
    """Where TensorBoard's events go, to a folder of the run's name: a local folder, or s3://, where those in the run's
    folder are copied to. Empty leaves them there; on SageMaker it is the LocalPath of the job's TensorBoard output."""

    @field_validator("tensorboard_folder")
    @classmethod
    def _can_be_written(cls, value: str) -> str:
        if "://" in value and value.partition("://")[0] not in ("file", "s3", "memory"):
            raise ValueError(f"events cannot be written to {value}; give a local folder or an s3:// URL")
        return value


class Evaluation(Section):
    """The held-out samples: when they are scored and which score counts."""

    every: Length = Length.parse("1ep")
    """Interval between evaluations; there is always one at the end."""
    batch_size: int = NotNegative
    """Samples of one evaluation step over all ranks; 0 takes data.global_batch_size."""
    workers: int = NotNegative
    """Loader processes of each rank during evaluation; they start anew each time."""
    metric: str = "loss"
    """Metric by which the best checkpoint is kept."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger value is better."""
    report: bool = True
    """Write report/ at the end of training."""


class Config(Section):
    """The whole configuration of a run."""

    run: Run = Run()
    data: Data = Data()
    storage: Storage = Storage()
    model: Model = Model()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    precision: Precision = Precision()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()
    debugger: Debugger = Debugger()
    profiler: Profiler = Profiler()

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = (("schedule.warmup", self.schedule.warmup), ("logging.every", self.logging.every))
        for name, length in (*lengths, *_milestones(self.schedule)):
            if length.unit == "h":
                raise ValueError(f"{name} is {length}: give it in epochs (ep) or steps (st)")
        if self.run.deadline.unit != "h":
            raise ValueError(f"run.deadline is {self.run.deadline}: give it in hours (h)")
        if self.run.check_every.unit != "st":
            raise ValueError(f"run.check_every is {self.run.check_every}: give it in steps (st)")
        if self.run.length.unit == "h" and self.schedule.name == "cosine":
            raise ValueError("schedule.name cosine needs run.length in epochs or steps; take 'constant' or 'step'")
        if self.data.train and self.data.sources:
            raise ValueError("data.train and data.sources are both given; take one, as with --data.train ''")
        if not self.run.length:
            raise ValueError("run.length is zero: nothing would be trained")
        return self


def _milestones(schedule: Schedule) -> list[tuple[str, Length]]:
    return [(f"schedule.milestones.{place}", length) for place, length in enumerate(schedule.milestones)]


PresetFunction = TypeVar("PresetFunction", bound=Callable[[], Config])


def preset(function: PresetFunction) -> PresetFunction:
    """Mark a function without arguments that returns a config as a preset named after it."""
    function.__dict__["is_preset"] = True
    return function
