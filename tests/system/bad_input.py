#!/usr/bin/env -S python3 -B
"""Bad input: one clear line, the right exit code, and nothing lost.

Exit code 2 is the user's mistake, 1 the machine's failure. After each of them the program, if there
is one, runs on unhurt, and no partial directory is left.
"""
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import stat
import subprocess

from harness import (UNMOOR, USER_MISTAKE, Skip, demand, footprint, is_alive, main, poll, state)

PTRACE_SEIZE = 0x4206
PTRACE_DETACH = 17
NOBODY = 65534


def one_line(outcome, *words):
    """The error is one line on stderr, and says all of `words` (each a word or several to choose from)."""
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    demand(len(lines) == 1, f"one line on stderr is wanted, there are {len(lines)}: {outcome}")
    for word in words:
        choices = (word,) if isinstance(word, str) else word
        demand(any(choice.lower() in lines[0].lower() for choice in choices),
               f"the message does not say any of {choices}: {outcome}")


def nothing_partial(story, name="image"):
    left = [entry for entry in os.listdir(story.folder) if entry.startswith(name + ".")]
    demand(not left, f"partial directories are left: {left}")


class Churn:
    """A running churn that must be unhurt at the end of the block."""

    def __init__(self, story, *options):
        self.story = story
        self.options = options or ("--mib", 16)

    def __enter__(self):
        self.program = self.story.start("churn", *self.options)
        self.before = footprint(self.program.pid)
        return self.program

    def __exit__(self, kind, error, trace):
        if kind is not None:
            return
        self.program.demand_alive("after the command failed")
        self.program.await_sweep()
        self.story.demand_untouched(self.program, self.before)
        self.program.end()


# The process named by -t.

def absent_process(story):
    pid = 4194303
    while os.path.exists(f"/proc/{pid}"):
        pid -= 1
    one_line(story.unmoor("dump", "-t", pid, "-D", story.path("image"), expect=USER_MISTAKE), str(pid),
             ("no such process", "no process", "does not exist", "absent"))
    demand(not os.path.exists(story.path("image")), "no directory is made")
    one_line(story.unmoor("remap", "-t", pid, expect=USER_MISTAKE), str(pid))
    one_line(story.unmoor("status", "-t", pid, expect=3), str(pid))
    one_line(story.unmoor("wait", "-t", pid, expect=3), str(pid))


def no_number(story):
    for text in ("0", "-1", "x", "12x", "99999999999999999999"):
        outcome = story.unmoor("dump", "-t", text, "-D", story.path("image"), expect=USER_MISTAKE)
        demand(outcome.err.strip(), f"something is said: {outcome}")


def kernel_thread(story):
    for entry in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        with contextlib.suppress(OSError):
            if int(entry) > 1 and not open(f"/proc/{entry}/cmdline").read() and state(entry) != "Z":
                break
    else:
        raise Skip("no kernel thread is visible here")
    one_line(story.unmoor("dump", "-t", entry, "-D", story.path("image"), expect=USER_MISTAKE),
             entry, "kernel thread")
    nothing_partial(story)


def zombie(story):
    process = story.popen(["true"])
    poll(lambda: state(process.pid) == "Z", "a zombie")
    one_line(story.unmoor("dump", "-t", process.pid, "-D", story.path("image"), expect=USER_MISTAKE),
             str(process.pid), ("zombie", "ended", "exited"))
    nothing_partial(story)


def already_traced(story):
    libc = ctypes.CDLL(None, use_errno=True)
    with Churn(story) as churn:
        demand(libc.ptrace(PTRACE_SEIZE, churn.pid, None, None) == 0, "ptrace seizes churn")
        try:
            one_line(story.unmoor("dump", "-t", churn.pid, "-D", story.path("image"),
                                  expect=USER_MISTAKE), ("traced", "debug"), str(os.getpid()))
            nothing_partial(story)
        finally:
            os.kill(churn.pid, signal.SIGSTOP)
            os.waitpid(churn.pid, 0x40000000)
            libc.ptrace(PTRACE_DETACH, churn.pid, None, None)
            os.kill(churn.pid, signal.SIGCONT)
            poll(lambda: state(churn.pid) not in "tT", "churn runs again")


def ourselves(story):
    """The command's own ancestor would freeze the command."""
    outcome = story.unmoor("dump", "-t", os.getpid(), "-D", story.path("image"), expect=USER_MISTAKE)
    one_line(outcome, str(os.getpid()), ("started this command", "ancestor", "itself"))


def of_another_user(story):
    """As another user: not ours to dump."""
    os.chmod(story.folder, 0o777)
    unmoor = shutil.copy(UNMOOR, story.path("unmoor"))  # where another user can reach it
    if subprocess.run(["setpriv", f"--reuid={NOBODY}", "--clear-groups", "test", "-x", unmoor],
                      stderr=subprocess.DEVNULL).returncode != 0:
        raise Skip("another user cannot run programs here")
    with Churn(story) as churn:
        with open(story.path("err"), "w+") as err:
            code = story.popen(["setpriv", f"--reuid={NOBODY}", "--clear-groups", unmoor, "dump", "-t",
                                str(churn.pid), "-D", story.path("image")], stderr=err).wait(60)
            err.seek(0)
            text = err.read()
        demand(code in (1, 2) and text.strip(), f"exit code {code}, stderr {text!r}")
        demand(len(text.strip().splitlines()) == 1, f"one line is wanted: {text!r}")
        nothing_partial(story)


# The image directory.

def make_image(story, *options):
    churn = story.start("churn", *(options or ("--mib", 16)))
    return churn, story.dump(churn, "image")


def refuse(story, folder, *words, code=USER_MISTAKE):
    outcome = story.unmoor("restore", "-D", folder, "-d", expect=None)
    demand(outcome.code == code, f"exit code {code} is wanted: {outcome}")
    one_line(outcome, *words)
    demand(not story.marked("churn"), "a program runs although restore failed")
    demand(not story.agents(), "an agent runs although restore failed")


def directory_missing(story):
    for command in (("restore", "-d"), ("show",)):
        folder = story.path("nowhere")
        one_line(story.unmoor(command[0], "-D", folder, *command[1:], expect=USER_MISTAKE), folder,
                 ("no such", "not exist", "missing"))
    with Churn(story) as churn:
        folder = story.path("nowhere/image")
        one_line(story.unmoor("dump", "-t", churn.pid, "-D", folder, expect=None), "nowhere", ("no such", "not exist", "missing"))


def directory_empty_or_foreign(story):
    folder = story.path("foreign")
    os.mkdir(folder)
    refuse(story, folder, folder)
    with open(os.path.join(folder, "letter.txt"), "w") as file:
        file.write("dear sir")
    refuse(story, folder, folder)
    # A dump must not replace what is no checkpoint.
    with Churn(story) as churn:
        one_line(story.unmoor("dump", "-t", churn.pid, "-D", folder, expect=USER_MISTAKE), folder,
                 ("not empty", "no checkpoint", "not a checkpoint"))
        with open(os.path.join(folder, "letter.txt")) as file:
            demand(file.read() == "dear sir", "the file that was there is untouched")
        nothing_partial(story, "foreign")


def file_instead_of_directory(story):
    path = story.path("file")
    with open(path, "w"):
        pass
    refuse(story, path, path)
    with Churn(story) as churn:
        one_line(story.unmoor("dump", "-t", churn.pid, "-D", path, expect=USER_MISTAKE), path)


def stock_criu_directory(story):
    """Commands for images of ours say what it is and what to do; restore takes it (interchange.py), but
    not one that is damaged."""
    folder = story.path("stock")
    os.mkdir(folder)
    churn = story.start("churn", "--mib", 16)
    from stock_unmoor import CRIU
    if story.popen([CRIU, "dump", "-t", str(churn.pid), "-D", folder, "-o", "dump.log"]).wait() != 0:
        raise Skip("stock criu cannot dump here")
    churn.await_gone()
    for command in ("show", "verify", "flatten"):
        outcome = story.unmoor(command, *(["-D"] if command == "show" else []), folder, expect=USER_MISTAKE)
        one_line(outcome, folder, "unmoor import")
    os.truncate(os.path.join(folder, "pages-1.img"), 4096)
    refuse(story, folder, "pages-1.img")
    nothing_partial(story, "stock.unmoor-import")
    demand(not os.path.exists(folder + ".unmoor-import"), "nothing was imported")


def manifest_path(image):
    return os.path.join(image, "manifest.json")


def seal(text):
    """A manifest's text with the right checksum (docs/format.md)."""
    try:
        xxhash = ctypes.CDLL("libxxhash.so.0")
    except OSError:
        raise Skip("libxxhash.so.0 is not installed") from None

    class Hash128(ctypes.Structure):
        _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]
    xxhash.XXH3_128bits.restype = Hash128
    xxhash.XXH3_128bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    tail = 51
    body = text[:-tail]
    value = xxhash.XXH3_128bits(body, len(body))
    return body + b'  "checksum": "%016x%016x"\n}\n' % (value.high, value.low)


def edit_manifest(image, change):
    path = manifest_path(image)
    with open(path, "rb") as file:
        text = file.read()
    demand(seal(text) == text, "the checksum is what the document says")
    changed = change(text)
    demand(changed != text, "the manifest was changed")
    os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
    with open(path, "wb") as file:
        file.write(seal(changed))


def other_format_version(story):
    _, image = make_image(story)
    edit_manifest(image, lambda text: text.replace(b'"format_version": 1', b'"format_version": 9'))
    refuse(story, image, "version", "9")


def cpu_features_missing(story):
    _, image = make_image(story)
    # The features are in ascending order, so this one comes last.
    edit_manifest(image, lambda text: re.sub(rb'("cpu_features": \[[^]]*")(\s*\])',
                                             rb'\1,\n    "zzz_unheard_of"\2', text))
    refuse(story, image, "zzz_unheard_of")


def manifest_byte_changed(story):
    """Whichever byte it is."""
    _, image = make_image(story)
    path = manifest_path(image)
    with open(path, "rb") as file:
        text = file.read()
    os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
    for place in sorted({0, 1, len(text) // 4, len(text) // 2, len(text) - 60, len(text) - 30, len(text) - 1}):
        changed = bytearray(text)
        changed[place] ^= 1
        with open(path, "wb") as file:
            file.write(changed)
        outcome = story.unmoor("restore", "-D", image, "-d", expect=None)
        demand(outcome.code in (1, 2), f"byte {place} changed: {outcome}")
        one_line(outcome, "manifest.json")
    for text_of in (b"", text[:len(text) // 2], b"{}\n"):
        with open(path, "wb") as file:
            file.write(text_of)
        one_line(story.unmoor("restore", "-D", image, "-d", expect=None), "manifest.json")
    demand(not story.marked("churn"), "nothing was restored")


def layer_damaged(story):
    """Missing, shorter, or with an index that does not belong to it."""
    _, image = make_image(story)
    layers = os.path.join(image, "layers")
    pages = [n for n in os.listdir(layers) if n.endswith(".pages")]
    demand(len(pages) == 1, f"one layer: {os.listdir(layers)}")
    path = os.path.join(layers, pages[0])
    index = path.replace(".pages", ".index")
    whole = story.path("whole")

    for victim in (path, index):
        os.rename(victim, whole)
        refuse_damage(story, image, os.path.basename(victim))
        os.rename(whole, victim)

    shutil.copyfile(index, whole)
    for length in (0, 100, os.path.getsize(index) - 8):
        shutil.copyfile(whole, index)
        os.truncate(index, length)
        refuse_damage(story, image, os.path.basename(index))
    shutil.copyfile(whole, index)
    for place in (0, 9, 50, 130, os.path.getsize(index) // 2):
        with open(index, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))
        outcome = story.unmoor("restore", "-D", image, "-d", expect=None)
        if outcome.code == 0 and place > 130:
            # Hashes are looked at by whoever reads the pages, not by restore.
            story.say(f"byte {place} of the index: not looked at by restore")
            for pid in story.marked("churn"):
                os.kill(pid, signal.SIGKILL)
            poll(lambda: not story.marked("churn"), "churn ends")
        else:
            demand(outcome.code in (1, 2), f"byte {place} of the index changed: {outcome}")
            one_line(outcome, os.path.basename(index))
        shutil.copyfile(whole, index)

    size = os.path.getsize(path)
    for length in (size - (2 << 20), 4096, 0):
        os.truncate(path, length)
        refuse_damage(story, image, os.path.basename(path))


def refuse_damage(story, image, name):
    outcome = story.unmoor("restore", "-D", image, "-d", expect=None)
    demand(outcome.code in (1, 2), f"exit code 1 or 2 is wanted: {outcome}")
    one_line(outcome, name)
    demand(not story.marked("churn"), "a program runs although restore failed")


def links_are_not_followed(story):
    """An image is not to be trusted: no file of it leads elsewhere, none makes a command wait."""
    _, image = make_image(story)
    secret = story.path("secret")
    with open(secret, "w") as file:
        file.write("not of the image")
    layers = os.path.join(image, "layers")
    victims = [os.path.join(layers, name) for name in sorted(os.listdir(layers))]
    victims += [os.path.join(image, "manifest.json"), os.path.join(image, "criu", "fs-%d.img"), os.path.join(image, "criu", "files.img")]
    criu = os.listdir(os.path.join(image, "criu"))
    victims = [path for path in victims if os.path.exists(path)] + [os.path.join(image, "criu", name) for name in criu if name.startswith("mm-")]
    whole = story.path("whole")
    for victim in victims:
        os.rename(victim, whole)
        commands = [["export", "-D", image, story.path("plain")]]
        if "/criu/" not in victim:
            commands += [["restore", "-D", image, "-d"], ["verify", "-D", image]]
        for make, word in ((lambda at: os.symlink(secret, at), "symbolic link"), (os.mkfifo, "regular file")):
            make(victim)
            for command in commands:
                outcome = story.unmoor(*command, expect=None, timeout=20)
                demand(outcome.code != 0 and word in outcome.err + outcome.out and os.path.basename(victim) in outcome.err + outcome.out,
                       f"{victim} is a {word}: {outcome}")
                demand(not os.path.exists(story.path("plain")), f"exported all the same: {outcome}")
            os.remove(victim)
        os.rename(whole, victim)
    story.unmoor("verify", "-D", image)


def pid_taken(story):
    """The pid the program had is another's now."""
    with Churn(story) as churn:
        image = story.path("image")
        story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
        outcome = story.unmoor("restore", "-D", image, "-d", expect=None)
        demand(outcome.code != 0, f"must fail: {outcome}")
        one_line(outcome, str(churn.pid), ("in use", "taken", "exists"))
        demand(not story.agents(), "an agent runs although restore failed")


def show_tells_what_there_is(story):
    churn, image = make_image(story, "--mib", 64, "--regions", 2)
    shown = story.unmoor("show", "-D", image, "--json").json()
    text = json.dumps(shown)
    demand(str(churn.pid) in text or '"vpid"' in text, f"the task is shown: {text[:400]}")
    demand("layers" in text, f"the layers are shown: {text[:400]}")
    plain = story.unmoor("show", "-D", image)
    demand("churn" in plain.out, f"the program's name is shown: {plain}")


def usage(story):
    """Wrong options are the user's mistake and say how it is done."""
    for arguments in ((), ("fly",), ("dump",), ("dump", "-t", "1", "--frobnicate"), ("restore",),
                      ("restore", "-D", story.path("x"), "--mode", "sideways"),
                      ("remap",), ("show",)):
        outcome = story.unmoor(*arguments, expect=USER_MISTAKE)
        demand(outcome.err.strip(), f"something is said: {outcome}")
    for arguments in (("status",), ("wait", "-t", "x")):
        demand(story.unmoor(*arguments, expect=None).code in (2, 3), f"{arguments}")
    demand(story.unmoor("--help").out, "--help goes to stdout")
    demand("." in story.unmoor("version").out, "a version")
    story.unmoor("check", "--json").json()


# CRIU failing.

FAILING_CRIU = """#!/bin/bash
# criu, but `{stage}` fails {how}.
for word in "$@"; do [ "$word" != "{stage}" ] || hit=yes; done
if [ "$hit" = yes ] && [ "$1" = "{stage}" -o "$2" = "{stage}" ]; then
  log=; folder=.
  while [ $# -gt 0 ]; do
    case $1 in -o|--log-file) log=$2 ;; -D|--images-dir) folder=$2 ;; -W|--work-dir) work=$2 ;; esac
    shift
  done
  [ -z "$log" ] || case $log in /*) ;; *) log=${{work:-$folder}}/$log ;; esac
  [ -z "$log" ] || echo "(00.000001) Error (criu/made-up.c:42): the decisive made-up line" >>"$log"
  {action}
fi
exec "{criu}" "$@"
"""


def failing_criu(story, stage, action):
    from stock_unmoor import CRIU
    path = story.path("criu-that-fails")
    with open(path, "w") as file:
        file.write(FAILING_CRIU.format(stage=stage, how="on purpose", action=action, criu=CRIU))
    os.chmod(path, 0o755)
    return path


def criu_fails_at_dump(story):
    with Churn(story) as churn:
        for action in ("exit 1", "kill -9 $$", "exit 0"):
            criu = failing_criu(story, "dump", action)
            outcome = story.unmoor("dump", "-t", churn.pid, "-D", story.path("image"), "--criu", criu,
                                   expect=1)
            if action == "exit 1":
                demand("decisive made-up line" in outcome.err, f"criu's line is shown: {outcome}")
                log = [w.strip(" ,;:.()'\"") for w in outcome.err.split() if ".log" in w]
                demand(log and os.path.exists(log[0].removesuffix(".")),
                       f"the whole log is kept and its place told: {outcome}")
                os.remove(log[0].removesuffix("."))
            demand(not os.path.exists(story.path("image")), "no checkpoint is published")
            shutil.rmtree(story.path("image"), ignore_errors=True)


def criu_fails_at_restore(story):
    churn, image = make_image(story)
    for action in ("exit 1", "kill -9 $$"):
        criu = failing_criu(story, "restore", action)
        outcome = story.unmoor("restore", "-D", image, "-d", "--criu", criu, expect=1)
        if action == "exit 1":
            demand("decisive made-up line" in outcome.err, f"criu's line is shown: {outcome}")
        demand(not story.marked("churn") and not story.agents(), "nothing is left running")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.end()


def criu_refuses_the_program(story):
    """Stock CRIU's own refusal reaches the user: here a terminal-less program with a foreign session."""
    report = story.path("churn.json")
    from harness import PROGRAMS, Program
    popen = story.popen([os.path.join(PROGRAMS, "churn"), "--report", report, "--mib", "16"],
                        start_new_session=False)
    churn = Program(story, popen.pid, report, popen)
    poll(lambda: churn.report().get("ready"), "churn is ready")
    outcome = story.unmoor("dump", "-t", churn.pid, "-D", story.path("image"), expect=1)
    demand("session" in outcome.err or "shell-job" in outcome.err, f"CRIU's reason is shown: {outcome}")
    churn.await_sweep()
    churn.end()


def criu_too_old_or_absent(story):
    with Churn(story) as churn:
        old = story.path("old-criu")
        with open(old, "w") as file:
            file.write("#!/bin/sh\necho Version: 3.17.1\n")
        os.chmod(old, 0o755)
        one_line(story.unmoor("dump", "-t", churn.pid, "-D", story.path("image"), "--criu", old,
                              expect=None), "3.17.1", "4.2")
        one_line(story.unmoor("dump", "-t", churn.pid, "-D", story.path("image"), "--criu",
                              story.path("nowhere"), expect=None), story.path("nowhere"))
        demand(is_alive(churn.pid), "churn lives")


if __name__ == "__main__":
    main({f.__name__: f for f in (
        absent_process, no_number, kernel_thread, zombie, already_traced, ourselves, of_another_user,
        directory_missing, directory_empty_or_foreign, file_instead_of_directory, stock_criu_directory,
        other_format_version, cpu_features_missing, manifest_byte_changed, layer_damaged, links_are_not_followed, pid_taken,
        show_tells_what_there_is, usage, criu_fails_at_dump, criu_fails_at_restore,
        criu_refuses_the_program, criu_too_old_or_absent)})
