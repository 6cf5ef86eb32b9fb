"""A nightly run without Airflow, for cron or any other scheduler: train once, publish, act on the exit code.

    python examples/run_night.py --config marc.yaml --ds 2026-11-20

Exit codes are those of ``marc``. Only a run that another run superseded is started again at once.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SUPERSEDED = 4
TRIES = 3


def marc(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one command of ``marc``; logs pass through to standard error, results come back as JSON."""
    command = ["marc", "--config", str(config), *arguments, "--json"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def main() -> int:
    """Publish the release of one date; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("marc.yaml"))
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    given = parser.parse_args()
    trained = marc(given.config, "train", "--if-none", "--ds", given.ds)
    if trained.returncode:
        return trained.returncode
    for _ in range(TRIES):
        done = marc(given.config, "run", "--ds", given.ds)
        if done.returncode != SUPERSEDED:
            break
    if done.returncode:
        # 2: correct catalogue or configuration. 3: a gate refused. 1: a fault; a retry does only what is missing.
        print(f"no release for {given.ds}: exit code {done.returncode}", file=sys.stderr)
        return done.returncode
    facts = json.loads(done.stdout)
    print(f"release {facts['release_id']}: {facts['items']} items, {facts['encoded']} texts encoded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
