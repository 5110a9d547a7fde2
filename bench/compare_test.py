#!/usr/bin/env -S python3 -B
"""bench/compare on figures whose truth is known."""
import importlib.machinery
import importlib.util
import os
import random
import unittest

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compare")
loader = importlib.machinery.SourceFileLoader("compare", PATH)
compare = importlib.util.module_from_spec(importlib.util.spec_from_loader("compare", loader))
loader.exec_module(compare)


def lines(values, case="restore", key="wall_ms", **members):
    return [{"case": case, "way": "direct", **members, key: value} for value in values]


def sample(source, middle, count=20, noise=0.03):
    return [middle * source.lognormvariate(0, noise) for _ in range(count)]


class Compare(unittest.TestCase):
    def verdicts(self, before, after, threshold=0.05):
        return [result["verdict"] for result in compare.compare(before, after, threshold, 300)]

    def test_exact_p_values_are_those_of_the_tables(self):
        # Three and three, wholly apart: 2 of the 20 ways to deal six ranks.
        self.assertAlmostEqual(compare.mann_whitney([1, 2, 3], [4, 5, 6]), 0.1)
        self.assertAlmostEqual(compare.mann_whitney([1, 2, 3, 4], [5, 6, 7, 8]), 2 / 70)
        self.assertEqual(compare.mann_whitney([1, 1, 1, 1], [1, 1, 1, 1]), 1.0)

    def test_the_approximation_agrees_with_the_exact_one(self):
        source = random.Random(3)
        for _ in range(3):
            a, b = sample(source, 10, 10), sample(source, 10.3, 10)
            exact = compare.mann_whitney(a, b)
            # As 2 × 10 is the largest exact one, one value more on each side is approximated.
            near = compare.mann_whitney(a + [sorted(a)[5]], b + [sorted(b)[5]])
            self.assertLess(abs(exact - near), 0.12)

    def test_noise_alone_is_the_same(self):
        source = random.Random(1)
        before = sum((lines(sample(source, 10 + i), mib=i) for i in range(60)), [])
        after = sum((lines(sample(source, 10 + i), mib=i) for i in range(60)), [])
        self.assertEqual(set(self.verdicts(before, after, threshold=0)), {"same"})

    def test_a_tenth_more_is_found_among_many(self):
        source = random.Random(2)
        before = sum((lines(sample(source, 10), mib=i) for i in range(60)), [])
        after = sum((lines(sample(source, 11 if i == 7 else 10), mib=i) for i in range(60)), [])
        found = self.verdicts(before, after)
        self.assertEqual([i for i, v in enumerate(found) if v == "worse"], [7])

    def test_more_is_better_where_rates_are_compared(self):
        source = random.Random(4)
        slow, fast = sample(source, 100), sample(source, 130)
        make = lambda values: lines(values, case="after", key="per_second")
        self.assertEqual(self.verdicts(make(slow), make(fast)), ["better"])
        self.assertEqual(self.verdicts(make(fast), make(slow)), ["worse"])

    def test_one_outlier_is_no_regression(self):
        source = random.Random(5)
        before, after = sample(source, 10), sample(source, 10)
        after[3] *= 40
        self.assertEqual(self.verdicts(lines(before), lines(after)), ["same"])

    def test_what_is_significant_but_small_is_the_same(self):
        before, after = [100 + i / 100 for i in range(20)], [102 + i / 100 for i in range(20)]
        self.assertEqual(self.verdicts(lines(before), lines(after)), ["same"])
        self.assertEqual(self.verdicts(lines(before), lines(after), threshold=0.01), ["worse"])

    def test_three_runs_tell_nothing(self):
        self.assertEqual(self.verdicts(lines([1, 1, 1]), lines([9, 9, 9])), ["too few runs"])

    def test_the_interval_holds_the_true_ratio(self):
        source = random.Random(6)
        held = 0
        for seed in range(100):
            _, low, high = compare.ratio_interval(sample(source, 10, 30), sample(source, 12, 30), 400, seed)
            held += low <= 1.2 <= high
        self.assertGreaterEqual(held, 88)

    def test_only_what_both_have_is_compared(self):
        self.assertEqual(self.verdicts(lines([1] * 5, mib=1), lines([1] * 5, mib=2)), [])


if __name__ == "__main__":
    unittest.main()
