"""examples/rlhf.py seed after seed, and the README's table of what each one gains, in Markdown.

A run that was ended before goes on where its folder has it; other options are passed on to the example. Figures are for
one version of this library on one machine: the last digit of a float decides which answers are drawn.

python benchmarks/rlhf_seeds.py --seeds 0 1 2 --output-dir runs/seeds --ppo.num-steps 10
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples/rlhf.py"
COLUMNS = (
    "seed",
    "gold score before",
    "after",
    "gain, with its standard error",
    "KL to the reference, nats an answer",
    "win rate, 95% interval",
)


def run(seed: int, folder: Path, options: list[str]) -> dict[str, float]:
    """What the example says of the seed at its end, from `result.json` if it has been run already."""
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(EXAMPLE), "--seed", str(seed), "--output-dir", str(folder), "--resume", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        last = done.stdout.splitlines()[-1]
        if "stopped_early" in json.loads(last):
            sys.exit(f"rlhf_seeds.py: seed {seed} was ended early, and goes on with the same command: {last}")
        result.write_text(last)
    return json.loads(result.read_text())


def row(seed: int, found: dict[str, float]) -> tuple[str, ...]:
    """The seed's line in the table."""
    low, high = found["win_rate_low"], found["win_rate_high"]
    return (
        str(seed),
        f"{found['gold_before']:.3f}",
        f"{found['gold_after']:.3f}",
        f"{found['gold_after'] - found['gold_before']:.3f} ± {found['gold_stderr']:.3f}",
        f"{found['kl']:.1f}",
        f"{found['win_rate']:.1%}, {100 * low:.1f} to {100 * high:.1f}",
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the seeds in turn; prints the table so far after each, and a line of JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="of the runs (default: 0 to 9)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/seeds"), help="holds a folder for each seed")
    args, options = parser.parse_known_args(argv)
    found = {}
    for seed in args.seeds:
        found[seed] = run(seed, args.output_dir / str(seed), options)
        lines = [COLUMNS, ("---",) * len(COLUMNS), *(row(*item) for item in found.items())]
        print(*(f"| {' | '.join(line)} |" for line in lines), "", sep="\n", flush=True)
    gains = {seed: result["gold_after"] - result["gold_before"] for seed, result in found.items()}
    beyond = [seed for seed, gain in gains.items() if gain >= 2 * found[seed]["gold_stderr"]]
    print(json.dumps({"seeds": len(found), "gained_2_standard_errors": len(beyond), "runs": found}))


if __name__ == "__main__":
    main()
