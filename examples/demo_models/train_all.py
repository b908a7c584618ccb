"""Train every demo model, two at a time, each on one thread: ``python examples/demo_models/train_all.py FOLDER``.

Takes less than an hour on two cores. The checkpoints that ship with the package are in ``tts_search/lab/models``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import train_policy
import train_verifier

HERE = Path(__file__).parent
BASE = "policy-0.6m"
OTHER_POLICIES = [name for name in reversed(train_policy.RECIPES) if name != BASE]  # the longest first

# glibc returns large blocks to the system as soon as they are freed; to keep them saves a tenth of the time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


def train_one(folder: Path, script: str, name: str, *options: str) -> int:
    """Run a training script on one thread, its output in ``FOLDER/NAME.log``, and return its exit status."""
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, HERE / script, name, folder / name, *options]
        status = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log).returncode
    print(f"{name}: {'done' if status == 0 else f'failed, see {log.name}'}", flush=True)
    return status


def main() -> int:
    """Train all models into the folder that the command line names; further options go to every script."""
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    base = ("--base", str(folder / BASE))
    with ThreadPoolExecutor(max_workers=2) as pool:
        policies = [
            pool.submit(train_one, folder, "train_policy.py", name, *options) for name in (BASE, *OTHER_POLICIES)
        ]
        failed = policies[0].result()  # the verifiers start from this policy
        verifiers = [
            pool.submit(train_one, folder, "train_verifier.py", name, *base, *options)
            for name in train_verifier.RECIPES
        ]
        return failed or max(job.result() for job in policies + verifiers)


if __name__ == "__main__":
    sys.exit(main())
