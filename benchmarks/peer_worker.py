"""A program for the peers' own Python: submits jobs of `true` through one of them when told to, and says what it took.

    python peer_worker.py PEER SCRATCH [ARGUMENT]...

Reads lines such as `{"jobs": 1}`, answers each with `{"seconds": 0.1}`. The peers that build images do so as often as
they are told in place of jobs. What is left of it is removed when the time has been taken, or at the end. Imports
nothing of Fray's.
"""

import json
import os
import sys
import time
import warnings
from contextlib import ExitStack, closing, suppress


def torchx(stack, scratch):
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


def submitit(stack, scratch):
    """Submit by submitit's `LocalExecutor`; its jobs are calls, here of what runs `sh -c true`."""
    import submitit

    executor = submitit.LocalExecutor(folder=scratch)

    def submit_and_wait(jobs):
        submitted = [executor.submit(os.system, "true") for _ in range(jobs)]
        for job in submitted:
            assert job.result() == 0

    return submit_and_wait


def torchx_docker(stack, scratch, image):
    """Submit by TorchX's `local_docker` scheduler."""
    import docker
    import torchx.specs as specs
    from docker.errors import APIError
    from torchx.runner import get_runner
    from torchx.schedulers.docker_scheduler import LABEL_APP_ID, NETWORK

    client = stack.enter_context(closing(docker.from_env()))
    if not client.networks.list(names=[f"^{NETWORK}$"]):

        def remove_network():
            with suppress(APIError):  # somebody else is in it by now
                client.networks.get(NETWORK).remove()

        stack.callback(remove_network)
    runner = stack.enter_context(get_runner())
    # An image that is named by its id it does not try to pull.
    role = specs.Role(name="true", image=image, entrypoint="sh", args=["-c", "true"], num_replicas=1)
    app = specs.AppDef(name="bench", roles=[role])

    def submit_and_wait(jobs):
        handles = [runner.run(app, "local_docker") for _ in range(jobs)]
        for handle in handles:
            status = runner.wait(handle, wait_interval=0.01)
            assert status is not None, "the job is not known any more"
            assert status.state.name == "SUCCEEDED", status

        def remove():
            for handle in handles:
                label = f"{LABEL_APP_ID}={handle.rpartition('/')[2]}"
                for container in client.containers.list(all=True, filters={"label": label}):
                    container.remove(v=True)

        return remove

    return submit_and_wait


def torchx_docker_build(stack, scratch, image, workspace):
    """Build as TorchX's `local_docker` scheduler does for a workspace: its files on top of an image."""
    import docker
    import torchx.specs as specs
    from docker.errors import APIError
    from docker.models.images import ImageCollection
    from torchx.schedulers.docker_scheduler import create_scheduler

    client = stack.enter_context(closing(docker.from_env()))
    # It tries to pull its base each time, which would measure how fast a registry does not have it.
    ImageCollection.pull = lambda self, repository: None
    scheduler = stack.enter_context(closing(create_scheduler("bench")))
    made = set()

    def remove_images():
        for each in made:
            with suppress(APIError):  # one that others were built on goes with the last of them
                client.images.remove(each, force=True)

    stack.callback(remove_images)

    def build(times):
        for _ in range(times):
            role = specs.Role(name="true", image=image)
            # Without a repository it would look at every image that the engine has.
            scheduler.build_workspace_and_update_role(
                role, f"file://{workspace}", {"image_repo": "fray-bench/torchx", "quiet": True}
            )
            assert role.image.startswith("sha256:"), role.image
            made.add(role.image)

    return build


PEERS = {
    "torchx": torchx,
    "submitit": submitit,
    "torchx-docker": torchx_docker,
    "torchx-docker-build": torchx_docker_build,
}


def main():
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print is not an answer
    with ExitStack() as stack:
        submit_and_wait = PEERS[sys.argv[1]](stack, *sys.argv[2:])
        for line in sys.stdin:
            jobs = json.loads(line)["jobs"]
            begin = time.perf_counter()
            tidy_up = submit_and_wait(jobs)
            seconds = time.perf_counter() - begin
            if tidy_up is not None:
                tidy_up()
            answers.write(json.dumps({"seconds": seconds}) + "\n")
            answers.flush()


main()
