"""Ray clusters of machines of their own, each with its own network and root folder, nothing shared but a bucket.

The driver's machine does no work, the workers' machines hold no driver. Takes root, for Linux's namespaces.
"""

import os

import pytest
from faults import cluster_faults
from faults.cluster import Cluster
from faults.machines import Network
from faults.proxy import FaultyProxy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
]


@pytest.fixture
def cluster(s3_server, ground_on_s3, tmp_path):
    with Network(tmp_path) as network, FaultyProxy(s3_server.endpoint, listener=network.listen()) as store:
        yield Cluster(network, store, tmp_path)


def test_a_node_joins(ground_on_s3, cluster, s3_bucket, table):
    table(cluster_faults.node_joins(ground_on_s3, cluster, f"{s3_bucket.url}/dataset"))
