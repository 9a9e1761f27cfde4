"""Runs a `TpuPlan`: check the name, create, wait, ship, run; retry on new machines; delete."""

from glimmer_jax.runtime.exit_codes import INVALID_INPUT, RETRY
from launch.plans import TpuPlan, shell
from launch.processes import Interrupts, read, run, run_again, run_showing_errors, say

POLL = 20.0  # seconds between two state queries
# Attempts of shipping, because workers reject connections for a while after they report READY, of
# state queries, because a failed query must not delete the machines, and of deletion.
ATTEMPTS = 3
# gcloud's error if no machine has the name. Its other errors (login, permissions, wrong zone,
# network) do not tell whether the machine exists.
NOT_FOUND = "NOT_FOUND:"
ALREADY_EXISTS = "ALREADY_EXISTS:"


def run_plan(plan: TpuPlan, interrupts: Interrupts, poll: float = POLL) -> int:
    """Runs the job to its end, on new machines after a preemption.

    Args:
      plan: the commands.
      interrupts: an entered context; after an interrupt the machines are deleted.
      poll: seconds between two state queries.

    Returns:
      The job's exit code; 42 if it was preempted more often than the plan allows; 2 if the machines
      failed before they were ready; gcloud's own code if gcloud fails; 1 if the machines of a
      finished job could not be deleted.

    Raises:
      ValueError: machines of that name exist, which belong to another run and are kept; or gcloud
        cannot determine whether they exist.
    """
    # First, since a create that fails takes minutes.
    answer = read(plan.describe)
    if not answer.code:
        raise _taken(plan, answer.text)
    if NOT_FOUND not in answer.errors:
        raise ValueError(
            f"--name must be free, and gcloud cannot determine whether {plan.name} exists: "
            f"{answer.errors or f'exit code {answer.code}'}\nNothing was created or deleted. Fix the "
            "login (gcloud auth login), --zone, --project or your permissions, and launch again."
        )
    say(f"launch: {NOT_FOUND} the name {plan.name} is free")
    for left in range(plan.recreate, -1, -1):
        code, lost = _attempt(plan, interrupts, poll)
        if interrupts.count:
            return interrupts.exit_code
        if not lost:
            return code
        say(f"launch: the machines are lost; {left} attempts left")
    return RETRY


def _attempt(plan: TpuPlan, interrupts: Interrupts, poll: float) -> tuple[int, bool]:
    """One attempt: the exit code, and whether the machines were lost."""
    code, lost, ours, cut_short = 1, False, True, False
    try:
        created = run_showing_errors(plan.create, interrupts)
        code = created.code
        cut_short = bool(code and interrupts.count)
        # Another launch took the name after the check, or after the deletion of lost machines.
        ours = not code or ALREADY_EXISTS not in created.errors
        if not ours:
            raise _taken(plan, read(plan.describe).text or "unknown")
        if not code and not interrupts.count:
            code, lost = _work(plan, interrupts, poll)
    finally:
        if ours and not _deleted(plan, poll, cut_short):
            by_hand = shell(plan.delete)
            say(f"launch: could not delete; if it is still there: {by_hand}")
            # No new attempt: the old machines may still have the name.
            code, lost = code or 1, False
    return code, lost


def _taken(plan: TpuPlan, state: str) -> ValueError:
    return ValueError(
        f"--name must be free, but {plan.name} exists, in state {state}. "
        "Choose another --name; or, if no run needs it, delete it by hand and launch again: "
        f"{shell(plan.delete)}"
    )


def _deleted(plan: TpuPlan, poll: float, cut_short: bool) -> bool:
    """Deletes the machines, in several attempts; returns whether they are gone.

    Machines that an interrupted create requested may appear after the first answer.
    """
    # Interrupts are ignored: half-deleted machines cost as much as running ones.
    ignored = Interrupts()
    for attempt in range(ATTEMPTS):
        if attempt:
            ignored.sleep(poll)
        answer = run_showing_errors(plan.delete, ignored)
        if not answer.code or (NOT_FOUND in answer.errors and (attempt or not cut_short)):
            return True
    return False


def _work(plan: TpuPlan, interrupts: Interrupts, poll: float) -> tuple[int, bool]:
    """Waits for requested machines, ships the code, and runs the job."""
    state = _state(plan, interrupts, poll)
    while state in plan.waiting and not interrupts.count:
        interrupts.sleep(poll)
        state = _state(plan, interrupts, poll)
    if interrupts.count or state is None or state in plan.lost:
        return RETRY, True
    if state != plan.ready:
        say(read(plan.explain).text)
        say(
            f"launch: {plan.name} is {state} before it was ever ready: check quota, --zone, --version "
            "and --accelerator_type; a new attempt would fail too"
        )
        return INVALID_INPUT, False
    for command in plan.ship:
        code = run_again(command, interrupts, attempts=ATTEMPTS, pause=poll)
        if code or interrupts.count:
            return code, _state(plan, interrupts, poll) != plan.ready
    code = run([plan.run], interrupts)
    # A lost machine breaks the connection; gcloud's exit code is then not the job's.
    if code in (0, INVALID_INPUT):
        return code, False
    return code, code == RETRY or _lost(plan, interrupts, poll)


def _lost(plan: TpuPlan, interrupts: Interrupts, poll: float) -> bool:
    """Whether the machines are gone; False after an interrupt.

    A queued resource reports ACTIVE for a while after its node was preempted.
    """
    for look in range(1 + ATTEMPTS):
        if look:
            interrupts.sleep(poll)
        if interrupts.count:
            return False
        if _state(plan, interrupts, poll) != plan.ready:
            return True
    return False


def _state(plan: TpuPlan, interrupts: Interrupts, poll: float) -> str | None:
    """The state according to gcloud; None if the machines are gone, or after several failed queries."""
    for attempt in range(ATTEMPTS):
        if attempt:
            interrupts.sleep(poll)
        answer = read(plan.describe)
        # An unset state is printed as an empty line.
        if not answer.code and answer.text:
            return answer.text
        if NOT_FOUND in answer.errors or interrupts.count:
            break
    return None
