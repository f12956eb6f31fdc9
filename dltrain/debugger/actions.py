"""What follows when a rule finds something: ``log``, ``save``, ``capture``, ``stop``, ``call:module.function``,
``webhook:URL``, ``sns:ARN``.

Saving and stopping are asked of the loop, which all ranks agree on. What goes over a network goes in a thread, and a
failure is told, once for each target.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import urllib3

from dltrain.debugger.findings import Finding
from dltrain.errors import UserError, nearest
from dltrain.hooks.base import NOTHING, Request

REQUESTS = {"log": NOTHING, "capture": NOTHING, "save": Request.SAVE, "stop": Request.STOP}

TARGETS = ("call", "webhook", "sns")

_SECONDS = 10.0
"""A message may take."""


class Actions:
    """Checks ``words``, and does what they say; ``told`` is given a sentence about a message that was not sent."""

    def __init__(self, words: Iterable[str], told: Callable[[str], Any]) -> None:
        self._told = told
        self._failed: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._targets = {word: _target(word) for word in words if _is_target(word)}

    def act(self, words: Iterable[str], finding: Finding) -> Request:
        """Returns what is asked of the loop."""
        asked = NOTHING
        for word in words:
            asked |= REQUESTS.get(word, NOTHING)
            if word in self._targets:
                self._send(word, finding)
        return asked

    def close(self) -> None:
        """Waits for messages on their way."""
        for thread in self._threads:
            thread.join(_SECONDS)

    def _send(self, word: str, finding: Finding) -> None:
        if word.startswith("call:"):
            self._try(word, finding)
            return
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=self._try, args=(word, finding), daemon=True))
        self._threads[-1].start()

    def _try(self, word: str, finding: Finding) -> None:
        try:
            self._targets[word](finding)
        except Exception as error:  # noqa: BLE001 - a function may be anyone's, and so may a server
            if word not in self._failed:
                self._failed.add(word)
                self._told(f"{word} was not told of {finding.rule} ({type(error).__name__}: {error})")


def _is_target(word: str) -> bool:
    """Whether an action has a target. Raises :class:`UserError` for one that is none."""
    name, colon, rest = word.partition(":")
    if name in TARGETS and colon and rest:
        return True
    if word in REQUESTS:
        return False
    if name in TARGETS:
        raise UserError(
            f"action {name!r} needs a target, such as call:my_module.tell, webhook:https://... or sns:arn:..."
        )
    raise UserError(f"there is no action {word!r}; {nearest(name, (*REQUESTS, *TARGETS))}")


def _target(word: str) -> Callable[[Finding], Any]:
    name, _, rest = word.partition(":")
    if name == "webhook":
        if not re.match(r"https?://[^/]", rest):
            raise UserError(f"action {word!r} needs a URL that begins with https:// or http://")
        return partial(_post, rest)
    if name == "sns":
        if not rest.startswith("arn:"):
            raise UserError(f"action {word!r} needs a topic's ARN, such as sns:arn:aws:sns:eu-west-1:123456789012:mine")
        return partial(_publish, rest)
    return named(rest, f"action {word!r}")


def named(path: str, whose: str) -> Any:
    """What ``module.name`` stands for. Raises :class:`UserError` where there is no such thing."""
    module, _, last = path.rpartition(".")
    if os.getcwd() not in sys.path and "" not in sys.path:  # a console script does not see the folder it is called in
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{whose} names {path!r}, which cannot be imported: {error}") from None


def _post(url: str, finding: Finding) -> None:
    headers = {"Content-Type": "application/json"}
    answer = urllib3.request("POST", url, body=finding.as_json().encode(), headers=headers, timeout=_SECONDS)
    if answer.status >= 300:
        raise OSError(f"the server answered {answer.status}")


def _publish(topic: str, finding: Finding) -> None:
    import boto3  # slow to import

    client = boto3.client("sns", region_name=topic.split(":")[3])
    client.publish(
        TopicArn=topic, Subject=f"dltrain: {finding.rule}"[:100], Message=f"{finding}\n\n{finding.as_json()}"
    )
