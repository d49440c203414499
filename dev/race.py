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

# Seconds that a version runs before the other one has its turn.
TURN = 15


def race(folders, command):
    """Run Python with `command` in each folder by turns -> {folder: seconds it was let run}."""
    running, used = {}, dict.fromkeys(folders, 0.0)
    for folder in folders:
        # Start it in a process group of its own, and pause it at once.
        with open(os.path.join(folder, "race.txt"), "w") as out:
            more = dict(cwd=folder, stdout=out, stderr=out, start_new_session=True)
            running[folder] = subprocess.Popen([sys.executable, *command], **more)
        os.killpg(running[folder].pid, signal.SIGSTOP)
    try:
        while running:
            for folder, process in list(running.items()):
                # Let one version run for a turn, or until it ends.
                os.killpg(process.pid, signal.SIGCONT)
                begin = time.monotonic()
                try:
                    code = process.wait(TURN)
                    del running[folder]
                    print(f"{folder} ended with code {code}, see its race.txt")
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGSTOP)
                used[folder] += time.monotonic() - begin
    finally:
        # Leave nothing behind when the race is interrupted.
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
    return used


if __name__ == "__main__":
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        sys.exit("error: usage is python -m dev.race OLD NEW -- SCRIPT [FLAGS]")
    old, new = map(os.path.abspath, sys.argv[1:3])
    used = race([old, new], sys.argv[4:])
    print(f"{old}: {used[old]:.0f} s, {new}: {used[new]:.0f} s")
    print(f"the new one is {used[old] / used[new]:.2f} times as fast")
