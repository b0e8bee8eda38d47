"""Stands for train.py where a test is about the sweep: stub_run.py RUN_DIR BEHAVIOUR... writes a
record, or fails. Each start leaves a line in RUN_DIR/starts; it starts in milliseconds."""

import json
import os
import signal
import sys
import time
from pathlib import Path

run_dir, behaviour = Path(sys.argv[1]), sys.argv[2]
run_dir.mkdir(parents=True, exist_ok=True)


def note(text: str) -> None:
    with open(run_dir / "starts", "a") as file:
        file.write(text + "\n")


def asked_to_stop(number: int, frame: object) -> None:
    note(f"stopped by {signal.Signals(number).name}")
    sys.exit(75)


signal.signal(signal.SIGTERM, asked_to_stop)
names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
held = {"cores": len(os.sched_getaffinity(0)), "pid": os.getpid(), "parent": os.getppid()}
note(json.dumps({n: os.environ.get(n) for n in names} | held))
first = (run_dir / "starts").read_text().count("{") == 1
if behaviour == "waits" or (behaviour == "waits once" and first):
    while not (run_dir / "go").exists():
        time.sleep(0.02)
if behaviour == "fails" or (behaviour in ("fails once", "fails, is killed") and first):
    print("some warning", file=sys.stderr)
    print("error: the disk is full\nmake room", file=sys.stderr)
    sys.exit(2)
if behaviour in ("is killed", "fails, is killed"):
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "crashes":
    raise ValueError("a defect")
if behaviour == "is held":
    print("error: this is in use by process 7 on there", file=sys.stderr)
    sys.exit(2)
print("training")
record = {"schema_version": 1, "status": "complete", "metrics": {"test/top1_error_last": 12.5}}
(run_dir / "record.json").write_text(json.dumps(record))
