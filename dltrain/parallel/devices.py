"""GPUs as their makers describe them, and the network of the AWS instance that usually carries them. Imports no torch.

Peaks are of dense matrix products, without sparsity. ``inter`` is the instance's network shared out over its GPUs.

Sources, of the GPUs: V100 https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf,
T4 https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf,
A10G https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf,
A100 https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf,
L4 https://www.nvidia.com/en-us/data-center/l4/, L40S https://www.nvidia.com/en-us/data-center/l40s/,
H100 https://www.nvidia.com/en-us/data-center/h100/, H200 https://www.nvidia.com/en-us/data-center/h200/,
B200 https://www.nvidia.com/en-us/data-center/hgx/; of the instances: https://aws.amazon.com/ec2/instance-types/
(p3.16xlarge, g4dn.12xlarge, g5.48xlarge, p4d and p4de.24xlarge, g6.48xlarge, g6e.48xlarge, p5 and p5en.48xlarge,
p6-b200.48xlarge).
"""

from __future__ import annotations

from dataclasses import dataclass

from dltrain.errors import UserError, nearest

_GB, _TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """Bytes of memory; FLOPs per second of dense products by number format, 0 where it has none of its own; bytes per
    second of its memory, of one direction to a GPU of the same node, and of one direction to another node."""

    name: str
    memory: float
    fp32: float
    tf32: float
    bf16: float
    fp16: float
    bandwidth: float
    intra: float
    inter: float

    def peak(self, compute: str, matmul: str) -> float:
        """FLOPs per second under ``precision.compute`` and ``precision.matmul``.

        A GPU without TF32 or bf16 units computes both at the rate of fp32.
        """
        if compute == "bf16":
            return self.bf16 or self.fp32
        return (self.tf32 if matmul == "high" else 0.0) or self.fp32


def _device(
    name: str, gib: float, flops: tuple[float, float, float, float], memory: float, intra: float, inter: float
) -> Device:
    """TFLOPs of fp32, tf32, bf16 and fp16; GB/s of the memory and within a node; Gbit/s of a GPU's share of the net."""
    fp32, tf32, bf16, fp16 = (each * _TERA for each in flops)
    return Device(name, gib * _GB, fp32, tf32, bf16, fp16, memory * _GB, intra * _GB, inter * _GB / 8)


DEVICES = {
    device.name: device
    for device in (
        _device("v100", 16, (15.7, 0.0, 0.0, 125.0), 900, 150, 25 / 8),
        _device("t4", 16, (8.1, 0.0, 0.0, 65.0), 300, 16, 50 / 4),
        _device("a10g", 24, (35.0, 35.0, 70.0, 70.0), 600, 32, 100 / 8),
        _device("a100-40", 40, (19.5, 156.0, 312.0, 312.0), 1555, 300, 400 / 8),
        _device("a100-80", 80, (19.5, 156.0, 312.0, 312.0), 2039, 300, 400 / 8),
        _device("l4", 24, (30.3, 60.0, 121.0, 121.0), 300, 32, 100 / 8),
        _device("l40s", 48, (91.6, 183.0, 362.0, 362.0), 864, 32, 400 / 8),
        _device("h100", 80, (67.0, 494.5, 989.5, 989.5), 3350, 450, 3200 / 8),
        _device("h200", 141, (67.0, 494.5, 989.5, 989.5), 4800, 450, 3200 / 8),
        _device("b200", 180, (75.0, 1100.0, 2250.0, 2250.0), 8000, 900, 3200 / 8),
    )
}


def device_of(name: str) -> Device:
    """The device of that name, in any case. Raises :class:`UserError` that names the nearest."""
    if name.lower() not in DEVICES:
        raise UserError(f"--device is {name!r}, which is not known; {nearest(name.lower(), DEVICES)}")
    return DEVICES[name.lower()]
