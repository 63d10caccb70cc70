"""`./run.sh faults --minutes=N --seed=S`: disturbs a small run and prints the outcomes; exit code 1 if any is lost."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults import campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run.sh faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to draw faults (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="which faults are drawn (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vit_scaling_faults_") as folder:
        verdicts = campaign.run(campaign.Lab(Path(folder)), options.seed, minutes=options.minutes)
    print(f"\n{campaign.table(verdicts)}")
    lost = [number for number, verdict in enumerate(verdicts) if verdict.answer == "lost"]
    if lost:
        print(f"lost with --seed={options.seed}: faults {', '.join(map(str, lost))}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
