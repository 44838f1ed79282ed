"""Automations of the Prefect server that end a run whose process has gone silent, and so free its concurrency slot.

A process that ends with its machine reports nothing: Prefect leaves its run Running or Pending, and the run's
deployment waits for the slot. A run sends a heartbeat every `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` seconds (30 in
prefect.yaml); the server marks a run as Crashed that sent none for a while, and one that stays Pending.

`prefect deploy --all` puts the automations: `deploy_automations` is a build step of prefect.yaml.
"""

from datetime import timedelta

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification

from facediffuser.errors import InputError
from facediffuser.flows.stopping import STOPPED

HEARTBEAT = "prefect.flow-run.heartbeat"
ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut", STOPPED)}
# A run that waits once more holds no slot.
WAITING = {f"prefect.flow-run.{name}" for name in ("Scheduled", "Late", "AwaitingConcurrencySlot", "AwaitingRetry")}
SILENT, NEVER_STARTED = "run without heartbeat", "run that does not start"
HEARTBEAT_S = 30
"""PREFECT_FLOWS_HEARTBEAT_FREQUENCY in prefect.yaml."""
SILENT_S, PENDING_S = 90, 180
RESUMES = "the next run with the same settings resumes it"


def deploy_automations(tag: str, silent_s: int | str = "", pending_s: int | str = "") -> dict[str, list[str]]:
    """Put the automations on the server, or bring those that are there up to date.

    Args:
        tag: the tag of the runs that are watched; every deployment of prefect.yaml has it.
        silent_s: seconds without a heartbeat after which a Running or Cancelling run counts as dead; more than two
            heartbeats, and more than the server may be away for: 90 where it is empty.
        pending_s: seconds after which a run counts as dead that is Pending still; longer than it takes to start a
            process (on Kubernetes: a node and a pod with a large image): 180 where it is empty.

    Returns:
        The names of the automations, for the log of `prefect deploy`.

    Raises:
        InputError: a time is no whole number of seconds, or too short.
    """
    silent_s = _seconds("FACEDIFFUSER_SILENT_S", silent_s or SILENT_S, HEARTBEAT_S * 2 + 1)
    pending_s = _seconds("FACEDIFFUSER_PENDING_S", pending_s or PENDING_S, 1)
    automations = [
        _crash(
            f"{tag}: {SILENT}",
            f"the run sent no heartbeat for {silent_s} s: its process or its machine is gone; {RESUMES}",
            tag,
            after={"prefect.flow-run.Running", "prefect.flow-run.Cancelling", HEARTBEAT},
            expect={HEARTBEAT, *ENDED},
            within_s=silent_s,
        ),
        _crash(
            f"{tag}: {NEVER_STARTED}",
            f"the run did not start within {pending_s} s: its worker is gone, or gets no process; {RESUMES}",
            tag,
            after={f"prefect.flow-run.{name}" for name in ("Pending", "Submitting", "InfrastructurePending")},
            expect={"prefect.flow-run.Running", *WAITING, *ENDED},
            within_s=pending_s,
        ),
    ]
    with get_client(sync_client=True) as client:
        for automation in automations:
            there = client.read_automations_by_name(automation.name)
            if there:
                client.update_automation(there[0].id, automation)
            else:
                client.create_automation(automation)
    return {"automations": [automation.name for automation in automations]}


def _seconds(name: str, value: int | str, least: int) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name} {text!r}: give whole seconds, at least {least}")
    return int(text)


def _crash(name: str, message: str, tag: str, after: set[str], expect: set[str], within_s: int) -> AutomationCore:
    return AutomationCore(
        name=name,
        description="Deployed by prefect.yaml; `prefect deploy --all` writes it anew.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after=after,
            expect=expect,
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=within_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)],
    )
