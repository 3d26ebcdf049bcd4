"""The processes of a job: how many there are, which one this is, and who says so.

`find` reads the flags and the environment and starts nothing; `join` connects the processes. A process that nothing
says to be one of several runs by itself, so that a laptop never waits for others. Who is asked, the first that knows:

    flags          --coordinator_address, --process_count, --process_index; --process_count=1 forbids to look further
    JAX_*          JAX_COORDINATOR_ADDRESS and JAX_PROCESS_COUNT, with JAX_PROCESS_INDEX or a JobSet's
                   JOB_COMPLETION_INDEX (launch/gke_gpu.yaml sets them)
    SLURM          tasks that srun started
    Open MPI       ranks that mpirun started
    TPU pods       on GKE by TPU_WORKER_HOSTNAMES, on a TPU VM by its metadata server
"""

import dataclasses
import glob
import importlib.util
import pathlib
import re
from collections.abc import Mapping

from modjax.errors import ConfigError

DEFAULT_PORT = "1234"
_FLAGS = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "process_count": "JAX_PROCESS_COUNT",
    "process_index": "JAX_PROCESS_INDEX or JOB_COMPLETION_INDEX",
}
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is known of a job of several processes.

    Attributes:
      origin: who says so, for people.
      coordinator_address, process_count, process_index: None where jax asks the cluster itself.
      local_device_ids: the accelerators of this process; None for what jax takes.
    """

    origin: str
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def find(
    environ: Mapping[str, str],
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
) -> Job | None:
    """The job that this process belongs to; None if it runs by itself.

    Args:
      environ: the environment's variables.
      coordinator_address, process_count, process_index: the flags.

    Raises:
      ConfigError: only a part is said, or what is said does not fit together.
    """
    flags = {
        "coordinator_address": coordinator_address,
        "process_count": process_count,
        "process_index": process_index,
    }
    if process_count == 1 and not process_index:
        return None
    said = any(value is not None for value in flags.values())
    if said or environ.get("JAX_PROCESS_COUNT"):
        return _told(environ, flags, said)
    return _slurm(environ) or _open_mpi(environ) or _tpu(environ)


def join(job: Job) -> None:
    """Connects this process with the others; returns when all are there.

    Raises:
      ConfigError: the job's cluster did not say enough, or not all came within five minutes.
    """
    import jax

    try:
        jax.distributed.initialize(
            coordinator_address=job.coordinator_address,
            num_processes=job.process_count,
            process_id=job.process_index,
            local_device_ids=job.local_device_ids,
        )
    except Exception as error:
        raise ConfigError(
            f"this is a process of a job, by {job.origin}, and could not join the others: {error}. "
            "--process_count=1 runs it by itself"
        ) from error


def _told(environ: Mapping[str, str], flags: dict[str, str | int | None], said: bool) -> Job | None:
    """By flags, filled up from the environment, or by the environment alone."""
    values = dict(flags)
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if values["coordinator_address"] is None and address:
        port = environ.get("JAX_COORDINATOR_PORT", DEFAULT_PORT)
        values["coordinator_address"] = address if ":" in address else f"{address}:{port}"
    if values["process_count"] is None:
        values["process_count"] = _number(environ, "JAX_PROCESS_COUNT")
    if values["process_index"] is None:
        values["process_index"] = _index(environ)
    if values["process_count"] == 1 and not values["process_index"]:
        return None
    count, index = values["process_count"], values["process_index"]
    if count is not None and (int(count) < 1 or not 0 <= int(index or 0) < int(count)):
        raise ConfigError(
            f"process_index={index or 0} is not one of process_count={count} processes: they are "
            "numbered from 0"
        )
    missing = [name for name, value in values.items() if value is None]
    if missing:
        lacking = ", ".join(f"--{name} (or {_FLAGS[name]})" for name in missing)
        raise ConfigError(
            "a multi-host job needs all of --coordinator_address, --process_count, --process_index, or none of them "
            f"where the cluster knows (TPU pods, SLURM, Open MPI); there is no {lacking}"
        )
    if not re.fullmatch(r".+:\d+", str(values["coordinator_address"])):
        raise ConfigError(
            f"coordinator_address={values['coordinator_address']!r} is not HOST:PORT, of process 0"
        )
    by = "its flags" if said else "the environment (JAX_PROCESS_COUNT)"
    return Job(by, str(values["coordinator_address"]), int(count or 0), int(index or 0))


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"the environment's {name}={text!r} is not a number")
    return int(text) if text else None


def _index(environ: Mapping[str, str]) -> int | None:
    """JAX_PROCESS_INDEX, or the number of a pod in a JobSet: jobs of PROCESSES_IN_JOB pods one after the other."""
    index = _number(environ, "JAX_PROCESS_INDEX")
    if index is None and (index := _number(environ, "JOB_COMPLETION_INDEX")) is not None:
        job = _number(environ, "JOB_INDEX") or 0
        pods = _number(environ, "PROCESSES_IN_JOB")
        if job and pods is None:
            raise ConfigError(
                f"the environment's JOB_INDEX={job} needs PROCESSES_IN_JOB, the pods of each job"
            )
        index += job * (pods or 0)
    return index


def _slurm(environ: Mapping[str, str]) -> Job | None:
    # sbatch's script has most of these, too, and is no task: only srun sets the step's nodes.
    if any(name not in environ for name in _SLURM) or environ["SLURM_NTASKS"] == "1":
        return None
    # jax gives a task the accelerator of its number on the node; not if the task has the node for itself, or sees but
    # its own.
    devices: tuple[int, ...] | None = None
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    number = len(visible.split(",")) if visible else _number(environ, "SLURM_GPUS_ON_NODE") or 0
    alone = re.match(r"1(\(|$)", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if (alone or number == 1) and "JAX_LOCAL_DEVICE_IDS" not in environ:
        devices = tuple(range(number)) or None
    return Job(f"SLURM (job {environ['SLURM_JOB_ID']})", local_device_ids=devices)


def _open_mpi(environ: Mapping[str, str]) -> Job | None:
    if (_number(environ, "OMPI_COMM_WORLD_SIZE") or 1) == 1:
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environ:
        raise ConfigError(
            f"this is rank {environ.get('OMPI_COMM_WORLD_RANK')} of {environ['OMPI_COMM_WORLD_SIZE']} "
            "of an Open MPI that does not say where process 0 is: pass --coordinator_address=HOST:PORT, "
            "--process_count and --process_index"
        )
    return Job("Open MPI")


def _tpu(environ: Mapping[str, str]) -> Job | None:
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None
    if importlib.util.find_spec("libtpu") is None or not has_chips():
        return None
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        several = "," in workers or (_number(environ, "MEGASCALE_NUM_SLICES") or 1) > 1
        return Job("GKE (TPU_WORKER_HOSTNAMES)") if several else None
    return None if "TPU_SKIP_MDS_QUERY" in environ else Job("the TPU VM's metadata")


def has_chips() -> bool:
    """Whether this machine has TPU chips: device files of an accelerator, on a machine of their maker."""
    vendors = map(pathlib.Path, glob.glob("/sys/bus/pci/devices/*/vendor"))
    if not any(path.read_text().strip() == "0x1ae0" for path in vendors):
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
