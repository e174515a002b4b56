"""A real one-node Slurm for the tests of this folder: munged, slurmctld and slurmd, in a folder of their own."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import environment

CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=15
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=patient Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=12
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _missing() -> str:
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if programs:
        return f"no Slurm here: {', '.join(programs)} not found (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "the test's own Slurm must be started by root"
    if (os.cpu_count() or 1) < 2:
        return "the test's own Slurm needs two cores"
    return ""


class Cluster:
    """Talks to the test's Slurm; `scratch` is its $SCRATCH, `temporary` its /tmp."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder, folder / "scratch"
        self.temporary = folder / "tmp"
        self.scratch.mkdir()
        self.temporary.mkdir()
        venv = Path(sys.prefix)
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"), SCRATCH=str(self.scratch))
        self.env |= {"VIRTUAL_ENV": str(venv), "PATH": paths, "TMPDIR": str(self.temporary)}

    def call(self, *command: object) -> str:
        """Run one of Slurm's commands; returns its stdout."""
        reply = subprocess.run(list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=60)
        assert reply.returncode == 0, f"{command}: {reply.stdout}{reply.stderr}"
        return reply.stdout.strip()

    def submit(
        self, folder: Path, *options: str, flags: tuple = (), path: str = "", scratch: bool = True, **env: str
    ) -> str:
        """sbatch job.sh from inside an experiment's folder; returns the job's number.

        path: a folder whose programs come before all others; scratch: with $SCRATCH; env: more of the environment.
        """
        env = self.env | env | ({"PATH": f"{path}:{self.env['PATH']}"} if path else {})
        if not scratch:
            del env["SCRATCH"]
        log = f"--output={self.scratch}/%x-%A_%a.out"
        fits = ("--gres=none", "--cpus-per-task=1", "--mem=0", f"--chdir={folder}")
        command = ["sbatch", "--parsable", *fits, log, *options, "job.sh", *map(str, flags)]
        reply = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        assert reply.returncode == 0, reply.stderr
        return reply.stdout.strip()

    def log(self, job: str) -> str:
        """What a job has written so far, all its allocations together."""
        paths = (path for number in job.split(",") for path in sorted(self.scratch.glob(f"*-{number}_*.out")))
        return "\n".join(path.read_text() for path in paths)

    def states(self, job: str) -> set[str]:
        """The states of a job's tasks (or of several, "1,2"); empty when none is queued or running."""
        return set(self._squeue("%T", "-j", job))

    def _squeue(self, form: str, *which: str) -> list[str]:
        command = ["squeue", "-h", "--array", "-o", form, *which]
        return subprocess.run(command, env=self.env, capture_output=True, text=True).stdout.splitlines()

    def wait_until(self, what: str, condition, job: str, patience: float = 150.0) -> None:
        """Poll; meanwhile let all requeued jobs start after a few seconds instead of Slurm's two minutes.

        Not at once: slurmd refuses a job's credential in the second in which it revoked that job's last one.
        """
        deadline = time.monotonic() + patience
        waits: dict[str, float] = {}  # since when each requeued task was seen waiting
        while not condition():
            assert time.monotonic() < deadline, f"no {what} of job {job}: {self.states(job)}\n{self.log(job)}"
            for task in self._squeue("%i %r"):
                name, reason = task.split(maxsplit=1)
                if reason != "BeginTime":
                    waits.pop(name, None)
                elif time.monotonic() - waits.setdefault(name, time.monotonic()) > 3:
                    subprocess.run(["scontrol", "update", f"JobId={name}", "StartTime=now"], env=self.env, timeout=60)
            time.sleep(0.5)

    def wait_for_end(self, job: str, patience: float = 240.0) -> None:
        """Wait until no task of the job is left in the queue, for a while: a requeue may leave it for a moment."""
        gone = 0

        def ended() -> bool:
            nonlocal gone
            gone = 0 if self.states(job) else gone + 1
            return gone >= 6

        self.wait_until("end", ended, job, patience)

    def wait_for_text(self, job: str, text: str, patience: float = 60.0) -> None:
        """Wait until the job's log says `text`."""
        self.wait_until(repr(text), lambda: text in self.log(job), job, patience)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running one-node Slurm."""
    if reason := _missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = os.uname().nodename.split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")  # to be asked for, though there are none
    for number in range(4):
        (folder / f"gpu{number}").touch()
    os.makedirs("/run/munge", exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "munged", "--force"], capture_output=True, timeout=60)
    there = Cluster(folder)
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            log = open(folder / f"{name}.out", "w")  # noqa: SIM115 - the daemon's
            command = [shutil.which(name), "-D", "-f", str(folder / "slurm.conf")]
            daemons.append(subprocess.Popen(command, env=there.env, stdout=log, stderr=log))
        deadline = time.monotonic() + 60
        while "idle" not in _sinfo(there):
            said = "".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
            assert time.monotonic() < deadline, f"Slurm does not start:\n{said}"
            time.sleep(0.5)
        yield there
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--user=root", "--full"], env=there.env, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _sinfo(cluster: Cluster) -> str:
    command = ["sinfo", "-h", "-o", "%t"]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=60).stdout
