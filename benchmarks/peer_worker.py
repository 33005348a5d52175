"""A program for the peers' own Python: submits jobs of `true` through one of them when told to, and says what it took.

    python peer_worker.py PEER SCRATCH

Reads lines such as `{"jobs": 1}`, answers each with `{"seconds": 0.1}`. Imports nothing of Fray's.
"""

import json
import os
import sys
import time
import warnings


def torchx(scratch):
    """Submit by TorchX's `local_cwd` scheduler, which runs commands as they are."""
    import torchx.specs as specs
    from torchx.runner import get_runner

    runner = get_runner()
    role = specs.Role(name="true", image=scratch, entrypoint="sh", args=["-c", "true"], num_replicas=1)
    app = specs.AppDef(name="bench", roles=[role])

    def submit_and_wait(jobs):
        handles = [runner.run(app, "local_cwd", cfg={"log_dir": scratch}) for _ in range(jobs)]
        for handle in handles:
            # Its default is to look every ten seconds: that would measure the pause.
            status = runner.wait(handle, wait_interval=0.01)
            assert status is not None, "the job is not known any more"
            assert status.state.name == "SUCCEEDED", status

    return submit_and_wait


def submitit(scratch):
    """Submit by submitit's `LocalExecutor`; its jobs are calls, here of what runs `sh -c true`."""
    import submitit

    executor = submitit.LocalExecutor(folder=scratch)

    def submit_and_wait(jobs):
        submitted = [executor.submit(os.system, "true") for _ in range(jobs)]
        for job in submitted:
            assert job.result() == 0

    return submit_and_wait


def main():
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print is not an answer
    submit_and_wait = {"torchx": torchx, "submitit": submitit}[sys.argv[1]](sys.argv[2])
    for line in sys.stdin:
        jobs = json.loads(line)["jobs"]
        begin = time.perf_counter()
        submit_and_wait(jobs)
        answers.write(json.dumps({"seconds": time.perf_counter() - begin}) + "\n")
        answers.flush()


main()
