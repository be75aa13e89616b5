"The panel of a run that trains elsewhere: two processes stop when a file asks them to, one child continues, and the curve is that of a run never stopped."
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import toy

from medkd.live import RunLog, continue_run, live_panel, stop_run
from medkd.trainers import fit

SLOW = replace(toy.alone, data=partial(toy.squares, toy.Slow), epochs=None, steps=40)


def stop_soon(path):
    "Ask the run below `path` to stop, from another thread, once it has logged something."
    def ask():
        while not (found := list(path.glob("run-*/metrics.jsonl"))): time.sleep(.02)
        stop_run(found[0].parent)
    threading.Thread(target=ask, daemon=True).start()


def test_stopped_by_a_file_and_continued_in_a_child(tmp_path):
    stop_soon(tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(SLOW, tmp_path/"run", nproc=2)
    folder, = tmp_path.glob("run-*")
    log = RunLog(folder)
    log.read()
    assert 0 < log.step < 40 and log.total() == 40 and (folder/"stopped").exists()
    panel = live_panel(folder)
    assert "stopped, its checkpoint is written" in panel.state.value
    panel.again.click()
    for _ in range(1200):
        panel.tick()
        if "complete" in panel.state.value or "Error" in panel.state.value: break
        time.sleep(.1)
    assert "complete: 40 steps" in panel.state.value
    assert panel.log.step == 40 and not (folder/"stopped").exists()
    whole = fit(replace(SLOW, data=partial(toy.squares, toy.Sampled)), tmp_path/"whole"/"run")
    assert whole.metrics("train")[-1]["losses"]["seg"] == pytest.approx(fit(SLOW, tmp_path/"run").metrics("train")[-1]["losses"]["seg"], rel=1e-3)
    with pytest.raises(FileNotFoundError): continue_run(tmp_path/"none")
