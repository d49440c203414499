"""Time two versions on a machine whose speed changes by the minute.

    git worktree add /tmp/old REVISION
    python -m dev.race /tmp/old . -- train.py --out runs/race

Arguments: the folders of the old and the new version, two dashes, the script and its flags. Both
run at once but in turns: one is stopped while the other has all cores for 15 seconds. So slow
minutes meet both alike. Only the seconds printed here count. Speeds in a version's own log include
the time in which it was stopped. The output of each version goes to race.txt in its folder.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Seconds that a version runs before the other one has its turn.
TURN = 15


def start(folder, command):
    """Start Python with `command` in `folder`, in its own process group, and pause it at once."""
    with open(Path(folder) / "race.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    os.killpg(process.pid, signal.SIGSTOP)
    return process


def race(folders, command, turn=TURN):
    """Run `command` in each folder by turns -> seconds each was let run, exit code of each."""
    running = {folder: start(folder, command) for folder in folders}
    used = dict.fromkeys(folders, 0.0)
    codes = {}
    try:
        while running:
            for folder, process in list(running.items()):
                # Let one version run for a turn, or until it ends.
                os.killpg(process.pid, signal.SIGCONT)
                begin = time.monotonic()
                try:
                    codes[folder] = process.wait(turn)
                    del running[folder]
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGSTOP)
                used[folder] += time.monotonic() - begin
    finally:
        # Leave nothing behind when the race is interrupted.
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
    return used, codes


def main():
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        raise ValueError("usage: python -m dev.race OLD NEW -- SCRIPT [FLAGS]")
    old, new = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    used, codes = race([old, new], sys.argv[4:])
    for folder in (old, new):
        print(f"{folder}: {used[folder]:.0f} s")
        if codes[folder]:
            print(f"  ended with code {codes[folder]}: see {folder}/race.txt")
    print(f"the new one is {used[old] / used[new]:.2f} times as fast")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
