"""Submit `train.py` with Ray's own client, its dependencies from this project's uv lock.

uv lock
python submit.py http://head:8265
"""

import sys
import time
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from fray.backend.ray.ray_deps import build_runtime_env_for_packages


def main(address: str) -> int:
    """Return the exit code: 0 where the job succeeded."""
    here = Path(__file__).parent
    runtime_env = build_runtime_env_for_packages(env_vars={"WANDB_PROJECT": "example"}, project=here)
    client = JobSubmissionClient(address)
    job_id = client.submit_job(
        entrypoint="python train.py",
        runtime_env=runtime_env | {"working_dir": str(here)},
    )
    while not client.get_job_status(job_id).is_terminal():
        time.sleep(0.5)
    print(client.get_job_logs(job_id))
    return 0 if client.get_job_status(job_id) == "SUCCEEDED" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
