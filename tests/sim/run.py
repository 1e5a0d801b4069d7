"""One seed from beginning to end: what `test_simulation.py` runs 500 of."""

import logging
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from sim.cluster import Cluster
from sim.faults import Faults

NUM_CLIENTS = 18
NUM_LINES = 80


@dataclass(frozen=True, slots=True)
class Outcome:
    """`failure` is empty when all went well."""

    seed: int
    digest: str
    faults: Counter[str]
    counters: Counter[str]
    failure: str


def prepare_process() -> None:
    """Of a process that does nothing but simulate."""
    torch.set_num_threads(1)
    # What goes wrong in these clusters is meant to, and would be logged by the million.
    logging.disable(logging.CRITICAL)


def simulate(seed: int, model: Path) -> Outcome:
    """Never raises for what goes wrong in the cluster: that is the outcome's failure."""
    cluster = Cluster(seed, model)
    plan = Faults(cluster).plan()
    cluster.add_clients(NUM_CLIENTS)
    failure = ""
    try:
        cluster.run(plan.end_s)
        found = cluster.violations(is_complete=not plan.excuses_errors)
    # A broken invariant anywhere in the cluster is what this looks for.
    except Exception as error:
        found = ["".join(traceback.format_exception(error)[-6:])]
    if found:
        failure = _told(cluster, seed, found)
    tally = cluster.tally
    tally.faults.update({fault.name: n for fault, n in cluster.read_faults.injected.items()})
    return Outcome(seed, cluster.world.trace.hexdigest(), tally.faults, tally.counters, failure)


def _told(cluster: Cluster, seed: int, found: list[str]) -> str:
    """What is wrong, and what was last seen of the requests that it is about."""
    words = []
    for client in cluster.clients:
        name = client.spec.request_id
        if client.entry is not None and any(name in line for line in found):
            words += [name, client.entry.transfer_id.hex()[:6]]
    words += ["fault", "crashes", "gone", "joined", "freezes"]
    lines = cluster.world.trace.about(*words, last=NUM_LINES)
    return "\n".join([f"seed {seed}: {len(found)} violations", *found, "last events:", *lines])
