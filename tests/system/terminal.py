#!/usr/bin/env -S python3 -B
"""At a terminal: what the user sees, and what Ctrl-C does there.

Commands run as the foreground process group of a pseudo terminal of their own, so Ctrl-C is the
terminal's: one byte is typed, and the kernel signals whom it would signal at a real one.
"""
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import termios

from harness import (LATER, PROGRAMS, READY, UNMOOR, Program, demand, footprint, is_alive, main, poll,
                     state)

CTRL_C = b"\x03"
ESCAPE = "\x1b"
BAR = re.compile(r"(remap|dump|restore) +[█░]+ +\d+ %")
# Long enough to type something meanwhile.
LARGE = ("--threads", 2, "--mib", 448, "--sweep-ms", 700)


class Terminal:
    """A command with a pseudo terminal as its stdin, stdout and stderr."""

    def __init__(self, story, *command, **streams):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
        self.seen = ""
        streams = {"stdin": slave, "stdout": slave, "stderr": slave} | streams
        self.process = story.popen(
            [str(word) for word in command], **streams,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)

    def read(self):
        """All it has written so far."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                break
            if not part:
                break
            self.seen += part.decode(errors="replace")
        return self.seen

    def await_text(self, pattern, timeout=60):
        def found():
            # First whether it has ended: what it wrote before that is there to be read then.
            ended = self.process.poll() is not None
            match = re.search(pattern, self.read())
            demand(match or not ended, f"it ended without {pattern!r}, after {self.seen!r}")
            return match
        return poll(found, lambda: f"the terminal to show {pattern!r}, it shows {self.seen[-500:]!r}", timeout)

    def type(self, keys):
        os.write(self.master, keys)

    def wait(self, timeout=60):
        """Its exit code; of what a signal ended, minus its number."""
        poll(lambda: self.read() is not None and self.process.poll() is not None,
             lambda: f"the command to end, the terminal shows {self.seen[-500:]!r}", timeout)
        self.read()
        return self.process.returncode

    def close(self):
        os.close(self.master)


def screen(text):
    """What is left to be read, once every escape sequence and carriage return did its work."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        for part in line.split("\r"):
            if part.startswith(ESCAPE + "[K"):
                part = part[3:]
                line = part
            elif part:
                line = part
        lines.append(line)
    return "\n".join(lines)


def progress(story):
    """A bar that moves and is wiped on a terminal, plain lines elsewhere, nothing with --json."""
    churn = story.start("churn", *LARGE)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off")

    # `wait` never gets any further here, so it shows for as long as it is let.
    terminal = Terminal(story, UNMOOR, "wait", "-t", churn.pid, "--timeout", "400ms")
    demand(terminal.wait() == LATER, "LATER when the time is up")
    demand(BAR.search(terminal.seen), f"a bar is drawn: {terminal.seen!r}")
    left = screen(terminal.seen)
    demand("█" not in left and "░" not in left and left.startswith("LATER"),
           f"the bar is wiped before the answer: {left!r}")
    terminal.close()
    silent = Terminal(story, UNMOOR, "wait", "-t", churn.pid, "--timeout", "400ms", "--json")
    demand(silent.wait() == LATER and ESCAPE not in silent.seen and silent.seen.startswith("{"),
           f"--json is one object and nothing else, also on a terminal: {silent.seen!r}")
    silent.close()
    plain = story.unmoor("wait", "-t", churn.pid, "--timeout", "2500ms", expect=LATER)
    demand(re.fullmatch(r"unmoor: remap: +\d+ %  .* of .*\n", plain.err), f"one plain line: {plain}")
    demand(ESCAPE not in plain.out + plain.err and plain.out.startswith("LATER"), f"no escape sequences: {plain}")

    remap = Terminal(story, UNMOOR, "remap", "-t", churn.pid)
    demand(remap.wait() == 0, f"remap succeeds: {remap.seen!r}")
    demand(BAR.search(remap.seen), f"remap draws a bar: {remap.seen!r}")
    demand("█" not in screen(remap.seen), f"it is wiped: {remap.seen!r}")
    remap.close()
    dump = Terminal(story, UNMOOR, "dump", "-t", churn.pid, "-D", story.path("second"), "--full")
    demand(dump.wait() == 0 and BAR.search(dump.seen), f"dump draws a bar: {dump.seen!r}")
    demand("█" not in screen(dump.seen), f"it is wiped: {dump.seen!r}")
    dump.close()
    churn.await_gone()
    outcome = story.unmoor("restore", "-D", story.path("second"), "--mode", "eager", "-d", "--json")
    demand(not outcome.err, f"--json says nothing on stderr: {outcome}")
    churn.popen = None
    churn.await_sweep()
    churn.end()


def interrupted_commands(story):
    """Ctrl-C while the bar is there: the program goes on, whatever the command was about."""
    churn = story.start("churn", *LARGE)
    before = footprint(churn.pid)

    dump = Terminal(story, UNMOOR, "dump", "-t", churn.pid, "-D", story.path("image"), "-R")
    dump.await_text(BAR)
    dump.type(CTRL_C)
    code = dump.wait()
    demand(code != 0 or os.path.exists(story.path("image")), f"exit code {code}")
    if code != 0:
        demand("interrupted" in dump.seen and "runs on" in dump.seen, f"it says what became of it: {dump.seen!r}")
        left = [name for name in os.listdir(story.folder) if name.startswith("image")]
        demand(not left, f"left behind: {left}")
    story.say(f"dump: exit code {code}")
    dump.close()
    poll(lambda: state(churn.pid) not in "tT", "the program runs")
    churn.await_progress("works after an interrupted dump")
    story.demand_untouched(churn, before)
    shutil.rmtree(story.path("image"), ignore_errors=True)

    image = story.dump(churn, "image")
    eager = Terminal(story, UNMOOR, "restore", "-D", image, "--mode", "eager")
    eager.await_text(BAR)
    eager.type(CTRL_C)
    demand(eager.wait() == 1, f"exit code {eager.process.returncode}")
    demand("interrupted; nothing was restored" in eager.seen, f"it says what became of it: {eager.seen!r}")
    eager.close()
    churn.await_gone()
    story.demand_no_agent()

    story.restore(churn, image, "--remap", "off")
    wait = Terminal(story, UNMOOR, "wait", "-t", churn.pid)
    wait.await_text(BAR)
    wait.type(CTRL_C)
    demand(wait.wait() in (-signal.SIGINT, 130), f"Ctrl-C ends wait: {wait.process.returncode}")
    wait.close()
    remap = Terminal(story, UNMOOR, "remap", "-t", churn.pid)
    remap.await_text(BAR)
    remap.type(CTRL_C)
    code = remap.wait()
    demand(code in (0, -signal.SIGINT, 130), f"exit code {code} of an interrupted remap")
    story.say(f"remap: exit code {code}")
    remap.close()
    churn.await_progress("works after an interrupted remap")
    # The agent is no process of the terminal's: it goes on.
    story.wait_ready(churn)
    shutil.rmtree(image)
    story.demand_no_agent()
    churn.await_sweep()
    story.demand_untouched(churn, before)
    churn.end()


def foreground_restore(story):
    """Ctrl-C ends the command, not a program of a session of its own."""
    churn = story.start("churn", "--mib", 64)
    image = story.dump(churn, "image")
    pidfile = story.path("pidfile")
    restore = Terminal(story, UNMOOR, "restore", "-D", image, "--pidfile", pidfile)
    poll(lambda: os.path.exists(pidfile) and churn.pid == int(open(pidfile).read() or 0), "the program runs")
    churn.popen = None
    churn.await_progress("works")
    restore.type(CTRL_C)
    demand(restore.wait() == 130, f"exit code {restore.process.returncode}: {restore.seen!r}")
    demand(f"process {churn.pid} runs on" in restore.seen, f"it says so: {restore.seen!r}")
    restore.close()
    churn.await_progress("works after Ctrl-C")
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def shell_job(story):
    """A program of the terminal's own, with --shell-job handed on to criu: restored at another terminal it
    belongs there, and gets that one's Ctrl-C itself."""
    report = story.path("churn.json")
    churn_path = os.path.join(PROGRAMS, "churn")
    first = Terminal(story, "sh", "-c", f"'{churn_path}' --report '{report}' --mib 32; true")

    def reported():
        try:
            with open(report) as file:
                return json.load(file)["pid"]
        except (OSError, ValueError):
            return None
    churn = Program(story, poll(reported, "churn is ready"), report)
    image = story.path("image")
    outcome = story.unmoor("dump", "-t", churn.pid, "-D", image, expect=None)
    demand(outcome.code == 1 and "tty" in outcome.err, f"criu's own words: {outcome}")
    churn.await_progress("works after criu's refusal")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "--", "--shell-job")
    poll(lambda: first.process.poll() is not None, "the shell sees its job end")
    first.close()
    churn.await_gone()

    second = Terminal(story, UNMOOR, "restore", "-D", image, "--", "--shell-job")
    poll(lambda: is_alive(churn.pid) or second.process.poll() is not None, "the program runs")
    demand(second.process.poll() is None, f"restore failed: {second.read()!r}")
    churn.await_progress("works at another terminal")
    demand(os.getpgid(churn.pid) == os.getpgid(second.process.pid), "it is of the terminal's foreground group")
    poll(lambda: story.status(churn).code == READY, "READY", 60)
    shutil.rmtree(image)
    churn.await_sweep()
    # The command sees the program's end before its own Ctrl-C, the hardest order: its status is what counts.
    second.process.send_signal(signal.SIGSTOP)
    poll(lambda: state(second.process.pid) == "T", "the command to stand")
    second.type(CTRL_C)
    poll(lambda: not is_alive(churn.pid), "the program got the Ctrl-C")
    second.process.send_signal(signal.SIGCONT)
    demand(second.wait() == 128 + signal.SIGINT, f"exit code {second.process.returncode}: {second.seen!r}")
    second.close()
    story.demand_no_agent()


if __name__ == "__main__":
    main({f.__name__: f for f in (progress, interrupted_commands, foreground_restore, shell_job)})
