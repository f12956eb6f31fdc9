"""A training job's hosts on this machine: the folders that SageMaker lays down, and its copies to and from S3.

    made = Fabricated(Path("sagemaker-local"), hosts=2, hyperparameters={"recipe": "image/classify"})
    with held(made.root) as lock:
        made.lay_down()  # brings back what an earlier job has left in the place of S3
        made.start(made.names[0], {"OMP_NUM_THREADS": "1"}, lock).wait()
        made.collect()

Hosts are addresses of the loopback interface, 127.0.0.1 and on, and each has its own ``/opt/ml``. A folder stands for
the bucket: what hosts change among their checkpoints comes there, and what they delete is deleted there, as SageMaker
does it (:mod:`dltrain.sagemaker.bucket`).
A host whose code asks for packages gets a Python of its own for them, which has those of this one besides.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dltrain.runtime.launch import free_port
from dltrain.runtime.meeting import PORT_SAID
from dltrain.runtime.parent import stop_with_parent
from dltrain.sagemaker.bucket import bring, changes, put, recover, stamps
from dltrain.sagemaker.channels import CODE
from dltrain.sagemaker.code import REQUIREMENTS, Code
from dltrain.sagemaker.holding import BASE_SAID

INSTANCE = "ml.m5.xlarge"

CHECKPOINTS = "checkpoints"
"""Folder of a host, and of the bucket, that SageMaker copies while a job runs."""


@dataclass(frozen=True)
class Fabricated:
    """``root`` holds the hosts' folders and ``s3``; ``channels`` are local folders by name, ``code`` is the user's."""

    root: Path
    hosts: int
    hyperparameters: Mapping[str, Any]
    channels: Mapping[str, Path] = field(default_factory=dict)
    instance_type: str = INSTANCE
    name: str = "local"
    code: Code | None = None
    port: int = field(default_factory=free_port)
    """Where its first host listens: hosts of several jobs share this machine's network."""

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
        said = {BASE_SAID: str(self.base(host)), "TRAINING_JOB_NAME": self.name}
        return {**said, PORT_SAID: str(self.port)}

    def interpreter(self, host: str) -> str:
        """Python of a host: this one, or one of its own where the code has requirements."""
        if self.code is None or REQUIREMENTS not in self.code.files:
            return sys.executable
        folder = self.base(host).parents[1] / "python"
        venv.create(folder, clear=True, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        here = [f"import site; site.addsitedir({each!r})" for each in site.getsitepackages()]
        (packages / "here.pth").write_text("\n".join(here) + "\n")
        return str(folder / "bin" / "python")

    def start(self, host: str, variables: Mapping[str, str], lock: int | None = None) -> subprocess.Popen[str]:
        """Its entry point, which is told to stop when this process ends. ``variables`` come to those of this process
        that a real container may have; ``lock`` is a descriptor that it keeps open. Its output comes by a pipe."""
        here = {name: value for name, value in os.environ.items() if not name.startswith("SM_")}
        return subprocess.Popen(
            [self.interpreter(host), "-m", "dltrain.sagemaker"],
            env={**here, **variables, **self.variables(host)},
            cwd=self.base(host),
            preexec_fn=stop_with_parent,  # noqa: PLW1509 - no thread of ours holds what it needs
            pass_fds=() if lock is None else (lock,),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )

    def lay_down(self) -> None:
        """Fresh folders on each host, with the checkpoints that are in the bucket, or should have come there: SageMaker
        copies them while a job runs, whatever becomes of it."""
        self._bring_checkpoints()
        self._given.unlink(missing_ok=True)  # before the files: what is missing from now on was not deleted by a host
        for base in self._bases():  # an earlier job may have had more hosts
            shutil.rmtree(base)
        for host in self.names:
            base = self.base(host)
            for folder in ("input/config", "input/data", "model", "output/data", "checkpoints"):
                (base / folder).mkdir(parents=True)
            for name, tree in self._descriptions(host).items():
                (base / "input/config" / name).write_text(json.dumps(tree, indent=1))
            for channel, source in self.channels.items():
                (base / "input/data" / channel).symlink_to(source.resolve(), target_is_directory=True)
            if self.code is not None:
                self.code.copy(base / "input/data" / CODE)
            kept = self.bucket / CHECKPOINTS
            if kept.is_dir():
                shutil.copytree(kept, base / CHECKPOINTS, dirs_exist_ok=True)
        self._note()

    def collect(self) -> None:
        """What the hosts have in the place of S3: checkpoints, and at the end model and output of all of them."""
        self._bring_checkpoints()
        for source, target in (("model", "model"), ("output/data", "output")):
            files, _ = changes({base / source: {} for base in self._bases()})
            put(files, self.bucket / target)

    def _bases(self) -> list[Path]:
        return sorted(self.root.glob("algo-*/opt/ml"))

    def _bring_checkpoints(self) -> None:
        for name in ("model", "output", CHECKPOINTS):
            recover(self.bucket / name)
        if self._given.is_file():  # else the hosts were not laid down to the end, and have nothing of their own
            given = json.loads(self._given.read_text())
            bring({folder: given.get(name, {}) for name, folder in self._kept().items()}, self.bucket / CHECKPOINTS)
            self._note()

    def _kept(self) -> dict[str, Path]:
        """Checkpoints of each host by its name."""
        folders = {base.parents[1].name: base / CHECKPOINTS for base in self._bases()}
        return {name: folder for name, folder in folders.items() if folder.is_dir()}

    @property
    def _given(self) -> Path:
        """Says which checkpoints the hosts have in common with the bucket, for whoever comes next."""
        return self.root / ".given.json"

    def _note(self) -> None:
        """That they are what the hosts have now; of all at once, for two may have changed the same file."""
        part = self._given.with_suffix(".part")
        part.write_text(json.dumps({name: stamps(folder) for name, folder in self._kept().items()}))
        part.rename(self._given)

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
            "inputdataconfig.json": dict.fromkeys([*self.channels, *([CODE] if self.code else [])], channel),
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
