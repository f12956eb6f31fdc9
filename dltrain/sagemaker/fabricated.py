"""A training job's hosts on this machine: the folders that SageMaker lays down, and its copies to and from S3.

    made = Fabricated(Path("sagemaker-local"), hosts=2, hyperparameters={"recipe": "image/classify"})
    made.lay_down()  # brings back what an earlier job has left in the place of S3
    made.variables(host)  # of the host's entry point
    made.collect()

Hosts are addresses of the loopback interface, 127.0.0.1 and on, and each has its own ``/opt/ml``. A folder stands for
the bucket: checkpoints of all hosts come together there, and what hosts delete is deleted there, as SageMaker does it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTANCE = "ml.m5.xlarge"


@dataclass(frozen=True)
class Fabricated:
    """``root`` holds the hosts' folders and ``s3``; ``channels`` are local folders by name."""

    root: Path
    hosts: int
    hyperparameters: Mapping[str, Any]
    channels: Mapping[str, Path] = field(default_factory=dict)
    instance_type: str = INSTANCE
    name: str = "local"

    @property
    def names(self) -> list[str]:
        return [f"127.0.0.{place + 1}" for place in range(self.hosts)]

    @property
    def bucket(self) -> Path:
        return self.root / "s3"

    def base(self, host: str) -> Path:
        """What is ``/opt/ml`` there."""
        return self.root / f"algo-{self.names.index(host) + 1}" / "opt" / "ml"

    def variables(self, host: str) -> dict[str, str]:
        return {"SAGEMAKER_BASE_DIR": str(self.base(host)), "TRAINING_JOB_NAME": self.name}

    def lay_down(self) -> None:
        """Fresh folders on each host, with the checkpoints that are in the bucket."""
        for host in self.names:
            base = self.base(host)
            shutil.rmtree(base, ignore_errors=True)
            for folder in ("input/config", "input/data", "model", "output/data", "checkpoints"):
                (base / folder).mkdir(parents=True)
            for name, tree in self._descriptions(host).items():
                (base / "input/config" / name).write_text(json.dumps(tree, indent=1))
            for channel, source in self.channels.items():
                (base / "input/data" / channel).symlink_to(source.resolve(), target_is_directory=True)
            kept = self.bucket / "checkpoints"
            if kept.is_dir():
                shutil.copytree(kept, base / "checkpoints", dirs_exist_ok=True)

    def collect(self) -> None:
        """What the hosts have in the place of S3: checkpoints, and at the end model and output of all of them."""
        for source, target in (("checkpoints", "checkpoints"), ("model", "model"), ("output/data", "output")):
            shutil.rmtree(self.bucket / target, ignore_errors=True)
            for host in self.names:
                shutil.copytree(self.base(host) / source, self.bucket / target, dirs_exist_ok=True)

    def failure(self, host: str) -> str:
        """What SageMaker would show as the failure reason; empty where nothing failed."""
        file = self.base(host) / "output" / "failure"
        return file.read_text() if file.is_file() else ""

    def _descriptions(self, host: str) -> dict[str, Any]:
        """Files of ``input/config``; every hyperparameter is text, as SageMaker knows nothing else."""
        channel = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        group = {"instance_group_name": "homogeneousCluster", "instance_type": self.instance_type, "hosts": self.names}
        return {
            "hyperparameters.json": {name: json.dumps(value) for name, value in self.hyperparameters.items()},
            "inputdataconfig.json": dict.fromkeys(self.channels, channel),
            "resourceconfig.json": {
                "current_host": host,
                "hosts": sorted(self.names),
                "network_interface_name": "lo",
                "current_instance_type": self.instance_type,
                "current_group_name": "homogeneousCluster",
                "instance_groups": [group],
            },
            "checkpointconfig.json": {
                "S3Uri": f"s3://local/{self.name}",
                "LocalPath": str(self.base(host) / "checkpoints"),
            },
        }
