"""How hosts of an instance type talk: variables for NCCL, gloo and EFA. What the job sets itself is left as it is.

References: https://github.com/aws/aws-ofi-nccl, https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa.html
"""

from __future__ import annotations

from dltrain.errors import UserError

_EFA = ("p3dn.24xlarge", "p4d.24xlarge", "p4de.24xlarge")
_EFA_FAMILIES = ("p5", "p5e", "p5en", "p6-b200", "p6-b300", "p6e-gb200")
"""Instances whose hosts talk past the kernel; of the families every size, down to p5.4xlarge with its one adapter."""

_SIMPLE = ("p3dn.24xlarge", "p4d.24xlarge", "p4de.24xlarge")
"""Where NCCL's low-latency protocols do not work over EFA, and its plugin does not choose by itself."""

_NO_GPU_MEMORY = ("p3dn.24xlarge",)
"""Whose adapter cannot reach the GPU's memory."""

_OTHERS = ("trn", "inf")


def variables_for(instance_type: str, interface: str, hosts: int) -> dict[str, str]:
    """By name, for ranks of a host of that type (``ml.p5.48xlarge``, or without ``ml.``) that is one of so many.

    Raises :class:`UserError` for Trainium and Inferentia, which torch's CUDA build knows nothing of.
    """
    name = instance_type.removeprefix("ml.")
    family = name.partition(".")[0]
    if family.startswith(_OTHERS):
        raise UserError(
            f"{instance_type} has no GPU but AWS's own accelerators, which dltrain does not train on; take a p or g "
            "instance, or a c or m one for the CPU"
        )
    found = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface, "NCCL_DEBUG": "WARN"}
    if hosts > 1 and (name in _EFA or family in _EFA_FAMILIES):
        found |= {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1"}
        found |= {} if name in _NO_GPU_MEMORY else {"FI_EFA_USE_DEVICE_RDMA": "1"}
        found |= {"NCCL_PROTO": "simple"} if name in _SIMPLE else {}
    return found
