"""What goes wrong in a cluster of machines that share nothing but a bucket; each fault returns what became of the rows."""

from faults.cluster import Cluster
from faults.faults import SHARDS, polled
from faults.ground import Ground, Outcome, shards_there, wait_until


def node_joins(ground: Ground, cluster: Cluster, url: str) -> Outcome:
    """A second node joins while the first one works; both make shards."""
    poller, first = polled(url), cluster.join("first")
    driver = cluster.generate(ground.settings(url, workers=2))
    wait_until(lambda: shards_there(url) >= 1, driver)
    second = cluster.join("second")
    assert driver.wait() == 0, driver.said()[-3000:]
    shards = [cluster.shards_by(machine) for machine in (first, second)]
    assert all(shards), f"shards by node: {shards}"
    note = f"it made {shards[1]} of {SHARDS} shards"
    return ground.outcome("cluster: a node joins", 1, url, poller, note)
