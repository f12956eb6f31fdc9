"""Following a training job: what it is doing, and what it prints, until it has ended.

job = Followed(name, boto3.client("sagemaker"), boto3.client("logs"), print)
status, reason = job.until_ended()

A job may run for weeks, and looking at it fails in between: what passes by itself (a busy API, a lost connection) is
tried again, and what does not (credentials that have run out) is :class:`Unfollowed`. The job goes on either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

LOGS = "/aws/sagemaker/TrainingJobs"

ENDED = ("Completed", "Failed", "Stopped")

PAUSE = 5.0
"""Seconds between looks."""

LONGEST_PAUSE, ATTEMPTS = 300.0, 15
"""Seconds between attempts at most, and how many in a row may fail: 45 minutes without an answer."""

_PASSING = ("Throttl", "TooManyRequests", "RequestLimitExceeded", "ServiceUnavailable", "InternalFailure", "SlowDown")
"""Parts of AWS's names of errors that are over after a while."""

T = TypeVar("T")


class Unfollowed(Exception):
    """The job can be looked at no longer, and goes on."""


class Followed:
    """One job; ``client`` and ``logs`` are boto3's of SageMaker and of CloudWatch Logs."""

    def __init__(self, name: str, client: Any, logs: Any, say: Callable[[str], None], pause: float = PAUSE) -> None:
        self._name, self._client, self._logs, self._say, self._pause = name, client, logs, say, pause
        self._seen, self._readable = 0, True
        self._next: dict[str, str] = {}
        self.asked_to_stop = False
        """Whether AWS has answered :meth:`stop`."""

    def until_ended(self) -> tuple[str, str]:
        """Tell each change of status and each line; the last status, and why where it failed.

        Raises :class:`Unfollowed`.
        """
        while True:
            found = self._asked(lambda: self._client.describe_training_job(TrainingJobName=self._name))
            self._tell_status(found.get("SecondaryStatusTransitions", []))
            if self._readable:
                self._tell_lines()
            if found["TrainingJobStatus"] in ENDED:
                if self._readable:
                    time.sleep(self._pause)  # its last lines, which say why it failed, are on their way
                    self._tell_lines()
                return found["TrainingJobStatus"], found.get("FailureReason", "")
            time.sleep(self._pause)

    def stop(self) -> None:
        """Ask for its end; it has two minutes to save. One that has just ended is left as it is.

        Raises :class:`Unfollowed`.
        """
        from botocore.exceptions import ClientError

        def ask() -> None:
            try:
                self._client.stop_training_job(TrainingJobName=self._name)
            except ClientError as error:
                if error.response["Error"]["Code"] != "ValidationException":
                    raise

        self._asked(ask, "stopped")
        self.asked_to_stop = True

    def _asked(self, ask: Callable[[], T], to_be: str = "followed any longer") -> T:
        """AWS's answer, after growing pauses where it does not come."""
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask()
            except (BotoCoreError, ClientError) as error:
                if attempt == ATTEMPTS or not _passes(error):
                    raise Unfollowed(f"{self._name} cannot be {to_be}: {error}") from None
                if attempt == 1:
                    self._say(f"AWS does not answer ({error}); trying again, and the job goes on")
                time.sleep(min(self._pause * 2 ** (attempt - 1), LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    def _tell_status(self, transitions: list[dict[str, Any]]) -> None:
        for each in transitions[self._seen :]:
            self._say(f"{each['Status']}: {each.get('StatusMessage', '')}".rstrip(": "))
        self._seen = len(transitions)

    def _tell_lines(self) -> None:
        """Without a right to read them, or without an answer, the status is followed on by itself."""
        try:
            self._read_lines()
        except Unfollowed as error:
            self._readable = False
            self._say(f"what it prints cannot be read, and its status alone is told from here on: {error}")

    def _read_lines(self) -> None:
        """Of each stream to its end, which a token that comes again says: an empty page may have more behind it."""
        for stream in self._asked(self._streams):
            while True:
                start = {"nextToken": self._next[stream]} if stream in self._next else {"startFromHead": True}
                page = self._asked(partial(self._logs.get_log_events, logGroupName=LOGS, logStreamName=stream, **start))
                for event in page["events"]:
                    self._say(f"[{stream.partition('/')[2].rsplit('-', 1)[0]}] {event['message'].rstrip()}")
                before, self._next[stream] = self._next.get(stream), page["nextForwardToken"]
                if before == page["nextForwardToken"]:
                    break

    def _streams(self) -> list[str]:
        """Of its hosts; none before the first has printed."""
        pages = self._logs.get_paginator("describe_log_streams")
        try:
            found = list(pages.paginate(logGroupName=LOGS, logStreamNamePrefix=f"{self._name}/"))
        except self._logs.exceptions.ResourceNotFoundException:
            return []
        return [stream["logStreamName"] for page in found for stream in page["logStreams"]]


def _passes(error: Exception) -> bool:
    """Whether an error of boto3's is over after a while."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        server = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
        return server or any(part in error.response["Error"]["Code"] for part in _PASSING)
    return isinstance(error, ConnectionError | HTTPClientError)
