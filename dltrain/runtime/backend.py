"""What ranks talk by: NCCL for tensors on GPUs and gloo for those on the host, or SageMaker's SMDDP where a job asks
for it and it is there.

    name, why = choose_backend("auto", device, os.environ)

The last SMDDP (2.5.0, October 2024) is for torch 2.4.1, so today its line says why it is not taken.

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/data-parallel-modify-sdp-pt.html
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from dltrain.errors import UserError

SMDDP = "smddp"

_MODULE = "smdistributed.dataparallel.torch.torch_smddp"
"""Registers the backend when it is imported."""


def choose_backend(
    wanted: str, device: torch.device, variables: Mapping[str, str], asked: str = "auto"
) -> tuple[str, str]:
    """The backend's name for ``init_process_group``, and why it is this one.

    ``wanted`` is ``parallel.backend``, ``asked`` ``run.device``. Raises :class:`UserError` where a backend is wanted
    that there is not.
    """
    if wanted == "nccl" and device.type != "cuda":
        raise UserError("parallel.backend is 'nccl', which talks between GPUs, and there is none; take gloo or auto")
    passed_over = ""
    if wanted == SMDDP or (wanted == "auto" and is_asked_for(variables)):
        passed_over = why_not_smddp()
        if not passed_over:
            return SMDDP, "SageMaker's data parallel library, which the job asks for"
        if wanted == SMDDP:
            raise UserError(f"parallel.backend is 'smddp', and {passed_over}; take auto")
        passed_over = f"smddp was asked for, and {passed_over}; "
    if device.type == "cuda" and wanted == "gloo":
        return "gloo", "parallel.backend is gloo"
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl", f"{passed_over}NCCL for tensors on GPUs, gloo for those on the host"
    return "gloo", passed_over + ("run.device is cpu" if asked == "cpu" else "torch finds no CUDA device")


def is_asked_for(variables: Mapping[str, str]) -> bool:
    """Whether the training job's parameters switch SMDDP on, as its SDK writes them."""
    try:
        parameters = json.loads(variables.get("SM_FRAMEWORK_PARAMS") or "{}")
    except ValueError:
        return False
    return str(parameters.get("sagemaker_distributed_dataparallel_enabled", "")).lower() == "true"


def why_not_smddp() -> str:
    """Empty where SMDDP is there and takes this machine; it refuses instances it does not know when it is imported."""
    if find_spec("smdistributed") is None:  # asking for what lies inside would raise where this is absent
        return "smdistributed is not installed (its last version is for torch 2.4.1)"
    try:
        importlib.import_module(_MODULE)
    except Exception as error:  # noqa: BLE001 - it raises whatever it likes, for wrong instances as for wrong versions
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it cannot be imported here ({type(error).__name__}: {first[:200]})"
    return ""
