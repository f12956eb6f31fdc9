"""Following a training job: what it is doing and prints, Ctrl-C, and what happens where AWS does not answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.stub import Stubber

from dltrain.sagemaker.following import LOGS, Followed, Unfollowed
from dltrain.testing.s3 import S3Server
from tests.sagemaker.test_request import GIVEN


def test_status_and_lines_are_told_as_they_come(s3: S3Server) -> None:
    region: dict[str, Any] = {"endpoint_url": s3.url, "region_name": "us-east-1"}
    logs, client = boto3.client("logs", **region), boto3.client("sagemaker", **region)
    with Stubber(client) as stub:
        moves: list[dict[str, Any]] = [
            {"Status": status, "StartTime": 0, "StatusMessage": message}
            for status, message in (("Starting", "Launching"), ("Training", "Image downloaded"), ("Failed", ""))
        ]
        for seen, status in ((1, "InProgress"), (2, "InProgress"), (3, "Failed")):
            required = {"TrainingJobArn": "arn:" + "x" * 20, "TrainingJobName": "followed", "CreationTime": 0}
            required |= {
                "ModelArtifacts": {"S3ModelArtifacts": "s3://bkt/m"},
                "SecondaryStatus": moves[seen - 1]["Status"],
            }
            required |= {"ResourceConfig": {"VolumeSizeInGB": 1}, "StoppingCondition": {}}
            required |= {"AlgorithmSpecification": {"TrainingInputMode": "File"}}
            reason = {"FailureReason": "rank 0: no"} if status == "Failed" else {}
            told = {"TrainingJobStatus": status, "SecondaryStatusTransitions": moves[:seen]}
            stub.add_response("describe_training_job", {**required, **told, **reason})
        lines: list[str] = []
        logs.create_log_group(logGroupName=LOGS)
        for host in ("algo-1", "algo-2"):
            stream = f"followed/{host}-1700000000"
            logs.create_log_stream(logGroupName=LOGS, logStreamName=stream)
            event = {"timestamp": int(1000 * time.time()), "message": f"step 1 of {host}\n"}
            logs.put_log_events(logGroupName=LOGS, logStreamName=stream, logEvents=[event])
        assert Followed("followed", client, logs, lines.append, pause=0).until_ended() == ("Failed", "rank 0: no")
    assert lines == [
        "Starting: Launching",
        "[algo-1] step 1 of algo-1",
        "[algo-2] step 1 of algo-2",
        "Training: Image downloaded",
        "Failed",
    ]


class Answers:
    """A client whose calls answer in turn, or raise what stands there."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            self.asked.append(name)
            answer = self.answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


def quiet(s3: S3Server) -> Any:
    """CloudWatch Logs of a region where nothing has been printed."""
    return boto3.client("logs", endpoint_url=s3.url, region_name="eu-north-1")


def refused(code: str, status: int = 400) -> ClientError:
    error: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(error, "DescribeTrainingJob")


RUNNING, DONE = {"TrainingJobStatus": "InProgress"}, {"TrainingJobStatus": "Completed"}


def test_what_passes_by_itself_is_tried_again_after_pauses(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    away = EndpointConnectionError(endpoint_url="https://api.sagemaker")
    client = Answers(refused("ThrottlingException"), refused("What", 503), away, RUNNING, away, DONE)
    lines: list[str] = []
    assert Followed("mine", client, quiet(s3), lines.append, pause=1).until_ended() == ("Completed", "")
    assert pauses == [1, 2, 4, 1, 1, 1]
    assert [line.partition(" (")[0] for line in lines] == ["AWS does not answer"] * 2
    with pytest.raises(Unfollowed, match=r"mine cannot be followed any longer: Could not connect"):
        Followed("mine", Answers(*[away] * 99), quiet(s3), lines.append).until_ended()
    assert sum(pauses[6:]) > 2700
    assert max(pauses) == 300


def test_what_does_not_pass_ends_the_following_at_once(s3: S3Server) -> None:
    client = Answers(RUNNING, refused("ExpiredTokenException"), DONE)
    with pytest.raises(Unfollowed, match="ExpiredTokenException"):
        Followed("mine", client, quiet(s3), print, pause=0).until_ended()
    assert client.answers == [DONE]
    Followed("mine", Answers(refused("ValidationException")), Answers(), print).stop()  # it has just ended
    with pytest.raises(Unfollowed, match=r"mine cannot be stopped: .*AccessDenied"):
        Followed("mine", Answers(refused("AccessDeniedException")), Answers(), print).stop()


def test_without_a_right_to_its_lines_the_status_is_followed_on() -> None:
    lines: list[str] = []
    logs = Answers(refused("AccessDeniedException"))
    assert Followed("mine", Answers(RUNNING, RUNNING, DONE), logs, lines.append, 0).until_ended() == ("Completed", "")
    assert logs.asked == ["get_paginator"]
    assert [line.partition(",")[0] for line in lines] == ["what it prints cannot be read"]


def test_the_logs_of_more_hosts_than_a_page_holds_are_told(s3: S3Server) -> None:
    logs = boto3.client("logs", endpoint_url=s3.url, region_name="eu-west-3")
    logs.create_log_group(logGroupName=LOGS)
    for host in range(60):
        stream = f"many/algo-{host + 1}-1700000000"
        logs.create_log_stream(logGroupName=LOGS, logStreamName=stream)
        event = {"timestamp": int(1000 * time.time()), "message": "here"}
        logs.put_log_events(logGroupName=LOGS, logStreamName=stream, logEvents=[event])
    lines: list[str] = []
    Followed("many", Answers(DONE), logs, lines.append, 0).until_ended()
    assert len(lines) == 60


class Pages:
    """Logs of one stream: pages of lines by their tokens; the last comes again and again, and may be filled late."""

    def __init__(self, *pages: tuple[str, ...]) -> None:
        self.pages = list(pages)

    def get_paginator(self, _: str) -> Any:
        return Answers(*[[{"logStreams": [{"logStreamName": "mine/algo-1-17"}]}]] * 9)

    def get_log_events(self, *, nextToken: str = "0", **_: Any) -> dict[str, Any]:
        place = int(nextToken)
        lines = self.pages[place] if place < len(self.pages) else ()
        return {
            "events": [{"message": line} for line in lines],
            "nextForwardToken": str(min(place + 1, len(self.pages))),
        }


def test_behind_an_empty_page_lines_are_read_to_the_end() -> None:
    lines: list[str] = []
    Followed("mine", Answers(DONE), Pages(("one",), (), (), ("two",), (), ("three",)), lines.append, 0).until_ended()
    assert lines == [f"[algo-1] {line}" for line in ("one", "two", "three")]


def test_lines_that_come_after_the_end_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    logs, lines = Pages(("one",)), list[str]()
    monkeypatch.setattr(time, "sleep", lambda _: logs.pages.append(("Traceback",)))
    Followed("mine", Answers(DONE), logs, lines.append).until_ended()
    assert lines == ["[algo-1] one", "[algo-1] Traceback"]


class Aws(BaseHTTPRequestHandler):
    """SageMaker with one job that runs until it is asked to stop, and then as long as ``stopping`` says."""

    stopping = 0
    expired = False
    silent = ""
    """A call that is not answered."""
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        called = self.headers["X-Amz-Target"].partition(".")[2]
        self.asked.append(called)
        if called == self.silent:
            time.sleep(20)
            return
        status = 200
        answer: dict[str, Any] = {"TrainingJobArn": "arn", "logStreams": []}
        if called == "DescribeTrainingJob":
            stopped = self.asked[self.asked.index("StopTrainingJob") :] if "StopTrainingJob" in self.asked else []
            ended = bool(stopped) and stopped.count(called) > self.stopping
            answer["TrainingJobStatus"] = "Stopped" if ended else "InProgress"
            if self.expired:
                status, answer = 400, {"__type": "ExpiredTokenException", "message": "the token has expired"}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def following(tmp_path: Path, *more: str, **changes: Any) -> Iterator[tuple[subprocess.Popen[str], type[Aws]]]:
    """``dltrain launch sagemaker`` that has begun to follow its job."""
    aws = type("Own", (Aws,), {"asked": [], **changes})
    with ThreadingHTTPServer(("127.0.0.1", 0), aws) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "eu-west-1"}
        variables = {**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        command = [sys.executable, "-m", "dltrain", "launch", "sagemaker", "image/classify", "--preset", "digits"]
        process = subprocess.Popen(
            [*command, *GIVEN, *more], cwd=tmp_path, env=variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        until(lambda: {"DescribeTrainingJob", aws.silent} & {*aws.asked} or process.poll() is not None)
        try:
            yield process, aws
        finally:
            process.kill()
            process.communicate()
            server.shutdown()


def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LOOK = "aws sagemaker describe-training-job --training-job-name mine --region eu-west-1"


def test_ctrl_c_leaves_the_job_alone(tmp_path: Path) -> None:
    with following(tmp_path) as (process, aws):
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 130, err
    assert (
        f"mine goes on without being followed; --stop-on-interrupt would have stopped it; see what it does: {LOOK}"
        in err
    )
    assert "StopTrainingJob" not in aws.asked
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_stops_the_job_where_it_is_to_and_a_second_one_leaves_it(tmp_path: Path) -> None:
    with following(tmp_path, "--stop-on-interrupt") as (process, aws):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert json.loads(out)["status"] == "Stopped"
    assert "stopping mine: it saves first" in err
    with following(tmp_path, "--stop-on-interrupt", stopping=99) as (process, aws):
        process.send_signal(signal.SIGINT)
        until(lambda: aws.asked[-1:] == ["DescribeLogStreams"] and "StopTrainingJob" in aws.asked)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 130, err
    assert f"mine goes on without being followed; it was asked to stop; see what it does: {LOOK}" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_what_aws_has_not_answered_is_not_said_to_be_done(tmp_path: Path) -> None:
    with following(tmp_path, "--stop-on-interrupt", silent="StopTrainingJob") as (process, aws):
        process.send_signal(signal.SIGINT)
        until(lambda: "StopTrainingJob" in aws.asked)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=15)[1]
    assert process.returncode == 130, err
    stop = LOOK.replace("describe-", "stop-")
    assert f"followed; it may not have been asked to stop: {stop}; see what it does: {LOOK}" in err
    with following(tmp_path, silent="CreateTrainingJob") as (process, _):
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=15)[1]
    assert process.returncode == 130, err
    assert f"mine may have been started, and goes on by itself if it was; see whether it is there: {LOOK}" in err
    assert "Traceback" not in err


def test_a_job_that_can_be_followed_no_longer_is_not_one_that_failed(tmp_path: Path) -> None:
    with following(tmp_path, expired=True) as (process, _):
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (69, "")
    assert "the token has expired; the job goes on by itself: " + LOOK in err
    assert "Traceback" not in err
