"""Making data sets of shards, and looking after them: building, indexing, resharding, verifying, by several processes.

from dltrain.data.building.build import build_shards
manifest = build_shards(open_source("/data/flowers"), "s3://bucket/flowers", workers=4)
"""
