"""Which job a process belongs to, as flags and clusters say."""

import importlib.util

import pytest

from modjax import launch, processes
from modjax.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
JOBSET = {
    "JAX_COORDINATOR_ADDRESS": "job-0-0.job",
    "JAX_PROCESS_COUNT": "4",
    "JOB_COMPLETION_INDEX": "3",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.fixture
def tpu(monkeypatch):
    """A machine with libtpu and a chip."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(processes, "has_chips", lambda: True)


def flags(*argv):
    read = launch.parse_flags(argv, "test")
    return read.coordinator_address, read.process_count, read.process_index


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JOB_COMPLETION_INDEX": "2"},  # one of many jobs that have nothing to do with each other
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # sbatch's script itself
        SLURM | {"SLURM_NTASKS": "1"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # no chips here
        JOBSET | {"JAX_PROCESS_COUNT": "1", "JOB_COMPLETION_INDEX": "0"},
        {"JAX_COORDINATOR_ADDRESS": "somewhere"},
    ],
)
def test_a_process_that_nobody_says_to_be_one_of_several_runs_by_itself(environ):
    assert processes.find(environ) is None


@pytest.mark.parametrize("environ", [SLURM, JOBSET, MPI | {"OMPI_MCA_orte_hnp_uri": "x"}])
def test_a_process_may_be_told_to_run_by_itself(environ):
    assert processes.find(environ) is not None
    assert processes.find(environ, *flags("--process_count=1")) is None


def test_flags_and_environment_fill_each_other_up():
    argv = ("--coordinator_address=a:1", "--process_count=2", "--process_index=1")
    job = processes.find({}, *flags(*argv))
    assert job == processes.Job("its flags", "a:1", 2, 1)
    assert processes.find(SLURM, *flags(*argv)) == job  # flags win
    job = processes.find(JOBSET)
    assert job == processes.Job("the environment (JAX_PROCESS_COUNT)", "job-0-0.job:1234", 4, 3)
    port = {"JAX_COORDINATOR_PORT": "99"}
    job = processes.find(JOBSET | port, *flags("--process_count=8"))
    assert (job.coordinator_address, job.process_count, job.process_index) == (
        "job-0-0.job:99",
        8,
        3,
    )
    several = {"JOB_INDEX": "2", "PROCESSES_IN_JOB": "4", "JAX_PROCESS_COUNT": "12"}
    assert processes.find(JOBSET | several).process_index == 11
    assert processes.find(JOBSET | {"JAX_PROCESS_INDEX": "0"}).process_index == 0


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--process_count=2"], {}, "no --coordinator_address .*, --process_index"),
        (["--process_index=0"], {}, "no --coordinator_address .*, --process_count"),
        (["--process_count=4"], SLURM, "or none of them where the cluster knows"),
        ([], {"JAX_PROCESS_COUNT": "2"}, "no --coordinator_address .*JAX_COORDINATOR_ADDRESS"),
        (
            ["--process_count=2", "--process_index=2"],
            {},
            "process_index=2 is not one of process_co",
        ),
        (
            ["--process_count=1", "--process_index=1"],
            {},
            "process_index=1 is not one of process_co",
        ),
        (["--process_count=0"], {}, "process_count=0"),
        (["--process_count=2"], JOBSET, "process_index=3 is not one of process_count=2"),
        (["--coordinator_address=here"], JOBSET, "'here' is not HOST:PORT"),
        ([], JOBSET | {"JAX_PROCESS_COUNT": "four"}, "JAX_PROCESS_COUNT='four' is not a number"),
        ([], JOBSET | {"JOB_INDEX": "1"}, "JOB_INDEX=1 needs PROCESSES_IN_JOB"),
        ([], MPI, "rank 1 of 2 of an Open MPI that does not say where process 0 is"),
    ],
)
def test_what_is_said_by_half_or_does_not_fit_is_refused(argv, environ, message):
    with pytest.raises(ConfigError, match=message):
        processes.find(environ, *flags(*argv))


def test_slurm_tasks_get_their_accelerators():
    """None is jax's own choice: the accelerator of the task's number on its node."""
    assert processes.find(SLURM) == processes.Job("SLURM (job 77)")
    four = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert processes.find(SLURM | four).local_device_ids is None
    whole = four | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
    assert processes.find(SLURM | whole).local_device_ids == (0, 1, 2, 3)
    own = four | {"CUDA_VISIBLE_DEVICES": "0"}
    assert processes.find(SLURM | own).local_device_ids == (0,)
    assert processes.find(SLURM | own | {"JAX_LOCAL_DEVICE_IDS": "0"}).local_device_ids is None


@pytest.mark.parametrize(
    ("environ", "origin"),
    [
        ({}, "the TPU VM's metadata"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE (TPU_WORKER_HOSTNAMES)"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "GKE (TPU_WORKER_HOSTNAMES)"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "GKE (TPU_WORKER_HOSTNAMES)"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_workers_of_tpu_pods_are_found(tpu, environ, origin):
    job = processes.find(environ)
    assert (job and job.origin) == origin


def test_a_machine_without_chips_is_no_tpu_vm(tpu, monkeypatch):
    monkeypatch.setattr(processes, "has_chips", lambda: False)
    assert processes.find({}) is processes.find({"TPU_WORKER_HOSTNAMES": "a,b"}) is None


def test_a_job_that_cannot_be_joined_says_who_said_so(monkeypatch):
    import jax

    def refuse(**options):
        raise RuntimeError(f"nobody at {options['coordinator_address']}")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ConfigError, match="by its flags, and could not join.*nobody at a:1"):
        launch.start_processes(launch.Flags((), (), (), "a:1", 2, 1))


def test_jax_asks_its_clusters_for_the_variables_that_we_look_at(monkeypatch):
    """So that what is found here is found by jax, which then asks for address, number and index."""
    from jax._src.clusters import ompi_cluster, slurm_cluster

    for name, value in (SLURM | MPI | {"OMPI_MCA_orte_hnp_uri": "x"}).items():
        monkeypatch.setenv(name, value)
    assert slurm_cluster.SlurmCluster.is_env_present()
    assert slurm_cluster.SlurmCluster.get_process_id() == 3
    assert ompi_cluster.OmpiCluster.is_env_present()
