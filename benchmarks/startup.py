"""How long `llm-quantize --help` takes before it answers, and what it imports.

    python benchmarks/startup.py [--limit 0.5]

Prints the best of several fresh processes: importing the command line, and the whole command. Exits with 1 when the import takes longer than the limit
or brings torch or transformers with it.
"""
import argparse
import subprocess
import sys
import time

IMPORT = "import sys, time; start = time.perf_counter(); import llm_quantize.cli.main; print(time.perf_counter() - start, *{m.split('.')[0] for m in sys.modules})"
HEAVY = ("torch", "transformers", "huggingface_hub", "matplotlib")


def import_time(runs: int) -> tuple[float, list[str]]: # (best seconds, heavy packages that came along)
    "Time of `import llm_quantize.cli.main` in a fresh interpreter."
    times, loaded = [], set()
    for _ in range(runs):
        seconds, *modules = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
        times.append(float(seconds))
        loaded |= set(modules)
    return min(times), [name for name in HEAVY if name in loaded]


def command_time(runs: int, *words: str) -> float: # best seconds
    "Wall time of the whole command, interpreter included."
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llm_quantize.cli.main", *words], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=0.5, help="seconds the import may take")
    parser.add_argument("--runs", type=int, default=5, help="fresh processes; the best counts")
    args = parser.parse_args()
    seconds, heavy = import_time(args.runs)
    print(f"import llm_quantize.cli.main    {seconds:6.3f} s   (limit {args.limit} s)   heavy packages loaded: {', '.join(heavy) or 'none'}")
    for words in (["--help"], ["quantize", "--help"], ["--version"]):
        print(f"llm-quantize {' '.join(words):<15} {command_time(args.runs, *words):6.3f} s")
    return int(seconds > args.limit or bool(heavy))


if __name__ == "__main__":
    sys.exit(main())
