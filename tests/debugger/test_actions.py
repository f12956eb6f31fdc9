"""What follows a finding goes where it is told to."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from dltrain.debugger.actions import Actions
from dltrain.debugger.findings import Finding
from dltrain.errors import UserError
from dltrain.hooks.base import NOTHING, Request

FOUND = Finding("LossSpike", 7, "the loss is 9", "It may not heal.", "Look at the samples.", ("a/1",), {"loss": 9.0})


class Topics:
    """What boto3's client of SNS is asked; moto's stand-in for all of AWS would break the clients of other tests."""

    sent: ClassVar[list[dict[str, str]]] = []

    def __init__(self, service: str, region_name: str) -> None:
        assert (service, region_name) == ("sns", "eu-west-1")

    def publish(self, **message: str) -> None:
        if message["TopicArn"].endswith("gone"):
            raise ValueError("no such topic")
        self.sent.append(message)


def test_a_finding_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boto3.client", Topics)
    topic, told = "arn:aws:sns:eu-west-1:123456789012:found", list[str]()
    actions = Actions([f"sns:{topic}", f"sns:{topic}-gone"], told.append)
    assert actions.act([f"sns:{topic}", f"sns:{topic}-gone"], FOUND) == NOTHING
    actions.close()
    assert [each["Subject"] for each in Topics.sent] == ["dltrain: LossSpike"]
    assert json.loads(Topics.sent[0]["Message"].splitlines()[-1])["numbers"] == {"loss": 9.0}
    assert told == [f"sns:{topic}-gone was not told of LossSpike (ValueError: no such topic)"]


def test_what_is_asked_of_the_loop_is_put_together() -> None:
    actions = Actions(["log", "save", "stop"], print)
    assert actions.act(["log"], FOUND) == NOTHING
    assert actions.act(["save", "stop"], FOUND) == Request.SAVE | Request.STOP


@pytest.mark.parametrize("word", ["webhook:example.org", "sns:my-topic", "sns", "email:me@example.org"])
def test_a_target_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"needs a|there is no action"):
        Actions([word], print)
