"""Which of two versions is faster, on a machine whose speed changes by the minute? Both run at once, but in turns: one is stopped while the other has
all cores for a while, so that slow minutes meet both alike. What counts is the time each was let run.

    git worktree add /tmp/old REVISION
    python dev/race.py /tmp/old . -- train.py --out runs/race          # folders of the two versions, then the script and its flags

Each runs in its own folder and group of processes; its output goes to race.txt there. Time-outs and the speeds in a version's own log include the time that it
was stopped: only the seconds printed here mean something.
"""
import os
import signal
import subprocess
import sys
import time

TURN = 15  # seconds


def race(folders, command, turn=TURN):
    """Run `command` with this Python in each of two folders, by turns -> the seconds each was let run, and its exit codes."""
    running, codes, used = {}, {}, dict.fromkeys(folders, 0.0)
    for folder in folders:
        with open(os.path.join(folder, "race.txt"), "w") as out:
            running[folder] = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=out, stderr=out, start_new_session=True)
        os.killpg(running[folder].pid, signal.SIGSTOP)
    try:
        while running:
            for folder, process in list(running.items()):
                os.killpg(process.pid, signal.SIGCONT)
                start = time.monotonic()
                try:
                    codes[folder] = process.wait(turn)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGSTOP)
                used[folder] += time.monotonic() - start
                if folder in codes:
                    del running[folder]
    finally:
        for process in running.values():  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
    return used, codes


if __name__ == "__main__":
    if "--" not in sys.argv or sys.argv.index("--") != 3:
        sys.exit("error: race.py OLD NEW -- SCRIPT [FLAGS]: two folders, two dashes, and what to run in each")
    old, new = (os.path.abspath(x) for x in sys.argv[1:3])
    used, codes = race([old, new], sys.argv[4:])
    for folder in (old, new):
        print(f"{folder}: {used[folder]:.0f} s" + f", but it ended with code {codes[folder]}, see {folder}/race.txt" * (codes[folder] != 0))
    print(f"{used[old] / used[new]:.2f} times as fast")
