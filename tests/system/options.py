#!/usr/bin/env -S python3 -B
"""Options do what docs/cli.md says, end to end: they reach the agent, or criu, and bad values are refused."""
import json
import os
import shutil

from harness import (LATER, USER_MISTAKE, Skip, demand, exists, is_alive, main, poll,
                     smaps_total, thp_setting)
from redis import Redis

ERROR = 3  # of status and wait


def refused(story, *arguments, expect=USER_MISTAKE, word=""):
    outcome = story.unmoor(*arguments, expect=expect)
    lines = outcome.err.strip().splitlines()
    demand(lines and lines[0].startswith("unmoor: ") and word in lines[0], f"one clear line is wanted: {outcome}")
    return outcome


def max_pause(story):
    """The bound decides how much is swapped at once; what cannot be a bound is refused."""
    churn = story.start("churn", "--threads", 1, "--mib", 192, "--regions", 1)
    image = story.dump(churn, "image")
    windows = {}
    for bound in ("50us", "2s"):
        story.restore(churn, image, "--max-pause", bound)
        story.wait_ready(churn)
        report = story.unmoor("status", "-t", churn.pid, "--json").json()["progress"]
        windows[bound] = report["windows"]
        story.say(f"--max-pause {bound}: {report['windows']} windows, longest {report['longest_pause_ns'] / 1e6:.2f} ms")
        churn.await_sweep()
        churn.end()
        churn.await_gone()
    demand(windows["50us"] > 2 * windows["2s"], f"a short bound makes small windows: {windows}")
    for bad in ("0", "-1ms", "49us", "soon", "1h", "1e30s", "nan", ""):
        refused(story, "restore", "-D", image, "-d", "--max-pause", bad)
        refused(story, "remap", "-t", os.getpid(), "--max-pause", bad)
    demand(not exists(churn.pid), "a refused restore does nothing")


def huge_pages(story):
    """--thp never leaves small pages, auto makes huge ones of what is all in use; neither leaves a flag."""
    setting = thp_setting()
    if setting == "never":
        raise Skip("this machine has no huge pages (transparent_hugepage/enabled is never)")
    churn = story.start("churn", "--mib", 128)
    image = story.dump(churn, "image")
    for policy in ("never", "auto"):
        story.restore(churn, image, "--thp", policy)
        story.wait_ready(churn)
        huge = smaps_total(churn.pid, "AnonHugePages")
        story.say(f"--thp {policy}: {huge >> 20} MiB in huge pages")
        # Where the setting is always the kernel makes them by itself.
        demand(huge == 0 or setting == "always" if policy == "never" else huge >= 32 << 20,
               f"--thp {policy}: {huge >> 20} MiB in huge pages")
        churn.await_sweep()
        churn.end()
        churn.await_gone()
    refused(story, "restore", "-D", image, "-d", "--thp", "always", word="auto or never")
    refused(story, "restore", "-D", image, "-d", "--guard", "none", word="freeze or fault")


def agent_log_and_pidfile(story):
    """The agent logs where it is told to, what it was told to do; a pidfile that cannot be written costs a warning."""
    churn = story.start("churn", "--mib", 64)
    image = story.dump(churn, "image")
    log = story.path("agent.log")
    outcome = story.unmoor("restore", "-D", image, "-d", "--agent-log", log, "--max-pause", "300us", "--thp", "never",
                           "--guard", "fault", "--pidfile", story.path("nowhere/pidfile"))
    demand("nowhere/pidfile" in outcome.err, f"the pidfile is warned about: {outcome}")
    churn.popen = None
    churn.await_progress("works all the same")
    story.wait_ready(churn)
    story.demand_no_agent()
    with open(log) as file:
        text = file.read()
    demand(f"process {churn.pid} is watched; max pause 300.0 us, thp never, guard fault" in text, text)
    demand(f"process {churn.pid} is READY: " in text, text)
    churn.await_sweep()
    churn.end()


def timeouts(story):
    """dump and wait give up when they are told to, and change nothing by it."""
    churn = story.start("churn", "--threads", 2, "--mib", 384)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off")
    outcome = story.unmoor("wait", "-t", churn.pid, "--timeout", "300ms", expect=LATER)
    demand(outcome.seconds >= 0.3 and outcome.out.startswith("LATER"), f"it waits that long: {outcome}")
    second = story.path("second")
    outcome = refused(story, "dump", "-t", churn.pid, "-D", second, "--timeout", "1ms", expect=1)
    demand("--timeout" in outcome.err and f"unmoor wait -t {churn.pid}" in outcome.err, f"says what to do: {outcome}")
    demand(not [name for name in os.listdir(story.folder) if name.startswith("second")], "nothing is written")
    for bad in ("-1", "x", "1day"):
        refused(story, "dump", "-t", churn.pid, "-D", second, "--timeout", bad)
        refused(story, "wait", "-t", churn.pid, "--timeout", bad, expect=ERROR)
    churn.await_progress("works after a dump that gave up")
    story.unmoor("remap", "-t", churn.pid)
    shutil.rmtree(image)
    churn.await_sweep()
    story.demand_no_agent()
    churn.end()


def options_of_criu(story):
    """What comes after -- reaches criu: a redis with a client needs --tcp-established, and the client's
    connection lives through dump, restore and remap."""
    redis = Redis(story)
    client = redis.client()
    client("DEBUG", "POPULATE", 50_000, "key", 500)
    image = story.path("image")
    outcome = story.unmoor("dump", "-t", redis.program.pid, "-D", image, expect=1)
    demand("tcp-established" in outcome.err, f"criu's own words: {outcome}")
    demand(client("DBSIZE") == 50_000, "redis goes on and so does its client")
    outcome = story.unmoor("dump", "-t", redis.program.pid, "-D", image, "--", "--frobnicate", expect=1)
    demand("frobnicate" in outcome.err, f"criu's own words: {outcome}")
    # Nobody sends anything meanwhile, so nothing has to be locked out (which takes iptables or nft).
    options = ("--", "--tcp-established", "--network-lock", "skip")
    story.unmoor("dump", "-t", redis.program.pid, "-D", image, *options)
    redis.program.await_gone()
    story.restore(redis.program, image, *options)
    demand(client("DBSIZE") == 50_000, "the connection is there after the restore")
    demand(client("SET", "key:1", "new") == "OK", "and can write")
    story.wait_ready(redis.program)
    shutil.rmtree(image)
    demand(client("GET", "key:1") == b"new" and client("GET", "key:2")[:7] == b"value:2", "and read")
    client.send("SHUTDOWN", "NOSAVE")
    client.close()
    redis.program.await_gone()
    for command in ("status", "wait", "remap"):
        refused(story, command, "-t", os.getpid(), "--", "--shell-job", expect=ERROR if command != "remap" else USER_MISTAKE)


def own_bench(story):
    """bench runs nothing without --yes, leaves a program that runs alone, and nothing of its copies behind."""
    churn = story.start("churn", "--mib", 32)
    image = story.path("image")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    refused(story, "bench", "-D", image, word="--yes")
    outcome = refused(story, "bench", "-D", image, "--yes", expect=1)
    demand("in use" in outcome.err, f"it says why not: {outcome}")
    churn.await_progress("is not touched")
    churn.end()
    churn.await_gone()
    told = story.unmoor("bench", "-D", image, "--yes", "--rounds", 1, "--json").json()
    demand({mode["mode"] for mode in told["modes"]} == {"direct", "lazy", "eager"}, told)
    demand(all(0 < mode["runs_ns"][0] <= mode["ready_ns"][0] for mode in told["modes"]), told)
    story.restore(churn, image, "--record")
    churn.await_progress("is recorded")
    story.unmoor("record", "-t", churn.pid, "--stop")
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()
    beside = sorted(os.listdir(os.path.dirname(image)))
    told = story.unmoor("bench", "-D", image, "--yes", "--rounds", 1, "--cold", "--stock", "--json").json()
    found = sorted((mode["cache"], mode["mode"]) for mode in told["modes"])
    ways = ("direct", "direct+prefetch", "eager", "lazy", "stock")
    demand(found == [(cache, way) for cache in ("cold", "warm") for way in ways], found)
    demand(all(mode["ratio"] > 0 and 0 < mode["runs_ns"][0] <= mode["ready_ns"][0] for mode in told["modes"]), told)
    demand(all(mode["ratio"] == 1 for mode in told["modes"] if mode["mode"] == "stock"), told)
    demand(sorted(os.listdir(os.path.dirname(image))) == beside, "the exported copy is gone")
    demand(not exists(churn.pid), "the last copy is ended")
    story.demand_no_agent()


# What docs/cli.md promises a program that reads the output.
STATUS = {"pid": int, "status": str, "reason": str, "direct_mapped_bytes": int, "direct_mapped_data_bytes": int,
          "images": list}
PROGRESS = {"total_bytes": int, "done_bytes": int, "dropped_bytes": int, "windows": int, "guarded_windows": int,
            "aborted_windows": int, "longest_pause_ns": int, "elapsed_ns": int, "bytes_per_second": (int, float)}
DUMP = {"directory": str, "checkpoint_id": str, "tasks": int, "vmas": int, "mapped_bytes": int, "layer_bytes": int,
        "written_bytes": int, "criu_bytes": int, "allocated_bytes": int, "remapped_first": bool, "frozen_ns": int,
        "elapsed_ns": int}
RESTORE = {"pid": int, "tasks": list, "agent": int, "mapped_bytes": int, "layer_bytes": int, "loaded_bytes": int,
           "mappings": int, "criu_ns": int, "elapsed_ns": int}
REMAP = PROGRESS | {"ready": bool}


def has(object, members, what):
    for name, kind in members.items():
        demand(isinstance(object.get(name), kind), f"{what} has no {name} of {kind}: {object}")
    return object


def json_for_programs(story):
    """Every command with --json: one object on stdout with the members that are documented, nothing on stderr,
    also when it fails."""
    def run(*arguments, expect=0):
        outcome = story.unmoor(*arguments, "--json", expect=expect)
        demand(not outcome.err, f"nothing on stderr: {outcome}")
        object = outcome.json()
        if "error" in object:
            demand(object["exit_code"] == expect and object["error"], f"an error tells its exit code: {outcome}")
        return object

    churn = story.start("churn", "--mib", 64)
    image = story.path("image")
    demand(has(run("status", "-t", churn.pid), STATUS, "status")["status"] == "READY", "READY")
    dumped = has(run("dump", "-t", churn.pid, "-D", image), DUMP, "dump")
    demand(dumped["parent"] is None and dumped["layer_bytes"] >= 64 << 20, f"{dumped}")
    churn.await_gone()
    shown = run("show", "-D", image)
    demand(shown["checkpoint_id"] == dumped["checkpoint_id"], f"the same checkpoint: {shown}")
    task, = shown["tasks"]
    demand(task["vpid"] == churn.pid and len(task["vmas"]) == dumped["vmas"], f"its one task: {task}")
    mapped = [vma for vma in task["vmas"] if vma["kind"] == "mapped"]
    demand(sum(int(v["end"], 16) - int(v["begin"], 16) for v in mapped) == dumped["mapped_bytes"], f"{mapped}")

    restored = has(run("restore", "-D", image, "-d", "--remap", "off"), RESTORE, "restore")
    demand(restored["pid"] == churn.pid and restored["tasks"] == [churn.pid], f"{restored}")
    churn.popen = None
    status = has(run("status", "-t", churn.pid, expect=LATER), STATUS, "status")
    demand(status["status"] == "LATER" and status["reason"] and len(status["images"]) == 1 and
           status["images"][0].startswith(image) and status["direct_mapped_bytes"] == dumped["mapped_bytes"], f"{status}")
    has(status["progress"], PROGRESS, "status' progress")
    demand(is_alive(status["agent"]), "its agent is a process")
    waited = run("wait", "-t", churn.pid, "--timeout", "1ms", expect=LATER)
    demand(has(waited, STATUS, "wait")["status"] == "LATER", f"{waited}")
    remapped = has(run("remap", "-t", churn.pid), REMAP, "remap")
    demand(remapped["ready"] and remapped["done_bytes"] + remapped["dropped_bytes"] >= remapped["total_bytes"],
           f"{remapped}")
    demand(run("wait", "-t", churn.pid)["status"] == "READY", "READY")
    status = run("status", "-t", churn.pid)
    demand(status["direct_mapped_bytes"] == 0 and status["images"] == [] and "agent" not in status, f"{status}")
    items = run("check")
    demand(json.dumps(items).count("criu") > 0, f"check tells of criu: {items}")

    absent = story.path("absent")
    for arguments, code in ((("dump", "-t", "0", "-D", absent), 2), (("dump", "-t", churn.pid), 2),
                            (("restore", "-D", absent), 2), (("show", "-D", absent), 2), (("verify", absent), 2),
                            (("remap", "-t", "x"), 2), (("status", "-t", "x"), 3), (("wait", "-t", "-1"), 3),
                            (("status",), 3), (("dump", "--frobnicate"), 2), (("restore", "-D", image, "-d"), 2)):
        demand("error" in run(*arguments, expect=code), f"{arguments}")
    zombie = story.popen(["true"])
    poll(lambda: os.path.exists(f"/proc/{zombie.pid}") and " Z " in open(f"/proc/{zombie.pid}/stat").read(), "a zombie")
    never = run("status", "-t", zombie.pid, expect=2)
    demand(never["status"] == "NEVER" and "ended" in never["reason"], f"NEVER has a reason: {never}")
    demand(run("wait", "-t", zombie.pid, expect=2)["status"] == "NEVER", "waiting for it is in vain")
    churn.await_sweep()
    churn.end()


if __name__ == "__main__":
    main({f.__name__: f for f in (max_pause, huge_pages, agent_log_and_pidfile, timeouts, options_of_criu, own_bench,
                                  json_for_programs)})
