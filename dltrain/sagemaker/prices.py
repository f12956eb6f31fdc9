"""What a job costs, by a price list with its source and date: AWS's own, or a table of the user's. None is shipped, for
one that is old is worse than none.

    Bill(options, read_prices("aws", "ml.p5.48xlarge", "eu-west-1")).lines()
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dltrain.errors import UserError
from dltrain.sagemaker.options import JobOptions

AWS = "aws"

_LIST_REGION = "us-east-1"
"""Where AWS's price list answers, for all regions."""


@dataclass(frozen=True)
class Prices:
    """US dollars per hour by instance type."""

    source: str
    date: str
    per_hour: Mapping[str, float]


@dataclass(frozen=True)
class Bill:
    """Of a job that runs as long as it may."""

    options: JobOptions
    prices: Prices | None

    def lines(self) -> Iterator[str]:
        options, hours = self.options, self.options.count * self.options.max_hours
        yield (
            f"at most {hours:g} instance-hours: {options.count} x {options.instance_type} for {options.max_hours:g} h"
            + (", on spot capacity" if options.spot else "")
        )
        if self.prices is None:
            yield "no prices: give --prices aws, or a table with source, date and usd_per_hour"
            return
        price = self.prices.per_hour.get(options.instance_type)
        if price is None:
            raise UserError(f"the prices of {self.prices.source} have no {options.instance_type}; leave --prices out")
        of = f"by {self.prices.source}, {self.prices.date}"
        spot = "; spot capacity costs less, at a price that changes" if options.spot else ""
        yield f"${price * options.count:,.2f} per hour, at most ${price * hours:,.2f} {of}{spot}"


def read_prices(where: str, instance_type: str, region: str) -> Prices | None:
    """AWS's list for ``aws``, else a YAML or JSON file of ``source``, ``date`` and ``usd_per_hour`` by instance type.

    Raises :class:`UserError` where it cannot be had.
    """
    if not where:
        return None
    if where == AWS:
        return _of_aws(instance_type, region)
    try:
        tree = yaml.safe_load(Path(where).read_text())
        table = {str(name): float(price) for name, price in tree["usd_per_hour"].items()}
        return Prices(str(tree["source"]), str(tree["date"]), table)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--prices {where} cannot be used ({type(error).__name__}: {error}); it is a table with source, date and "
            "usd_per_hour by instance type"
        ) from None


def _of_aws(instance_type: str, region: str) -> Prices:
    import boto3  # slow to import
    from botocore.exceptions import BotoCoreError, ClientError

    filters = {"instanceName": instance_type, "regionCode": region, "component": "Training"}
    try:
        found = boto3.client("pricing", region_name=_LIST_REGION).get_products(
            ServiceCode="AmazonSageMaker",
            Filters=[{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in filters.items()],
        )
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"AWS's price list cannot be read: {error}; leave --prices out, or give a table") from None
    prices = [price for product in found["PriceList"] for price in _hourly(json.loads(product))]
    if not prices:
        raise UserError(f"AWS's price list has no training on {instance_type} in {region}; leave --prices out")
    return Prices(f"AWS's price list for {region}", time.strftime("%Y-%m-%d"), {instance_type: max(prices)})


def _hourly(product: Mapping[str, Any]) -> Iterator[float]:
    for term in product["terms"]["OnDemand"].values():
        for dimension in term["priceDimensions"].values():
            if dimension["unit"].lower().startswith("h"):
                yield float(dimension["pricePerUnit"]["USD"])
