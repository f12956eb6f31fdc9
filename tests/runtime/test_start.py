"""A rank that dies while the ranks start: the others end within seconds, and its death is what is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

pytestmark = pytest.mark.slow

WAYS = {
    "killed": ("os.kill(os.getpid(), 9)", "rank 1 was ended by SIGKILL"),
    "left": ("os._exit(7)", "rank 1 ended with status 7"),
    "left with status 0": ("os._exit(0)", "rank 1 ended with status 0"),
}
THREE = ["--nproc", "3"]
PIPELINE = ["--nproc", "2", "--parallel.pp", "2"]


def dying(way: str, moment: str) -> str:
    """The recipe image/classify, whose rank 1 ends in this way at that moment."""
    text = (ROOT / "recipes/image/classify.py").read_text()
    death = f"import os\n{{0}}if os.environ.get('RANK') == '1':\n{{0}}    {WAYS[way][0]}\n"
    if moment == "model":
        method = "    def model(self) -> nn.Module:\n"
        assert text.count(method) == 1
        return text.replace(method, method + "        " + death.format("        "))
    start = "    import torch.distributed as dist\n\n    def die(*_, **__):\n        " + death.format("        ")
    start += "        return before(*_, **__)\n\n    before, dist.init_process_group = dist.init_process_group, die\n"
    return text.replace("    main(Classify)", start + "    main(Classify)")


@pytest.mark.parametrize("ranks", [THREE, PIPELINE], ids=["three", "pp 2"])
@pytest.mark.parametrize("moment", ["model", "process group"])
@pytest.mark.parametrize("way", WAYS)
def test_the_others_end_soon_and_the_first_death_is_told(
    cli: Cli, tmp_path: Path, way: str, moment: str, ranks: list[str]
) -> None:
    (tmp_path / "dying.py").write_text(dying(way, moment))
    began = time.monotonic()
    done = cli("train", "dying.py", "--preset", "vit-tiny", *ranks, timeout=200)
    assert done.status != 0
    lines = [line for line in done.err.splitlines() if line.startswith("dltrain:")]
    assert len(lines) == 1, done.err
    assert WAYS[way][1] in lines[0]
    assert "Traceback" not in done.err
    assert time.monotonic() - began < 150  # of which imports take most on a busy machine; a collective waits 600
