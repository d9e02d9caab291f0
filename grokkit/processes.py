"""Several processes as one: starting them, agreeing before the work begins, gathering results.

JAX does the work itself (`jax.distributed`): every process runs the same program on its own
devices. What is here keeps a mistake in one of them from leaving the others waiting.
"""

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from grokkit.errors import ProcessError

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for this long counts as dead, and ends the others."""

_CHOOSE_ONE = {"SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"}
_RECORD = 1 << 15  # bytes of what a process tells the others
_LONGEST = 3000  # characters of a message in it

T = TypeVar("T")


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    timeout: int = 300,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> None:
    """Join the other processes. Call it before JAX is first used, in every process.

    **Arguments:**

    - `coordinator`: address and port of process 0, as in `"10.0.0.1:1234"`.
    - `processes`: how many there are.
    - `index`: which of them this is, from 0. Under SLURM and Open MPI, and on Cloud TPUs, JAX finds
        out all three. A process takes all GPUs that it sees; if SLURM or Open MPI run several on a
        machine, the one with its number there, or those that `JAX_LOCAL_DEVICE_IDS` lists.
    - `timeout`: seconds to wait until all are there.
    - `heartbeat`: seconds without a sign of life after which a process counts as dead. The others
        then end with an error.

    **Raises:** `ProcessError` if the processes do not find each other.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as e:
        raise ProcessError(
            f"the processes did not find each other: {e}\n  what to do: start as many as you say "
            f"there are, each with its own index, all with the address of process 0; do this "
            f"before JAX is used"
        ) from e
    # Where JAX finds SLURM or Open MPI it has now chosen one GPU, however many processes there are.
    is_chosen = not _CHOOSE_ONE.isdisjoint(os.environ) and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    if is_chosen and (index is not None or _n_on_this_machine(os.environ) == 1):
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, os.environ.get(name.upper(), "all"))


def _n_on_this_machine(environment: Mapping[str, str]) -> int | None:
    """How many processes Open MPI or SLURM run on this machine; `None` if neither says it."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    # As in "2(x3),1": two on each of three machines, and one on the fourth.
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    each = [int(n) for n, times in runs for _ in range(int(times or 1))]
    machine = int(environment.get("SLURM_NODEID", 0))
    return each[machine] if machine < len(each) else None


def is_first() -> bool:
    """Whether this is process 0, which prints and shows progress for all. True if it is alone."""
    return jax.process_count() == 1 or jax.process_index() == 0


def spans_processes(mesh: Mesh) -> bool:
    """Whether a mesh has devices of more than one process."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def to_host(tree: PyTree[Array | np.ndarray]) -> PyTree[np.ndarray]:
    """Arrays as numpy arrays, gathered if they lie on several processes.

    Every process must call it, with the same arrays, and each gets all of them.

    **Arguments:**

    - `tree`: arrays of jax or numpy, alone or in any pytree.
    """

    def gather(a: Any) -> np.ndarray:
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return np.asarray(a)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(gather, tree)


def agree(prepare: Callable[[], tuple[T, dict[str, str]]], together: bool) -> T:
    """Prepare in every process, and go on only if all succeeded and have the same facts.

    **Arguments:**

    - `prepare`: gives a result and facts, which must be the same in all processes, by name.
    - `together`: whether several processes take part; with `False`, just `prepare`.

    **Returns:** this process's result.

    **Raises:** what `prepare` raised, in that process; `ProcessError` in the others, or in all of
    them if their facts differ.
    """
    if not together:
        return prepare()[0]
    try:
        result, facts = prepare()
        error = None
    except Exception as e:  # noqa: BLE001 - whatever it is, the others must hear of it
        result, facts, error = None, {}, e
    told = {
        "host": socket.gethostname()[:100],
        "error": None if error is None else f"{type(error).__name__}: {error}"[:_LONGEST],
        "facts": facts,
    }
    everyone = _exchange(told)
    if error is not None:
        raise error
    failed = [i for i, other in enumerate(everyone) if other["error"] is not None]
    if failed:
        i = failed[0]
        raise ProcessError(f"{_called(i, everyone)} stopped: {everyone[i]['error']}")
    for name in dict.fromkeys(name for other in everyone for name in other["facts"]):
        values = [other["facts"].get(name) for other in everyone]
        for i, value in enumerate(values):
            if value != values[0]:
                raise ProcessError(
                    f"the processes do not have the same {name}\n"
                    f"  {_called(0, everyone)}: {values[0]}\n"
                    f"  {_called(i, everyone)}: {value}\n"
                    f"  what to do: let every process make the same calls, with the same texts, "
                    f"options and files"
                )
    return result  # type: ignore[return-value]


def same_call(name: str, what: Any, together: bool) -> None:
    """See that all processes make the same call, before they wait for each other in it.

    **Arguments:**

    - `name`: what is called.
    - `what`: its arguments, as far as their `repr` is the same in every process.
    - `together`: whether several processes take part; with `False` there is nothing to see.

    **Raises:** `ProcessError` in all of them if they do not.
    """

    def facts() -> tuple[None, dict[str, str]]:
        text = repr(what)
        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
        return None, {"call": f"{name} of {text[:200]}, with the digest {digest}"}

    if together:
        agree(facts, together)


def by_first(act: Callable[[], T], together: bool = True) -> T | None:
    """Do something in process 0 alone, such as writing a file; all go on only if it succeeded.

    **Arguments:**

    - `act`: what process 0 does. The others wait, however long it takes.
    - `together`: whether several processes take part; with `False`, this one does it.

    **Returns:** what `act` returned, in process 0; `None` in the others.

    **Raises:** what `act` raised, in process 0; `ProcessError` in the others.
    """
    mine = not together or is_first()
    return agree(lambda: (act() if mine else None, {}), together)


def share(decide: Callable[[], T], together: bool) -> T:
    """What process 0 decides, told to all of them.

    **Arguments:**

    - `decide`: gives what JSON can hold. Process 0 alone calls it.
    - `together`: as for `by_first`.

    **Raises:** as `by_first`.
    """
    decided = by_first(decide, together)
    if not together:
        return decided  # type: ignore[return-value]
    text = np.frombuffer(json.dumps(decided).encode(), np.uint8)
    size = int(from_first(np.array(len(text), np.int32), together))
    return json.loads(from_first(np.resize(text, size), together).tobytes())


def from_first(array: np.ndarray, together: bool) -> np.ndarray:
    """Process 0's array; the others give one of the same shape and dtype, whose values are lost."""
    if not together:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array, is_source=is_first()))


def _called(i: int, everyone: list[dict[str, Any]]) -> str:
    return f"process {i} of {len(everyone)}, on {everyone[i]['host']}"


def _exchange(told: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process told, in their order."""
    text = json.dumps(told).encode()
    assert len(text) <= _RECORD, "facts are short"
    record = np.frombuffer(text.ljust(_RECORD), np.uint8)
    records = multihost_utils.process_allgather(record)
    return [json.loads(bytes(np.asarray(r))) for r in records]
