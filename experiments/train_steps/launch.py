"""One process or many.

A process that falls silent ends the others: the runtime of JAX stops them, with a message, once
the heartbeat has been missed. Started again, they continue from the latest checkpoint.

    host a$ python -m experiments.train --coordinator=a:1234 --num_processes=2 --process_id=0 ...
    host b$ python -m experiments.train --coordinator=a:1234 --num_processes=2 --process_id=1 ...
    Slurm, Open MPI, GKE, TPU pods: python -m experiments.train --coordinator=auto ...
"""

import jax
from absl import flags

from experiments import cli
from moejax.core.errors import InputError, check

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, or auto (Slurm, Open MPI, GKE, TPU pods)"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "of the run", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "of this one, from 0", lower_bound=0)
HEARTBEAT_SECS = flags.DEFINE_integer(
    "heartbeat_secs", 100, "silence after which a process counts as dead", lower_bound=1
)
JOIN_SECS = flags.DEFINE_integer("join_secs", 300, "to wait for the others", lower_bound=1)


def join(num_devices: int) -> None:
    """Joins the other processes; call before anything asks for devices.

    Where there is only the CPU, each process makes its share of `num_devices`.
    """
    check_flags(num_devices)
    cli.use_cpu_devices(num_devices // (NUM_PROCESSES.value or 1))
    if COORDINATOR.value is None:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=None if COORDINATOR.value == "auto" else COORDINATOR.value,
            num_processes=NUM_PROCESSES.value,
            process_id=PROCESS_ID.value,
            initialization_timeout=JOIN_SECS.value,
            heartbeat_timeout_seconds=HEARTBEAT_SECS.value,
            # A process that ends with an error waits no longer for the others to end as well.
            shutdown_timeout_seconds=HEARTBEAT_SECS.value,
        )
    except ValueError as error:
        raise InputError(f"--coordinator={COORDINATOR.value}: {error}") from error


def check_flags(num_devices: int) -> None:
    """Raises `InputError` for flags that do not go together."""
    where, count, this = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if where in (None, "auto"):
        for name, value in (("num_processes", count), ("process_id", this)):
            check(value is None, f"--{name}={value} wants --coordinator=host:port, got {where}")
        return
    port = where.rpartition(":")[2]
    check(port.isdigit(), f"--coordinator={where} is neither auto nor host:port")
    if count is None or this is None:
        raise InputError(f"--coordinator={where} wants --num_processes and --process_id")
    check(this < count, f"--process_id={this} is not below --num_processes={count}")
    check(
        num_devices % count == 0,
        f"a mesh of {num_devices} devices is not divisible by --num_processes={count}",
    )
