"""infra/slurm/generate.sbatch on a real Slurm: munge, slurmctld and two slurmd on machines of their own, data in a bucket."""

import os
import shutil

import pytest
from faults.faults import polled
from faults.ground import shards_there
from faults.machines import Network
from faults.proxy import FaultyProxy
from faults.slurm import PROGRAMS, Slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)),
        reason="apt-get install munge slurmctld slurmd slurm-client installs Slurm",
    ),
]


@pytest.fixture
def slurm(s3_server, ground_on_s3, tmp_path):
    with Network(tmp_path) as network, FaultyProxy(s3_server.endpoint, listener=network.listen()) as store:
        yield Slurm(network, store, tmp_path)


def test_a_job_that_is_requeued_and_then_loses_its_first_node_ends_well(ground_on_s3, slurm, s3_bucket, table):
    ground, url = ground_on_s3, f"{s3_bucket.url}/out/dataset"
    poller = polled(url)
    slurm.wait_until(lambda: slurm.ask("sinfo", "--noheader", "--format=%t %D").strip() == "idle 2")
    job = slurm.submit(ground.settings(url, workers=2))
    slurm.wait_until(lambda: shards_there(url) >= 2)
    slurm.ask("scontrol", "requeue", job)
    slurm.wait_until(lambda: slurm.job(job)["Restarts"] == "1" and slurm.job(job)["JobState"] == "RUNNING")
    requeued_at = shards_there(url)
    slurm.wait_until(lambda: shards_there(url) >= requeued_at + 2)
    # The node of driver and Ray's head is lost: Slurm ends the job and puts it into the queue once more.
    slurm.nodes[0].lose()
    lost_at = shards_there(url)
    slurm.wait_until(lambda: slurm.job(job)["Restarts"] == "2")
    slurm.restore(slurm.nodes[0])
    end = slurm.wait_until(
        lambda: (state := slurm.job(job)["JobState"]) in ("COMPLETED", "FAILED", "TIMEOUT") and state
    )
    assert end == "COMPLETED", slurm.said()[-3000:]
    assert slurm.job(job)["ExitCode"] == "0:0"
    assert lost_at < 12
    note = f"requeued with {requeued_at}, the node lost with {lost_at} of 12 shards; ended COMPLETED"
    table(ground.outcome("Slurm: requeued, then the driver's node lost", 2, url, poller, note))
