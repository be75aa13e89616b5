"""Every fault: each paper's stages killed and continued, then the other faults; json and markdown in a folder.

python tests/faults/run.py [--out DIR] [--work DIR] [--kills N] [--seed S] [PAPER ...]
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT/"benchmarks"), str(ROOT)]
OTHERS = ("tests/faults", "--ignore=tests/faults/test_kills.py", "tests/test_runs.py::test_another_teacher_on_resume", *(f"tests/test_trainer.py::test_{name}" for name in (
    "not_finite_stops_in_that_step", "one_bad_image_is_named_alone", "discriminator_that_is_not_finite")))


def disturb(paper, kills, seed, folder):
    "All of one paper, in a process of its own; its rows in `folder`/<paper>.json."
    import kills as killing
    from stages import run_stages
    os.environ["MEDKD_CACHE"] = str(folder/"cache")
    sys.stdout = sys.stderr = open(folder/f"{paper}.log", "w", buffering=1)
    started = time.monotonic()
    killing.once()
    shutil.rmtree(folder/paper, ignore_errors=True)
    stages = run_stages(paper, folder/paper)
    rows, left = killing.trials(stages, folder/paper, kills or len(stages) * 5 // 4 + 1, seed)
    shutil.rmtree(folder/paper)
    (folder/f"{paper}.json").write_text(json.dumps(dict(
        paper=paper, stages=len(stages), seconds=round(time.monotonic() - started, 1), rows=rows, left=left)))


def one_paper(paper, kills, seed, folder):
    "What `disturb` found, now or before."
    if not (folder/f"{paper}.json").exists():
        child = multiprocessing.get_context("fork").Process(target=disturb, args=(paper, kills, seed, folder))
        child.start()
        child.join()
        if child.exitcode: raise SystemExit(f"{paper} failed:\n" + (folder/f"{paper}.log").read_text()[-4000:])
    done = json.loads((folder/f"{paper}.json").read_text())
    print(" ".join(f"{name} {value}" for name, value in sums([done])[0].items()), flush=True)
    return done


def other_faults(folder):
    "The faults that have a test each: name, outcome and seconds."
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={folder/'others.xml'}", *OTHERS]
    subprocess.run(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    cases = ElementTree.parse(folder/"others.xml").iter("testcase")
    return [dict(fault=f"{case.get('classname').split('.')[-1]}: {case.get('name')}", seconds=round(float(case.get("time")), 1),
                 outcome=next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"))
            for case in cases]


def kind(at):
    "Where a kill hit, without the number of the step."
    return "a step" if at.startswith("step") else "validation" if at.startswith("validation") else at or "starting"


def sums(papers):
    "A row per paper and one for all."
    rows = []
    for done in papers:
        hits = [hit for row in done["rows"] for hit in row["kills"]]
        rows.append(dict(paper=done["paper"], stages=done["stages"], **{"kills at random": sum(h["seconds"] is not None for h in hits)},
                         **{"kills at a chosen point": sum(h["seconds"] is None for h in hits)}, trainings=len(done["rows"]),
                         completed=sum(row["resumed"] for row in done["rows"]), identical=sum(row["identical"] for row in done["rows"]),
                         **{"unreadable files": sum(len(row["unreadable"]) for row in done["rows"]), "processes left": len(done["left"])},
                         seconds=done["seconds"]))
    return [*rows, dict(paper="all") | {name: round(sum(row[name] for row in rows), 1) for name in rows[0] if name != "paper"}]


def page(about, papers, others):
    "The report as markdown."
    from common import markdown
    hits = Counter(kind(hit["at"]) for done in papers for row in done["rows"] for hit in row["kills"])
    trials = [dict(paper=row["paper"], stage=row["stage"],
                   killed="; ".join(f"{hit['at'] or 'starting'}" + (f" ({hit['seconds']} s)" if hit["seconds"] is not None else "") for hit in row["kills"]),
                   resumed="yes" if row["resumed"] else "NO", identical="yes" if row["identical"] else "NO")
              for done in papers for row in done["rows"]]
    git = about["git"] or dict(commit="unknown", changed=False)
    return "\n\n".join([
        "# Faults", "Trainings of the paper notebooks' smoke presets, on small phantoms with 2 DataLoader workers, killed by SIGKILL and continued. "
        "`identical`: weights, last checkpoint, metrics.jsonl and report (times apart) of the continued run are, bit by bit, those of a run "
        "that nothing disturbed. Files are checked after every kill. `processes left`: DataLoader workers alive 10 s after the last trial.",
        markdown(sums(papers)), "## Where the kills hit", markdown([dict(at=at, kills=count) for at, count in hits.most_common()]),
        "## Other faults", markdown(others), "## Every training", markdown(trials),
        f"{about['date']}, {about['cpu']}, {about['cores']} core(s), load {about['load']}, commit {git['commit'][:10]}"
        f"{' with changes' if git['changed'] else ''}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}."]) + "\n"


def good(papers, others):
    "Whether nothing is to be mended."
    rows = [row for done in papers for row in done["rows"]]
    return (all(row["identical"] and not row["unreadable"] for row in rows) and not any(done["left"] for done in papers)
            and not [case for case in others if case["outcome"] in ("failure", "error")])


def main():
    from common import provenance
    from stages import PAPERS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", help=f"of {', '.join(PAPERS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT/"benchmarks"/"results")
    parser.add_argument("--kills", type=int, help="at random instants in each paper (default: five for four stages)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder that keeps what is done, to continue there (default: a temporary one)")
    args = parser.parse_args()
    os.environ |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", MPLBACKEND="agg")
    import kills # once, for all that is forked
    assert kills.fit
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medkd-faults-", ignore_cleanup_errors=True)))
        work.mkdir(parents=True, exist_ok=True)
        if not (work/"about.json").exists(): (work/"about.json").write_text(json.dumps(provenance(False)))
        papers = [one_paper(paper, args.kills, args.seed, work) for paper in args.papers or PAPERS]
        others, about = other_faults(work), json.loads((work/"about.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out/"faults.json").write_text(json.dumps(dict(about=about, seed=args.seed, papers=papers, others=others), indent=1) + "\n")
    (args.out/"faults.md").write_text(page(about, papers, others))
    print(page(about, papers, others).split("## Every training")[0])
    return 0 if good(papers, others) else 1


if __name__ == "__main__": sys.exit(main())
