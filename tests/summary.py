#!/usr/bin/env python3
"""Sums up a CTest run from its JUnit files.

  summary.py late RESULTS.xml                            names of tests that only ran out of time
  summary.py LEFTOVERS_EXIT_CODE SECONDS RESULTS.xml [AGAIN.xml]

A test that ran out of time is run once more, alone, when the rest is done: AGAIN.xml. One that passes then is
counted as passed and named with its first complaint. A test that failed in any other way is never run again.

Failures come with their first complaint and the end of their output, skipped tests with their reason. The last line is
"N passed, N failed, N skipped"; things left behind count as one more failure.
"""
import sys
import xml.etree.ElementTree as ElementTree

FAILURE_LINES = 30
LATE = "ran out of patience"  # as tests/system/harness.py prints it
COMPLAINTS = ("Failure", "Traceback", "FAILED", "error:", "ERROR: ")


def output_lines(case):
    return (case.findtext("system-out") or "").rstrip().splitlines()


def complaint(case):
    """The lines from the first that complains, then the last lines; each line once."""
    lines = output_lines(case)
    first = next((i for i, line in enumerate(lines)
                  if any(word in line for word in COMPLAINTS)), len(lines))
    tail = max(len(lines) - FAILURE_LINES, 0)
    head = lines[first:min(first + FAILURE_LINES, tail)]
    return head + ["..."] * bool(head) + lines[tail:]


def why_skipped(lines):
    """GoogleTest says it on the line after "file:line: Skipped", our scripts on the last."""
    for at, line in enumerate(lines[:-1]):
        if line.endswith(": Skipped"):
            return lines[at + 1]
    return lines[-1] if lines else "no reason given"


def read(results):
    """The cases that passed, failed and were skipped."""
    passed, failed, skipped = [], [], []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.get("status") == "run":
            passed.append(case)
        elif skip is not None and skip.get("message", "").startswith("SKIP_"):
            skipped.append(case)
        else:
            failed.append(case)
    return passed, failed, skipped


def ran_out_of_time(case):
    return LATE in output_lines(case)


def late(results):
    try:
        failed = read(results)[1]
    except (OSError, ElementTree.ParseError):
        return 0  # the summary will say so
    for case in filter(ran_out_of_time, failed):
        print(case.get("name"))
    return 0


def main():
    if sys.argv[1] == "late":
        return late(sys.argv[2])
    left_behind, took, results = sys.argv[1] != "0", sys.argv[2], sys.argv[3:]
    passed, failed, skipped = [], [], []
    try:
        passed, failed, skipped = read(results[0])
    except (OSError, ElementTree.ParseError) as error:
        print(f"summary: no results: {error}")
        left_behind = True
    seconds = sum(float(case.get("time", 0)) for case in passed + failed + skipped)
    print()
    if len(results) > 1:
        again = {case.get("name"): case for case in read(results[1])[0]}
        for case in [case for case in failed if ran_out_of_time(case) and case.get("name") in again]:
            print(f"slow: {case.get('name')} ran out of time and passed when run again, alone. At first:")
            for line in complaint(case):
                print(f"    {line}")
            failed.remove(case)
            passed.append(again[case.get("name")])
    for case in failed:
        print(f"FAILED {case.get('name')}")
        for line in complaint(case):
            print(f"    {line}")
    for case in skipped:
        reason = why_skipped(output_lines(case))
        print(f"skipped {case.get('name')}: {reason}")
    if left_behind:
        print("FAILED nothing is left behind (see above)")
    print(f"tests took {took} s ({seconds:.0f} s one after the other)")
    failures = len(failed) + left_behind
    print(f"{len(passed)} passed, {failures} failed, {len(skipped)} skipped")
    return 1 if failures or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
