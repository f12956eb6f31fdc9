"""The image and the account: what the Dockerfile copies is there, and the template of the account is what AWS takes."""

from __future__ import annotations

import fnmatch
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from moto import mock_aws

from dltrain.sagemaker.options import JobOptions
from tests.conftest import ROOT

TEMPLATE = ROOT / "launch" / "cloudformation.yaml"

WITHOUT_RESOURCES = {
    "ecr:GetAuthorizationToken",
    "cloudwatch:PutMetricData",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
}
"""Actions that AWS lets nobody limit to resources."""


class _Loader(yaml.SafeLoader):
    """CloudFormation's short forms: ``!Ref x`` as {"Ref": "x"}, and so on."""


def _short(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        return {suffix: loader.construct_scalar(node)}
    assert isinstance(node, yaml.SequenceNode)
    return {suffix: loader.construct_sequence(node, deep=True)}


_Loader.add_multi_constructor("!", _short)


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    return dict(yaml.load(TEMPLATE.read_text(), _Loader))


def of(template: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name: each["Properties"] for name, each in template["Resources"].items() if each["Type"] == kind}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def instructions() -> list[dict[str, Any]]:
    text = (ROOT / "launch" / "Dockerfile").read_bytes()
    return [each for each in DockerfileParser(fileobj=io.BytesIO(text)).structure if each["instruction"] != "COMMENT"]


def values(name: str) -> list[str]:
    return [each["value"] for each in instructions() if each["instruction"] == name]


def test_the_image_has_a_base_that_can_be_chosen_and_sagemakers_entry_point() -> None:
    assert [each["instruction"] for each in instructions()][:2] == ["ARG", "FROM"]
    assert values("FROM") == ["${BASE}"]
    assert json.loads(values("ENTRYPOINT")[0]) == ["python", "-m", "dltrain.sagemaker"]
    assert not values("USER")  # SageMaker's folders are root's
    (run,) = values("RUN")
    assert subprocess.run(["sh", "-n"], input=run, text=True).returncode == 0


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for value in values("COPY") for source in value.split()[:-1]]
    assert {"constraints.txt", "dltrain", "recipes", "launch"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), source
    built = ["pyproject.toml", "README.md", "LICENSE"]  # what the wheel is built from beside folders
    assert set(built) <= set(sources)


def test_the_constraints_of_the_image_leave_torch_to_its_base(tmp_path: Path) -> None:
    (run,) = values("RUN")
    (expression,) = re.findall(r"torch='([^']+)'", run)
    left = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not re.match(expression, line)]
    names = {line.partition("==")[0] for line in left}
    assert not names & {"torch", "torchvision", "triton"}
    assert {"numpy", "pydantic", "torchao", "boto3"} <= names
    extras = dict(line.partition("=")[::2] for line in values("ARG"))["EXTRAS"].split(",")
    text = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras)


@pytest.mark.parametrize("has_pip", [True, False])
def test_the_image_is_built_by_pip_which_uv_brings_where_there_is_none(tmp_path: Path, has_pip: bool) -> None:
    python = f"""#!/bin/sh
echo "python $*" >> {tmp_path}/told
case "$*" in "-m pip"*) [ -e {tmp_path}/pip ] || exit 1;; esac
case "$*" in "-m pip list"*) echo torch==2.13.0;; esac
"""
    for name, text in (
        ("python", python),
        ("uv", f'#!/bin/sh\necho "uv $*" >> {tmp_path}/told; touch {tmp_path}/pip\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    if has_pip:
        (tmp_path / "pip").touch()
    (run,) = values("RUN")
    here = run.replace("/tmp/", f"{tmp_path}/").replace("cd /opt/dltrain", f"cd {ROOT}").replace("${EXTRAS}", "gpu")
    done = subprocess.run(["sh"], input=here, text=True, capture_output=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text()
    assert (f"uv pip install --python {tmp_path}/python pip" in told) is not has_pip
    assert "python -m pip install --constraint" in told


def test_cfn_lint_finds_nothing() -> None:
    command = shutil.which("cfn-lint", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, str(TEMPLATE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def statements(template: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, each in of(template, "AWS::IAM::RolePolicy").items():
        yield from ((name, statement) for statement in each["PolicyDocument"]["Statement"])


def test_the_role_may_do_nothing_anywhere_but_what_aws_cannot_limit(template: dict[str, Any]) -> None:
    found = list(statements(template))
    assert len(found) > 10
    anywhere = set()
    for name, statement in found:
        assert statement["Effect"] == "Allow"
        actions = as_list(statement["Action"])
        assert not any("*" in action for action in actions), name
        if "*" in as_list(statement["Resource"]):
            anywhere |= set(actions)
    assert anywhere == WITHOUT_RESOURCES
    metrics = next(each for _, each in found if each["Action"] == "cloudwatch:PutMetricData")
    assert "cloudwatch:namespace" in metrics["Condition"]["StringEquals"]
    (role,) = of(template, "AWS::IAM::Role").values()
    assert "ManagedPolicyArns" not in role
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert trust["Condition"]


def test_the_role_writes_below_the_prefix_alone_and_reads_data(template: dict[str, Any]) -> None:
    storage = {each["Sid"]: each for name, each in statements(template) if name == "StoragePolicy"}
    writing = [sid for sid, each in storage.items() if {"s3:PutObject", "s3:DeleteObject"} & {*as_list(each["Action"])}]
    assert writing == ["Output"]
    assert storage["Output"]["Resource"] == {"Sub": "${OutputBucket.Arn}/${OutputPrefix}*"}
    assert storage["ReadData"]["Resource"] == {"Sub": "${DataBucket.Arn}/${DataPrefix}*"}
    assert all("s3:prefix" in storage[sid]["Condition"]["StringLike"] for sid in ("ListData", "ListOutput"))


def test_every_bucket_is_private_encrypted_versioned_and_over_tls(template: dict[str, Any]) -> None:
    buckets = of(template, "AWS::S3::Bucket")
    assert set(buckets) == {"DataBucket", "OutputBucket", "TrailBucket"}
    policies = {each["Bucket"]["Ref"]: each for each in of(template, "AWS::S3::BucketPolicy").values()}
    for name, bucket in buckets.items():
        (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
        assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
        assert all(bucket["PublicAccessBlockConfiguration"].values())
        assert len(bucket["PublicAccessBlockConfiguration"]) == 4
        assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
        assert any("AbortIncompleteMultipartUpload" in each for each in bucket["LifecycleConfiguration"]["Rules"])
        tls = policies[name]["PolicyDocument"]["Statement"][0]
        assert (tls["Effect"], tls["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
        assert {"GetAtt": f"{name}.Arn"} in tls["Resource"]
        assert template["Resources"][name]["DeletionPolicy"] == "Retain"


def test_the_trail_sees_objects_of_both_buckets_and_is_validated(template: dict[str, Any]) -> None:
    (trail,) = of(template, "AWS::CloudTrail::Trail").values()
    assert trail["EnableLogFileValidation"] is True
    assert trail["KMSKeyId"] == {"GetAtt": "Key.Arn"}
    fields = [field for each in trail["AdvancedEventSelectors"] for field in each["FieldSelectors"]]
    seen = next(field["StartsWith"] for field in fields if field["Field"] == "resources.ARN")
    assert seen == [{"Sub": "${DataBucket.Arn}/"}, {"Sub": "${OutputBucket.Arn}/"}]


def test_the_network_has_endpoints_of_all_that_jobs_use_and_efa_may_talk(template: dict[str, Any]) -> None:
    services = {
        each["ServiceName"]["Sub"].partition("}.")[2] for each in of(template, "AWS::EC2::VPCEndpoint").values()
    }
    assert services == {"s3", "ecr.api", "ecr.dkr", "logs", "sagemaker.api", "sts", "kms", "monitoring"}
    group = {"GetAtt": "SecurityGroup.GroupId"}
    (inwards,) = of(template, "AWS::EC2::SecurityGroupIngress").values()
    outwards = of(template, "AWS::EC2::SecurityGroupEgress")["Outwards"]
    assert (inwards["IpProtocol"], inwards["GroupId"], inwards["SourceSecurityGroupId"]) == ("-1", group, group)
    assert (outwards["IpProtocol"], outwards["DestinationSecurityGroupId"]) == ("-1", group)
    kinds = {each["Type"] for each in template["Resources"].values()}
    assert not kinds & {"AWS::EC2::InternetGateway", "AWS::EC2::NatGateway"}
    for each in template["Resources"].values():
        assert not each["Type"].startswith("AWS::EC2::") or each["Condition"] == "Vpc"


@pytest.mark.filterwarnings("ignore:Tried to parse AWS")
@pytest.mark.parametrize("vpc", ["yes", "no"])
def test_a_stack_is_made_and_its_outputs_are_options_of_a_job(vpc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By moto, which resolves all references, and makes what it knows."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        client = boto3.client("cloudformation", "eu-west-1")
        given = [{"ParameterKey": "UseVpc", "ParameterValue": vpc}]
        client.create_stack(StackName="dl", TemplateBody=TEMPLATE.read_text(), Parameters=given)
        (stack,) = client.describe_stacks(StackName="dl")["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        made = {each["OutputKey"]: (each["Description"], each["OutputValue"]) for each in stack["Outputs"]}
        assert made["OutputBucket"][1].endswith("/runs/")
        assert ("Subnets" in made) == (vpc == "yes")
        words = [word for told, _ in made.values() for word in re.findall(r"--([a-z-]+)", told)]
        assert {word.replace("-", "_") for word in words} <= set(JobOptions.model_fields)
        assert {"role", "bucket", "kms-key", "volume-kms-key"} <= set(words)
