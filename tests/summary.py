#!/usr/bin/env python3
"""Sums up a CTest run from its JUnit file: summary.py RESULTS.xml LEFTOVERS_EXIT_CODE

Failures come with their first complaint and the end of their output, skipped tests with their reason. The last line is
"N passed, N failed, N skipped"; things left behind count as one more failure.
"""
import sys
import xml.etree.ElementTree as ElementTree

FAILURE_LINES = 30
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


def main():
    results, left_behind = sys.argv[1], sys.argv[2] != "0"
    passed, failed, skipped, seconds = [], [], [], 0.0
    try:
        cases = ElementTree.parse(results).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError) as error:
        print(f"summary: no results: {error}")
        cases, left_behind = [], True
    for case in cases:
        seconds += float(case.get("time", 0))
        skip = case.find("skipped")
        if case.get("status") == "run":
            passed.append(case)
        elif skip is not None and skip.get("message", "").startswith("SKIP_"):
            skipped.append(case)
        else:
            failed.append(case)
    print()
    for case in failed:
        print(f"FAILED {case.get('name')}")
        for line in complaint(case):
            print(f"    {line}")
    for case in skipped:
        reason = why_skipped(output_lines(case))
        print(f"skipped {case.get('name')}: {reason}")
    if left_behind:
        print("FAILED nothing is left behind (see above)")
    print(f"tests took {seconds:.0f} s")
    failures = len(failed) + left_behind
    print(f"{len(passed)} passed, {failures} failed, {len(skipped)} skipped")
    return 1 if failures or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
