"""What follows a finding goes where it is told to."""

from __future__ import annotations

import json

import boto3
import pytest
from moto import mock_aws
from moto.core import DEFAULT_ACCOUNT_ID
from moto.sns.models import sns_backends

from dltrain.debugger.actions import Actions
from dltrain.debugger.findings import Finding
from dltrain.errors import UserError
from dltrain.hooks.base import NOTHING, Request

FOUND = Finding("LossSpike", 7, "the loss is 9", "It may not heal.", "Look at the samples.", ("a/1",), {"loss": 9.0})


def test_a_finding_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        topic = boto3.client("sns", region_name="eu-west-1").create_topic(Name="found")["TopicArn"]
        told: list[str] = []
        actions = Actions([f"sns:{topic}", f"sns:{topic}-gone"], told.append)
        assert actions.act([f"sns:{topic}", f"sns:{topic}-gone"], FOUND) == NOTHING
        actions.close()
        sent = sns_backends[DEFAULT_ACCOUNT_ID]["eu-west-1"].topics[topic].sent_notifications
    assert len(sent) == 1
    _, message, subject, *_ = sent[0]
    assert subject == "dltrain: LossSpike"
    assert json.loads(message.splitlines()[-1])["numbers"] == {"loss": 9.0}
    assert len(told) == 1
    assert "was not told of LossSpike" in told[0]


def test_what_is_asked_of_the_loop_is_put_together() -> None:
    actions = Actions(["log", "save", "stop"], print)
    assert actions.act(["log"], FOUND) == NOTHING
    assert actions.act(["save", "stop"], FOUND) == Request.SAVE | Request.STOP


@pytest.mark.parametrize("word", ["webhook:example.org", "sns:my-topic", "sns", "email:me@example.org"])
def test_a_target_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"needs a|there is no action"):
        Actions([word], print)
