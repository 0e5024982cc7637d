"""A training step and a token beside other programs on the same cores: how much slower they become, and beside whom.

Each way is a process of its own, since how threads wait is settled when torch is loaded; they compute in turn, one at a
time, beside so many busy loops.

python benchmarks/busy.py --loops 0 2          # quiet, then beside two loops; needs the extra palm-rlhf[bench]
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

OURS, USUAL, ONE, PEER = "palm-rlhf", "palm-rlhf, torch's threads", "palm-rlhf, one thread", "palm-rlhf-pytorch"
SHARED = {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
LOOP = "while True: pass"


def worker(way: str, dim: int, depth: int, batch: int, seq_len: int) -> None:
    """Computes a step or some tokens for each line on standard input, and answers with the seconds that one took."""
    if way == OURS:
        from palm_rlhf.ops.cpu.threads import share_the_machine

        share_the_machine()
    import time
    import warnings

    import torch
    from training_step import make_step

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if way == PEER:
        from palm_rlhf_pytorch import PaLM

        palm = PaLM(num_tokens=256, dim=dim, depth=depth, flash_attn=True)
    else:
        from palm_rlhf import PaLM

        palm = PaLM(num_tokens=256, dim=dim, depth=depth)
    tokens = torch.randint(256, (batch, seq_len))
    train = make_step(palm, tokens, bfloat16=True)

    def step() -> None:
        if way == OURS:
            from palm_rlhf.ops.cpu.threads import adapt

            adapt()  # as the trainers do
        train()

    runs = {"step": (step, 1), "token": (lambda: palm.eval().generate(seq_len + 32, prompt=tokens[:1]), 32)}
    for line in sys.stdin:
        run, count = runs[line.strip()]
        palm.train()
        started = time.perf_counter()
        run()
        print((time.perf_counter() - started) / count, torch.get_num_threads(), flush=True)


@contextlib.contextmanager
def busy_loops(number: int, pin: bool) -> Iterator[None]:
    """So many processes that do nothing, as fast as they can, each on a core of its own choice or on a given one."""
    cores = sorted(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(number)]
    try:
        for index, loop in enumerate(loops if pin else ()):
            os.sched_setaffinity(loop.pid, {cores[index % len(cores)]})
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextlib.contextmanager
def workers(ways: dict[str, list[str]]) -> Iterator[dict[str, subprocess.Popen]]:
    """A process for each way, with no setting of threads but its own."""
    environment = {name: value for name, value in os.environ.items() if name not in SHARED}
    started = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--worker", way, *sizes],
            env={**environment, **({"OMP_NUM_THREADS": "1"} if way == ONE else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way, sizes in ways.items()
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def ask(process: subprocess.Popen, what: str) -> tuple[float, int]:
    """The seconds that the worker needs for it now, and with how many threads."""
    print(what, file=process.stdin, flush=True)
    answer = process.stdout.readline().split()
    if not answer:
        raise RuntimeError(f"a worker ended with code {process.wait()}: see above")
    return float(answer[0]), int(answer[1])


def main(
    loops: tuple[int, ...] = (0, 2),
    pin: bool = False,
    rounds: int = 7,
    dim: int = 512,
    depth: int = 8,
    batch: int = 4,
    seq_len: int = 1024,
    peer: bool = True,
) -> None:
    """Time ours as its commands run it, with torch's own threads, and with one thread, and palm-rlhf-pytorch.

    Args:
        loops: Numbers of busy loops beside which all is measured.
        pin: Hold each loop on one core, in turn, rather than where the system puts it.
        rounds: Timed rounds of each load.
        dim: Width of the model.
        depth: Blocks.
        batch: Sequences in a step.
        seq_len: Tokens of a sequence; generation starts after as many.
        peer: Measure palm-rlhf-pytorch as well.
    """
    from side_by_side import speedup, summary, surroundings, table

    sizes = [str(size) for size in (dim, depth, batch, seq_len)]
    ways = [OURS, USUAL, ONE, *([PEER] if peer else [])]
    measured, quiet = [], {}
    with workers(dict.fromkeys(ways, sizes)) as processes:
        for process in processes.values():
            ask(process, "step"), ask(process, "token")
        for number in loops:
            for what in ("step", "token"):
                seconds: dict[str, list[float]] = {way: [] for way in ways}
                threads: dict[str, int] = {}
                with busy_loops(number, pin):
                    for _ in range(rounds):
                        for way, process in processes.items():
                            time, threads[way] = ask(process, what)
                            seconds[way].append(time)
                times = {way: summary(values) for way, values in seconds.items()}
                ratios = {f"than {way}": speedup(seconds[OURS], seconds[way]) for way in ways[1:]}
                slower = {
                    way: times[way]["median"] / quiet.setdefault((what, way), times[way]["median"]) for way in ways
                }
                title = f"a {what} beside {number} busy loops{', pinned' * (pin and number > 0)}"
                print(f"{title}; threads at the end: {threads}\n\n{table(times, 'ms', 1e3)}\n")
                print(f"{table(ratios, 'times as fast')}\n")
                measured.append(
                    {"what": what, "loops": number, "pinned": pin, "threads": threads, "seconds": times,
                     "speedups": ratios, "slower_than_first": slower}
                )  # fmt: skip
    print(json.dumps({"benchmark": "on a busy machine", **surroundings(), "measured": measured}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        import tyro

        tyro.cli(main)
