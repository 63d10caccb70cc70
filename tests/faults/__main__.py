"""`./run.sh faults --minutes=N --seed=S`: disturbs a small run and prints the outcomes; exit code 1 if any is lost."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.faults import campaign, kinds


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run.sh faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to draw faults (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="which faults are drawn (default: 0)")
    parser.add_argument("--faults", type=int, default=10**6, help="how many at most (default: no limit)")
    parser.add_argument("--output", type=Path, help="file of verdicts (default: runs/faults_SEED.jsonl); goes on there")
    parser.add_argument("--only", help="numbers of faults to try again, such as 3,17; nothing is resumed")
    parser.add_argument("--kinds", help="only these kinds, separated by commas")
    parser.add_argument("--python", help="another Python with the program's packages, to go on with")
    options = parser.parse_args()
    record = options.output or Path(f"runs/faults_{options.seed}.jsonl")
    record.parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(number) for number in options.only.split(",")] if options.only else None
    chosen = {
        name: kind
        for name, kind in kinds.KINDS.items()
        if (options.python or name != "another Python") and (not options.kinds or name in options.kinds.split(","))
    }
    with tempfile.TemporaryDirectory(prefix="vit_scaling_faults_") as folder:
        lab = campaign.Lab(Path(folder), options.python)
        how = {"minutes": options.minutes, "record": record, "numbers": numbers, "most": options.faults}
        verdicts = campaign.run(lab, chosen, options.seed, often=kinds.OFTEN, **how)
    print(f"\n{campaign.table(verdicts)}")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    lost = sorted({row["number"] for row in rows if row["answer"] == "lost"})
    if lost:
        print(f"lost with --seed={options.seed}: faults {', '.join(map(str, lost))}; --only=NUMBER tries one again")
    return 1 if any(verdict.answer == "lost" for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
