"""``dltrain launch sagemaker RECIPE --instance-type ml.p5.48xlarge --count 2 --spot ... [--dry-run]``: a training job
on SageMaker, checked here against every limit of its API, and followed until it has ended."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dltrain.cli.main import Parser
from dltrain.config import split_arguments
from dltrain.degrees import degrees_of
from dltrain.errors import EXIT_INTERRUPTED, EXIT_UNFOLLOWED, UserError
from dltrain.recipes import declarations
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import CODE
from dltrain.sagemaker.code import Code, is_users, read_code
from dltrain.sagemaker.following import Followed, Unfollowed
from dltrain.sagemaker.options import JobOptions, patterns, read_options
from dltrain.sagemaker.prices import Bill, read_prices
from dltrain.sagemaker.request import address_of, build, refuse_packages, settings_here, with_channels

FLAGS = ("spot", "isolate", "encrypt")


def run(arguments: Sequence[str]) -> int:
    """Build, check, tell what it costs; then, without ``--dry-run``, upload, start and follow. Returns 0 where the job
    has completed, 1 where it has not, and 69 where that could not be seen."""
    words, overrides = split_arguments(arguments)
    known = _parser().parse_args(words)
    given = {name: getattr(known, name) for name in JobOptions.model_fields if getattr(known, name) is not None}
    options = read_options(known.job, given)
    config = declarations(known.recipe).configure(known.preset, settings_here(overrides, options))
    if options.nproc:  # of GPUs only the instance knows
        degrees_of(config.parallel, Environment(0, options.nproc * options.count, 0, options.nproc))
    config = with_channels(config, overrides, options, lambda line: _say(f"warning: {line}"))
    request = build(known.recipe, known.preset, overrides, config, options)
    code = read_code(known.recipe, options.source, options.ignore) if is_users(known.recipe) else None
    if code is not None:
        refuse_packages(code, options)
        print(f"code: {code.told()}", file=sys.stderr)
    for line in Bill(options, read_prices(known.prices, options.instance_type, options.region)).lines():
        print(line, file=sys.stderr)
    if known.dry_run:
        print(json.dumps(request, indent=1))
        return 0
    return _start(known, request, options, code)


def _parser() -> Parser:
    parser = Parser(prog="dltrain launch sagemaker", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--preset", default="")
    parser.add_argument("--job", type=Path, help="YAML file of these options")
    parser.add_argument("--dry-run", action="store_true", help="print the request and start nothing")
    parser.add_argument("--detach", action="store_true", help="start it, and do not wait")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job, too")
    parser.add_argument("--prices", default="", help="'aws', or a table: source, date, usd_per_hour")
    for name, field in JobOptions.model_fields.items():
        option, doc = "--" + name.replace("_", "-"), field.description
        if name in FLAGS:
            parser.add_argument(option, action="store_true", default=None, help=doc)
        elif name == "ignore":  # no YAML: there a star begins a reference
            parser.add_argument(option, action="extend", type=patterns, default=None, help=doc)
        elif str(field.annotation).startswith(("dict", "tuple")):
            parser.add_argument(option, type=_parsed, default=None, help=doc)
        else:
            parser.add_argument(option, default=None, help=doc)
    return parser


def _parsed(text: str) -> Any:
    """A list or a mapping, as YAML. Raises ``ArgumentTypeError``, to which argparse adds the option."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not, say
        why = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML ({why}); give '{{name: value}}', or 'a, b'") from None
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _start(known: Any, request: dict[str, Any], options: JobOptions, code: Code | None) -> int:
    import boto3  # slow to import
    from botocore.exceptions import BotoCoreError, ClientError

    name = request["TrainingJobName"]
    region = {"region_name": options.region} if options.region else {}
    try:
        if code is not None:
            address = f"{address_of(name, options)}/{CODE}"
            files = list(code.upload(address))
            print(f"{len(files)} file(s) of code are at {address}", file=sys.stderr)
        client = boto3.client("sagemaker", **region)
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"AWS refused: {error}") from None
    where = f"--training-job-name {name} --region {client.meta.region_name}"
    look = f"aws sagemaker describe-training-job {where}"
    try:
        client.create_training_job(**request)
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"AWS refused: {error}") from None
    except KeyboardInterrupt:  # AWS may have taken the request, and its answer was still to come
        _say(f"\n{name} may have been started, and goes on by itself if it was; see whether it is there: {look}")
        return EXIT_INTERRUPTED
    _say(f"started {name}")
    if known.detach:
        print(json.dumps({"job": name}))
        return 0
    job = Followed(name, client, boto3.client("logs", **region), _say)
    try:
        return _follow(job, name, known.stop_on_interrupt)
    except Unfollowed as error:
        _say(f"warning: {error}; the job goes on by itself: {look}")
        return EXIT_UNFOLLOWED
    except KeyboardInterrupt:
        stops = "--stop-on-interrupt would have stopped it"
        if known.stop_on_interrupt:
            unsure = f"it may not have been asked to stop: aws sagemaker stop-training-job {where}"
            stops = "it was asked to stop" if job.asked_to_stop else unsure
        _say(f"\n{name} goes on without being followed; {stops}; see what it does: {look}")
        return EXIT_INTERRUPTED


def _follow(job: Followed, name: str, stops: bool) -> int:
    """Until it has ended; Ctrl-C, once, asks for its end where that ``stops`` it. Raises ``KeyboardInterrupt`` for
    another, and :class:`Unfollowed`."""
    started = time.monotonic()
    try:
        status, reason = job.until_ended()
    except KeyboardInterrupt:
        if not stops:
            raise
        _say(f"\nstopping {name}: it saves first")
        job.stop()
        status, reason = job.until_ended()
    print(json.dumps({"job": name, "status": status, "reason": reason, "seconds": round(time.monotonic() - started)}))
    return 0 if status == "Completed" else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
