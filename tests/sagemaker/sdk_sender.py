"""Sends jobs by one of SageMaker's SDKs, to the endpoint of the environment: run with the SDK on PYTHONPATH.

    python tests/sagemaker/sdk_sender.py v2 '[{"recipe": "tiny.py", "preset": "small", "settings": {}, ...}]'

The last line that it prints is the list of the requests, as the SDK has handed them to boto3. Jobs
have a recipe, a preset, settings, options and an entry.
"""

import json
import sys

import boto3
from botocore.awsrequest import AWSResponse

from dltrain.sagemaker.options import JobOptions
from dltrain.sagemaker.sdk import to_estimator, to_model_trainer

sent = []


def keep(params, **_):
    sent.append(params)


def allow(params, **_):
    """What IAM would say of a role that may do everything; moto does not know the operation."""
    names = [value for name, value in params["body"].items() if name.startswith("ActionNames")]
    results = [{"EvalActionName": name, "EvalDecision": "allowed"} for name in names]
    return AWSResponse("", 200, {}, None), {"EvaluationResults": results, "IsTruncated": False}


class Watched(boto3.session.Session):
    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.events.register("provide-client-params.sagemaker.CreateTrainingJob", keep)
        self.events.register("before-call.iam.SimulatePrincipalPolicy", allow)


def main(sdk, jobs):
    boto3.session.Session = Watched
    for job in jobs:
        given = job["recipe"], job["preset"], job["settings"], JobOptions(**job["options"])
        if sdk == "v2":
            to_estimator(*given, entry=job["entry"]).fit(wait=False)
        else:
            to_model_trainer(*given, entry=job["entry"]).train(wait=False, logs=False)
    print(json.dumps(sent))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
