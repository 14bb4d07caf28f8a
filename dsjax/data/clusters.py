"""Clusters that do the tasks of a plan; all of their machines must see its folder under the same name."""

import subprocess
import sys
from pathlib import Path

from dsjax.config import ConfigError
from dsjax.data.engines import Watch, begun, do_task, stages_to_do
from dsjax.data.files import write_json
from dsjax.data.plan import Plan
from dsjax.data.readers import needed
from dsjax.data.stages import STAGES


def run_ray(plan: Plan, watch: Watch, address: str) -> None:
    """Does it on a Ray cluster, or on one that is started on this machine where ``address`` is ``local``.

    Errors: ConfigError where Ray is not installed or cannot be reached, and for what a task raises.
    """
    ray = needed("ray", "--engine=ray")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ConfigError(f"--ray-address={address} cannot be reached ({error}): start Ray there") from None
    work = ray.remote(num_cpus=1)(do_task)
    try:
        for stage, pending in stages_to_do(plan):
            with begun(stage, plan, pending, watch) as bar:
                waiting = {work.remote(plan.folder, stage.name, task): task for task in pending}
                while waiting:
                    (first,), _ = ray.wait(list(waiting))
                    ray.get(first)
                    bar.advance(stage.work_bytes(plan, waiting.pop(first)))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, (ConfigError, OSError)):
            raise cause from None
        raise ConfigError(
            f"a task of Ray failed ({str(error).strip().splitlines()[0]}): run the same command again, and it goes on "
            "where it was"
        ) from error
    finally:
        ray.shutdown()


class Step:
    """A stage as a step of a datatrove pipeline, which any of its executors runs: a task is a rank."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def __call__(self, documents: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Does a task; documents come from the folder."""
        do_task(self.folder, self.name, rank)


def submit_slurm(plan: Plan, *, partition: str, time_limit: str, memory_gb: int, at_once: int) -> list[str]:
    """Submits the stages as Slurm jobs, each after the one before, by datatrove; returns the ids of these jobs.

    Logs and scripts stand in ``FOLDER.slurm``.

    Errors: ConfigError where Slurm does not take a job, and where the jobs were submitted before.
    """
    submitted = plan.work / "slurm-jobs.json"
    if submitted.exists():
        raise ConfigError(
            f"{plan.folder} is being prepared by the Slurm jobs in {submitted}: wait for them, or delete that file "
            "when they have ended, and what they did not do is submitted again"
        )
    executor_of = needed("datatrove.executor.slurm", "--engine=slurm").SlurmPipelineExecutor
    jobs = []
    for stage in STAGES:
        job = executor_of(
            pipeline=[Step(plan.folder, stage.name)],
            tasks=stage.tasks(plan),
            time=time_limit,
            partition=partition,
            mem_per_cpu_gb=memory_gb,
            workers=at_once,
            job_name=f"dsjax-{stage.name}",
            logging_dir=str(plan.folder.with_name(f"{plan.folder.name}.slurm") / stage.name),
            skip_completed=False,  # results say what is done
            depends=jobs[-1] if jobs else None,
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        )
        try:
            job.run()
        except FileNotFoundError:
            raise ConfigError(
                "--engine=slurm: sbatch is not on this machine: run this where jobs are submitted"
            ) from None
        except subprocess.CalledProcessError as error:
            raise ConfigError(
                f"--engine=slurm: {' '.join(error.cmd)} failed: see what it says above"
            ) from None
        jobs.append(job)
    ids = [job.job_id for job in jobs]
    if plan.work.exists():
        write_json(submitted, ids)
    return ids
