"""The request for a training job: what SageMaker takes, refused here where it would be refused there, and started."""

from __future__ import annotations

import io
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from dltrain.cli import launch_sagemaker
from dltrain.config import Config, Data, load_overrides
from dltrain.errors import UserError
from dltrain.sagemaker.code import Code
from dltrain.sagemaker.hyperparameters import read_hyperparameters
from dltrain.sagemaker.options import JobOptions, read_options
from dltrain.sagemaker.prices import Bill, Prices, read_prices
from dltrain.sagemaker.request import build, refuse_packages
from dltrain.testing.s3 import S3Server
from tests.conftest import TINY, Cli

OPTIONS: dict[str, Any] = {
    "instance_type": "ml.p5.48xlarge",
    "image": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/dltrain:0.1",
    "role": "arn:aws:iam::123456789012:role/training",
    "bucket": "s3://data/training",
    "name": "mine",
}
TRAIN = {"data.train": "s3://data/digits"}


def made(settings: dict[str, Any] | None = None, recipe: str = "image/classify", **options: Any) -> dict[str, Any]:
    given = {**TRAIN, **(settings or {})}
    return build(recipe, "digits", given, load_overrides(Config(), given), JobOptions(**{**OPTIONS, **options}))


def test_a_plain_request_has_what_the_job_needs() -> None:
    request = made({"optim.learning_rate": 0.1})
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"] == ["python", "-m", "dltrain.sagemaker"]
    assert request["HyperParameters"] == {
        "recipe": '"image/classify"',
        "preset": '"digits"',
        "data__train": '"s3://data/digits"',
        "optim__learning_rate": "0.1",
        "run__deadline": '"23.95h"',
    }
    assert request["CheckpointConfig"] == {
        "S3Uri": "s3://data/training/mine/checkpoints",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400}
    assert "DebugHookConfig" not in request  # rules are our own
    assert request["ProfilerConfig"] == {"DisableProfiler": True}
    assert "InputDataConfig" not in request
    back = read_hyperparameters(
        {"SM_HPS": json.dumps({k: json.loads(v) for k, v in request["HyperParameters"].items()})}
    )
    assert back.settings["optim.learning_rate"] == 0.1


def test_every_option_has_its_place() -> None:
    request = made(
        {"data.train": ""},
        count=2,
        nproc=8,
        spot=True,
        max_hours=2,
        wait_hours=5,
        volume=500,
        channels={"train": "s3://data/t:FastFile", "validation": "s3://data/v"},
        environment={"A": "b"},
        tags={"team": "vision"},
        subnets=("subnet-1",),
        security_groups=("sg-1",),
        kms_key="k",
        volume_kms_key="v",
        isolate=True,
        encrypt=True,
        checkpoints="s3://data/earlier/",
        tensorboard=False,
    )
    assert request["HyperParameters"]["nproc"] == "8"
    assert request["ResourceConfig"] == {
        "InstanceType": "ml.p5.48xlarge",
        "InstanceCount": 2,
        "VolumeSizeInGB": 500,
        "VolumeKmsKeyId": "v",
    }
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 18000}
    assert [(each["ChannelName"], each["InputMode"]) for each in request["InputDataConfig"]] == [
        ("train", "FastFile"),
        ("validation", "File"),
    ]
    assert request["VpcConfig"] == {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}
    assert request["OutputDataConfig"] == {"S3OutputPath": "s3://data/training/", "KmsKeyId": "k"}
    assert request["CheckpointConfig"]["S3Uri"] == "s3://data/earlier"
    for name in ("EnableManagedSpotTraining", "EnableNetworkIsolation", "EnableInterContainerTrafficEncryption"):
        assert request[name] is True
    assert (request["Environment"], request["Tags"]) == ({"A": "b"}, [{"Key": "team", "Value": "vision"}])
    assert "TensorBoardOutputConfig" not in request


def test_a_recipe_of_the_users_is_named_by_its_place_in_the_source() -> None:
    folder = Path(TINY).parent
    for source, place in (("", "tiny.py"), (str(folder), "tiny.py"), (str(folder.parent), "recipes/tiny.py")):
        assert made(recipe=TINY, source=source)["HyperParameters"]["recipe"] == json.dumps(place)
    with pytest.raises(UserError, match=r"tiny\.py is not in it; give --source"):
        made(recipe=TINY, source=str(folder.parent / "sagemaker"))


def test_a_channel_takes_the_place_of_the_presets_data_in_the_request_too(cli: Cli) -> None:
    data = Data(train="/of/a/preset", evaluation="s3://of/a/preset")
    options = JobOptions(**OPTIONS, channels={"train": "s3://data/t"}, isolate=True)
    assert build("image/classify", "digits", {}, Config(data=data), options)["InputDataConfig"]
    given = {"data.train": "s3://data/digits"}
    with pytest.raises(UserError, match="s3://data/digits is read over it"):
        build("image/classify", "digits", given, load_overrides(Config(), given), options)
    words = ("launch", "sagemaker", "image/classify", "--preset", "digits", *GIVEN, "--dry-run")
    alone = cli(*words, "--channels", "{train: 's3://data/t'}")
    assert alone.status == 0, alone.err
    assert "warning: nothing is evaluated" in alone.err
    both = cli(*words, "--channels", "{train: 's3://data/t'}", "--data.train", "s3://data/digits")
    assert both.status == 0, both.err
    assert "warning: nothing uses channel 'train': data.train is given and counts over it" in both.err


MANY = {f"model.a{number}": 1 for number in range(100)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a_b"}, "TrainingJobName is 'a_b', which does not fit"),
        ({"name": "a" * 64}, "TrainingJobName has 64 characters, and 63 are the most"),
        ({"role": "training"}, "RoleArn has 8 characters, and 20 are the least"),
        ({"role": "arn:aws:iam::1:role/training"}, "RoleArn is 'arn:aws:iam::1:role/training', which does not fit"),
        ({"image": "x" * 256}, "TrainingImage has 256 characters, and 255"),
        ({"instance_type": "ml.p5.48xlarg"}, "did you mean 'ml.p5.48xlarge'"),
        ({"kms_key": "a b"}, "KmsKeyId is 'a b', which does not fit"),
        ({"subnets": ["s"] * 17, "security_groups": ["g"]}, "VpcConfig.Subnets has 17 entries, and 16"),
        ({"subnets": ["s"], "security_groups": ["g"] * 6}, "SecurityGroupIds has 6 entries, and 5"),
        ({"keep_alive": 21601}, "KeepAlivePeriodInSeconds is 21,601, and 21,600 is the most"),
        ({"environment": {"1a": "b"}}, "the name '1a' in Environment is '1a', which does not fit"),
        ({"environment": {"a": "b" * 513}}, "Environment.a has 513 characters, and 512"),
        ({"environment": {f"a{n}": "" for n in range(101)}}, "Environment has 101 entries, and 100"),
        ({"tags": {f"a{n}": "" for n in range(51)}}, "Tags has 51 entries, and 50"),
        ({"channels": {f"c{n}": "s3://bkt/c" for n in range(21)}}, "InputDataConfig has 21 entries, and 20"),
        ({"channels": {"a b": "s3://bkt/c"}}, "ChannelName is 'a b', which does not fit"),
        ({"channels": {"train": "/data"}}, "give s3://bucket/prefix"),
        ({"channels": {"train": "s3://bkt/x:Fast"}}, "give s3://bucket/prefix"),
        ({"channels": {"train": "s3://B_b/x"}}, "channel 'train' is 's3://B_b/x': no bucket can be named 'B_b'"),
        ({"channels": {"code": "s3://bkt/c"}}, "must not be named 'code'"),
        ({"bucket": ""}, "--bucket is missing"),
        ({"instance_type": "ml.trn1.32xlarge"}, "has no GPU"),
        ({"isolate": True}, "--isolate leaves the container no network, and s3://data/digits"),
    ],
)
def test_each_limit_is_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        made(**options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run.name": "x" * 2499}, "HyperParameters.run__name has 2,501 characters, and 2,500"),
        ({"data.train": "/here"}, "/here lies on this machine"),
        ({"data.train": "file:///here"}, "file:///here lies on this machine"),
        ({"model.weights": "/here.safetensors"}, "/here.safetensors lies on this machine"),
        ({"data.train": ""}, "there are no training data"),
        ({"run.folder": "/tmp/runs"}, "run.folder is '/tmp/runs', which SageMaker does not keep"),
        ({"run.deadline": "25h"}, "run.deadline is 25h, and SageMaker ends the job after max_hours 24"),
        ({"run.stop_file": "stop"}, "nobody can put a file into the container"),
    ],
)
def test_settings_that_cannot_go_there_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(settings)


def test_more_hyperparameters_than_there_may_be_are_refused() -> None:
    with pytest.raises(UserError, match="HyperParameters has 104 entries, and 100 are the most"):
        build("image/classify", "digits", {**TRAIN, **MANY}, load_overrides(Config(), TRAIN), JobOptions(**OPTIONS))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cuont": 2}, "has an option 'cuont', which there is not; did you mean 'count'"),
        ({"count": 0}, "count is 0"),
        ({"wait_hours": 3}, "wait_hours is for spot"),
        ({"spot": True, "wait_hours": 3, "max_hours": 4}, "less than max_hours"),
        ({"subnets": ["a"]}, "needs both subnets and security_groups"),
        ({"bucket": "data"}, "give an address on S3"),
        ({"bucket": "s3:///data"}, "give an address on S3"),
        ({"bucket": "s3://My_Data/x"}, "no bucket can be named 'My_Data'"),
        ({"checkpoints": "s3://10.0.0.1/x"}, "no bucket can be named '10.0.0.1'"),
        ({"max_hours": 1e6}, "max_hours is 1000000"),
        ({"max_hours": float("nan")}, "max_hours is .NaN.: input should be a finite number"),
    ],
)
def test_options_in_a_file_are_checked(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(given))
    with pytest.raises(UserError, match=words):
        read_options(file, {})


def test_a_mistake_is_placed_where_its_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("count: 2\ninstance_type: [1]\nspot: true\nwait_hours: 3\n")
    with pytest.raises(UserError, match=rf"^instance_type is \[1\]: .* \(in {file}\)$"):
        read_options(file, {"max_hours": "1"})
    with pytest.raises(UserError, match=r"^--max-hours is 'two': .* number$"):
        read_options(file, {"instance_type": "ml.g5.xlarge", "max_hours": "two"})
    with pytest.raises(
        UserError, match=rf"wait_hours is 3, less than max_hours 4 \(in {file} and of the command line\)"
    ):
        read_options(file, {"instance_type": "ml.g5.xlarge", "max_hours": "4"})


def test_a_price_has_its_source_and_date(tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text("source: our contract\ndate: 2026-11-01\nusd_per_hour: {ml.p5.48xlarge: 50}\n")
    prices = read_prices(str(table), "ml.p5.48xlarge", "eu-west-1")
    lines = list(Bill(JobOptions(**OPTIONS, count=2, max_hours=3), prices).lines())
    assert lines[0].startswith("at most 6 instance-hours: 2 x ml.p5.48xlarge for 3 h")
    assert lines[1] == "$100.00 per hour, at most $300.00 by our contract, 2026-11-01"
    assert "no prices" in list(Bill(JobOptions(**OPTIONS), None).lines())[1]
    with pytest.raises(UserError, match=r"have no ml\.p5\.48xlarge"):
        list(Bill(JobOptions(**OPTIONS), Prices("x", "y", {})).lines())
    table.write_text("usd_per_hour: 3")
    with pytest.raises(UserError, match="it is a table with source, date and usd_per_hour"):
        read_prices(str(table), "ml.p5.48xlarge", "eu-west-1")


def test_awss_price_list_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    client = boto3.client("pricing", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    dimension = {"unit": "Hrs", "pricePerUnit": {"USD": "98.32"}}
    product = {"terms": {"OnDemand": {"x": {"priceDimensions": {"y": dimension}}}}}
    monkeypatch.setattr("boto3.client", lambda *_, **__: client)
    with Stubber(client) as stub:
        stub.add_response("get_products", {"PriceList": [json.dumps(product)]})
        prices = read_prices("aws", "ml.p5.48xlarge", "eu-west-1")
        stub.add_client_error("get_products", "AccessDeniedException")
        with pytest.raises(UserError, match="AWS's price list cannot be read"):
            read_prices("aws", "ml.p5.48xlarge", "eu-west-1")
    assert prices is not None
    assert prices.per_hour == {"ml.p5.48xlarge": 98.32}
    assert prices.source == "AWS's price list for eu-west-1"


WORDS = ("launch", "sagemaker", TINY, "--preset", "small", "--data.train", "s3://data/digits", "--data.evaluation", "")
GIVEN = tuple(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items())


def test_a_dry_run_prints_the_request_and_starts_nothing(cli: Cli, s3: S3Server) -> None:
    done = cli(*WORDS, *GIVEN, "--spot", "--count", "2", "--dry-run", **s3.variables)
    assert done.status == 0, done.err
    request = json.loads(done.out)
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert "at most 48 instance-hours: 2 x ml.p5.48xlarge for 24 h, on spot capacity" in done.err
    client = boto3.client("sagemaker", endpoint_url=s3.url, region_name="us-east-1")
    jobs = [job["TrainingJobName"] for job in client.list_training_jobs()["TrainingJobSummaries"]]
    assert request["TrainingJobName"] not in jobs
    assert client.create_training_job(**{**request, "TrainingJobName": "taken"})["TrainingJobArn"]
    refused = cli(*WORDS, *GIVEN, "--role=me", "--dry-run")
    assert (refused.status, refused.out) == (2, "")
    assert "SageMaker would refuse this job: RoleArn" in refused.err


def test_a_dry_run_tells_what_would_be_uploaded(cli: Cli, tmp_path: Path, s3: S3Server) -> None:
    (tmp_path / "mine.py").write_text(Path(TINY).read_text())
    (tmp_path / "weights.bin").write_bytes(bytes(2_000_000))
    words = ("launch", "sagemaker", "mine.py", "--preset", "small", "--dry-run", *GIVEN)
    done = cli(*words, **s3.variables)
    assert done.status == 0, done.err
    assert "code: 2 file(s), 2.0 MB, of ." in done.err
    assert "code: 1 file(s), 0.0 MB, of ." in cli(*words, "--ignore", "weights.bin", **s3.variables).err
    for file in ("notes.md", "more.txt"):
        (tmp_path / file).touch()
    said = cli(*words, "--ignore", "*.bin, *.md", "--ignore=more.*", **s3.variables).err
    assert "code: 1 file(s), 0.0 MB, of ." in said, said


@pytest.mark.parametrize("text", ["{a: [", "*mine", "{a: 2020-13-45}"])
def test_an_option_that_is_no_yaml_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--tags: {text!r} is no YAML")):
        launch_sagemaker.run([TINY, "--dry-run", "--tags", text])


@pytest.mark.slow
def test_packages_to_be_fetched_without_a_network_are_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(TINY).read_text())
    (tmp_path / "requirements.txt").write_text("# ours\ntimm==1.0\n")
    words = ("launch", "sagemaker", "mine.py", "--preset", "small", "--dry-run", *GIVEN)
    assert cli(*words).status == 0
    refused = cli(*words, "--isolate")
    assert (refused.status, refused.out) == (2, "")
    assert "no network, and requirements.txt asks for 'timm==1.0'" in refused.err
    assert cli(*words, "--isolate", "--ignore", "requirements.txt").status == 0


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("--no-index  # none\n--find-links wheels/\ntimm==1.0  # ours", ""),
        ("--no-index -f ./wheels\ntimm ==1.0; python_version > '3' \\\n  --hash=sha256:00", ""),
        ("--no-index\n--find-links=.\ntimm", ""),
        ("./wheels/x.whl  # mine\nwheels/x.whl[all]\nfile:wheels/x.whl", ""),
        ("-e ./wheels\n/opt/wheels/y.whl\n--pre", ""),
        ("# nothing\n--index-url https://packages", ""),
        ("--no-index\ntimm", "timm"),
        ("--find-links wheels\ntimm", "timm"),
        ("--no-index\n--find-links whee\ntimm", "timm"),
        ("# --no-index\n--find-links wheels\ntimm", "timm"),
        ("./wheels/x.whl\ntimm", "timm"),
        ("./elsewhere/x.whl", "./elsewhere/x.whl"),
        ("-r more.txt", "-r more.txt"),
        ("-e git+https://host/x.git", "-e git+https://host/x.git"),
        ("timm @ https://host/timm-1.whl", "timm @ https://host/timm-1.whl"),
    ],
)
def test_what_can_be_installed_without_a_network_is_seen(tmp_path: Path, text: str, asked: str) -> None:
    (tmp_path / "requirements.txt").write_text(text)
    code = Code(tmp_path, "mine.py", ("mine.py", "requirements.txt", "wheels/x.whl"), 0)
    refuse_packages(code, JobOptions())
    with pytest.raises(UserError, match=re.escape(f"asks for {asked!r}")) if asked else nullcontext():
        refuse_packages(code, JobOptions(isolate=True))


def test_a_run_to_go_on_with_is_among_the_jobs_checkpoints(cli: Cli) -> None:
    words = (*WORDS, *GIVEN, "--dry-run", "--run.resume", "run-1")
    assert "run.resume is 'run-1'; say among which checkpoints it lies" in cli(*words).err
    done = cli(*words, "--checkpoints", "s3://data/earlier")
    assert done.status == 0, done.err
    assert json.loads(done.out)["HyperParameters"]["run__resume"] == '"run-1"'


def test_a_job_is_started_with_its_code_and_followed_to_its_end(cli: Cli, s3: S3Server) -> None:
    done = cli(*WORDS, *GIVEN, "--encrypt", **s3.variables)
    assert done.status == 0, done.err
    assert done.result["status"] == "Completed"
    assert "of code are at s3://data/training/mine/code" in done.err
    client = boto3.client("sagemaker", endpoint_url=s3.url, region_name="us-east-1")
    job = client.describe_training_job(TrainingJobName="mine")
    assert job["HyperParameters"]["recipe"] == '"tiny.py"'
    assert job["EnableInterContainerTrafficEncryption"] is True
    (channel,) = job["InputDataConfig"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://data/training/mine/code"
    body: StreamingBody | io.BytesIO = boto3.client("s3", endpoint_url=s3.url).get_object(
        Bucket="data", Key="training/mine/code/tiny.py"
    )["Body"]
    assert body.read() == Path(TINY).read_bytes()
    nowhere = cli(*WORDS, *GIVEN, "--bucket=s3://nowhere/x", **s3.variables)
    assert nowhere.status == 2
    assert "nowhere" in nowhere.err
    assert "Traceback" not in nowhere.err
