"""Following a training job: what it is doing, and what it prints, until it has ended.

status, reason = follow(name, region, print)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LOGS = "/aws/sagemaker/TrainingJobs"

ENDED = ("Completed", "Failed", "Stopped")

PAUSE = 5.0
"""Seconds between looks."""


class Followed:
    """One job; ``client`` and ``logs`` are boto3's of SageMaker and of CloudWatch Logs."""

    def __init__(self, name: str, client: Any, logs: Any, say: Callable[[str], None], pause: float = PAUSE) -> None:
        self._name, self._client, self._logs, self._say, self._pause = name, client, logs, say, pause
        self._seen = 0
        self._next: dict[str, str] = {}

    def until_ended(self) -> tuple[str, str]:
        """Tell each change of status and each line; the last status, and why where it failed."""
        while True:
            found = self._client.describe_training_job(TrainingJobName=self._name)
            self._tell_status(found.get("SecondaryStatusTransitions", []))
            self._tell_lines()
            if found["TrainingJobStatus"] in ENDED:
                self._tell_lines()
                return found["TrainingJobStatus"], found.get("FailureReason", "")
            time.sleep(self._pause)

    def stop(self) -> None:
        """Ask for its end; it has two minutes to save."""
        self._client.stop_training_job(TrainingJobName=self._name)

    def _tell_status(self, transitions: list[dict[str, Any]]) -> None:
        for each in transitions[self._seen :]:
            self._say(f"{each['Status']}: {each.get('StatusMessage', '')}".rstrip(": "))
        self._seen = len(transitions)

    def _tell_lines(self) -> None:
        for stream in self._streams():
            while True:
                start = {"nextToken": self._next[stream]} if stream in self._next else {"startFromHead": True}
                page = self._logs.get_log_events(logGroupName=LOGS, logStreamName=stream, **start)
                for event in page["events"]:
                    self._say(f"[{stream.partition('/')[2].rsplit('-', 1)[0]}] {event['message'].rstrip()}")
                before, self._next[stream] = self._next.get(stream), page["nextForwardToken"]
                if before == page["nextForwardToken"] or not page["events"]:
                    break

    def _streams(self) -> list[str]:
        """Of its hosts; none before the first has printed."""
        try:
            found = self._logs.describe_log_streams(logGroupName=LOGS, logStreamNamePrefix=f"{self._name}/")
        except self._logs.exceptions.ResourceNotFoundException:
            return []
        return [stream["logStreamName"] for stream in found["logStreams"]]
