"""Ray clusters of machines of their own, each with its own network and root folder, nothing shared but a bucket.

The driver's machine does no work, the workers' machines hold no driver. Takes root, for Linux's namespaces.
"""

import os
import shutil

import pytest
from faults import cluster_faults
from faults.cluster import Cluster
from faults.machines import Network
from faults.proxy import FaultyProxy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
]


@pytest.fixture
def cluster(request, s3_server, ground_on_s3, tmp_path):
    with Network(tmp_path) as network, FaultyProxy(s3_server.endpoint, listener=network.listen()) as store:
        yield Cluster(network, store, tmp_path, fault_tolerant=getattr(request, "param", False))


def test_what_happens_to_a_cluster_loses_no_row(ground_on_s3, cluster, s3_bucket, table):
    outcome, nodes = cluster_faults.node_joins(ground_on_s3, cluster, f"{s3_bucket.url}/joins")
    table(outcome)
    here = (ground_on_s3, cluster, nodes)
    table(cluster_faults.models_kept(*here, f"{s3_bucket.url}/kept"))
    table(cluster_faults.node_cut(*here, f"{s3_bucket.url}/cut", back=True))
    table(cluster_faults.head_lost(*here, f"{s3_bucket.url}/head"))
    table(cluster_faults.node_cut(*here, f"{s3_bucket.url}/gone", back=False))


@pytest.mark.skipif(not shutil.which("redis-server"), reason="apt-get install redis-server installs Redis")
@pytest.mark.parametrize("cluster", [True], ids=["redis"], indirect=True)
def test_a_fault_tolerant_head_is_lost_and_the_run_goes_on(ground_on_s3, cluster, s3_bucket, table):
    table(cluster_faults.fault_tolerant_head_lost(ground_on_s3, cluster, f"{s3_bucket.url}/dataset"))
