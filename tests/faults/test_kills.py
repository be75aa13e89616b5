"""A sample of `make faults`: CIRKD's queues and adversarial Graph Flow killed at random instants and chosen points."""
import json
import multiprocessing

import kills
import pytest
from stages import run_stages

SAMPLE = dict(methods="graph_flow,cirkd", layer_pairs=1, weight_rows=1, labelled="none")


def disturb(folder):
    "In a process of its own, from which every training is forked."
    kills.once()
    stages = run_stages("graph_flow", folder, **SAMPLE)
    rows, left = kills.trials(stages, folder, kills=len(stages), seed=7)
    (folder/"done.json").write_text(json.dumps(dict(stages=[stage.name for stage in stages], rows=rows, left=left)))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDKD_CACHE", str(folder/"cache"))
        child = multiprocessing.get_context("fork").Process(target=disturb, args=(folder,))
        child.start()
        child.join(570)
        child.kill() # has no effect on one that has ended
    assert child.exitcode == 0
    return json.loads((folder/"done.json").read_text())


def test_every_stage_is_killed(done):
    assert set(done["stages"]) == {"teacher", "student", "paraphraser_encoder", "paraphraser_decoder", "graph_flow", "cirkd"}
    killed = [row["stage"] for row in done["rows"] for hit in row["kills"] if hit["seconds"] is not None]
    assert set(killed) == set(done["stages"])


def test_kills_hit_files_being_written(done):
    hit = {hit["at"] for row in done["rows"] for hit in row["kills"]}
    assert hit >= {"last.pt half written", "best.safetensors half written", "between the two renames of a checkpoint",
                   "log written, checkpoint not yet"}


def test_no_file_is_unreadable(done): assert not [bad for row in done["rows"] for bad in row["unreadable"]]


def test_continued_runs_are_identical(done):
    assert not [row for row in done["rows"] if not (row["resumed"] and row["identical"])]


def test_no_process_is_left(done): assert not done["left"]
