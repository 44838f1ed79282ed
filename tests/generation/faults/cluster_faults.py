"""What goes wrong in a cluster of machines that share nothing but a bucket; each fault returns what became of the rows.

They are tried one after another on one cluster: each has a dataset of its own.
"""

from faults.cluster import Cluster
from faults.faults import SHARDS, polled
from faults.ground import Ground, Outcome, shards_there, wait_until
from faults.machines import Machine


def node_joins(ground: Ground, cluster: Cluster, url: str) -> tuple[Outcome, list[Machine]]:
    """A second node joins while the first one works; both make shards. Returns the nodes, too."""
    poller, first = polled(url), cluster.join("first")
    driver = cluster.generate(ground.settings(url, workers=2))
    wait_until(lambda: shards_there(url) >= 1, driver)
    second = cluster.join("second")
    assert driver.wait() == 0, driver.said()[-3000:]
    shards = [cluster.shards_by(machine) for machine in (first, second)]
    assert all(shards), f"shards by node: {shards}"
    note = f"it made {shards[1]} of {SHARDS} shards"
    return ground.outcome("cluster: a node joins", 1, url, poller, note), [first, second]


def models_kept(ground: Ground, cluster: Cluster, nodes: list[Machine], url: str) -> Outcome:
    """One more run on the same machines: each had fetched the models once, and fetches none for this run."""
    machines = [*nodes, cluster.desk]
    fetched = [cluster.models_fetched(machine) for machine in machines]
    assert all(set(counts) == {1} for counts in fetched), fetched
    poller = polled(url)
    driver = cluster.generate(ground.settings(url, workers=2))
    assert driver.wait() == 0, driver.said()[-3000:]
    assert [cluster.models_fetched(machine) for machine in machines] == fetched
    note = f"each of {len(machines)} machines fetched the models once"
    return ground.outcome("cluster: one more run, models kept", 1, url, poller, note)


def node_cut(ground: Ground, cluster: Cluster, nodes: list[Machine], url: str, back: bool) -> Outcome:
    """A node that works is cut from the network, not killed; `back`: joined again while the run goes on."""
    poller, before = polled(url), [cluster.shards_by(machine) for machine in nodes]
    driver = cluster.generate(ground.settings(url, workers=2))
    work = [
        lambda machine=machine, n=n: cluster.shards_by(machine) > n for machine, n in zip(nodes, before, strict=True)
    ]
    wait_until(lambda: all(begun() for begun in work), driver)
    cluster.network.plug(nodes[0], False)
    there = shards_there(url)
    if back:
        wait_until(lambda: shards_there(url) >= min(there + 2, SHARDS), driver)
        cluster.network.plug(nodes[0], True)
    code = driver.wait()
    cluster.network.plug(nodes[0], True)
    assert code == 0, f"exit code {code}:\n{driver.said()[-3000:]}"
    what = "cluster: a node cut from the network" + (", and back" if back else "")
    return ground.outcome(what, 1, url, poller, f"after {there} of {SHARDS} shards")


def head_lost(ground: Ground, cluster: Cluster, nodes: list[Machine], url: str) -> Outcome:
    """The head's machine is lost and started anew, empty: the driver ends, started once more it resumes."""
    poller = polled(url)
    driver = cluster.generate(ground.settings(url, workers=2))
    wait_until(lambda: shards_there(url) >= 2, driver)
    starts = [cluster.starts(machine) for machine in (cluster.desk, *nodes)]
    cluster.lose_head()
    code, there = driver.wait(), shards_there(url)
    assert code != 0, "the run ended well without its head"
    assert "does not answer" in driver.said(), driver.said()[-3000:]
    for machine, times in zip((cluster.desk, *nodes), starts, strict=True):
        cluster.wait_until_started(machine, times=times + 1)
    driver = cluster.generate(ground.settings(url, workers=2))
    assert driver.wait() == 0, driver.said()[-3000:]
    note = f"exit code {code} with {there} of {SHARDS} shards, then run again"
    return ground.outcome("cluster: the head lost, started anew", 1, url, poller, note)


def fault_tolerant_head_lost(ground: Ground, cluster: Cluster, url: str) -> Outcome:
    """The head's machine is lost and started anew; its books are in a Redis, and the run goes on."""
    poller = polled(url)
    for name in ("first", "second"):
        cluster.join(name)
    driver = cluster.generate(ground.settings(url, workers=2))
    wait_until(lambda: shards_there(url) >= 2, driver)
    there = shards_there(url)
    cluster.lose_head()
    code = driver.wait()
    assert code == 0, f"exit code {code}:\n{driver.said()[-3000:]}"
    assert "answers again" in driver.said(), driver.said()[-3000:]
    return ground.outcome("cluster: the head lost, books in Redis", 1, url, poller, f"after {there} of {SHARDS} shards")
