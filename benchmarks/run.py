"""All benchmarks, one process each: tables here, json and markdown in a folder.

python benchmarks/run.py [--quick] [--out DIR] [NAME ...]
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import ROOT, markdown

NAMES = ("terms", "metrics", "loader", "trainer", "gkd", "graph_flow", "volumes", "acf_bckd", "sikd_hlfd", "slices", "show")


def page(report):
    "One benchmark's table, verdicts and provenance as markdown."
    about = report["about"]
    git = about["git"] or dict(commit="unknown", changed=False)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    changed = " with changes" if git["changed"] else ""
    lines = [f"# {report['benchmark']}" + " (quick)" * about["quick"], markdown(report["rows"]),
             report["note"], "\n".join(f"- {line}" for line in report["verdicts"]),
             f"{about['date']}, {about['cpu']}, {about['threads']} of {about['cores']} cores used, "
             f"load {about['load']}, commit {git['commit'][:10]}{changed}; {versions}."]
    return "\n\n".join(filter(None, lines)) + "\n"


def run(name, out, quick):
    "Run one benchmark and write its files; whether it came to its end."
    path = out / f"{name}.json"
    script = Path(__file__).with_name(f"{name}.py")
    print(f"\n{name}", flush=True)
    done = subprocess.run([sys.executable, script, "--json", path, *["--quick"] * quick])
    if done.returncode == 0:
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())))
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer rounds")
    parser.add_argument("--out", type=Path, help="benchmarks/results; quick: out/benchmarks")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    out = args.out or ROOT / ("out/benchmarks" if args.quick else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.names or NAMES if not run(name, out, args.quick)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print(f"\njson and markdown: {out}")


if __name__ == "__main__":
    main()
