"""Plays a `Machines` plan: look, create, wait, ship, run; again where machines were lost; delete."""

from glimmer_jax.main import BAD_INPUT, START_AGAIN
from launch.plans import Machines, shell
from launch.processes import Interrupts, read, run, run_again, run_heard, say

POLL = 20.0  # seconds between two looks at the state
# At shipping, since workers refuse connections for a while after they say they are ready; at asking
# for the state, since one failed question must not give the machines away; and at deleting.
ATTEMPTS = 3
# gcloud's error where there is no machine of the name. All its others (login, permissions, a wrong
# zone, the network) say nothing of the machine.
NOT_FOUND = "NOT_FOUND:"
ALREADY_EXISTS = "ALREADY_EXISTS:"


def play(plan: Machines, interrupts: Interrupts, poll: float = POLL) -> int:
    """Runs the job to its end, on new machines when it was preempted.

    Args:
      plan: the commands.
      interrupts: in force; after one, the machines are deleted and nothing more is tried.
      poll: seconds between two looks at the state.

    Returns:
      The job's exit code; 42 if it was preempted more often than the plan allows; 2 if the machines
      failed before they were ready; gcloud's where that fails; 1 if a finished job's machines could
      not be deleted.

    Raises:
      ValueError: there are machines of that name, which belong to another run and stay; or gcloud
        does not say whether there are.
    """
    # Before all else, since a create that fails may cost minutes.
    answer = read(plan.describe)
    if not answer.code:
        raise _taken(plan, answer.text)
    if NOT_FOUND not in answer.errors:
        raise ValueError(
            f"--name must be free, and gcloud does not say whether there is a {plan.name}: "
            f"{answer.errors or f'exit code {answer.code}'}\nNothing was made or deleted. Mend the "
            "login (gcloud auth login), --zone, --project or your permissions, and launch again."
        )
    say(f"launch: {NOT_FOUND} the name {plan.name} is free")
    for left in range(plan.recreate, -1, -1):
        code, lost = _life(plan, interrupts, poll)
        if interrupts.count:
            return interrupts.exit_code
        if not lost:
            return code
        say(f"launch: the machines are lost; new ones {left} times more")
    return START_AGAIN


def _life(plan: Machines, interrupts: Interrupts, poll: float) -> tuple[int, bool]:
    """One life of the machines: exit code, and whether they were lost."""
    code, lost, ours, cut_short = 1, False, True, False
    try:
        created = run_heard(plan.create, interrupts)
        code = created.code
        cut_short = bool(code and interrupts.count)
        # Somebody took the name after we looked, or after we deleted machines that were lost.
        ours = not code or ALREADY_EXISTS not in created.errors
        if not ours:
            raise _taken(plan, read(plan.describe).text or "unknown")
        if not code and not interrupts.count:
            code, lost = _work(plan, interrupts, poll)
    finally:
        if ours and not _deleted(plan, poll, cut_short):
            by_hand = shell(plan.delete)
            say(f"launch: could not delete; if it is still there: {by_hand}")
            # No new ones: what has the name may be the old ones.
            code, lost = code or 1, False
    return code, lost


def _taken(plan: Machines, state: str) -> ValueError:
    return ValueError(
        f"--name must be free, and there is a {plan.name} already, in state {state}. "
        "Choose another --name; or, if no run needs it, delete it by hand and launch again: "
        f"{shell(plan.delete)}"
    )


def _deleted(plan: Machines, poll: float, cut_short: bool) -> bool:
    """Deletes, in several attempts; whether the machines are gone.

    What create asked for before it was cut short may arrive after the first answer.
    """
    # Interrupts are not heard: half-deleted machines cost as much as whole ones.
    deaf = Interrupts()
    for attempt in range(ATTEMPTS):
        if attempt:
            deaf.sleep(poll)
        answer = run_heard(plan.delete, deaf)
        if not answer.code or (NOT_FOUND in answer.errors and (attempt or not cut_short)):
            return True
    return False


def _work(plan: Machines, interrupts: Interrupts, poll: float) -> tuple[int, bool]:
    """What is done with machines that were asked for."""
    state = _state(plan, interrupts, poll)
    while state in plan.waiting and not interrupts.count:
        interrupts.sleep(poll)
        state = _state(plan, interrupts, poll)
    if interrupts.count or state is None or state in plan.lost:
        return START_AGAIN, True
    if state != plan.ready:
        say(read(plan.explain).text)
        say(
            f"launch: {plan.name} is {state} before it was ever ready; look at quota, --zone, --version "
            "and --accelerator_type: new ones would fail too"
        )
        return BAD_INPUT, False
    for command in plan.ship:
        code = run_again(command, interrupts, attempts=ATTEMPTS, pause=poll)
        if code or interrupts.count:
            return code, _state(plan, interrupts, poll) != plan.ready
    code = run([plan.run], interrupts)
    # A lost machine breaks the connection, and gcloud's exit code says nothing of the job.
    if code in (0, BAD_INPUT):
        return code, False
    return code, code == START_AGAIN or _lost(plan, interrupts, poll)


def _lost(plan: Machines, interrupts: Interrupts, poll: float) -> bool:
    """Whether the machines are gone; after an interrupt it does not matter.

    A queued resource says that it is ready for some moments after its node was preempted.
    """
    for look in range(1 + ATTEMPTS):
        if look:
            interrupts.sleep(poll)
        if interrupts.count:
            return False
        if _state(plan, interrupts, poll) != plan.ready:
            return True
    return False


def _state(plan: Machines, interrupts: Interrupts, poll: float) -> str | None:
    """What gcloud calls it; None where it is gone, or gives no answer in several attempts."""
    for attempt in range(ATTEMPTS):
        if attempt:
            interrupts.sleep(poll)
        answer = read(plan.describe)
        # A state that is not set is printed as nothing, and no answer either.
        if not answer.code and answer.text:
            return answer.text
        if NOT_FOUND in answer.errors or interrupts.count:
            break
    return None
