"""SageMaker Debugger's names of tensors in ours: without the model's class, and without what wrappers put between.

canonical("gradient/DistributedDataParallel_module.conv1.weight")  # gradient/conv1.weight
expression("^ResNet_conv1.*weight")  # ^conv1.*weight
"""

from __future__ import annotations

import re

_CLASS = r"_*[A-Z][A-Za-z0-9]*_"
"""The class of the model and an underscore, which stand before its parameters' names."""

_WRAPPERS = r"(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\\?\."
"""Anywhere in a name, with its dot; in an expression the dot may be escaped."""

_OUTER = r"(?:module\\?\.)+"
"""What data parallelism calls the model; at the beginning alone, for deeper it may be a module of the model's own."""

_BEGINNING = re.compile(rf"^(gradient/)?(?:{_CLASS})?({_OUTER})?")
_OF_A_MODULE = re.compile(r"_(in|out)put_\d+$")
_IN_EXPRESSION = re.compile(rf"(^|[\^/(|*+?:)])(?:{_CLASS}(?!(?:in|out)put)({_OUTER})?|{_OUTER})")


def canonical(name: str) -> str:
    """A tensor's name as dltrain has it; names of losses and scalars stay."""
    name = re.sub(_WRAPPERS, "", name)
    if name.startswith("scalar/"):
        return name
    if _OF_A_MODULE.search(name):
        return re.sub(rf"^{_OUTER}", "", name)
    return _BEGINNING.sub(r"\1", name)


def expression(text: str) -> str:
    """A regular expression for canonical names, of one for SageMaker Debugger's.

    What stands for a class or a wrapper is taken out where it is written out; the rest stays.
    """
    return _IN_EXPRESSION.sub(r"\1", re.sub(_WRAPPERS, "", text))
