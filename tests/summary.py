#!/usr/bin/env python3
"""Sums up a CTest run from its JUnit file: summary.py RESULTS.xml LEFTOVERS_EXIT_CODE

Failures come with the end of their output, skipped tests with their reason. The last line is
"N passed, N failed, N skipped"; things left behind count as one more failure.
"""
import sys
import xml.etree.ElementTree as ElementTree

FAILURE_LINES = 30


def last_lines(case, count):
    text = (case.findtext("system-out") or "").rstrip()
    return text.splitlines()[-count:]


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
        for line in last_lines(case, FAILURE_LINES):
            print(f"    {line}")
    for case in skipped:
        reason = (last_lines(case, 1) or ["no reason given"])[0]
        print(f"skipped {case.get('name')}: {reason}")
    if left_behind:
        print("FAILED nothing is left behind (see above)")
    print(f"tests took {seconds:.0f} s")
    failures = len(failed) + left_behind
    print(f"{len(passed)} passed, {failures} failed, {len(skipped)} skipped")
    return 1 if failures or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
